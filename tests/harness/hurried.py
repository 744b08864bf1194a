"""`vcpuset` with some of its times set otherwise: what takes minutes in a cluster need not do so in a test.

    python -m harness.hurried vcpuset.kube.transport.ANSWER_SECONDS=3 vcpuset.qmp.client.READ_LIMIT=9 -- run …

The names are those of constants in modules, or of their fields. One that there is not is an error, so that no test goes
on waiting for a constant that was renamed.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Set the constants before `--`, and run the program with what follows."""
    end = arguments.index("--")
    for each in arguments[:end]:
        place, _, value = each.partition("=")
        name, _, constant = place.rpartition(".")
        owner = pkgutil.resolve_name(name)
        set_attribute = setattr if isinstance(owner, ModuleType) else object.__setattr__  # a frozen dataclass
        getattr(owner, constant)  # there is such a one
        set_attribute(owner, constant, float(value))
    # Imported when all is set, since modules take over constants of each other.
    from vcpuset.cli import main as cli

    cli.main(args=list(arguments[end + 1 :]), prog_name="vcpuset")


if __name__ == "__main__":
    main(sys.argv[1:])
