"""Whether the watch still delivers all changes.

A watch can fail silently: a reader hangs, a server's own cache has stopped, a proxy holds streams back. Silence alone
proves nothing, because sets need not change. But the periodic lists show what the watch should have delivered, and what
it has not delivered for long although the API server responds, it will not deliver.

An API server that is away proves nothing about the watch either, which then waits in its own back-off. So only the time
between two consecutive successful lists counts, and a list that fails resets it. While changes are missing, there is a
list every `CHECK_SECONDS`.

A watch that fails with an error, because a permission is missing or the server refuses it, is behind as well; but it is
retried anyway, and a restart would not help. So the time in which the watch did not fail is counted separately: it
seemed to be open and was silent, or was no longer retried.

A watch that has been silent for 70 s is closed, because the API server sends a bookmark each minute. So a half-open
connection, the pause before the next attempt (30 s at most) and another list take less than `BEHIND_SECONDS` together.
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
"""The time between two lists while changes are missing."""

BEHIND_SECONDS: Final = 240.0
"""Changes that a watch has not delivered for so long, although it did not fail, it will not deliver."""


@dataclass(slots=True)
class Missing:
    """A set's change that a list had and the watch has not delivered.

    version  the resourceVersion in the list
    seconds  for how long lists have had it
    silent   for how many of them the watch did not fail
    """

    version: str
    seconds: float = 0.0
    silent: float = 0.0


class Freshness:
    """Compares what the watch delivers with the lists.

    failing    whether the watch on a namespace fails at present, and is retried
    monotonic  a monotonic clock, in seconds

    missing    the sets whose changes the watch has not delivered
    events     how many objects the watch has delivered
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
        """When the last list succeeded, by `monotonic`; None: it failed."""
        self._brought: dict[UID, str] = {}
        """The last version of each set that the watch has delivered, of those in the last list."""
        self.missing: dict[UID, Missing] = {}
        self.events = self.lists = self.failures = 0
        self.listed_at = 0.0

    def brought(self, uid: UID, version: str | None) -> None:
        """The watch has delivered a set in this version; None: it is gone."""
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
        # A process that was stopped, or a suspended host, has not checked for longer than that.
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
                del self.missing[uid]  # gone meanwhile: a watch that restarted since then never reports that
        self._brought = {uid: version for uid, version in self._brought.items() if uid in present}
        for uid, version in news.items():
            # A version that the watch has delivered can be news all the same: while the definition is being upgraded,
            # the watch delivers it without the new fields, and not again.
            if (brought := self._brought.get(uid)) is not None and not is_newer(version, brought):
                continue
            # A newer version does not reset the time.
            owed = self.missing.setdefault(uid, Missing(version))
            owed.version = version

    def failed(self) -> None:
        """A list has failed, so the time until now does not count."""
        self.failures += 1
        self._last = None
        for owed in self.missing.values():
            owed.seconds = owed.silent = 0.0

    @property
    def behind_seconds(self) -> float:
        """How long lists have had something that the watch did not deliver; 0: nothing, or not known."""
        return max((owed.seconds for owed in self.missing.values()), default=0.0)

    @property
    def silent_seconds(self) -> float:
        """The part of that in which the watch did not fail."""
        return max((owed.silent for owed in self.missing.values()), default=0.0)
