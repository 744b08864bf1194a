"""The reasons of a VCPUSet's conditions: the one list that code, documentation and tests share."""

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
    """All three False: nothing is done, because the user asked for that."""


class Reason(enum.StrEnum):
    """Why the conditions are as they are; `states` are those that the reason occurs in, `meaning` is for people."""

    states: tuple[State, ...]
    meaning: str

    def __new__(cls, value: str, states: tuple[State, ...], meaning: str) -> Self:
        """An enum member that is its CamelCase name, with what it stands for."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.states = states
        member.meaning = meaning
        return member

    CONVERGED = ("Converged", (State.READY,), "QEMU has as many vCPUs as declared.")
    PLUGGING = (
        "Plugging",
        (State.RECONCILING,),
        "vCPUs are being plugged; if QEMU refuses one for now, the message has its words.",
    )
    UNPLUGGING = ("Unplugging", (State.RECONCILING,), "The guest was asked to give vCPUs back.")
    UNPLUG_PENDING = ("UnplugPending", (State.RECONCILING,), "The guest has not answered yet.")
    WAITING_FOR_GUEST = (
        "WaitingForGuest",
        (State.RECONCILING,),
        "The guest has not booted far enough for an unplug (or was booted with acpi=off and never will).",
    )
    UNPLUG_REFUSED = (
        "UnplugRefused",
        (State.RECONCILING, State.STALLED),
        "The guest said no and no other candidate is left; asked again every unplug.retrySeconds.",
    )
    UNPLUG_TIMED_OUT = (
        "UnplugTimedOut",
        (State.STALLED,),
        "The guest has not answered within unplug.timeoutSeconds; asked again every unplug.retrySeconds.",
    )
    GUEST_CPUS_OFFLINE = (
        "GuestCPUsOffline",
        (State.RECONCILING,),
        "QEMU has as many vCPUs as declared, but the guest has left some of them offline.",
    )
    MONITOR_UNREACHABLE = (
        "MonitorUnreachable",
        (State.RECONCILING,),
        "Nobody answers at the address, it may not be opened, or no QMP monitor is there.",
    )
    MONITOR_BUSY = (
        "MonitorBusy",
        (State.RECONCILING,),
        "Connected, but no greeting: another client holds the monitor, or QEMU hangs.",
    )
    MONITOR_TIMEOUT = ("MonitorTimeout", (State.RECONCILING,), "QEMU did not answer a command in time.")
    MACHINE_BUSY = (
        "MachineBusy",
        (State.RECONCILING,),
        "The machine migrates, saves, restores, sleeps or stands still (io-error): its CPUs cannot be changed now.",
    )
    MACHINE_NOT_RUNNING = (
        "MachineNotRunning",
        (State.RECONCILING,),
        "The machine is shut down, panicked, failed, or was migrated away.",
    )
    INSUFFICIENT_SLOTS = (
        "InsufficientSlots",
        (State.STALLED,),
        "More vCPUs are declared than the machine has slots for; it runs at its ceiling.",
    )
    UNPLUG_UNSUPPORTED = (
        "UnplugUnsupported",
        (State.STALLED,),
        "Fewer vCPUs are declared than the machine can come down to, or QEMU refuses to unplug; see the message.",
    )
    UNPLUG_DISABLED = (
        "UnplugDisabled",
        (State.STALLED,),
        "Fewer vCPUs are declared than present, and unplug.policy is Disabled.",
    )
    BOOT_VCPUS_KEPT = (
        "BootVCPUsKept",
        (State.STALLED,),
        "Fewer vCPUs are declared than the machine booted with, and unplug.bootVCPUs is Keep.",
    )
    GRANULARITY = (
        "Granularity",
        (State.STALLED,),
        "The machine plugs whole cores only, and the declared count does not fit.",
    )
    HOTPLUG_UNSUPPORTED = (
        "HotplugUnsupported",
        (State.STALLED,),
        "The machine type cannot plug CPUs, or QEMU refuses for good; the message has its words.",
    )
    MONITOR_CONFLICT = (
        "MonitorConflict",
        (State.STALLED,),
        "An older VCPUSet names the same monitor and keeps it.",
    )
    INVALID_MONITOR = (
        "InvalidMonitor",
        (State.STALLED,),
        "spec.monitor names something that this operator must not or cannot open.",
    )
    SUSPENDED = ("Suspended", (State.HELD,), "spec.suspend is set and the count differs; nothing is changed.")
