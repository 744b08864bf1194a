"""A model of QEMU and its guest, for what a real one cannot be made to do thousands of times in a second.

It keeps their rules that matter to an operator: a CPU plugged into a slot is another CPU than the one before, a request
on x86 is latched and carried out at any later hotplug event, a refusal clears the latch, a new process knows nothing of
old requests (though in a container it can have the paths and thread ids of the one before), the guest's firmware has to
come up before any request is taken, a guest need not use what was plugged, and a monitor serves one client at a time.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Collection, Hashable, Iterable
from datetime import UTC, datetime
from typing import Any

from vcpuset.domain.errors import CommandRefused, DeviceGone, GuestNotReady, Migrating, PermanentError, SlotTaken
from vcpuset.domain.guest import GuestCPU, GuestCPUs
from vcpuset.domain.machine import Machine, Ost, Slot
from vcpuset.domain.requests import CPU
from vcpuset.qmp.peer import Peer

__all__ = ["START", "AgentMode", "Client", "Guest", "Qemu"]

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
"""The time at which every story begins."""

PLUGGED = 1
EJECT = 3
"""`_OST` sources: a CPU came; the host asked for one."""

IN_PROGRESS = 0x84
IN_USE = 0x81

FIRST_THREAD = 1001
"""The thread id of the first CPU of a process whose ids repeat those of the one before."""

_THREADS = itertools.count(FIRST_THREAD)
"""Thread ids of all other processes: never the same again."""


_PORTS = itertools.count(40000)


class Guest(enum.Enum):
    """How the guest takes a request, or a CPU that was plugged."""

    PROMPT = "prompt"
    """Carries it out, or refuses it, at once."""
    SLOW = "slow"
    """Says that it is in progress, and does it when it gets round to it."""
    ASLEEP = "asleep"
    """Says and does nothing; the request stays latched."""


class AgentMode(enum.Enum):
    """What becomes of a question to the guest's agent."""

    WORKS = "works"
    LATE = "late"
    """It answers after some seconds."""
    MUTE = "mute"
    """It takes the connection and says nothing."""
    ABSENT = "absent"
    """Nobody listens."""
    BLOCKED = "blocked"
    """It answers with an error."""
    STRANGER = "stranger"
    """It is another machine's, with more CPUs."""


class Client:
    """A connection to a monitor: what it is told."""

    def __init__(self, event: Callable[[dict[str, Any]], None], lost: Callable[[], None]) -> None:
        self.event = event
        self.lost = lost
        self.link = (("qemu", 4444), ("operator", next(_PORTS)))
        """The two ends, if the monitor is on TCP."""


class Qemu:
    """One machine, also across restarts of its process.

    repeats_ids  a new process has the thread ids of the one before, as in a container
    dated        it is known since when the process runs: the monitor is a unix socket
    has_uuid     it was started with a uuid
    shows_process  its host tells processes apart, also across containers
    on_tcp         its monitors are on TCP, and it tells of its connections
    """

    def __init__(
        self,
        *,
        boot: int = 2,
        slots: int = 8,
        threads: int = 1,
        arch: str = "x86_64",
        repeats_ids: bool = False,
        dated: bool = True,
        has_uuid: bool = True,
        shows_process: bool = True,
        on_tcp: bool = False,
    ) -> None:
        self.boot_slots = boot
        self.slots = slots
        self.threads = threads
        self.arch = arch
        self.repeats_ids = repeats_ids
        self.dated = dated
        self.has_uuid = has_uuid
        self.shows_process = shows_process
        self.on_tcp = on_tcp
        self.clock: Callable[[], datetime] = lambda: START
        """The host's clock."""
        self.guest = Guest.PROMPT
        self.leaves_offline = False
        """The guest takes up what is plugged and does not use it, as Linux does without a udev rule."""
        self.never_online: set[int] = set()
        """Slots whose CPU the guest cannot set online."""
        self.agent = AgentMode.WORKS
        self.refused_slots: set[int] = set()
        """Slots that the guest says no about."""
        self.rejected_slots: set[int] = set()
        """Slots that QEMU itself refuses to ask for, with words of its own."""
        self.loses_requests = False
        """The guest takes requests without a trace, as Linux does early in its boot."""
        self.listener: Hashable | None = None
        """The process that made the monitor's socket in place of QEMU; None: none has."""
        self.seconds: dict[str, float] = {}
        """How long QEMU takes over a command; those that are not named take no time."""
        self.reachable = True
        self.clients: list[Client] = []
        self.process = 0
        """Counts the processes."""
        self.machine_number = 0
        """Counts the machines; a restart can be another machine's."""
        self.changes = 0
        """How often CPUs left, or came by somebody else's hand."""
        self.news = 0
        """How many events were sent after which a look is due."""
        self.signs = 0
        """How many signs of life the guest has given: answers, CPUs that left, resets, words of its agent."""
        self.refusals: set[CPU] = set()
        """Who has refused since the last request, as somebody has heard."""
        self.looks = 0
        """How often somebody has begun to look."""
        self.settles_each = 1
        """Each so-manieth look finds two lists of CPUs that agree; 0: none does."""
        self.moving = False
        """CPUs come or go while they are counted next."""
        self.settled = True
        """Whether the lists of the last look agree."""
        self.restless = False
        """Each look finds other CPUs in the slots, which no QEMU does, but who writes a monitor of his own can."""
        self.power_on()

    # --- the process ----------------------------------------------------------------------------------------------

    def power_on(self, *, legacy: bool = False, other_machine: bool = False) -> None:
        """Restart the process: boot CPUs only, connections cut."""
        self.process += 1
        self.machine_number += other_machine
        self.since = self.clock()
        self.run_state = "running"
        self.migrating = False
        self.legacy = legacy and self.arch == "x86_64"
        self._threads = itertools.count(FIRST_THREAD) if self.repeats_ids else _THREADS
        self.cpus: dict[int, CPU] = {
            index: (f"/machine/unattached/device[{index}]", next(self._threads)) for index in range(self.boot_slots)
        }
        self.taken_up: dict[int, bool] = {} if self.legacy else dict.fromkeys(self.cpus, True)
        """The slots whose CPU the guest knows of, and whether it uses it."""
        self.latched: set[int] = set()
        self.refusals = set()
        self.expected: set[CPU] = set()
        """What was plugged by somebody who does not wait for the guest to find it."""
        self.ost: dict[int, Ost] = {}
        self.changes += 1
        self._slots: tuple[Slot, ...] | None = None
        self.other_has_it = self.other_waits = False
        self.disconnect()

    def booted(self) -> None:
        """The guest's firmware and kernel are up, with all CPUs that there are."""
        self.legacy = False
        self.taken_up = dict.fromkeys(self.cpus, True)

    @property
    def uuid(self) -> str | None:
        """`query-uuid`."""
        return f"00000000-0000-4000-8000-{self.machine_number:012}" if self.has_uuid else None

    @property
    def peer(self) -> Peer:
        """What the operator's host tells of who listens at the monitor."""
        return Peer(process=(self.listener or (id(self), self.process)) if self.shows_process else None)

    @property
    def vcpus(self) -> int:
        """The length of query-cpus-fast."""
        return len(self.cpus) * self.threads

    @property
    def present(self) -> frozenset[CPU]:
        """The CPUs that are in a slot."""
        return frozenset(self.cpus.values())

    def slot_of(self, cpu: CPU) -> int | None:
        """Where a CPU is; None: gone."""
        return next((index for index, here in self.cpus.items() if here == cpu), None)

    def machine(self) -> Machine:
        """What an observation shows now."""
        if self._slots is None:
            none: tuple[None, None] = (None, None)
            self._slots = tuple(
                Slot(index, "cpu-type", {"core-id": index}, self.threads, *self.cpus.get(index, none))
                for index in range(self.slots)
            )
        shown: dict[int, Ost] | None = None
        if self.arch == "x86_64":
            shown = {} if self.legacy else {index: self.ost.get(index, Ost(0, 0)) for index in range(self.slots)}
        return Machine(
            self.run_state,
            self.arch,
            self.vcpus,
            self._slots,
            self.migrating,
            shown,
            self.uuid,
            self.since if self.dated else None,
        )

    # --- the monitor ----------------------------------------------------------------------------------------------

    def looked_at(self) -> None:
        """Somebody begins to look."""
        self.looks += 1
        self.settled = not self.moving and self.settles_each > 0 and self.looks % self.settles_each == 0
        self.moving = False
        if self.restless:
            self._slots = None
            self.cpus = {index: (path, next(self._threads)) for index, (path, _) in self.cpus.items()}

    def disconnect(self) -> None:
        """Cut every connection of the operator's."""
        clients, self.clients = self.clients, []
        for client in clients:
            client.lost()

    def let_go(self, client: Client) -> None:
        """A client has closed its connection; the next one gets its turn."""
        if client in self.clients:
            self.clients.remove(client)
        self.other_has_it |= self.other_waits and not self.clients
        self.other_waits &= not self.other_has_it

    def other_client_comes(self) -> None:
        """Somebody else wants the monitor, and has it as soon as it is free."""
        if self.clients:
            self.other_waits = True
        else:
            self.other_has_it = True

    def other_client_goes(self) -> None:
        """Nobody else wants it any more."""
        self.other_has_it = self.other_waits = False

    # --- commands -------------------------------------------------------------------------------------------------

    def device_add(self, index: int, device_id: str, *, expected: bool = False) -> None:
        """Plug a CPU; the guest gets to see whatever is latched.

        expected  that the guest finds it is no news
        """
        path = f"/machine/peripheral/{device_id}"
        if self.migrating:
            raise Migrating("device_add", "GenericError", "device_add not allowed while migrating")
        if index in self.cpus or any(path == other for other, _ in self.cpus.values()):
            raise SlotTaken("device_add", "GenericError", f"Duplicate device ID '{device_id}'")
        self._slots = None
        self.cpus[index] = (path, next(self._threads))
        if expected:
            self.expected.add(self.cpus[index])
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
        self.refusals.discard(self.cpus[index])
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
                    self._report(index, EJECT, IN_PROGRESS)
            case Guest.ASLEEP:
                pass

    def guest_works(self) -> None:
        """The guest takes up what was plugged, and carries out, or refuses, everything that is latched."""
        if self.legacy:
            return
        for index in sorted(self.cpus.keys() - self.taken_up.keys()):
            self.taken_up[index] = not (self.leaves_offline or index in self.never_online)
            self._report(index, PLUGGED, 0, final=self.cpus[index] not in self.expected)
        for index in sorted(self.latched):
            if index in self.refused_slots:
                self.latched.discard(index)
                if self.clients:
                    self.refusals.add(self.cpus[index])
                self._report(index, EJECT, IN_USE)
            else:
                self._leave(index)
                self._report(index, EJECT, 0)

    def forget(self) -> None:
        """A reset that drops what was latched, without a trace; the guest boots with all CPUs that there are."""
        self.latched.clear()
        if not self.legacy:
            self.booted()
        self._tell("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    def take_away(self, index: int) -> None:
        """Somebody else's request was carried out."""
        self._leave(index)

    def come_by_another_hand(self, index: int, device_id: str) -> None:
        """Somebody else plugs a CPU."""
        self.changes += 1
        self.device_add(index, device_id)

    def guest_cpus(self) -> GuestCPUs:
        """What the guest knows of; it counts its processors itself."""
        known = sorted(self.taken_up.items())
        cpus = (
            GuestCPU(slot * self.threads + thread, online, can_offline=slot != 0)
            for slot, online in known
            for thread in range(self.threads)
        )
        if self.agent is AgentMode.STRANGER:
            return GuestCPUs(tuple(GuestCPU(number, online=True, can_offline=True) for number in range(99)))
        return GuestCPUs(tuple(cpus))

    @property
    def agent_runs(self) -> bool:
        """Whether something in the guest can answer."""
        return self.run_state == "running" and not self.legacy and self.agent is not AgentMode.MUTE

    def bring_online(self, numbers: Iterable[int]) -> dict[int, str]:
        """The agent sets processors online; returns those that it could not, with its words."""
        resisted = {}
        for number in numbers:
            slot = number // self.threads
            if slot in self.never_online:
                resisted[number] = "Input/output error"
            else:
                self.taken_up[slot] = True
        return resisted

    def set_offline(self, slots: Collection[int]) -> None:
        """Somebody in the guest takes processors out of use."""
        for slot in slots:
            if slot in self.taken_up and slot != 0:
                self.taken_up[slot] = False

    @property
    def used(self) -> int:
        """How many vCPUs the guest uses."""
        return sum(online for slot, online in self.taken_up.items() if slot in self.cpus) * self.threads

    def _leave(self, index: int) -> None:
        self._slots = None
        self.latched.discard(index)
        self.taken_up.pop(index, None)
        path, _ = self.cpus.pop(index)
        self.changes += 1
        self._tell("DEVICE_DELETED", {"path": path})

    def _report(self, index: int, source: int, status: int, *, final: bool = True) -> None:
        if self.arch == "x86_64":
            self.ost[index] = Ost(source, status)
            info = {"slot": str(index), "slot-type": "CPU", "source": source, "status": status}
            self._tell("ACPI_DEVICE_OST", {"info": info}, final=final and status != IN_PROGRESS)
        elif source == EJECT and status not in {0, IN_PROGRESS}:
            self._tell("DEVICE_UNPLUG_GUEST_ERROR", {"path": self.cpus[index][0]})

    def _tell(self, event: str, data: dict[str, Any], *, final: bool = True) -> None:
        self.news += final
        self.signs += 1
        for client in tuple(self.clients):
            client.event({"event": event, "data": data})
