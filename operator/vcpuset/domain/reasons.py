"""The reasons of a VCPUSet's conditions: the one list that code, documentation and tests share.

The table in docs/conditions.md is made from it (`make docs`).
"""

from __future__ import annotations

import enum
from typing import Self

__all__ = ["Reason", "State"]


class State(enum.Enum):
    """What a reason makes of the three conditions; a condition that is not True is False, never absent."""

    READY = "Ready"
    """Ready=True: the machine is as declared."""
    RECONCILING = "Reconciling"
    """Reconciling=True: on its way, or waiting for something that passes."""
    STALLED = "Stalled"
    """Stalled=True: it will not get there unless somebody acts (or the guest changes its mind)."""
    HELD = "Held"
    """All three False: nothing is done, because the user asked for that (also by deleting the set)."""


class Reason(enum.StrEnum):
    """Why the conditions are as they are.

    states   those that the reason occurs in, in the order in which they follow each other
    meaning  what is the case, for people
    remedy   what helps, for people; a dash where nothing is wrong
    """

    states: tuple[State, ...]
    meaning: str
    remedy: str

    def __new__(cls, value: str, states: tuple[State, ...], meaning: str, remedy: str) -> Self:
        """An enum member that is its CamelCase name, with what it stands for."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.states = states
        member.meaning = meaning
        member.remedy = remedy
        return member

    CONVERGED = ("Converged", (State.READY,), "QEMU has as many vCPUs as declared.", "\N{EN DASH}")
    PLUGGING = (
        "Plugging",
        (State.RECONCILING,),
        "vCPUs are being plugged; if QEMU refuses one for now, the message has its words.",
        "Wait. If QEMU names something that is in the way, remove it.",
    )
    UNPLUGGING = (
        "Unplugging",
        (State.RECONCILING,),
        "The guest was asked to give vCPUs back.",
        "Wait: a healthy guest does so within seconds.",
    )
    UNPLUG_PENDING = (
        "UnplugPending",
        (State.RECONCILING,),
        "The guest has not answered yet.",
        "Wait. A paused guest answers once it goes on.",
    )
    WAITING_FOR_GUEST = (
        "WaitingForGuest",
        (State.RECONCILING,),
        "The guest has not booted far enough for an unplug (or was booted with acpi=off and never will).",
        "Wait until it has booted. A guest without ACPI has to be booted with it, or with fewer vCPUs.",
    )
    UNPLUG_REFUSED = (
        "UnplugRefused",
        (State.RECONCILING, State.STALLED),
        "The guest said no and no other candidate is left; repeated at most unplug.retrySeconds apart.",
        "End what holds the CPUs in the guest (pinned or real-time tasks; its log tells), or declare more vCPUs.",
    )
    UNPLUG_TIMED_OUT = (
        "UnplugTimedOut",
        (State.STALLED,),
        "The guest has not answered within unplug.timeoutSeconds; repeated at most unplug.retrySeconds apart.",
        "See whether the guest hangs or is paused. If it does not know CPU hot-unplug, declare what it has.",
    )
    GUEST_CPUS_OFFLINE = (
        "GuestCPUsOffline",
        (State.RECONCILING,),
        "QEMU has as many vCPUs as declared, but the guest has left some of them offline.",
        "Set guestAgent.bringOnline, or give the guest a udev rule that brings new CPUs online.",
    )
    MONITOR_UNREACHABLE = (
        "MonitorUnreachable",
        (State.RECONCILING,),
        "Nobody answers at the address, it may not be opened, or no QMP monitor is there.",
        "Start QEMU with a QMP monitor at that address, and let the operator's user open it.",
    )
    MONITOR_BUSY = (
        "MonitorBusy",
        (State.RECONCILING,),
        "Connected, but no greeting: another client holds the monitor, QEMU hangs, or it is no QMP monitor.",
        "Give the operator a QMP monitor of its own (QEMU takes -qmp several times), or see why QEMU hangs.",
    )
    MONITOR_TIMEOUT = (
        "MonitorTimeout",
        (State.RECONCILING,),
        "QEMU did not answer a command in time.",
        "See whether the QEMU process is stopped, waits for storage, or has too little CPU time.",
    )
    MACHINE_BUSY = (
        "MachineBusy",
        (State.RECONCILING,),
        "The machine migrates, saves, restores, sleeps, or is in io-error or -preconfig: CPUs cannot be changed now.",
        "Wait for the migration or snapshot to end; wake the guest; mend the storage (then cont); x-exit-preconfig.",
    )
    MACHINE_NOT_RUNNING = (
        "MachineNotRunning",
        (State.RECONCILING,),
        "The machine is shut down, panicked, failed, or was migrated away.",
        "Reset or restart the VM. After a migration, name the destination's monitor in spec.monitor.",
    )
    INSUFFICIENT_SLOTS = (
        "InsufficientSlots",
        (State.STALLED,),
        "More vCPUs are declared than the machine has slots for; it runs at its ceiling.",
        "Declare at most status.machine.maxVCPUs, or restart the VM with a larger -smp maxcpus.",
    )
    UNPLUG_UNSUPPORTED = (
        "UnplugUnsupported",
        (State.STALLED,),
        "Fewer vCPUs are declared than the machine can come down to, or QEMU refuses to unplug; see the message.",
        "Declare at least what the message names, or the present count, or restart the VM with fewer vCPUs.",
    )
    UNPLUG_DISABLED = (
        "UnplugDisabled",
        (State.STALLED,),
        "Fewer vCPUs are declared than present, and unplug.policy is Disabled.",
        "Declare at least status.vcpus, or set unplug.policy to Enabled.",
    )
    BOOT_VCPUS_KEPT = (
        "BootVCPUsKept",
        (State.STALLED,),
        "Fewer vCPUs are declared than the machine booted with, and unplug.bootVCPUs is Keep.",
        "Declare at least what the message names, or set unplug.bootVCPUs to Unplug.",
    )
    UNSUPPORTED_VCPU_COUNT = (
        "UnsupportedVCPUCount",
        (State.STALLED,),
        "The machine plugs whole cores only, and the declared count does not fit; it runs at the next lower one.",
        "Declare one of the two counts that the message names.",
    )
    HOTPLUG_UNSUPPORTED = (
        "HotplugUnsupported",
        (State.STALLED,),
        "The machine type cannot plug CPUs or has none (-M none), or QEMU refuses for good; the message has its words.",
        "Restart the VM with the declared count, or with a machine type (on x86: q35 or pc) and firmware that can.",
    )
    MONITOR_CONFLICT = (
        "MonitorConflict",
        (State.STALLED,),
        "An older VCPUSet names the same monitor, or another one of the same machine, and keeps the machine.",
        "Delete one of the two, or give the younger one the monitor of another machine.",
    )
    CONTESTED = (
        "Contested",
        (State.STALLED,),
        "Something else has changed the machine's vCPUs again and again; they are corrected at a slow pace.",
        "Find what else has a monitor of this QEMU (another VCPUSet, operator or tool), and leave the count to one.",
    )
    INVALID_MONITOR = (
        "InvalidMonitor",
        (State.STALLED,),
        "spec.monitor names something that this operator must not or cannot open.",
        "Name a socket below the namespace's folder, without links, or an address in --allow-tcp; see the message.",
    )
    CREDENTIALS_UNAVAILABLE = (
        "CredentialsUnavailable",
        (State.STALLED,),
        "A TLS monitor's Secret is missing or wrong, or one of the two ends does not accept the other's certificate.",
        "Mend the Secret, the certificates, or what QEMU's tls-authz allows; the message says which.",
    )
    UNSUPPORTED_SPEC = (
        "UnsupportedSpec",
        (State.STALLED,),
        "The spec holds what this version of the operator cannot obey: machine and monitor are left alone.",
        "Upgrade the operator, or correct the field that the message names.",
    )
    SUSPENDED = (
        "Suspended",
        (State.HELD,),
        "spec.suspend is set and the count differs; nothing is changed.",
        "Set spec.suspend to false.",
    )
    TERMINATING = (
        "Terminating",
        (State.HELD,),
        "The VCPUSet has been deleted and a finalizer keeps its object; its machine is left as it is.",
        "Nothing, or see why the owner of the finalizer does not remove it.",
    )
