"""Unplug requests: what is known of each, and how an observation changes it.

A request may vanish without a trace (early in a boot, with a replaced QEMU) or be carried out much later (QEMU keeps
it through resets until the guest looks). So nothing is assumed: a request is over when its CPU is gone or when the
guest said no, and until then the CPU may leave at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from vcpuset.domain.machine import Answer, Machine, Slot
from vcpuset.domain.resource import Request, Status, Unplug

__all__ = ["CPU", "answered", "asked", "carried_over", "cpu_of", "due_at", "still_open", "withdrawn"]

CPU = tuple[str, int]
"""QOM path and host thread id: one CPU of one QEMU process, for ever."""


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


def asked(requests: Iterable[Request], slots: Iterable[Slot], now: datetime) -> tuple[Request, ...]:
    """The requests as they stand once these CPUs are asked for (again), ordered by slot."""
    book = {cpu_of(request): request for request in requests}
    for slot in slots:
        path, thread_id = cpu = cpu_of(slot)
        attempts = book[cpu].attempts + 1 if cpu in book else 1
        book[cpu] = Request(slot.index, path, thread_id, requested_at=now, attempts=attempts)
    return tuple(sorted(book.values(), key=lambda request: request.slot))


def withdrawn(requests: Iterable[Request], before: Iterable[Request], cpus: Collection[CPU]) -> tuple[Request, ...]:
    """The requests as they stand if those for `cpus` were never made: what was on the book `before` counts again."""
    earlier = {cpu_of(request): request for request in before}
    return tuple(
        kept for request in requests if (kept := earlier.get(cpu_of(request)) if cpu_of(request) in cpus else request)
    )


def due_at(request: Request, unplug: Unplug, inherited: Collection[CPU]) -> datetime:
    """When the request may be made again.

    An inherited one without any sign of an answer may never have been sent: its author wrote it down and died. It is
    made again after `timeoutSeconds`; any other after `retrySeconds`.
    """
    unsure = request.answer is None and cpu_of(request) in inherited
    return request.requested_at + timedelta(seconds=unplug.timeout_seconds if unsure else unplug.retry_seconds)
