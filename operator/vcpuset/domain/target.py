"""The count that a machine can reach for a declared count, and why it differs."""

from __future__ import annotations

from dataclasses import dataclass

from vcpuset.domain.machine import Machine
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import BootVCPUs, Spec, Unplug, UnplugPolicy

__all__ = ["Target", "target_for"]


@dataclass(frozen=True, slots=True)
class Target:
    """The count to reach.

    count    the possible count that is nearest to the declared one
    reason   why it is not the declared one; None: it is
    message  the same for people, with the remedy
    """

    count: int
    reason: Reason | None = None
    message: str = ""


def target_for(spec: Spec, machine: Machine) -> Target:
    """The count that this machine can reach for the declared one; without one, it stays as it is."""
    declared, present = spec.vcpus, machine.vcpus
    if declared is None or declared == present:
        return Target(present)
    if machine.slots is None:
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
    floor, reason, cause, remedy = _floor(spec.unplug, machine)
    if declared < floor:
        return Target(
            floor, reason, f"{cause}, so the machine keeps at least {floor} vCPUs: declare at least {floor}{remedy}"
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


def _floor(unplug: Unplug, machine: Machine) -> tuple[int, Reason, str, str]:
    """The fewest vCPUs that machine and policy allow, the reason, the cause in words, and the remedy."""
    unpluggable = machine.unpluggable
    if not unpluggable:
        if machine.arch == "s390x":
            words, remedy = "QEMU cannot unplug CPUs of this machine", ", or restart the VM with fewer"
        elif machine.one_thread:
            words = "QEMU runs all CPUs in one thread, in which an unplug would crash it"
            remedy = ", or restart the VM with -accel tcg,thread=multi and without -icount"
        else:
            words, remedy = "slot 0 cannot be unplugged", ""
        return machine.floor, Reason.UNPLUG_UNSUPPORTED, words, remedy
    if unplug.policy is UnplugPolicy.DISABLED:
        words = "spec.unplug.policy is Disabled"
        return machine.vcpus, Reason.UNPLUG_DISABLED, words, ", or set it to Enabled"
    kept = sum(slot.vcpus for slot in unpluggable if slot.boot) if unplug.boot_vcpus is BootVCPUs.KEEP else 0
    if kept:
        words = "spec.unplug.bootVCPUs is Keep"
        return machine.floor + kept, Reason.BOOT_VCPUS_KEPT, words, ", or set it to Unplug"
    return machine.floor, Reason.UNPLUG_UNSUPPORTED, "slot 0 cannot be unplugged", ""
