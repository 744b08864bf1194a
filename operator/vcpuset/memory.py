"""What one process remembers of a VCPUSet between passes. It is an optimization only: a new process has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from vcpuset.domain.contest import Contest
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Machine
from vcpuset.domain.requests import Ledger

__all__ = ["Memory"]

UNSETTLED_SECONDS = 5.0
"""How long CPUs may come or go at each observation before this is reported as a monitor that cannot be used.

QEMU shows a slot as free some milliseconds before the CPU disappears from `query-cpus-fast`; then it sends the event.
"""


@dataclass
class Memory:
    """Times are the event loop's, in seconds, but for `reset`.

    contest      whether another client changes the machine
    ledger       the unplug requests
    vcpus        the last count
    moved_at     when a CPU was last observed to leave
    unsettled    when the first of consecutive observations failed to count the CPUs
    reset        when the machine was last reset, as far as a session was informed
    plugged_at   when this process last plugged a CPU, or the guest then set one online
    online       how many CPUs the guest used according to its last answer
    speechless   the guest's agent did not answer the last query
    carried_out  a CPU was plugged or unplugged since the last Event about that
    written_at   when the status was last written
    progress     how many writes of the current change were for progress alone
    resynced     the first resync is due, or was
    not_adopted  the API server's words, if it refused the count that was to be adopted
    """

    contest: Contest
    ledger: Ledger = field(default_factory=Ledger)
    vcpus: int = 0
    moved_at: float | None = None
    unsettled: float | None = None
    reset: datetime | None = None
    plugged_at: float | None = None
    online: int = 0
    speechless: bool = False
    carried_out: bool = False
    written_at: float = 0.0
    progress: int = 0
    resynced: bool = False
    not_adopted: str | None = None

    def observed(self, machine: Machine, now: float) -> None:
        """Record an observation."""
        self.unsettled = None
        if machine.vcpus < self.vcpus:
            self.moved_at = now
        self.vcpus = machine.vcpus

    def unsettled_too_long(self, now: float) -> bool:
        """Record that an observation failed to count the CPUs; returns whether this has gone on for too long."""
        self.unsettled = now if self.unsettled is None else self.unsettled
        return now >= self.unsettled + UNSETTLED_SECONDS

    def guest_said(self, guest: GuestReport, now: float) -> bool:
        """Record an answer of the guest; returns whether its agent answers again."""
        speaks_again = self.speechless and guest.cpus is not None
        self.speechless = guest.cpus is None
        if guest.cpus is not None:
            if guest.cpus.online > self.online and self.plugged_at is not None:
                # A guest that still sets plugged CPUs online has not left the rest offline.
                self.plugged_at = now
            self.online = guest.cpus.online
        return speaks_again
