"""Unplug requests: what is known of each, and how an observation changes it.

A request may be lost (early in a boot, or with a replaced QEMU) or be carried out much later (QEMU keeps it through
resets until the guest reads it). So nothing is assumed: a request is over when its CPU is gone or when the guest has
refused it, and until then the CPU may leave at any time.
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
"""QOM path and host thread id: permanently one CPU of one QEMU process."""

FIRST_PAUSE = timedelta(seconds=5)
"""After this time a request that the guest ignored or refused is sent again for the first time.

A Linux guest that is up answers within two seconds; one that is still booting loses requests that QEMU accepts.
"""

_DOUBLINGS = 16
"""More than `retrySeconds` can have."""


def cpu_of(holder: Request | Slot) -> CPU:
    """Which CPU a request, or an occupied slot, is about."""
    if isinstance(holder, Request):
        return (holder.path, holder.thread_id)
    assert holder.path is not None, "a free slot holds no CPU"
    return (holder.path, -1 if holder.thread_id is None else holder.thread_id)


def _made_to(requests: Iterable[Request], machine: Machine, now: datetime) -> Iterable[Request]:
    """Without the requests that are older than this QEMU.

    Path and thread id are not enough: in a container, the next QEMU can have the same ones. A start time in the future
    is ignored: the clock was set back.
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
    """The requests once the unplug of these CPUs is requested (again), ordered by slot.

    early  CPUs whose attempts, and with them the pauses, start again
    """
    known = {cpu_of(request): request for request in requests}
    for slot in slots:
        path, thread_id = cpu = cpu_of(slot)
        attempts = known[cpu].attempts + 1 if cpu in known and cpu not in early else 1
        known[cpu] = Request(slot.index, path, thread_id, requested_at=now, attempts=attempts)
    return tuple(sorted(known.values(), key=lambda request: request.slot))


def due_at(request: Request, unplug: Unplug, *, early: bool = False, moved: datetime | None = None) -> datetime:
    """When the request may be sent again.

    A guest that ignores or refuses a request may just not be up yet: the first pause is short, each further one twice
    as long, and none longer than `retrySeconds`. After "in progress" or a rejection by QEMU it is `retrySeconds`.

    early  the guest has shown since that it may accept requests now: only the first pause counts
    moved  when a CPU was last observed to leave; a guest that carries out requests one by one ignores none
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

    request    as in the status
    inherited  an earlier process sent it
    report     the slot's `_OST` report before this process sent it
    error      QEMU's, when it rejected it
    early      the guest has shown since that it may accept requests now
    """

    request: Request
    inherited: bool = False
    report: Ost | None = None
    error: CommandError | None = None
    early: bool = False


class Ledger:
    """The unplug requests of one set: what this process has sent, what a predecessor has recorded, and the answers.

    A request is recorded in the status before it is sent, and is here once it is sent: one that is only recorded was
    never sent, and is due at once.
    """

    def __init__(self) -> None:
        self._entries: dict[CPU, _Entry] = {}
        self._qemu: tuple[Hashable, str | None, datetime | None] | None = None
        """The monitor's address, the machine's UUID and `Machine.since`; None: nothing was observed yet."""
        self._started: tuple[int, datetime] | None = None
        """A generation, and when its first request was sent."""

    @classmethod
    def of(cls, status: Status, machine: Machine, now: datetime) -> Self:
        """The ledger of a process that starts with this status and this observation."""
        ledger = cls()
        ledger.observe(status, None, machine, now)
        return ledger

    @property
    def requests(self) -> tuple[Request, ...]:
        """The open requests, ordered by slot."""
        return tuple(sorted((entry.request for entry in self._entries.values()), key=lambda request: request.slot))

    @property
    def early(self) -> frozenset[CPU]:
        """The CPUs whose guest has shown since their requests that it may accept them now."""
        return frozenset(cpu for cpu, entry in self._entries.items() if entry.early)

    @property
    def rejection(self) -> CommandError | None:
        """QEMU's error for one of the requests that it rejected; None: it rejected none."""
        return next((entry.error for entry in self._entries.values() if entry.error is not None), None)

    def started(self, requests: Sequence[Request], generation: int, surplus: int, now: datetime) -> datetime | None:
        """When the first unplug request of this generation was sent; None if none is open or no CPU is too many.

        Requests of an earlier generation count from the first observation for this one.

        requests  the open ones, or those about to be sent
        """
        if surplus <= 0 or not requests:
            self._started = None
            return None
        if self._started is None or self._started[0] != generation or self._started[1] > now:
            self._started = (generation, now)
        return self._started[1]

    def observe(self, status: Status, address: Hashable, machine: Machine, now: datetime) -> int:
        """Keep the requests that this machine may still carry out; returns how many CPUs have left since.

        status   is used at the first observation of a process
        address  the monitor's: a new address does not mean a new QEMU
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
        """Record what the guest has answered.

        answer   its answer for a slot, by event, since the last request for it; None: none
        machine  with the `_OST` reports. A report from before this process sent its request is about an older one. If
                 an earlier process sent it, no report can be dated, so only "in progress" counts: a later answer
                 would replace it
        """
        before = self.requests
        for entry in self._entries.values():
            if entry.error is not None:
                continue
            slot = entry.request.slot
            heard = answer(slot)
            report = None if machine is None or machine.ost is None else machine.ost.get(slot)
            if heard is None and report is not None:
                counts = report.answer is Answer.IN_PROGRESS if entry.inherited else report != entry.report
                heard = report.answer if counts else None
            if heard is not None:
                entry.request = replace(entry.request, answer=heard)
        self._hurry_up(before)

    def hurry_up(self) -> None:
        """The guest has shown that it may accept requests now: it was reset, or its agent answers again."""
        for entry in self._entries.values():
            entry.early = True

    def _hurry_up(self, before: Sequence[Request]) -> None:
        """The same for requests without an answer, if the guest has answered or carried out a later one."""
        silent = {None, Answer.REJECTED}
        answered = [
            request.requested_at
            for request in before
            if (entry := self._entries.get(cpu_of(request))) is None or entry.request.answer not in silent
        ]
        latest = max(answered, default=None)
        for entry in self._entries.values():
            if entry.request.answer is None and latest is not None and entry.request.requested_at < latest:
                entry.early = True

    def forget_refusals(self) -> None:
        """No CPU is too many: refused ones may be requested again when one is."""
        self._entries = {cpu: entry for cpu, entry in self._entries.items() if entry.request.in_flight}

    def with_guest(self, slot: Slot) -> bool:
        """Whether the guest may still carry out a request for the CPU in this slot."""
        entry = self._entries.get(cpu_of(slot))
        return entry is not None and entry.request.in_flight

    def send(self, request: Request, report: Ost | None) -> Callable[[], None]:
        """The request, which is recorded in the status, is about to be sent; returns a function that undoes this.

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
