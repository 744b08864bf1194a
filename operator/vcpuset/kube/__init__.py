"""The API server: everything that connects to it, and the only package that imports kopf and kubernetes.

codec        objects as values, status as a merge patch
cache        the sets that this operator manages
login        the address and credentials of the API server, for kopf and for our own requests
cluster      our own requests: list, write a status, post Events
source       the watch, by kopf
sweep        the list that finds what the watch missed
lease        leader election
recorder     Kubernetes Events
aggregation  the requests of the metrics API
user         the requests of kubectl vcpuset
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

__all__: list[str] = []


def _import_nothing_by_itself(package: str, parent: str | None = None) -> None:
    """Have the modules of a package imported without what the package itself imports."""
    if package not in sys.modules and (spec := find_spec(package)) is not None:
        sys.modules[package] = module_from_spec(spec)
        if parent is not None:
            setattr(sys.modules[parent], package.rpartition(".")[2], sys.modules[package])


# These import the synchronous client, with requests, oauthlib and websocket: 10 MB in each process.
_import_nothing_by_itself("kubernetes")
_import_nothing_by_itself("kubernetes.aio", "kubernetes")
