"""How often events of a guest and answers of an agent may trigger a pass: at once for a while, then at a limited rate.

Both can come endlessly, and each triggers a pass, which takes the operator's time from other machines.
"""

from __future__ import annotations

import asyncio
import math

__all__ = ["WAKES_AT_ONCE", "WAKES_PER_SECOND", "RateLimiter"]

WAKES_AT_ONCE = 100
"""More than any change of CPUs needs."""

WAKES_PER_SECOND = 5.0
"""How fast the tokens are refilled."""


class RateLimiter:
    """A token bucket on the event loop's clock."""

    def __init__(self) -> None:
        self._left = float(WAKES_AT_ONCE)
        self._at = -math.inf

    def delay(self) -> float:
        """Take a token; returns how many seconds to wait first: none, or once all are used, until this one is
        refilled."""
        now = asyncio.get_running_loop().time()
        self._left = min(self._left + (now - self._at) * WAKES_PER_SECOND, WAKES_AT_ONCE)
        self._at = now
        self._left -= 1
        return max(0.0, -self._left / WAKES_PER_SECOND)
