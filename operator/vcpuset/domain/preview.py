"""What the next pass over a machine would do, and its expected result, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vcpuset.domain.assessment import Assessment, assess, plugging
from vcpuset.domain.blockers import Blocker, blockers
from vcpuset.domain.findings import Findings
from vcpuset.domain.guest import GuestCPUs, GuestReport
from vcpuset.domain.machine import Machine, Slot
from vcpuset.domain.plan import Plan, first_fit, plan
from vcpuset.domain.reasons import Reason
from vcpuset.domain.requests import Ledger, requested
from vcpuset.domain.resource import VCPUSet

__all__ = ["PlanPreview", "preview"]


@dataclass(frozen=True, slots=True)
class PlanPreview:
    """The next pass. At most one of `plug` and `unplug` is not empty.

    findings      what it knows at its start; its target is the count to reach
    adopt         the count that is written into the set; None: one stands, or the set must not be changed now
    plug          the free slots to plug, in this order
    unplug        the occupied slots whose unplug to request, in this order
    standby       those that replace one that fails or is refused, in this order
    bring_online  the guest's CPUs (its own numbers) that the guest's agent is to set online
    assessment    for the set's conditions meanwhile
    expected      the assessment once that is done; None: nothing is done
    blockers      everything that blocks the declared count
    """

    findings: Findings
    adopt: int | None
    plug: tuple[Slot, ...]
    unplug: tuple[Slot, ...]
    standby: tuple[Slot, ...]
    bring_online: tuple[int, ...]
    assessment: Assessment
    expected: Assessment | None
    blockers: tuple[Blocker, ...]


def preview(vcpuset: VCPUSet, machine: Machine, guest: GuestReport | None, now: datetime) -> PlanPreview:
    """The next pass of an operator that only has the set's status."""
    found = _findings(vcpuset, machine, guest, now)
    step = plan(found)
    fill = tuple(first_fit(step.plug, -found.surplus, ()))
    bring_online = _to_bring_online(found)
    # The text of the report that a pass writes before it plugs, or sends requests.
    assessment = plugging(found) if fill else assess(_findings(vcpuset, machine, guest, now, step.unplug))
    adopt: int | None = None
    expected: Assessment | None = None
    if assessment.reason is Reason.ADOPTING:
        adopt = found.spec.within_bounds(machine.vcpus)
        expected = preview(replace(vcpuset, spec=replace(found.spec, vcpus=adopt)), machine, guest, now).assessment
    elif fill or step.unplug:
        # The guest's reaction cannot be predicted.
        without_agent = replace(vcpuset, spec=replace(vcpuset.spec, guest_agent=None))
        expected = assess(_findings(without_agent, _changed(machine, fill, step.unplug), None, now))
    elif bring_online and guest is not None and guest.cpus is not None:
        online = tuple(replace(cpu, online=True) for cpu in guest.cpus.cpus)
        expected = assess(replace(found, guest=GuestReport(GuestCPUs(online))))
    return PlanPreview(
        findings=found,
        adopt=adopt,
        plug=fill,
        unplug=step.unplug,
        standby=_standby(found, fill, step),
        bring_online=bring_online,
        assessment=assessment,
        expected=expected,
        blockers=blockers(found),
    )


def _findings(
    vcpuset: VCPUSet, machine: Machine, guest: GuestReport | None, now: datetime, unplug: Sequence[Slot] = ()
) -> Findings:
    """What a pass knows that starts now, once it has recorded these requests."""
    status, generation = vcpuset.status, vcpuset.generation
    ledger = Ledger.of(status, machine, now)
    requests = requested(ledger.requests, unplug, now)
    found = Findings(
        spec=vcpuset.spec,
        machine=machine,
        now=now,
        requests=requests,
        reported=status.reason_for(generation),
        guest=guest,
    )
    return replace(found, started=ledger.started(requests, generation, found.surplus, now))


def _to_bring_online(findings: Findings) -> tuple[int, ...]:
    """As the operator does when it queries the guest: not while CPUs are unplugged or the machine migrates."""
    spec, machine, guest = findings.spec, findings.machine, findings.guest
    if guest is None or guest.cpus is None or spec.guest_agent is None or not spec.guest_agent.bring_online:
        return ()
    if spec.suspend or machine.migrating or findings.surplus > 0 or len(guest.cpus.cpus) > machine.vcpus:
        return ()
    return guest.cpus.offline


def _standby(findings: Findings, fill: Sequence[Slot], step: Plan) -> tuple[Slot, ...]:
    chosen = {slot.index for slot in (*fill, *step.unplug)}
    everything: Sequence[Slot] = ()
    if fill:
        everything = findings.machine.free
    elif step.unplug:
        # With the floor as its target it would request all that may be requested.
        everything = plan(replace(findings, spec=replace(findings.spec, vcpus=1))).unplug
    return tuple(slot for slot in everything if slot.index not in chosen)


def _changed(machine: Machine, fill: Sequence[Slot], unplug: Sequence[Slot]) -> Machine:
    """The machine with these slots filled and those free."""
    filled = {slot.index: replace(slot, path=f"/machine/peripheral/{slot.index}") for slot in fill}
    freed = {slot.index: replace(slot, path=None, thread_id=None) for slot in unplug}
    changed = filled | freed
    slots = tuple(changed.get(slot.index, slot) for slot in machine.slots or ())
    moved = sum(slot.vcpus for slot in fill) - sum(slot.vcpus for slot in unplug)
    return replace(machine, slots=slots, vcpus=machine.vcpus + moved)
