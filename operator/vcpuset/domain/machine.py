"""One machine as observed: an immutable snapshot, taken in one monitor session.

Sources: `query-status`, `query-hotpluggable-cpus`, `query-cpus-fast`, `query-acpi-ospm-status`, `query-migrate`,
`query-uuid`, `query-chardev`.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

__all__ = ["Activity", "Answer", "Machine", "Ost", "Slot"]

_X86 = frozenset({"i386", "x86_64"})

_SAFE = frozenset({"running", "paused"})
"""Not "prelaunch" (`-S`): the program that started QEMU may still be setting it up. libvirt 9.0 gives up the start of a
machine that has more CPUs than it gave it ("qemu reported thread id for inactive vcpu")."""

_GONE = frozenset({"shutdown", "guest-panicked", "internal-error", "postmigrate", "watchdog"})

_OST_EJECT = frozenset({0x03, 0x103})
"""`_OST` source events of an eject: requested by the host, and started by the guest (ACPI 6.5, 6.3.5)."""


class Activity(enum.Enum):
    """What a machine's QEMU run state means for changes of its CPUs."""

    CHANGEABLE = "changeable"
    """CPUs can be plugged and unplugged."""
    BUSY = "busy"
    """Not now: it migrates, saves, restores, sleeps, or is in a state that this program does not know."""
    OVER = "over"
    """No longer: shut down, panicked, failed, or migrated away."""


class Answer(enum.Enum):
    """A guest's reaction to an unplug request; the value is shown in `status.unplug.requests`."""

    IN_PROGRESS = "InProgress"
    FAILURE = "Failure"
    UNRECOGNIZED_NOTIFY = "UnrecognizedNotify"
    NOT_SUPPORTED = "NotSupported"
    IN_USE = "InUse"
    BUSY = "Busy"
    DEPENDENCY_BUSY = "DependencyBusy"
    OTHER = "Other"
    """A code that ACPI does not define: only 0 is success and only 0x84 is in progress."""
    GUEST_ERROR = "GuestError"
    """A machine without `_OST` (pseries): its only answer is DEVICE_UNPLUG_GUEST_ERROR."""
    REJECTED = "Rejected"
    """Not the guest's: QEMU itself refused `device_del`."""

    @property
    def refused(self) -> bool:
        """Whether the request is over and the CPU stays."""
        return self is not Answer.IN_PROGRESS

    @property
    def words(self) -> str:
        """The answer for people, with its ACPI code."""
        return _WORDS[self]


_WORDS = {
    Answer.IN_PROGRESS: "in progress (_OST 0x84)",
    Answer.FAILURE: "non-specific failure (_OST 0x1)",
    Answer.UNRECOGNIZED_NOTIFY: "unrecognised notification (_OST 0x2)",
    Answer.NOT_SUPPORTED: "not supported by the guest (_OST 0x80)",
    Answer.IN_USE: "device in use (_OST 0x81)",
    Answer.BUSY: "device busy (_OST 0x82)",
    Answer.DEPENDENCY_BUSY: "a dependency is busy (_OST 0x83)",
    Answer.OTHER: "a refusal with an _OST code that ACPI does not define",
    Answer.GUEST_ERROR: "refused (DEVICE_UNPLUG_GUEST_ERROR)",
    Answer.REJECTED: "refused by QEMU",
}

_ANSWERS = {
    0x01: Answer.FAILURE,
    0x02: Answer.UNRECOGNIZED_NOTIFY,
    0x80: Answer.NOT_SUPPORTED,
    0x81: Answer.IN_USE,
    0x82: Answer.BUSY,
    0x83: Answer.DEPENDENCY_BUSY,
    0x84: Answer.IN_PROGRESS,
}


@dataclass(frozen=True, slots=True)
class Ost:
    """One `_OST` report of a guest about a CPU slot (`ACPI_DEVICE_OST`, `query-acpi-ospm-status`)."""

    source: int
    status: int

    @property
    def answer(self) -> Answer | None:
        """What it says about an eject; None: nothing (it is about a plug, or reports success)."""
        if self.source not in _OST_EJECT or self.status == 0:
            return None
        return _ANSWERS.get(self.status, Answer.OTHER)


@dataclass(frozen=True, slots=True)
class Slot:
    """One place for a CPU: an entry of `query-hotpluggable-cpus`.

    index       position in ascending order of the topology ids; on x86 QEMU's cpu-index and `_OST` slot
    driver      the QOM type to plug (`type`)
    props       the properties to plug it with, exactly as QEMU listed them
    vcpus       vCPUs of the slot (`vcpus-count`; more than one where only whole cores are plugged)
    path        QOM path of the CPU in it; None: free
    thread_id   host thread of its first vCPU; None: free. Path and thread identify one CPU of one QEMU process.
    """

    index: int
    driver: str
    props: Mapping[str, int | str]
    vcpus: int = 1
    path: str | None = None
    thread_id: int | None = None

    @property
    def boot(self) -> bool:
        """Whether the CPU in it came from `-smp`; one that was plugged with an id, by any client, counts as plugged."""
        return self.path is not None and self.path.startswith("/machine/unattached/")


@dataclass(frozen=True)
class Machine:
    """What QEMU reported of one machine.

    run_state  `query-status`
    arch       `target` of `query-cpus-fast`
    vcpus      the number of entries of `query-cpus-fast`: the authoritative count
    slots      ascending; None: the machine type does not support CPU hotplug
    migrating  an outgoing migration is in progress, whatever the run state
    ost        the last `_OST` report of each CPU slot; None: the machine has no `query-acpi-ospm-status`
    uuid       `query-uuid`; None: it was started without one
    since      when its monitor's socket was created, which QEMU does at its start; None: not known
    connections  its TCP connections, including those of its monitors, if neither a uuid nor a process identifies it
    """

    run_state: str
    arch: str
    vcpus: int
    slots: tuple[Slot, ...] | None
    migrating: bool = False
    ost: Mapping[int, Ost] | None = None
    uuid: str | None = None
    since: datetime | None = None
    connections: frozenset[Hashable] = frozenset()

    @property
    def activity(self) -> Activity:
        """Whether CPUs can be changed in the current run state."""
        if self.run_state in _GONE:
            return Activity.OVER
        if self.run_state in _SAFE and not self.migrating:
            return Activity.CHANGEABLE
        return Activity.BUSY

    @cached_property
    def occupied(self) -> tuple[Slot, ...]:
        """The slots that hold a CPU, ascending."""
        return tuple(slot for slot in self.slots or () if slot.path is not None)

    @cached_property
    def free(self) -> tuple[Slot, ...]:
        """The slots without a CPU, ascending."""
        return tuple(slot for slot in self.slots or () if slot.path is None)

    @property
    def process(self) -> Hashable:
        """Identifies the QEMU process among those that a set had."""
        return (self.uuid, self.first_thread)

    @property
    def first_thread(self) -> int | None:
        """Host thread of the CPU in slot 0, which stays for as long as QEMU runs; None: it has no slots."""
        return self.slots[0].thread_id if self.slots else None

    @cached_property
    def one_thread(self) -> bool:
        """Whether QEMU runs all CPUs in one host thread (TCG with `thread=single`, or with `-icount`).

        An unplug makes such a QEMU hang or abort, since it ends the CPU's thread and waits for that (7.2 to 11.1).
        """
        return len(self.occupied) > 1 and len({slot.thread_id for slot in self.occupied}) == 1

    @cached_property
    def unpluggable(self) -> tuple[Slot, ...]:
        """The occupied slots whose unplug can be requested: never slot 0; none on s390x, nor with `one_thread`."""
        if self.arch == "s390x" or self.one_thread:
            return ()
        return tuple(slot for slot in self.occupied if slot.index != 0)

    @cached_property
    def floor(self) -> int:
        """The fewest vCPUs that this machine can have."""
        return self.vcpus - sum(slot.vcpus for slot in self.unpluggable)

    @cached_property
    def ceiling(self) -> int:
        """The most vCPUs that this machine can have."""
        return self.vcpus + sum(slot.vcpus for slot in self.free)

    @property
    def guest_accepts_unplugs(self) -> bool:
        """Whether the guest's ACPI has taken over CPU hotplug.

        Until then x86 QEMU up to 10.2 is in its "legacy" mode: it rejects `device_del` and reports no `_OST` slots.
        """
        return self.arch not in _X86 or self.ost is None or bool(self.ost)
