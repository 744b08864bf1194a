"""Delays after failures, and between regular observations.

Pure arithmetic: nothing waits here, and the source of randomness is a parameter.
"""

from __future__ import annotations

import math
import random as random_module
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ExponentialBackoff", "Random", "jittered"]

Random = Callable[[], float]
"""Returns a number in [0, 1), as `random.random` does."""


@dataclass(frozen=True, slots=True)
class ExponentialBackoff:
    """Delays that double with each failure in a row, from the base up to the cap.

    Jitter only shortens a delay. So the cap is guaranteed ("tried at least every 30 s"), and many keys that have failed
    together and reached the cap still spread out.
    """

    base_seconds: float
    """The delay after the first failure."""
    cap_seconds: float
    """No delay is longer."""
    jitter: float = 0.5
    """The largest fraction of a delay that may be taken off: 0 for none, 1 for the whole delay."""
    random: Random = random_module.random

    def __post_init__(self) -> None:
        if not 0 < self.base_seconds <= self.cap_seconds:
            raise ValueError(
                f"back-off from {self.base_seconds} s to {self.cap_seconds} s: "
                "the base must be above 0 and not above the cap"
            )
        _check_fraction(self.jitter)

    def delay(self, failures: int, at_most: float = math.inf) -> float:
        """Seconds to wait after this many failures in a row (at least 1); `at_most` is another cap."""
        if failures < 1:
            raise ValueError(f"delay after {failures} failures: there is none before the first")
        try:
            seconds = min(self.base_seconds * 2.0 ** (failures - 1), self.cap_seconds)
        except OverflowError:  # a float ends at 2**1024; a key can fail more often than that
            seconds = self.cap_seconds
        return min(seconds, at_most) * (1 - self.jitter * self.random())


def jittered(seconds: float, fraction: float, random: Random = random_module.random) -> float:
    """`seconds`, up to `fraction` (0 to 1) shorter or longer, so that regular work spreads out.

    For regular observations: their mean interval stays the configured one. A delay after a failure has its own jitter
    in `ExponentialBackoff`.
    """
    _check_fraction(fraction)
    return seconds * (1 + fraction * (2 * random() - 1))


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"jitter {fraction}: must be a fraction from 0 to 1")
