"""A model of QEMU and its guest, for what a real one cannot be made to do thousands of times in a second.

It keeps QEMU's rules that matter to an operator: a CPU plugged into a slot is another CPU than the one before, a
request on x86 is latched and carried out at any later hotplug event, a refusal clears the latch, a new process has new
threads and knows nothing of old requests, and the guest's firmware has to come up before any request is taken.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from vcpuset.domain.errors import CommandRefused, DeviceGone, GuestNotReady, Migrating, PermanentError, SlotTaken
from vcpuset.domain.machine import Machine, Ost, Slot
from vcpuset.domain.requests import CPU

__all__ = ["EJECT", "IN_USE", "Guest", "Listener", "Qemu"]

EJECT = 3
"""`_OST` source of an eject that the host asked for."""

IN_PROGRESS = 0x84
IN_USE = 0x81

_THREADS = itertools.count(1001)
"""Host thread ids: never the same again, in any process."""


class Guest(enum.Enum):
    """How the guest takes a request."""

    PROMPT = "prompt"
    """Carries it out, or refuses it, at once."""
    SLOW = "slow"
    """Says that it is in progress, and does it when it gets round to it."""
    ASLEEP = "asleep"
    """Says and does nothing; the request stays latched."""


@dataclass
class Listener:
    """What a monitor session is told: that the guest reported on a slot, that something happened, that it is over."""

    ost: Callable[[int, Ost], None]
    event: Callable[[], None]
    lost: Callable[[], None]


class Qemu:
    """One machine, also across restarts of its process."""

    def __init__(self, *, boot: int = 2, slots: int = 8, threads: int = 1, arch: str = "x86_64") -> None:
        self.boot_slots = boot
        self.slots = slots
        self.threads = threads
        self.arch = arch
        self.guest = Guest.PROMPT
        self.refused_slots: set[int] = set()
        """Slots that the guest says no about."""
        self.rejected_slots: set[int] = set()
        """Slots that QEMU itself refuses to ask for, with words of its own."""
        self.loses_requests = False
        """The guest takes requests without a trace, as Linux does early in its boot."""
        self.reachable = True
        self.listeners: list[Listener] = []
        self.power_on()

    # --- the process ----------------------------------------------------------------------------------------------

    def power_on(self, *, legacy: bool = False) -> None:
        """Start the process anew: boot CPUs only, connections cut."""
        self.run_state = "running"
        self.migrating = False
        self.legacy = legacy and self.arch == "x86_64"
        self.cpus: dict[int, CPU] = {
            index: (f"/machine/unattached/device[{index}]", next(_THREADS)) for index in range(self.boot_slots)
        }
        self.latched: set[int] = set()
        self.ost: dict[int, Ost] = {}
        self.disconnect()

    def disconnect(self) -> None:
        """Cut every connection."""
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener.lost()

    @property
    def vcpus(self) -> int:
        """The length of query-cpus-fast."""
        return len(self.cpus) * self.threads

    @property
    def present(self) -> set[CPU]:
        """The CPUs that are in a slot."""
        return set(self.cpus.values())

    def slot_of(self, cpu: CPU) -> int | None:
        """Where a CPU is; None: gone."""
        return next((index for index, here in self.cpus.items() if here == cpu), None)

    def machine(self) -> Machine:
        """What an observation shows now."""
        slots = []
        for index in range(self.slots):
            path, thread = self.cpus.get(index, (None, None))
            slots.append(Slot(index, "cpu-type", {"core-id": index}, self.threads, path, thread))
        shown: dict[int, Ost] = {}
        if not self.legacy:
            shown = {index: self.ost.get(index, Ost(0, 0)) for index in range(self.slots)}
        return Machine(
            self.run_state,
            self.arch,
            self.vcpus,
            tuple(slots),
            self.migrating,
            shown if self.arch == "x86_64" else None,
        )

    # --- commands -------------------------------------------------------------------------------------------------

    def device_add(self, index: int, device_id: str) -> None:
        """Plug a CPU; the guest gets to see whatever is latched."""
        path = f"/machine/peripheral/{device_id}"
        if self.migrating:
            raise Migrating("device_add", "GenericError", "device_add not allowed while migrating")
        if index in self.cpus or any(path == other for other, _ in self.cpus.values()):
            raise SlotTaken("device_add", "GenericError", f"Duplicate device ID '{device_id}'")
        self.cpus[index] = (path, next(_THREADS))
        self.hotplug_event()

    def device_del(self, path: str) -> None:
        """Pass a request on to the guest."""
        index = next((slot for slot, (name, _) in self.cpus.items() if name == path), None)
        if index is None:
            raise DeviceGone("device_del", "DeviceNotFound", f"Device '{path}' not found")
        if self.migrating:
            raise Migrating("device_del", "GenericError", "device_del not allowed while migrating")
        if index == 0:
            raise PermanentError("device_del", "GenericError", "Boot CPU cannot be unplugged")
        if index in self.rejected_slots:
            raise CommandRefused("device_del", "GenericError", "not this one")
        if self.legacy:
            raise GuestNotReady("device_del", "GenericError", "acpi: device unplug request for not supported device")
        if self.loses_requests:
            return
        self.latched.add(index)
        self.hotplug_event()

    # --- the guest ------------------------------------------------------------------------------------------------

    def hotplug_event(self) -> None:
        """The guest looks at all slots, as after every plug and every request."""
        match self.guest:
            case Guest.PROMPT:
                self.guest_works()
            case Guest.SLOW:
                for index in sorted(self.latched):
                    self._report(index, IN_PROGRESS)
            case Guest.ASLEEP:
                pass

    def guest_works(self) -> None:
        """The guest carries out, or refuses, everything that is latched."""
        for index in sorted(self.latched):
            self.latched.discard(index)
            if index in self.refused_slots:
                self._report(index, IN_USE)
            else:
                del self.cpus[index]
                self._report(index, 0)
                self._tell()

    def forget(self) -> None:
        """A reset that drops what was latched, without a trace."""
        self.latched.clear()
        self._tell()

    def take_away(self, index: int) -> None:
        """Somebody else's request was carried out."""
        self.latched.discard(index)
        del self.cpus[index]
        self._tell()

    def _report(self, index: int, status: int) -> None:
        if self.arch != "x86_64":
            return
        self.ost[index] = Ost(EJECT, status)
        for listener in tuple(self.listeners):
            listener.ost(index, self.ost[index])

    def _tell(self) -> None:
        for listener in tuple(self.listeners):
            listener.event()
