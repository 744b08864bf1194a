"""What has happened to each set in the last hour, from the changes of the cache: so passes need not report anything.

A new process begins with none. Changes are kept and not samples, so a set at rest costs one entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from sys import intern
from typing import Final, NamedTuple

from vcpuset.domain.reasons import State
from vcpuset.domain.report import state_of
from vcpuset.domain.resource import UID, VCPUSet

__all__ = ["ENTRIES", "KEPT_SECONDS", "MESSAGE_LIMIT", "Entry", "Journal"]

KEPT_SECONDS: Final = 3600.0
"""Entries are kept for so long, and the one before them, which was in force at their beginning."""

ENTRIES: Final = 64
"""At most so many entries are kept of one set; the oldest are dropped first. One takes 0.2 to 1 kB, by its message."""

MESSAGE_LIMIT: Final = 200
"""Characters of a message that an entry keeps."""


class Entry(NamedTuple):
    """How a set has been since a moment, `at` (Unix time)."""

    at: float
    desired: int | None
    current: int | None
    state: State
    reason: str
    message: str


class Journal:
    """The entries of all sets.

    changed  called with a set when what the page shows of it has changed; it must not raise
    clock    Unix time
    """

    def __init__(self, changed: Callable[[UID], None], clock: Callable[[], float] = time.time) -> None:
        self._changed = changed
        self._clock = clock
        self._entries: dict[UID, list[Entry]] = {}

    def moved(self, before: VCPUSet | None, after: VCPUSet | None) -> None:
        """The cache has a change of a set. None: it was not there before, or is no longer there."""
        if after is None:
            if before is not None:
                self._entries.pop(before.uid, None)
                self._changed(before.uid)
            return
        if before is not None and before.generation == after.generation and before.status == after.status:
            return
        state, reason = state_of(after)
        shown = (after.spec.vcpus, after.status.vcpus, state, intern(reason))
        entries = self._entries.setdefault(after.uid, [])
        if not entries or entries[-1][1:5] != shown:
            # The clock may have been set back.
            now = max(self._clock(), entries[-1].at if entries else 0.0)
            ready = after.status.ready
            message = ready.message if ready is not None and ready.observed_generation == after.generation else ""
            if len(message) > MESSAGE_LIMIT:
                message = f"{message[: MESSAGE_LIMIT - 1]}\N{HORIZONTAL ELLIPSIS}"
            entries.append(Entry(now, *shown, message))
            while len(entries) > ENTRIES or (len(entries) > 1 and entries[1].at <= now - KEPT_SECONDS):
                del entries[0]
        self._changed(after.uid)

    def of(self, uid: UID) -> Sequence[Entry]:
        """The entries of a set, oldest first; the first may be older than an hour."""
        return tuple(self._entries.get(uid, ()))
