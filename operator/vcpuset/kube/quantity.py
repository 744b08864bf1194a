"""CPU quantities of Kubernetes: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from typing import Final

__all__ = ["millicores"]

_QUANTITY: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})([numkM]?|[eE][+-]?[0-9])")
_SUFFIXES: Final = {"n": "e-9", "u": "e-6", "m": "e-3", "": "", "k": "e3", "M": "e6"}


def millicores(raw: object) -> int | None:
    """In thousandths of a CPU, rounded up, as the API server does; None: it is no CPU quantity.

    Binary suffixes (Ki) are for memory; nothing writes them for CPU.
    """
    found = _QUANTITY.fullmatch(str(raw)) if isinstance(raw, str | int) else None
    if found is None:
        return None
    value = Decimal(found[1] + _SUFFIXES.get(found[2], found[2]))
    return int((value * 1000).to_integral_value(ROUND_CEILING))
