"""Unplug requests: what is known of each, and how an observation changes it.

A request may vanish without a trace (early in a boot, with a replaced QEMU) or be carried out much later (QEMU keeps
it through resets until the guest looks). So nothing is assumed: a request is over when its CPU is gone or when the
guest said no, and until then the CPU may leave at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from vcpuset.domain.machine import Answer, Machine, Slot
from vcpuset.domain.resource import Request, Status, Unplug

__all__ = [
    "CPU",
    "FIRST_PAUSE",
    "answered",
    "asked",
    "carried_over",
    "cpu_of",
    "due_at",
    "revived",
    "still_open",
    "withdrawn",
]

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


def carried_over(status: Status, machine: Machine, now: datetime, *, same: bool | None = None) -> tuple[Request, ...]:
    """The requests of a status that this machine may still carry out; none of those that another QEMU was asked.

    same  whether this is the QEMU that the status was written for; None: that is to be told from the status itself

    Path and thread id alone do not tell: in a container, the next QEMU can have the same ones.
    """
    if status.machine_uuid != machine.uuid or same is False:
        return ()
    # A time in the future tells nothing: the clock was set back.
    since = datetime.min.replace(tzinfo=UTC)
    if machine.since is not None and machine.since <= now and not same:
        since = machine.since
    return still_open((each for each in status.pending_unplugs if each.requested_at >= since), machine, now)


def still_open(requests: Iterable[Request], machine: Machine, now: datetime) -> tuple[Request, ...]:
    """The requests whose CPU is still there; one for a slot that was plugged anew is void.

    A time in the future (the clock was set back) becomes now: otherwise it would never fall due.
    """
    present = {cpu_of(slot): slot.index for slot in machine.occupied}
    return tuple(
        replace(request, slot=present[cpu_of(request)], requested_at=min(request.requested_at, now))
        for request in requests
        if cpu_of(request) in present
    )


def answered(requests: Iterable[Request], answer: Callable[[Request], Answer | None]) -> tuple[Request, ...]:
    """The requests with what the guest has said since; no news leaves an earlier answer."""
    return tuple(replace(request, answer=answer(request) or request.answer) for request in requests)


def asked(
    requests: Iterable[Request], slots: Iterable[Slot], now: datetime, woken: Collection[CPU] = ()
) -> tuple[Request, ...]:
    """The requests as they stand once these CPUs are requested (again), ordered by slot.

    woken  CPUs whose requests count from one again, and with them the pauses
    """
    book = {cpu_of(request): request for request in requests}
    for slot in slots:
        path, thread_id = cpu = cpu_of(slot)
        attempts = book[cpu].attempts + 1 if cpu in book and cpu not in woken else 1
        book[cpu] = Request(slot.index, path, thread_id, requested_at=now, attempts=attempts)
    return tuple(sorted(book.values(), key=lambda request: request.slot))


def withdrawn(requests: Iterable[Request], unsent: Mapping[CPU, Request | None]) -> tuple[Request, ...]:
    """The requests without those that were recorded and never sent: what was recorded `before` counts again.

    unsent  their CPUs, each with its earlier request; None: there was none
    """
    kept = (unsent.get(cpu_of(request), request) for request in requests)
    return tuple(request for request in kept if request is not None)


def revived(recorded: Iterable[Request], requests: Sequence[Request]) -> set[CPU]:
    """The CPUs whose request has no answer, although the guest answered or carried out a later one.

    recorded  the requests as the status has them
    requests  those still open, with their answers
    """
    still = {cpu_of(request): request.answer for request in requests}
    silent = {None, Answer.REJECTED}
    heard = [request.requested_at for request in recorded if still.get(cpu_of(request), Answer.OTHER) not in silent]
    latest = max(heard, default=None)
    return {
        cpu_of(request)
        for request in requests
        if request.answer is None and latest is not None and request.requested_at < latest
    }


def due_at(request: Request, unplug: Unplug, *, woken: Collection[CPU] = (), moved: datetime | None = None) -> datetime:
    """When the request may be made again.

    A guest that ignores or refuses a request may just not be up yet: the first pause is short, each further one twice
    as long, and none longer than `retrySeconds`. A guest that says that it is at work on a request is left to it for as
    long, and so is a QEMU that rejects one.

    woken  CPUs whose guest has shown since that it may take requests now: only the first pause counts
    moved  when a CPU was last seen to leave; a guest that carries out one request after the other ignores none
    """
    longest = timedelta(seconds=unplug.retry_seconds)
    first = min(FIRST_PAUSE, longest)
    if request.answer is Answer.REJECTED:
        return request.requested_at + longest
    if cpu_of(request) in woken:
        return request.requested_at + first
    if request.answer is Answer.IN_PROGRESS:
        return request.requested_at + longest
    pause = min(first * (1 << min(request.attempts - 1, _DOUBLINGS)), longest)
    since = request.requested_at if moved is None or request.answer else max(request.requested_at, moved)
    return min(since + pause, request.requested_at + longest)
