"""What the next pass over a machine would do, and what would come of it, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vcpuset.domain.assessment import Assessment, assess, plugging
from vcpuset.domain.blockers import Blocker, blockers
from vcpuset.domain.guest import GuestCPUs, GuestReport
from vcpuset.domain.machine import Machine, Slot
from vcpuset.domain.plan import Target, first_fit, plan, target_for
from vcpuset.domain.report import opened_at
from vcpuset.domain.requests import asked, carried_over
from vcpuset.domain.resource import Request, Spec, VCPUSet

__all__ = ["PlanPreview", "preview"]


@dataclass(frozen=True, slots=True)
class PlanPreview:
    """The next pass. At most one of `plug` and `ask` is not empty.

    target        the count that it works towards
    plug          the free slots that it fills, in this order
    ask           the occupied slots that it asks the guest for, in this order
    standby       those that take the place of one that fails or is refused, in this order
    bring_online  the guest's CPUs (its own numbers) that it has the guest's agent set online
    requests      what stands in the status and still holds for this machine
    assessment       what the set's conditions say meanwhile
    expected      what they say when QEMU and the guest have done as they were told; None: nothing is done
    blockers     all that stands in the way
    """

    target: Target
    plug: tuple[Slot, ...]
    ask: tuple[Slot, ...]
    standby: tuple[Slot, ...]
    bring_online: tuple[int, ...]
    requests: tuple[Request, ...]
    assessment: Assessment
    expected: Assessment | None
    blockers: tuple[Blocker, ...]


def preview(vcpuset: VCPUSet, machine: Machine, guest: GuestReport | None, now: datetime) -> PlanPreview:
    """The next pass of an operator that has nothing but the set's status."""
    spec = vcpuset.spec
    requests = carried_over(vcpuset.status, machine, now)
    step = plan(spec, machine, requests, now=now)
    fill = tuple(first_fit(step.plug, step.target.count - machine.vcpus, ()))
    bring_online = _to_bring_online(spec, machine, step.target, guest)
    if fill:
        # The very words of the report that a pass writes before it plugs.
        assessment = plugging(spec, machine, step.target)
    else:
        assessment = _assessed(vcpuset, machine, asked(requests, step.ask, now), guest, now)
    expected: Assessment | None = None
    if fill or step.ask:
        after = _changed(machine, fill, step.ask)
        # What the guest makes of it cannot be foreseen: of that nothing is said.
        expected = _assessed(_without_agent(vcpuset), after, carried_over(vcpuset.status, after, now), None, now)
    elif bring_online and guest is not None and guest.cpus is not None:
        woken = tuple(replace(cpu, online=True) for cpu in guest.cpus.cpus)
        expected = _assessed(vcpuset, machine, requests, GuestReport(GuestCPUs(woken)), now)
    return PlanPreview(
        target=step.target,
        plug=fill,
        ask=step.ask,
        standby=_standby(spec, machine, requests, fill, step.ask, now),
        bring_online=bring_online,
        requests=requests,
        assessment=assessment,
        expected=expected,
        blockers=blockers(spec, machine, requests, guest, now=now),
    )


def _assessed(
    vcpuset: VCPUSet, machine: Machine, requests: Sequence[Request], guest: GuestReport | None, now: datetime
) -> Assessment:
    target = target_for(vcpuset.spec, machine)
    status = vcpuset.status
    current = status.ready is not None and status.ready.observed_generation == vcpuset.generation
    return assess(
        vcpuset.spec,
        machine,
        target,
        requests,
        started=opened_at(status, vcpuset.generation, requests, machine.vcpus - target.count, now),
        blocked=None,
        reported=status.ready.reason if status.ready is not None and current else None,
        now=now,
        guest=guest,
    )


def _without_agent(vcpuset: VCPUSet) -> VCPUSet:
    return replace(vcpuset, spec=replace(vcpuset.spec, guest_agent=None))


def _to_bring_online(spec: Spec, machine: Machine, target: Target, guest: GuestReport | None) -> tuple[int, ...]:
    """As the operator does when it asks the guest: not while CPUs are given back or the machine migrates."""
    if guest is None or guest.cpus is None or spec.guest_agent is None or not spec.guest_agent.bring_online:
        return ()
    if spec.suspend or machine.migrating or machine.vcpus > target.count or len(guest.cpus.cpus) > machine.vcpus:
        return ()
    return guest.cpus.offline


def _standby(
    spec: Spec, machine: Machine, requests: Sequence[Request], fill: Sequence[Slot], ask: Sequence[Slot], now: datetime
) -> tuple[Slot, ...]:
    chosen = {slot.index for slot in (*fill, *ask)}
    everything: Sequence[Slot] = ()
    if fill:
        everything = machine.free
    elif ask:
        # Whoever wanted no more than the floor would ask for all that may be asked for.
        everything = plan(replace(spec, vcpus=1), machine, requests, now=now).ask
    return tuple(slot for slot in everything if slot.index not in chosen)


def _changed(machine: Machine, fill: Sequence[Slot], ask: Sequence[Slot]) -> Machine:
    """The machine with these slots filled and those free."""
    filled = {slot.index: replace(slot, path=f"/machine/peripheral/{slot.index}") for slot in fill}
    freed = {slot.index: replace(slot, path=None, thread_id=None) for slot in ask}
    changed = filled | freed
    slots = tuple(changed.get(slot.index, slot) for slot in machine.slots or ())
    moved = sum(slot.vcpus for slot in fill) - sum(slot.vcpus for slot in ask)
    return replace(machine, slots=slots, vcpus=machine.vcpus + moved)
