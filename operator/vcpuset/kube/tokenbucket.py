"""A token bucket for each object, so that one object that is never quiet does not speak for all.

The rule is client-go's (`EventSourceObjectSpamFilter`): so many at once, and then one in a while.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["TokenBuckets"]

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Bucket:
    """`tokens` there were at time `at`; `refused` counts who went away empty-handed since it was last full."""

    tokens: float
    at: float
    refused: int = 0


class TokenBuckets(Generic[K]):
    """Buckets that begin full. Times are the caller's, in seconds; they must not go backwards."""

    def __init__(self, *, burst: int, refill_seconds: float, limit: int) -> None:
        """A bucket for each key.

        Args:
            burst: how many tokens a bucket holds.
            refill_seconds: after so long there is one token more.
            limit: buckets that are remembered; the one that was not used for the longest time is forgotten, which
                fills it.
        """
        self._burst = burst
        self._refill_seconds = refill_seconds
        self._limit = limit
        self._buckets: OrderedDict[K, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        """How many buckets are remembered."""
        return len(self._buckets)

    def take(self, key: K, now: float) -> bool:
        """Take a token out of the key's bucket; False: it is empty."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(self._burst, now)
            if len(self._buckets) > self._limit:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        bucket.tokens += (now - bucket.at) / self._refill_seconds
        bucket.at = now
        if bucket.tokens >= self._burst:
            bucket.tokens = self._burst
            bucket.refused = 0
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def refuse(self, key: K) -> int:
        """Count one that `take` had no token for; returns how many these are since the bucket was last full."""
        bucket = self._buckets[key]
        bucket.refused += 1
        return bucket.refused
