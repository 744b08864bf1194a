"""What to do about the difference between a declared and an observed count: pure decisions.

Rules that hold for every plan:

* CPUs are plugged only while fewer are present than the target, lowest free slot first.
* Unplug is requested only while present - leaving > target, where leaving are the requests that the guest may still
  carry out. So never more are requested than are too many. (A request that never reached the guest counts as leaving
  until it is made again, or would be if `bootVCPUs` did not keep its CPU since; should that happen while another is
  open, one CPU too many can leave, and is plugged again.)
* Plugged CPUs come before those of the boot, the highest slot first; one that was refused comes after all others.
* The target is what the declaration comes to on this machine: never above its ceiling or below its floor.
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

    plug    free slots to fill, in this order, until the target is reached; the rest stands by
    unplug  occupied slots whose unplug to request, in this order; each holds a CPU that may be requested now
    """

    plug: tuple[Slot, ...] = ()
    unplug: tuple[Slot, ...] = ()


def plan(findings: Findings) -> Plan:
    """The next step for a machine."""
    machine, target = findings.machine, findings.target.count
    if findings.spec.suspend or machine.activity is not Activity.CHANGEABLE:
        return Plan()
    if machine.vcpus < target:
        return Plan(plug=machine.free)
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
    # One that may not be requested (any more) is not requested again when it falls due: it is not waited for, either.
    leaving = [slot for slot in with_guest if slot in candidates or cpu_of(slot) not in due]
    surplus = findings.surplus

    wanted = surplus - sum(slot.vcpus for slot in leaving)
    fresh = [slot for slot in candidates if cpu_of(slot) not in known]
    refused = [slot for slot in candidates if slot not in leaving and cpu_of(slot) in due]
    for slot in (*fresh, *refused):
        if slot.vcpus <= wanted:
            wanted -= slot.vcpus
            yield slot

    # A request in flight that has fallen due is made again, for its own CPU, so no further CPU leaves by it; no more
    # of them than are still wanted, for the target may have risen since. Before that, all others have been requested
    # once: a pass may have no time for both.
    pressed = surplus - sum(slot.vcpus for slot in leaving if cpu_of(slot) not in due)
    for slot in candidates:
        if slot in leaving and cpu_of(slot) in due and slot.vcpus <= pressed:
            pressed -= slot.vcpus
            yield slot
