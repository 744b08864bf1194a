"""What to do about the difference between a declared and an observed count: pure decisions.

Rules that hold for every plan:

* CPUs are plugged only while fewer are present than the target, lowest free slot first.
* The guest is asked only while present - leaving > target, where leaving are the requests that it may still carry
  out. So never more are asked for than are too many. (A request that never reached the guest counts as leaving until it
  is made again, or would be if `bootVCPUs` did not keep its CPU since; should that happen while another is open, one
  CPU too many can leave, and is plugged again.)
* Plugged CPUs are asked for before those of the boot, the highest slot first; one that was refused, after all others.
* The target is what the declaration comes to on this machine: never above its ceiling or below its floor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from vcpuset.domain.machine import Activity, Machine, Slot
from vcpuset.domain.reasons import Reason
from vcpuset.domain.requests import CPU, cpu_of, due_at
from vcpuset.domain.resource import BootVCPUs, Request, Spec, Unplug, UnplugPolicy

__all__ = ["Plan", "Target", "first_fit", "plan", "target_for"]


@dataclass(frozen=True, slots=True)
class Target:
    """The count to bring a machine to.

    count    the reachable count that is nearest to the declared one
    reason   why it is not the declared one; None: it is
    message  the same for a person, with the remedy
    """

    count: int
    reason: Reason | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one pass does: at most one of the two is not empty.

    plug  free slots to fill, in this order, until `target.count` vCPUs are present; the rest stands by
    ask   occupied slots to ask the guest for, in this order; each holds a CPU that may be asked for now
    """

    target: Target
    plug: tuple[Slot, ...] = ()
    ask: tuple[Slot, ...] = ()


def plan(
    spec: Spec,
    machine: Machine,
    requests: Sequence[Request],
    *,
    now: datetime,
    woken: Collection[CPU] = (),
    moved: datetime | None = None,
) -> Plan:
    """The next step for this machine.

    requests      those still open
    woken, moved  what is known of the guest since, as in `due_at`
    """
    target = target_for(spec, machine)
    if spec.suspend or machine.activity is not Activity.CHANGEABLE:
        return Plan(target)
    if machine.vcpus < target.count:
        return Plan(target, plug=machine.free)
    if machine.vcpus > target.count and machine.guest_takes_unplugs:
        due = {cpu_of(each) for each in requests if due_at(each, spec.unplug, woken=woken, moved=moved) <= now}
        return Plan(target, ask=tuple(_to_ask(spec.unplug, machine, target.count, requests, due)))
    return Plan(target)


def target_for(spec: Spec, machine: Machine) -> Target:
    """What the declared count comes to on this machine."""
    declared, present = spec.vcpus, machine.vcpus
    if machine.slots is None:
        if declared == present:
            return Target(present)
        return Target(
            present,
            Reason.HOTPLUG_UNSUPPORTED,
            "the machine type does not support CPU hotplug: restart the VM with the declared count, or with another "
            "machine type",
        )
    if declared > machine.ceiling:
        return Target(
            machine.ceiling,
            Reason.INSUFFICIENT_SLOTS,
            f"the machine has slots for {machine.ceiling} vCPUs: declare at most {machine.ceiling}, "
            "or restart the VM with a larger -smp maxcpus",
        )
    floor, reason, cause, way_out = _floor(spec.unplug, machine)
    if declared < floor:
        return Target(
            floor, reason, f"{cause}, so the machine keeps at least {floor} vCPUs: declare at least {floor}{way_out}"
        )
    step = max((slot.vcpus for slot in machine.slots), default=1)
    if misfit := (declared - present) % step:
        return Target(
            declared - misfit,
            Reason.UNSUPPORTED_VCPU_COUNT,
            f"the machine only plugs whole cores of {step} vCPUs: declare {declared - misfit} or "
            f"{declared - misfit + step}",
        )
    return Target(declared)


def first_fit(free: Iterable[Slot], missing: int, taken: Collection[int]) -> list[Slot]:
    """The first slots that together hold no more than the missing vCPUs."""
    chosen = []
    for slot in free:
        if slot.index not in taken and slot.vcpus <= missing:
            missing -= slot.vcpus
            chosen.append(slot)
    return chosen


def _floor(unplug: Unplug, machine: Machine) -> tuple[int, Reason, str, str]:
    """The fewest vCPUs that machine and policy allow, what stands in the way, and what would clear it."""
    unpluggable = machine.unpluggable
    if not unpluggable:
        if machine.arch == "s390x":
            words, way_out = "QEMU cannot unplug CPUs of this machine", ", or restart the VM with fewer"
        elif machine.one_thread:
            words = "QEMU runs all CPUs in one thread, in which an unplug would crash it"
            way_out = ", or restart the VM with -accel tcg,thread=multi and without -icount"
        else:
            words, way_out = "slot 0 cannot be unplugged", ""
        return machine.floor, Reason.UNPLUG_UNSUPPORTED, words, way_out
    if unplug.policy is UnplugPolicy.DISABLED:
        words = "spec.unplug.policy is Disabled"
        return machine.vcpus, Reason.UNPLUG_DISABLED, words, ", or set it to Enabled"
    kept = sum(slot.vcpus for slot in unpluggable if slot.boot) if unplug.boot_vcpus is BootVCPUs.KEEP else 0
    if kept:
        words = "spec.unplug.bootVCPUs is Keep"
        return machine.floor + kept, Reason.BOOT_VCPUS_KEPT, words, ", or set it to Unplug"
    return machine.floor, Reason.UNPLUG_UNSUPPORTED, "slot 0 cannot be unplugged", ""


def _candidates(unplug: Unplug, machine: Machine) -> list[Slot]:
    """The slots that may be asked for at all, in the order of asking."""
    keep_boot = unplug.boot_vcpus is BootVCPUs.KEEP
    found = [slot for slot in machine.unpluggable if not (slot.boot and keep_boot)]
    return sorted(found, key=lambda slot: (slot.boot, -slot.index))


def _to_ask(
    unplug: Unplug, machine: Machine, target: int, requests: Sequence[Request], may_ask: Collection[CPU]
) -> Iterator[Slot]:
    book = {cpu_of(request): request for request in requests}
    candidates = _candidates(unplug, machine)
    with_guest = [slot for slot in machine.occupied if (r := book.get(cpu_of(slot))) is not None and r.in_flight]
    # One that may not be asked for (any more) is not asked for again when it falls due: it is not waited for, either.
    leaving = [slot for slot in with_guest if slot in candidates or cpu_of(slot) not in may_ask]
    surplus = machine.vcpus - target

    wanted = surplus - sum(slot.vcpus for slot in leaving)
    fresh = [slot for slot in candidates if cpu_of(slot) not in book]
    refused = [slot for slot in candidates if slot not in leaving and cpu_of(slot) in may_ask]
    for slot in (*fresh, *refused):
        if slot.vcpus <= wanted:
            wanted -= slot.vcpus
            yield slot

    # A request in flight that has fallen due is made again, for its own CPU, so no further CPU leaves by it; no more
    # of them than are still wanted, for the target may have risen since. Before that, all others have been asked for
    # once: a pass may have no time for both.
    pressed = surplus - sum(slot.vcpus for slot in leaving if cpu_of(slot) not in may_ask)
    for slot in candidates:
        if slot in leaving and cpu_of(slot) in may_ask and slot.vcpus <= pressed:
            pressed -= slot.vcpus
            yield slot
