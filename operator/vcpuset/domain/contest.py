"""Whether something else changes a machine again and again: another operator, a tool, a VCPUSet that names another
monitor of it.

What counts is a CPU that came, or left without an unplug request, while no pass was under way, and that has to be
undone. Once that has happened `CHANGES` times within a window, to correct each at once would only keep a fight alive:
the set is contested, the count is corrected at a slow pace, and the report says so until nothing else has changed it
for one window. Another QEMU and another spec start from nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final

from vcpuset.domain.machine import Machine

__all__ = ["CHANGES", "PAUSE_RESYNCS", "WINDOW_RESYNCS", "Contest"]

CHANGES: Final = 5
"""So many changes by something else within one window are no accident."""

WINDOW_RESYNCS: Final = 10
"""The window, in resyncs. With one observation each resync a fight is seen at each, so half a window finds it."""

PAUSE_RESYNCS: Final = 5
"""The pause between two corrections of a contested machine, in resyncs: less than the window, or a fight that goes on
would pass for one that has ended."""


@dataclass(slots=True)
class Contest:
    """What one set's machine went through. All times are in seconds of one clock that is never set.

    resync  the pace at which an idle machine is observed
    """

    resync: float
    _subject: Hashable = None
    _left: tuple[int | None, ...] | None = None
    """The host thread of each slot's CPU when the last pass ended; None: not known."""
    _leaving: frozenset[int] = frozenset()
    """The slots that the guest may still free since it was asked to."""
    _changes: list[float] = field(default_factory=list)
    """When something else last changed the machine, `CHANGES` times at most."""
    _last: float | None = None
    """When the contested machine was last changed, by something else or by a correction; None: it is not contested."""
    _corrected: float = 0.0
    _unfinished: bool = False
    """Whether the correction under way goes on in the next pass."""

    @property
    def window(self) -> float:
        """For how long nothing else must have changed the machine."""
        return WINDOW_RESYNCS * self.resync

    @property
    def pause(self) -> float:
        """The time between two corrections of a contested machine."""
        return PAUSE_RESYNCS * self.resync

    def observed(self, subject: Hashable, machine: Machine, now: float, *, wrong: bool, reported: bool) -> bool:
        """Take in what a pass has found; whether the machine is contested.

        subject   the spec and the QEMU that all this is about
        wrong     the machine is not at its count
        reported  the status says that they are contested; counts for the first pass of a process
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
        """Whether something else has changed the machine again and again."""
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

        leaving     the slots that the guest may still free, since it was asked to
        unfinished  the pass had no time for all that it had to do
        """
        self._left, self._leaving, self._unfinished = _threads(machine), frozenset(leaving), unfinished

    def _changed(self, machine: Machine) -> bool:
        if self._left is None:
            return False
        if machine.since is None and all(slot.boot for slot in machine.occupied):
            # Perhaps another QEMU that looks like the one before: over TCP nothing shows when it started, and in a
            # container thread ids repeat.
            return False
        return any(
            was != thread and (thread is not None or slot not in self._leaving)
            for slot, (was, thread) in enumerate(zip(self._left, _threads(machine), strict=False))
        )


def _threads(machine: Machine) -> tuple[int | None, ...]:
    return tuple(None if slot.path is None else slot.thread_id or 0 for slot in machine.slots or ())
