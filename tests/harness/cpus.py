"""A small model of a machine's CPUs and of a guest's answers, for `FaultyMonitor`.

It behaves as QEMU 10 does for x86 under TCG, as far as an operator can see: the lapic's DEVICE_DELETED and never the
CPU's own, _OST reports with ``device`` only while the CPU exists, ids that stay taken while the CPU is there, boot CPUs
in /machine/unattached whose numbers are not their indexes, slot 0 that cannot be unplugged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CommandError", "Cpu", "Cpus", "Eject", "Refuse", "Silent", "Unplug", "kvm_counters"]

EJECT_REQUEST = 3
DEVICE_CHECK = 1
SUCCESS = 0
IN_PROGRESS = 0x84
BUSY = 0x82

Arguments = dict[str, Any]


def kvm_counters(path: str, *, exits: int, halt_wait_ns: int = 0, blocking: bool = False) -> dict[str, Any]:
    """An entry of query-stats, as QEMU 10.0 with KVM shows it."""
    stats = {"exits": exits, "halt_wait_ns": halt_wait_ns, "halt_poll_success_ns": 0, "halt_poll_fail_ns": 0}
    return {
        "provider": "kvm",
        "qom-path": path,
        "stats": [{"name": name, "value": value} for name, value in {**stats, "blocking": blocking}.items()],
    }


class CommandError(Exception):
    """A QMP error: class and text."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.error_class = error_class


@dataclass(frozen=True)
class Eject:
    """The guest gives the CPU up at once."""


@dataclass(frozen=True)
class Refuse:
    """The guest says no with this _OST status."""

    status: int = BUSY


@dataclass(frozen=True)
class Silent:
    """The guest says nothing. The request stays: `Cpus.eject` carries it out, however late."""


@dataclass(frozen=True)
class Working:
    """The guest says that it is at work on the request, and no more: so it is left to it for `retrySeconds`."""


Unplug = Eject | Refuse | Silent | Working
"""What the guest does with an unplug request."""


@dataclass(frozen=True)
class Cpu:
    """A CPU of the machine."""

    path: str
    ident: str | None
    thread_id: int


_THREADS = itertools.count(1000)
"""Each CPU is a thread of its own, on a host that runs all of these machines."""


class Cpus:
    """The slots of one machine.

    unplug   what the guest does when it is asked for the CPU in a slot; Eject() for slots that are not in it
    emit     is given each event: name and data
    """

    def __init__(self, cpus: int, slots: int, driver: str, emit: Callable[[str, Arguments], None]) -> None:
        self.unplug: dict[int, Unplug] = {}
        self.driver = driver
        self._emit = emit
        self._slots: list[Cpu | None] = [None] * slots
        self._ost = [(0, 0)] * slots
        self.boot(cpus)

    def boot(self, cpus: int) -> None:
        """A new process with so many boot CPUs: other thread ids than ever before, everything else forgotten."""
        # As real machines number their unattached devices: 0, 2, 3, …
        numbers = [0, *range(2, cpus + 1)]
        booted = [Cpu(f"/machine/unattached/device[{n}]", None, next(_THREADS)) for n in numbers[:cpus]]
        self._slots = [*booted, *[None] * (len(self._slots) - cpus)]
        self._ost = [(0, 0)] * len(self._slots)

    def occupied(self) -> list[int]:
        """The indexes of the slots that hold a CPU."""
        return [index for index, cpu in enumerate(self._slots) if cpu is not None]

    def at(self, slot: int) -> Cpu | None:
        """The CPU in a slot."""
        return self._slots[slot]

    def plug(self, slot: int, ident: str | None = None) -> None:
        """A new CPU in a free slot, which the guest takes at once."""
        ident = f"vcpu{slot}" if ident is None else ident
        self._slots[slot] = Cpu(f"/machine/peripheral/{ident}", ident, next(_THREADS))
        self._report(slot, DEVICE_CHECK, SUCCESS)

    def ask(self, slot: int) -> None:
        """An unplug request: the guest does what `unplug` says."""
        match self.unplug.get(slot, Eject()):
            case Eject():
                self.eject(slot)
            case Refuse(status):
                self._report(slot, EJECT_REQUEST, IN_PROGRESS)
                self._report(slot, EJECT_REQUEST, status)
            case Silent():
                pass
            case Working():
                self._report(slot, EJECT_REQUEST, IN_PROGRESS)

    def eject(self, slot: int) -> None:
        """The guest gives a CPU up."""
        cpu = self._slots[slot]
        assert cpu is not None, f"slot {slot} is free"
        self._report(slot, EJECT_REQUEST, IN_PROGRESS)
        self._slots[slot] = None
        self._emit("DEVICE_DELETED", {"path": f"{cpu.path}/lapic"})
        self._report(slot, EJECT_REQUEST, SUCCESS)

    def _report(self, slot: int, source: int, status: int) -> None:
        self._ost[slot] = (source, status)
        self._emit("ACPI_DEVICE_OST", {"info": self._ospm(slot)})

    def _ospm(self, slot: int) -> Arguments:
        source, status = self._ost[slot]
        cpu = self._slots[slot]
        device = {"device": cpu.ident} if cpu is not None and cpu.ident is not None else {}
        return {**device, "slot": str(slot), "slot-type": "CPU", "source": source, "status": status}

    def query_acpi_ospm_status(self, _: Arguments) -> list[Arguments]:
        """The last report of each slot."""
        return [self._ospm(slot) for slot in range(len(self._slots))]

    def query_cpus_fast(self, _: Arguments) -> list[Arguments]:
        """The CPUs that are there."""
        return [
            {
                "cpu-index": slot,
                "qom-path": cpu.path,
                "thread-id": cpu.thread_id,
                "props": _props(slot),
                "target": "x86_64",
            }
            for slot, cpu in enumerate(self._slots)
            if cpu is not None
        ]

    def query_hotpluggable_cpus(self, _: Arguments) -> list[Arguments]:
        """All slots, in descending order as QEMU lists them."""
        return [
            {
                "type": self.driver,
                "vcpus-count": 1,
                "props": _props(slot),
                **({"qom-path": cpu.path} if cpu is not None else {}),
            }
            for slot, cpu in reversed(list(enumerate(self._slots)))
        ]

    def device_add(self, arguments: Arguments) -> Arguments:
        """Plug what the arguments describe; refused as QEMU does."""
        props = {key: value for key, value in arguments.items() if key not in {"driver", "id"}}
        if arguments.get("driver") != self.driver:
            raise CommandError(f"'{arguments.get('driver')}' is not a valid device model name")
        slot = next((slot for slot in range(len(self._slots)) if _props(slot) == props), None)
        if slot is None:
            raise CommandError(f"Invalid CPU core-id: {props.get('core-id')} must be in range 0:{len(self._slots) - 1}")
        ident = arguments.get("id")
        if ident is not None and any(cpu is not None and cpu.ident == ident for cpu in self._slots):
            raise CommandError(f"Duplicate device ID '{ident}'")
        if self._slots[slot] is not None:
            raise CommandError(f"CPU[{slot}] with APIC ID {slot} exists")
        self.plug(slot, ident)
        return {}

    def device_del(self, arguments: Arguments) -> Arguments:
        """Ask the guest for the CPU with this id or QOM path."""
        name = arguments["id"]
        slot = next((s for s, cpu in enumerate(self._slots) if cpu is not None and name in {cpu.path, cpu.ident}), None)
        if slot is None:
            raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
        if slot == 0:
            raise CommandError("Boot CPU is unpluggable")
        self.ask(slot)
        return {}


def _props(slot: int) -> Arguments:
    return {"socket-id": 0, "core-id": slot, "thread-id": 0}
