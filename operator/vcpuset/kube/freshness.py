"""Whether the watch still brings what there is.

A watch can fail without a word: a reader that hangs, a server whose own cache has stopped, a proxy that holds streams
back. Silence alone proves nothing, since sets need not change. But the lists that are made from time to time show what
the watch should have brought, and what it does not bring for long although the API server answers, it will not bring.

That the API server is away proves nothing about the watch either, which then waits in its own back-off. So only the
time between two lists counts that succeeded one soon after the other, and a list that fails starts the count anew.
While news is missing, lists are to be made every `CHECK_SECONDS`.

A watch that fails aloud, since the right to it is missing or the server refuses it, is behind as well; but it is tried
again by itself, and a new process could do no more. So the time is counted apart in which the watch did not fail: in
which it seemed to stand and was silent, or nobody tried it any more.

A watch that has been silent for 70 s is given up, as the API server sends a bookmark each minute. So a half-open
connection, the pause before the next try (30 s at most) and another list take less than `BEHIND_SECONDS` together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from vcpuset.domain.resource import UID
from vcpuset.kube.cache import is_newer

__all__ = ["BEHIND_SECONDS", "CHECK_SECONDS", "Freshness", "Missing"]

CHECK_SECONDS: Final = 30.0
"""The time between two lists while news is missing."""

BEHIND_SECONDS: Final = 240.0
"""News that a watch has not brought for so long, although it did not fail, it is not going to bring."""


@dataclass(slots=True)
class Missing:
    """A set's news that a list had and the watch has not brought.

    version  the resourceVersion that the list showed
    seconds  for how long lists have shown it
    silent   for how many of them the watch did not fail
    """

    version: str
    seconds: float = 0.0
    silent: float = 0.0


class Freshness:
    """Compares what the watch brings with what the lists show.

    failing    whether the watch on a namespace fails at present, and is tried again
    monotonic  a clock that is never set, in seconds

    missing    the sets whose news the watch owes
    events     how many objects the watch has brought
    lists      how many lists succeeded
    failures   how many did not
    listed_at  when the last one succeeded, in seconds since 1970; 0: none has
    """

    def __init__(
        self, failing: Callable[[str], bool] = lambda _: False, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._failing = failing
        self._monotonic = monotonic
        self._last: float | None = None
        """When the last list succeeded, by `monotonic`; None: it did not."""
        self._brought: dict[UID, str] = {}
        """The last version of each set that the watch has brought, of those in the last list."""
        self.missing: dict[UID, Missing] = {}
        self.events = self.lists = self.failures = 0
        self.listed_at = 0.0

    def brought(self, uid: UID, version: str | None) -> None:
        """The watch has brought a set in this version; None: it is gone."""
        self.events += 1
        if version is None:
            self._brought.pop(uid, None)
        else:
            self._brought[uid] = version
        owed = self.missing.get(uid)
        if owed is not None and (version is None or not is_newer(owed.version, version)):
            del self.missing[uid]

    def listed(self, present: Mapping[UID, str], news: Mapping[UID, str]) -> None:
        """A list has succeeded. `present`: the sets in it and their namespaces; `news`: the versions not known yet."""
        now = self._monotonic()
        # A process that was stopped, or a host that slept, has not looked for longer than that.
        elapsed = 0.0 if self._last is None else min(now - self._last, 2 * CHECK_SECONDS)
        self._last = now
        self.lists += 1
        self.listed_at = time.time()
        for uid, owed in list(self.missing.items()):
            if uid in present:
                owed.seconds += elapsed
                if not self._failing(present[uid]):
                    owed.silent += elapsed
            else:
                del self.missing[uid]  # gone meanwhile: a watch that began anew since then never says so
        self._brought = {uid: version for uid, version in self._brought.items() if uid in present}
        for uid, version in news.items():
            # A version that the watch has brought can be news all the same: while the definition is being upgraded, the
            # watch tells it without the fields that are new. It is not going to tell it again.
            if (brought := self._brought.get(uid)) is not None and not is_newer(version, brought):
                continue
            # What it owed before, it owes for as long.
            owed = self.missing.setdefault(uid, Missing(version))
            owed.version = version

    def failed(self) -> None:
        """A list has failed, so what the watch did not bring meanwhile does not count."""
        self.failures += 1
        self._last = None
        for owed in self.missing.values():
            owed.seconds = owed.silent = 0.0

    @property
    def behind_seconds(self) -> float:
        """For how long lists have shown something that the watch did not bring; 0: nothing, or it is not known."""
        return max((owed.seconds for owed in self.missing.values()), default=0.0)

    @property
    def silent_seconds(self) -> float:
        """For how much of that the watch did not fail, and brought nothing all the same."""
        return max((owed.silent for owed in self.missing.values()), default=0.0)
