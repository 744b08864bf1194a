"""Whether the watch still brings what there is.

A watch can fail without a word: a reader that hangs, a server whose own cache has stopped, a right that was taken away.
Silence alone proves nothing, since sets need not change. But the lists that are made from time to time show what the
watch should have brought, and what it does not bring for long although the API server answers, it will not bring.

That the API server is away proves nothing about the watch either, which then waits in its own back-off. So only the
time between two lists counts that succeeded one soon after the other, and a list that fails starts the count anew.
While news is missing, lists are to be made every `CHECK_SECONDS`.

kopf (1.45.2) itself gives up a connection that has been silent for 70 s, and the API server sends a bookmark each
minute. So a half-open connection, the pause before the next try (30 s at most) and another list take less than
`BEHIND_SECONDS` together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from vcpuset.domain.resource import UID
from vcpuset.kube.cache import is_newer

__all__ = ["BEHIND_SECONDS", "CHECK_SECONDS", "Freshness", "Missing"]

CHECK_SECONDS: Final = 30.0
"""The time between two lists while news is missing."""

BEHIND_SECONDS: Final = 240.0
"""News that the watch has not brought for so long, it is not going to bring."""


@dataclass(slots=True)
class Missing:
    """A set's news that a list had and the watch has not brought.

    version  the resourceVersion that the list showed
    seconds  for how long lists have shown it
    """

    version: str
    seconds: float = 0.0


class Freshness:
    """Compares what the watch brings with what the lists show.

    monotonic  a clock that is never set, in seconds

    missing    the sets whose news the watch owes
    events     how many objects the watch has brought
    lists      how many lists succeeded
    failures   how many did not
    listed_at  when the last one succeeded, in seconds since 1970; 0: none has
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last: float | None = None
        """When the last list succeeded, by `monotonic`; None: it did not."""
        self.missing: dict[UID, Missing] = {}
        self.events = self.lists = self.failures = 0
        self.listed_at = 0.0

    def brought(self, uid: UID, version: str | None) -> None:
        """The watch has brought a set in this version; None: it is gone."""
        self.events += 1
        owed = self.missing.get(uid)
        if owed is not None and (version is None or not is_newer(owed.version, version)):
            del self.missing[uid]

    def listed(self, present: Collection[UID], news: Mapping[UID, str]) -> None:
        """A list has succeeded. `present`: the sets in it; `news`: the versions of those that were not known."""
        now = self._monotonic()
        # A process that was stopped, or a host that slept, has not looked for longer than that.
        elapsed = 0.0 if self._last is None else min(now - self._last, 2 * CHECK_SECONDS)
        self._last = now
        self.lists += 1
        self.listed_at = time.time()
        for uid, owed in list(self.missing.items()):
            if uid in present:
                owed.seconds += elapsed
            else:
                del self.missing[uid]  # gone meanwhile: a watch that began anew since then never says so
        for uid, version in news.items():
            # What it owed before, it owes for as long.
            self.missing[uid] = Missing(version, self.missing[uid].seconds if uid in self.missing else 0.0)

    def failed(self) -> None:
        """A list has failed, so what the watch did not bring meanwhile does not count."""
        self.failures += 1
        self._last = None
        for owed in self.missing.values():
            owed.seconds = 0.0

    @property
    def behind_seconds(self) -> float:
        """For how long lists have shown something that the watch did not bring; 0: nothing, or it is not known."""
        return max((owed.seconds for owed in self.missing.values()), default=0.0)
