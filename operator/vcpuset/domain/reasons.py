"""The reasons of a VCPUSet's conditions: the one list for code, documentation and tests.

The table in docs/conditions.md is made from it (`make docs`).
"""

from __future__ import annotations

import enum
from typing import Self

__all__ = ["Reason", "State"]


class State(enum.Enum):
    """The three conditions of a reason; a condition that is not True is False, never absent (Ready can be Unknown)."""

    READY = "Ready"
    """Ready=True: the machine is as declared."""
    RECONCILING = "Reconciling"
    """Reconciling=True: a change is in progress, or waits for something that passes."""
    STALLED = "Stalled"
    """Stalled=True: it needs a user to act (or another answer of the guest)."""
    HELD = "Held"
    """All three False: nothing is done, because the user wants that (also by deleting the set)."""
    UNKNOWN = "Unknown"
    """Ready=Unknown: no process observes the machine."""


class Reason(enum.StrEnum):
    """Why the conditions are as they are.

    states   in which the reason occurs, in the order in which they follow each other
    meaning  what the situation is, for people
    remedy   for people; a dash where nothing is wrong
    """

    states: tuple[State, ...]
    meaning: str
    remedy: str

    def __new__(cls, value: str, states: tuple[State, ...], meaning: str, remedy: str) -> Self:
        """An enum member whose value is its CamelCase name."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.states = states
        member.meaning = meaning
        member.remedy = remedy
        return member

    CONVERGED = ("Converged", (State.READY,), "QEMU has the declared number of vCPUs.", "\N{EN DASH}")
    ADOPTING = (
        "Adopting",
        (State.RECONCILING,),
        "spec.vcpus is not set: the present count was observed, and is being written there, once.",
        "Wait. If the message has a refusal: the operator's role must allow it to patch vcpusets/scale.",
    )
    PLUGGING = (
        "Plugging",
        (State.RECONCILING,),
        "vCPUs are being plugged. If QEMU rejects one at the moment, the message contains its error.",
        "Wait. If QEMU names a conflict, such as another device with the ID of a vCPU, remove it.",
    )
    UNPLUGGING = (
        "Unplugging",
        (State.RECONCILING,),
        "Unplug requests were sent to the guest.",
        "Wait: a healthy guest completes them within seconds.",
    )
    UNPLUG_PENDING = (
        "UnplugPending",
        (State.RECONCILING,),
        "The guest has not answered an unplug request yet.",
        "Wait. A paused guest answers when it is resumed.",
    )
    WAITING_FOR_GUEST = (
        "WaitingForGuest",
        (State.RECONCILING,),
        "The guest does not accept unplug requests: it is still booting, or was booted with acpi=off.",
        "Wait until it has booted. Boot a guest without ACPI with ACPI, or with fewer vCPUs.",
    )
    UNPLUG_REFUSED = (
        "UnplugRefused",
        (State.RECONCILING, State.STALLED),
        "The guest refused, and there is no other candidate; repeated at most unplug.retrySeconds apart.",
        "Stop what uses the CPUs in the guest (pinned or real-time tasks; see its log), or declare more vCPUs.",
    )
    UNPLUG_TIMED_OUT = (
        "UnplugTimedOut",
        (State.STALLED,),
        "The guest has not answered within unplug.timeoutSeconds; repeated at most unplug.retrySeconds apart.",
        "Check whether the guest hangs or is paused. If it does not support CPU hot-unplug, declare the present count.",
    )
    GUEST_CPUS_OFFLINE = (
        "GuestCPUsOffline",
        (State.RECONCILING,),
        "QEMU has the declared number of vCPUs, but the guest has left some of them offline.",
        "Set guestAgent.bringOnline, or add a udev rule to the guest that brings new CPUs online.",
    )
    MONITOR_UNREACHABLE = (
        "MonitorUnreachable",
        (State.RECONCILING,),
        "Nothing listens at the address, the operator may not open it, or it is not a QMP monitor.",
        "Start QEMU with a QMP monitor at that address, and allow the operator's user to open it.",
    )
    MONITOR_BUSY = (
        "MonitorBusy",
        (State.RECONCILING,),
        "Connected, but no greeting: another client holds the monitor, QEMU hangs, or it is not a QMP monitor.",
        "Give the operator a dedicated QMP monitor (QEMU accepts several -qmp), or check why QEMU hangs.",
    )
    MONITOR_TIMEOUT = (
        "MonitorTimeout",
        (State.RECONCILING,),
        "QEMU did not answer a command in time.",
        "Check whether the QEMU process is stopped, waits for storage, or has too little CPU time.",
    )
    MACHINE_BUSY = (
        "MachineBusy",
        (State.RECONCILING,),
        "CPUs cannot be changed now: the machine was not started, migrates, saves, restores, sleeps or is in io-error.",
        "Wait for the migration or snapshot to end; wake the guest; fix the storage; cont; x-exit-preconfig.",
    )
    MACHINE_NOT_RUNNING = (
        "MachineNotRunning",
        (State.RECONCILING,),
        "The machine is shut down, has panicked or failed, or was migrated away.",
        "Reset or restart the VM. After a migration, set spec.monitor to the monitor of the destination.",
    )
    INSUFFICIENT_SLOTS = (
        "InsufficientSlots",
        (State.STALLED,),
        "More vCPUs are declared than the machine has slots for; it runs with the maximum.",
        "Declare at most status.machine.maxVCPUs, or restart the VM with a larger -smp maxcpus.",
    )
    UNPLUG_UNSUPPORTED = (
        "UnplugUnsupported",
        (State.STALLED,),
        "Fewer vCPUs are declared than the machine can have, or QEMU rejects the unplug; see the message.",
        "Declare at least the count in the message, or the present count, or restart the VM with fewer vCPUs.",
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
        "Declare at least the count in the message, or set unplug.bootVCPUs to Unplug.",
    )
    UNSUPPORTED_VCPU_COUNT = (
        "UnsupportedVCPUCount",
        (State.STALLED,),
        "The machine only plugs whole cores, and the declared count does not fit; it runs with the next lower count.",
        "Declare one of the two counts in the message.",
    )
    HOTPLUG_UNSUPPORTED = (
        "HotplugUnsupported",
        (State.STALLED,),
        "The machine type has no CPU hotplug or no CPUs, or QEMU rejects the change permanently; see the message.",
        "Restart the VM with the declared count, or with a machine type (x86: q35, pc) and firmware that support it.",
    )
    MONITOR_CONFLICT = (
        "MonitorConflict",
        (State.STALLED,),
        "An older VCPUSet names the same monitor, or another monitor of the same machine, and keeps the machine.",
        "Delete one of the two, or set the monitor of another machine for the younger one.",
    )
    CONTESTED = (
        "Contested",
        (State.STALLED,),
        "Another client has changed the machine's vCPUs repeatedly; they are corrected at a slow pace.",
        "Find the other client with a monitor of this QEMU (VCPUSet, operator or tool), and leave the count to one.",
    )
    INVALID_MONITOR = (
        "InvalidMonitor",
        (State.STALLED,),
        "spec.monitor names something that this operator must not or cannot open.",
        "Set a socket below the namespace's directory, without links, or an address in --allow-tcp; see the message.",
    )
    CREDENTIALS_UNAVAILABLE = (
        "CredentialsUnavailable",
        (State.STALLED,),
        "The Secret of a TLS monitor is missing or invalid, or one end rejects the certificate of the other.",
        "Correct the Secret, the certificates, or QEMU's tls-authz; see the message.",
    )
    UNSUPPORTED_SPEC = (
        "UnsupportedSpec",
        (State.STALLED,),
        "The spec contains a value that this version of the operator does not support: it leaves the machine alone.",
        "Upgrade the operator, or correct the field in the message.",
    )
    POD_NOT_FOUND = (
        "PodNotFound",
        (State.RECONCILING,),
        "No running pod matches spec.pod.selector, or the operator may not look for it; see the message.",
        "Start the pod, correct the selector, or bind the ClusterRole vcpuset-pods in the namespace.",
    )
    POD_AMBIGUOUS = (
        "PodAmbiguous",
        (State.RECONCILING,),
        "More than one running pod matches spec.pod.selector, or an older VCPUSet names the same container.",
        "Delete all but one, or give the pod of the machine a label of its own.",
    )
    POD_RESIZE_DEFERRED = (
        "PodResizeDeferred",
        (State.RECONCILING,),
        "The pod needs more CPU for its vCPUs, and its node has none to give at the moment.",
        "Wait, free CPU on the node, or declare fewer vCPUs. The request is repeated after pod.timeoutSeconds.",
    )
    POD_RESIZE_INFEASIBLE = (
        "PodResizeInfeasible",
        (State.STALLED,),
        "The pod needs more CPU for its vCPUs, and its node can never give it.",
        "Declare fewer vCPUs, or move the machine to a larger node.",
    )
    POD_RESIZE_REFUSED = (
        "PodResizeRefused",
        (State.STALLED,),
        "The pod's CPU cannot follow the count, or the API server refused to resize it; see the message.",
        "Raise the quota or LimitRange, bind the ClusterRole vcpuset-pods, or recreate the pod; see the message.",
    )
    SUSPENDED = (
        "Suspended",
        (State.HELD,),
        "spec.suspend is set, and the count differs or is not set; nothing is changed.",
        "Set spec.suspend to false.",
    )
    TERMINATING = (
        "Terminating",
        (State.HELD,),
        "The VCPUSet has been deleted and a finalizer keeps the object; the machine is left as it is.",
        "None needed, or check why the owner of the finalizer does not remove it.",
    )
    AGENT_UNAVAILABLE = (
        "AgentUnavailable",
        (State.UNKNOWN,),
        "spec.nodeName is set, and no agent is ready on that node; written by the central controller.",
        "Check spec.nodeName, the node, and the pod of its agent. The agent replaces the report when it is back.",
    )
