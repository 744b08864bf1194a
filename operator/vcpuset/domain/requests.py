"""Unplug requests: what is known of each, and how an observation changes it.

A request may vanish without a trace (early in a boot, with a replaced QEMU) or be carried out much later (QEMU keeps
it through resets until the guest looks). So nothing is assumed: a request is over when its CPU is gone or when the
guest said no, and until then the CPU may leave at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Self

from vcpuset.domain.errors import CommandError
from vcpuset.domain.machine import Answer, Machine, Ost, Slot
from vcpuset.domain.resource import Request, Status, Unplug

__all__ = ["CPU", "FIRST_PAUSE", "Ledger", "cpu_of", "due_at", "requested", "still_open"]

CPU = tuple[str, int]
"""QOM path and host thread id: one CPU of one QEMU process, for ever."""

FIRST_PAUSE = timedelta(seconds=5)
"""After this time a request that the guest ignored or refused is made again for the first time.

A Linux guest that is up answers within two seconds; QEMU takes requests while it boots, and the guest never sees them.
"""

_DOUBLINGS = 16
"""More of them than `retrySeconds` can have."""


def cpu_of(holder: Request | Slot) -> CPU:
    """Which CPU a request, or an occupied slot, is about."""
    if isinstance(holder, Request):
        return (holder.path, holder.thread_id)
    assert holder.path is not None, "a free slot holds no CPU"
    return (holder.path, -1 if holder.thread_id is None else holder.thread_id)


def _made_to(requests: Iterable[Request], machine: Machine, now: datetime) -> Iterable[Request]:
    """Without those that are older than this QEMU.

    Path and thread id alone do not tell: in a container, the next QEMU can have the same ones. A time in the future
    tells nothing: the clock was set back.
    """
    since = datetime.min.replace(tzinfo=UTC)
    if machine.since is not None and machine.since <= now:
        since = machine.since
    return (request for request in requests if request.requested_at >= since)


def still_open(requests: Iterable[Request], machine: Machine, now: datetime) -> tuple[Request, ...]:
    """The requests whose CPU is still there; one for a slot that was plugged again is void.

    A time in the future (the clock was set back) becomes now: otherwise it would never fall due.
    """
    present = {cpu_of(slot): slot.index for slot in machine.occupied}
    return tuple(
        replace(request, slot=present[cpu_of(request)], requested_at=min(request.requested_at, now))
        for request in requests
        if cpu_of(request) in present
    )


def requested(
    requests: Iterable[Request], slots: Iterable[Slot], now: datetime, early: Collection[CPU] = ()
) -> tuple[Request, ...]:
    """The requests as they stand once the unplug of these CPUs is requested (again), ordered by slot.

    early  CPUs whose requests count from one again, and with them the pauses
    """
    known = {cpu_of(request): request for request in requests}
    for slot in slots:
        path, thread_id = cpu = cpu_of(slot)
        attempts = known[cpu].attempts + 1 if cpu in known and cpu not in early else 1
        known[cpu] = Request(slot.index, path, thread_id, requested_at=now, attempts=attempts)
    return tuple(sorted(known.values(), key=lambda request: request.slot))


def due_at(request: Request, unplug: Unplug, *, early: bool = False, moved: datetime | None = None) -> datetime:
    """When the request may be made again.

    A guest that ignores or refuses a request may just not be up yet: the first pause is short, each further one twice
    as long, and none longer than `retrySeconds`. A guest that says that it is at work on a request is left to it for as
    long, and so is a QEMU that rejects one.

    early  the guest has shown since that it may take requests now: only the first pause counts
    moved  when a CPU was last seen to leave; a guest that carries out one request after the other ignores none
    """
    longest = timedelta(seconds=unplug.retry_seconds)
    first = min(FIRST_PAUSE, longest)
    if request.answer is Answer.REJECTED:
        return request.requested_at + longest
    if early:
        return request.requested_at + first
    if request.answer is Answer.IN_PROGRESS:
        return request.requested_at + longest
    pause = min(first * (1 << min(request.attempts - 1, _DOUBLINGS)), longest)
    since = request.requested_at if moved is None or request.answer else max(request.requested_at, moved)
    return min(since + pause, request.requested_at + longest)


@dataclass(slots=True)
class _Entry:
    """One open request.

    request    as the status is to show it
    inherited  an earlier process made it
    report     the slot's `_OST` report that stood before this process sent it
    error      what QEMU said when it rejected it
    early      the guest has shown since that it may take requests now
    """

    request: Request
    inherited: bool = False
    report: Ost | None = None
    error: CommandError | None = None
    early: bool = False


class Ledger:
    """The unplug requests of one set: what this process has sent, what a predecessor has recorded, what was answered.

    A request is recorded in the status before it is sent, and stands here once it is sent: what is only recorded was
    never sent, and is due at once.
    """

    def __init__(self) -> None:
        self._entries: dict[CPU, _Entry] = {}
        self._qemu: tuple[Hashable, str | None, datetime | None] | None = None
        """The monitor's address, the machine's UUID and `Machine.since`; None: nothing was observed yet."""
        self._started: tuple[int, datetime] | None = None
        """A generation, and when its first request was made."""

    @classmethod
    def of(cls, status: Status, machine: Machine, now: datetime) -> Self:
        """The ledger of a process that begins with this status and this observation."""
        ledger = cls()
        ledger.observe(status, None, machine, now)
        return ledger

    @property
    def requests(self) -> tuple[Request, ...]:
        """The open requests, ordered by slot."""
        return tuple(sorted((entry.request for entry in self._entries.values()), key=lambda request: request.slot))

    @property
    def early(self) -> frozenset[CPU]:
        """The CPUs whose guest has shown since their requests that it may take them now."""
        return frozenset(cpu for cpu, entry in self._entries.items() if entry.early)

    @property
    def rejection(self) -> CommandError | None:
        """What QEMU said to one of the requests that it rejected; None: it rejected none."""
        return next((entry.error for entry in self._entries.values() if entry.error is not None), None)

    def started(self, requests: Sequence[Request], generation: int, surplus: int, now: datetime) -> datetime | None:
        """When the first unplug request of this generation was made; None while none is open or no CPU is too many.

        Requests of an earlier generation count from the first observation for this one.

        requests  the open ones, or those about to be made
        """
        if surplus <= 0 or not requests:
            self._started = None
            return None
        if self._started is None or self._started[0] != generation:
            self._started = (generation, now)
        return min(self._started[1], now)

    def observe(self, status: Status, address: Hashable, machine: Machine, now: datetime) -> int:
        """Keep the requests that this machine may still carry out; returns how many CPUs have left since.

        status   counts for the first observation of a process
        address  the monitor's: another one says nothing of whether the QEMU behind it is another one
        """
        qemu, self._qemu = self._qemu, (address, machine.uuid, machine.since)
        if qemu is None:
            if status.machine_uuid == machine.uuid:
                for request in _made_to(status.pending_unplugs, machine, now):
                    self._entries[cpu_of(request)] = _Entry(request, inherited=True)
            if status.unplug_started_at is not None:
                self._started = (status.observed_generation, status.unplug_started_at)
        elif qemu[1] != machine.uuid or (qemu[0] == address and qemu[2] != machine.since):
            self._entries.clear()
        elif qemu[0] != address:
            made_to = {cpu_of(request) for request in _made_to(self.requests, machine, now)}
            self._entries = {cpu: entry for cpu, entry in self._entries.items() if cpu in made_to}
        before = self.requests
        present = {cpu_of(request): request for request in still_open(before, machine, now)}
        self._entries = {cpu: entry for cpu, entry in self._entries.items() if cpu in present}
        for cpu, entry in self._entries.items():
            entry.request = present[cpu]
        self._hurry_up(before)
        return len(before) - len(present)

    def hear(self, answer: Callable[[int], Answer | None], machine: Machine | None = None) -> None:
        """Take in what the guest has answered.

        answer   what it said of a slot, by event, since the last request for it; None: nothing
        machine  with the `_OST` reports; a report that stood before this process sent its request is about something
                 older. When an earlier process sent it none can be dated, so none counts but that the guest is at work:
                 whatever came of it would replace that
        """
        before = self.requests
        for entry in self._entries.values():
            if entry.error is not None:
                continue
            slot = entry.request.slot
            told = answer(slot)
            report = None if machine is None or machine.ost is None else machine.ost.get(slot)
            if told is None and report is not None:
                counts = report.answer is Answer.IN_PROGRESS if entry.inherited else report != entry.report
                told = report.answer if counts else None
            if told is not None:
                entry.request = replace(entry.request, answer=told)
        self._hurry_up(before)

    def hurry_up(self) -> None:
        """The guest has shown that it may take requests now: it was reset, or its agent speaks again."""
        for entry in self._entries.values():
            entry.early = True

    def _hurry_up(self, before: Sequence[Request]) -> None:
        """The same for requests without an answer, if the guest has answered or carried out a later one."""
        silent = {None, Answer.REJECTED}
        heard = [
            request.requested_at
            for request in before
            if (entry := self._entries.get(cpu_of(request))) is None or entry.request.answer not in silent
        ]
        latest = max(heard, default=None)
        for entry in self._entries.values():
            if entry.request.answer is None and latest is not None and entry.request.requested_at < latest:
                entry.early = True

    def forget_refusals(self) -> None:
        """No CPU is too many: those whose unplug was refused may be requested again when one is."""
        self._entries = {cpu: entry for cpu, entry in self._entries.items() if entry.request.in_flight}

    def with_guest(self, slot: Slot) -> bool:
        """Whether the guest may still carry out a request for the CPU in this slot."""
        entry = self._entries.get(cpu_of(slot))
        return entry is not None and entry.request.in_flight

    def send(self, request: Request, report: Ost | None) -> Callable[[], None]:
        """The request, which is recorded in the status, is about to be sent; returns what takes that back.

        report  the slot's `_OST` report now
        """
        cpu = cpu_of(request)
        before = self._entries.get(cpu)
        self._entries[cpu] = _Entry(request, report=report)

        def withdraw() -> None:
            del self._entries[cpu]
            if before is not None:
                self._entries[cpu] = before

        return withdraw

    def reject(self, request: Request, error: CommandError) -> None:
        """QEMU has rejected the request."""
        entry = self._entries[cpu_of(request)]
        entry.error, entry.request = error, replace(entry.request, answer=Answer.REJECTED)
