"""What to do about a difference between the declared and the observed count: pure decisions.

Rules of every plan:

* CPUs are plugged only while fewer are present than the target, lowest free slot first.
* Unplug is requested only while present - leaving > target, where leaving are the requests that the guest may still
  carry out. So never more are requested than are too many. (A request that never reached the guest counts as leaving
  until it is sent again, or would be if `bootVCPUs` did not keep its CPU since; if that happens while another is
  open, one CPU too many can leave, and is plugged again.)
* Plugged CPUs come before boot CPUs, the highest slot first; a refused one comes after all others.
* The target is the count that this machine can reach: never above its ceiling or below its floor.
* Nothing is plugged that the machine's pod may not use yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from vcpuset.domain.findings import Findings
from vcpuset.domain.machine import Activity, Machine, Slot
from vcpuset.domain.requests import cpu_of
from vcpuset.domain.resource import BootVCPUs, Unplug

__all__ = ["Plan", "first_fit", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one pass does: at most one of the two is not empty.

    plug    free slots to plug, in this order, until the target is reached; the rest are standby
    unplug  occupied slots whose unplug to request, in this order; each request may be sent now
    """

    plug: tuple[Slot, ...] = ()
    unplug: tuple[Slot, ...] = ()


def plan(findings: Findings) -> Plan:
    """The next step for a machine."""
    machine, target = findings.machine, findings.target.count
    if findings.spec.suspend or machine.activity is not Activity.CHANGEABLE:
        return Plan()
    if machine.vcpus < target:
        return Plan(plug=machine.free) if machine.vcpus < findings.plug_to else Plan()
    if machine.vcpus > target and machine.guest_accepts_unplugs:
        return Plan(unplug=tuple(_to_unplug(findings)))
    return Plan()


def first_fit(free: Iterable[Slot], missing: int, taken: Collection[int]) -> list[Slot]:
    """The first slots that together hold no more than the missing vCPUs."""
    chosen = []
    for slot in free:
        if slot.index not in taken and slot.vcpus <= missing:
            missing -= slot.vcpus
            chosen.append(slot)
    return chosen


def _candidates(unplug: Unplug, machine: Machine) -> list[Slot]:
    """The slots whose unplug may be requested at all, in the order of the requests."""
    keep_boot = unplug.boot_vcpus is BootVCPUs.KEEP
    found = [slot for slot in machine.unpluggable if not (slot.boot and keep_boot)]
    return sorted(found, key=lambda slot: (slot.boot, -slot.index))


def _to_unplug(findings: Findings) -> Iterator[Slot]:
    machine = findings.machine
    known = {cpu_of(request): request for request in findings.requests}
    due = findings.due
    candidates = _candidates(findings.spec.unplug, machine)
    with_guest = [slot for slot in machine.occupied if (r := known.get(cpu_of(slot))) is not None and r.in_flight]
    # One that may not be requested (any more) is not requested again, so it does not count as leaving once it is due.
    leaving = [slot for slot in with_guest if slot in candidates or cpu_of(slot) not in due]
    surplus = findings.surplus

    wanted = surplus - sum(slot.vcpus for slot in leaving)
    fresh = [slot for slot in candidates if cpu_of(slot) not in known]
    refused = [slot for slot in candidates if slot not in leaving and cpu_of(slot) in due]
    for slot in (*fresh, *refused):
        if slot.vcpus <= wanted:
            wanted -= slot.vcpus
            yield slot

    # A request in flight that has fallen due is sent again, for its own CPU, so no further CPU leaves; at most as many
    # as are still wanted, because the target may have risen since. All others are requested first: a pass may have no
    # time for both.
    repeated = surplus - sum(slot.vcpus for slot in leaving if cpu_of(slot) not in due)
    for slot in candidates:
        if slot in leaving and cpu_of(slot) in due and slot.vcpus <= repeated:
            repeated -= slot.vcpus
            yield slot
