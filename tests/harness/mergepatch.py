"""What a JSON merge patch makes of an object, as the API server applies it (RFC 7386)."""

from collections.abc import Mapping
from typing import Any

__all__ = ["merged"]


def merged(stored: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`stored` with the patch applied: null removes, objects are merged, everything else is replaced."""
    result = dict(stored)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, Mapping) else {}, value)
        else:
            result[key] = value
    return result
