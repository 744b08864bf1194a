"""Whether another client changes a machine repeatedly: an operator, a tool, a VCPUSet with another monitor of it.

What counts is a CPU that came, or left without an unplug request, between two passes, and that has to be corrected.
After `CHANGES` of these within a window, correcting each at once would only continue the fight: the set is contested,
the count is corrected at a slow pace, and the status says so until no other client has changed it for one window.
Another QEMU or another spec resets this.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final

from vcpuset.domain.machine import Machine

__all__ = ["CHANGES", "PAUSE_RESYNCS", "WINDOW_RESYNCS", "Contest"]

CHANGES: Final = 5
"""So many changes by other clients within one window are no coincidence."""

WINDOW_RESYNCS: Final = 10
"""The window, in resyncs. With one observation per resync a fight is found after half a window."""

PAUSE_RESYNCS: Final = 5
"""The pause between two corrections of a contested machine, in resyncs: less than the window, because otherwise a
continuing fight would seem to have ended."""


@dataclass(slots=True)
class Contest:
    """The history of one set's machine. All times are in seconds of a monotonic clock.

    resync  the interval at which an idle machine is observed
    """

    resync: float
    _subject: Hashable = None
    _left: tuple[int | None, ...] | None = None
    """The host thread of each slot's CPU when the last pass ended; None: not known."""
    _leaving: frozenset[int] = frozenset()
    """The slots that the guest may still free because of unplug requests."""
    _changes: list[float] = field(default_factory=list)
    """When other clients last changed the machine, at most `CHANGES` times."""
    _last: float | None = None
    """When the contested machine was last changed, by another client or by a correction; None: it is not contested."""
    _corrected: float = 0.0
    _unfinished: bool = False
    """Whether the correction in progress continues in the next pass."""

    @property
    def window(self) -> float:
        """How long no other client must have changed the machine."""
        return WINDOW_RESYNCS * self.resync

    @property
    def pause(self) -> float:
        """The time between two corrections of a contested machine."""
        return PAUSE_RESYNCS * self.resync

    def observed(self, subject: Hashable, machine: Machine, now: float, *, wrong: bool, reported: bool) -> bool:
        """Evaluate an observation; returns whether the machine is contested.

        subject   the spec and the QEMU that the history is about
        wrong     the machine does not have its target count
        reported  the status says that it is contested; used in the first pass of a process
        """
        if subject != self._subject:
            first = self._subject is None
            self._subject, self._left, self._last = subject, None, None
            self._changes.clear()
            if reported and first:
                self._last = self._corrected = now
        if wrong and self._changed(machine):
            self._unfinished = False
            self._changes = [*self._changes[1 - CHANGES :], now]
            many = len(self._changes) == CHANGES and now <= self._changes[0] + self.window
            if many or self._last is not None:
                self._last = now
        self._left = None
        if self._last is not None and now >= self._last + self.window:
            self._last = None
            self._changes.clear()
        return self.contested

    @property
    def contested(self) -> bool:
        """Whether another client has changed the machine repeatedly."""
        return self._last is not None

    def may_correct(self, now: float) -> bool:
        """Whether a pass may change the machine."""
        return not self.contested or self._unfinished or now >= self._corrected + self.pause

    def corrects(self, now: float) -> None:
        """A pass is about to change the machine."""
        self._corrected = now
        if self.contested:
            self._last = now

    def left(self, machine: Machine, leaving: Iterable[int], *, unfinished: bool = False) -> None:
        """A pass ends.

        leaving     the slots that the guest may still free because of unplug requests
        unfinished  the pass had no time for all of its work
        """
        self._left, self._leaving, self._unfinished = _threads(machine), frozenset(leaving), unfinished

    def _changed(self, machine: Machine) -> bool:
        if self._left is None:
            return False
        if machine.since is None and all(slot.boot for slot in machine.occupied):
            # Perhaps another QEMU: over TCP its start time is unknown, and in a container thread ids repeat.
            return False
        return any(
            was != thread and (thread is not None or slot not in self._leaving)
            for slot, (was, thread) in enumerate(zip(self._left, _threads(machine), strict=False))
        )


def _threads(machine: Machine) -> tuple[int | None, ...]:
    return tuple(None if slot.path is None else slot.thread_id or 0 for slot in machine.slots or ())
