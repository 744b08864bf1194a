"""`vcpuset inspect`: a machine as its monitor shows it, slot by slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from vcpuset.cli.observation import Observation, observe_machine, open_monitor, query_guest
from vcpuset.cli.render import Block, Cell, Facts, Grid, Lines, Styled
from vcpuset.domain.assessment import sentence
from vcpuset.domain.credentials import Credentials
from vcpuset.domain.guest import AgentReason, GuestReport
from vcpuset.domain.machine import Activity, Answer, Machine, Ost, Slot
from vcpuset.domain.requests import CPU, Ledger, cpu_of
from vcpuset.domain.resource import Request, VCPUSet
from vcpuset.qmp.sockets import find_local_socket
from vcpuset.qmp.tcp import TCPEndpoint

__all__ = [
    "Inspection",
    "document",
    "guest_document",
    "guest_facts",
    "inspect",
    "machine_document",
    "ost_words",
    "page",
    "reach",
    "timestamp",
]

_FOLDED_FROM: Final = 4
"""As many free slots in a row make one line of the table."""

_ACTIVITY: Final[Mapping[Activity, str]] = {
    Activity.CHANGEABLE: "CPUs can be changed",
    Activity.BUSY: "CPUs cannot be changed now",
    Activity.OVER: "CPUs can no longer be changed",
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that is known of a machine.

    monitor      where it was observed
    guest        what its agent says; None: it was not queried
    not_queried  why it was not queried, although its socket was given; None: it was, or none was given
    vcpuset      the set whose requests are shown; None: none was given
    """

    monitor: str
    observation: Observation
    guest: GuestReport | None
    not_queried: str | None
    vcpuset: VCPUSet | None
    now: datetime

    @property
    def machine(self) -> Machine:
        """The machine."""
        return self.observation.machine

    @property
    def requests(self) -> Mapping[CPU, Request]:
        """The set's requests that hold for this machine."""
        if self.vcpuset is None:
            return {}
        ledger = Ledger.of(self.vcpuset.status, self.machine, self.now)
        return {cpu_of(request): request for request in ledger.requests}

    @property
    def void(self) -> tuple[Request, ...]:
        """The set's requests whose CPU is gone, or was another QEMU's."""
        if self.vcpuset is None:
            return ()
        held = self.requests.keys()
        return tuple(each for each in self.vcpuset.status.pending_unplugs if cpu_of(each) not in held)

    @property
    def all_online(self) -> bool:
        """Whether the guest uses every CPU; only then each slot's CPU is known to be online."""
        cpus = None if self.guest is None else self.guest.cpus
        return cpus is not None and cpus.online == self.machine.vcpus


async def inspect(
    address: Path | TCPEndpoint,
    agent: Path | None,
    vcpuset: VCPUSet | None,
    seconds: float,
    credentials: Credentials | None = None,
    server_name: str | None = None,
) -> Inspection:
    """Observe the machine, and query its guest if possible. Raises what `observe_machine` and `open_monitor` raise."""
    observation = await observe_machine(await open_monitor(address, credentials, server_name), seconds)
    guest: GuestReport | None = None
    not_queried: str | None = None
    if agent is not None:
        if observation.machine.run_state == "running":
            guest = await query_guest(find_local_socket(agent), seconds)
        else:
            not_queried = f"the guest cannot answer in the run state {observation.machine.run_state!r}"
    return Inspection(str(address), observation, guest, not_queried, vcpuset, datetime.now(UTC))


def document(found: Inspection) -> dict[str, Any]:
    """The result for programs."""
    requests = found.requests
    return {
        "monitor": found.monitor,
        "qemuVersion": found.observation.version,
        "machine": machine_document(found.machine),
        "guest": guest_document(found.guest, found.machine, found.not_queried),
        "vcpuset": None
        if found.vcpuset is None
        else {
            "namespace": found.vcpuset.namespace,
            "name": found.vcpuset.name,
            "voidUnplugs": [_request_document(request) for request in found.void],
        },
        "slots": [_slot_document(found, slot, requests) for slot in found.machine.slots or ()],
    }


def machine_document(machine: Machine) -> dict[str, Any]:
    """A machine for programs."""
    return {
        "arch": machine.arch,
        "runState": machine.run_state,
        "changeable": machine.activity is Activity.CHANGEABLE,
        "migrating": machine.migrating,
        "uuid": machine.uuid,
        "hotplug": machine.slots is not None,
        "guestAcceptsUnplugs": machine.guest_accepts_unplugs,
        "vcpus": machine.vcpus,
        "minVCPUs": machine.floor,
        "maxVCPUs": machine.ceiling,
    }


def guest_document(guest: GuestReport | None, machine: Machine, not_queried: str | None) -> dict[str, Any] | None:
    """A guest for programs; None: no query was wanted."""
    if guest is None:
        if not_queried is None:
            return None
        reason, message = AgentReason.NOT_QUERIED, sentence(not_queried)
    else:
        reason = guest.reason(machine.vcpus)
        message = reason.meaning if guest.error is None else sentence(str(guest.error))
    cpus = None if guest is None else guest.cpus
    return {
        "reason": reason.value,
        "message": message,
        "onlineVCPUs": None if cpus is None else cpus.online,
        "offlineCPUs": None if cpus is None else list(cpus.offline),
    }


def _slot_document(found: Inspection, slot: Slot, requests: Mapping[CPU, Request]) -> dict[str, Any]:
    report = (found.machine.ost or {}).get(slot.index)
    request = requests.get(cpu_of(slot)) if slot.path is not None else None
    return {
        "slot": slot.index,
        "state": _state(slot),
        "props": dict(slot.props),
        "driver": slot.driver,
        "vcpus": slot.vcpus,
        "path": slot.path,
        "deviceID": _device_id(slot),
        "threadID": slot.thread_id,
        "unplugInProgress": _in_progress(slot, report),
        "pendingUnplug": None if request is None else _request_document(request),
        "ost": None
        if report is None
        else {
            "source": report.source,
            "status": report.status,
            "answer": None if report.answer is None else report.answer.value,
            "words": ost_words(report),
        },
        "online": True if slot.path is not None and found.all_online else None,
    }


def _request_document(request: Request) -> dict[str, Any]:
    return {
        "slot": request.slot,
        "path": request.path,
        "threadID": request.thread_id,
        "requestedAt": timestamp(request.requested_at),
        "attempts": request.attempts,
        "answer": None if request.answer is None else request.answer.value,
    }


def page(found: Inspection) -> list[Block]:
    """The result for people."""
    blocks: list[Block] = [Facts(list(_facts(found)))]
    if found.machine.slots is not None:
        blocks.append(_grid(found, found.machine.slots))
    if notes := list(_notes(found)):
        blocks.append(Lines(notes))
    return blocks


def _facts(found: Inspection) -> Iterator[tuple[str, Cell]]:
    machine = found.machine
    yield "Monitor", found.monitor
    yield "QEMU", f"{found.observation.version or 'unknown version'}, {machine.arch}"
    yield "UUID", machine.uuid or "none"
    colour = "green" if machine.activity is Activity.CHANGEABLE else "yellow"
    migration = ", migrating" if machine.migrating else ""
    yield "Run state", Styled(f"{machine.run_state}{migration} ({_ACTIVITY[machine.activity]})", colour)
    yield "vCPUs", f"{machine.vcpus} present, {reach(machine)}"
    if machine.slots is None:
        yield "Hotplug", Styled("not supported by this machine type", "yellow")
        return
    kinds = sorted({(slot.driver, slot.vcpus) for slot in machine.slots})
    yield (
        "Slots",
        f"{len(machine.slots)}: "
        + ", ".join(f"{driver} with {'1 vCPU' if vcpus == 1 else f'{vcpus} vCPUs'} each" for driver, vcpus in kinds),
    )
    if not machine.unpluggable:
        yield "Unplug", "no vCPU can be unplugged"
    elif machine.guest_accepts_unplugs:
        yield "Unplug", "the guest accepts requests" if machine.ost is not None else "unknown until a request is sent"
    else:
        yield (
            "Unplug",
            Styled("the guest does not accept requests: it is still booting, or was booted with acpi=off", "yellow"),
        )
    yield from guest_facts(found.guest, machine, found.not_queried)


def reach(machine: Machine) -> str:
    """The counts that the machine can have, whatever a set declares."""
    if machine.floor == machine.ceiling:
        return "cannot be changed"
    return f"{machine.floor} to {machine.ceiling} possible"


def guest_facts(guest: GuestReport | None, machine: Machine, not_queried: str | None) -> Iterator[tuple[str, Cell]]:
    """What is known of the guest, for people; nothing if no query was wanted."""
    if guest is None:
        if not_queried is not None:
            yield "Guest", Styled(f"not queried: {not_queried}", "yellow")
        return
    if guest.cpus is None:
        yield "Guest", Styled(f"no answer: {guest.error}", "yellow")
        return
    text = f"{guest.cpus.online} of {machine.vcpus} online"
    if guest.reason(machine.vcpus) is AgentReason.OTHER_MACHINE:
        yield "Guest", Styled(f"{guest.cpus.online} online: this is the agent of another machine", "red")
    elif guest.cpus.online == machine.vcpus:
        yield "Guest", Styled(text, "green")
    else:
        offline = ", ".join(map(str, guest.cpus.offline)) or "none"
        yield "Guest", Styled(f"{text}; offline (guest CPU numbers): {offline}", "yellow")


def _grid(found: Inspection, slots: Sequence[Slot]) -> Grid:
    machine, requests = found.machine, found.requests
    uniform = len({(slot.driver, slot.vcpus) for slot in slots}) == 1
    header = ["SLOT", "STATE", "OCCUPIED BY", "PROPS"]
    header += [] if uniform else ["TYPE", "VCPUS"]
    header += ["PENDING"]
    header += [] if machine.ost is None else ["LAST _OST"]
    header += [] if found.guest is None else ["ONLINE"]

    def row(run: Sequence[Slot]) -> list[Cell]:
        slot, report = run[0], (machine.ost or {}).get(run[0].index)
        name = str(slot.index) if len(run) == 1 else f"{slot.index}-{run[-1].index}"
        state = _state(slot)
        cells: list[Cell] = [name, Styled(state.lower(), _COLOURS[state]), slot.path or "-", _props(run)]
        cells += [] if uniform else [slot.driver, str(slot.vcpus)]
        cells += [_pending(slot, report, requests)]
        cells += [] if machine.ost is None else [_last_ost(report)]
        cells += [] if found.guest is None else [_online(found, slot)]
        return cells

    return Grid(header, [row(run) for run in _runs(machine, slots)])


_COLOURS: Final[Mapping[str, str]] = {"Free": "dim", "Boot": "cyan", "Plugged": "green"}


def _runs(machine: Machine, slots: Sequence[Slot]) -> Iterator[Sequence[Slot]]:
    """The slots of each line of the table."""

    def likeness(slot: Slot) -> object:
        report = (machine.ost or {}).get(slot.index)
        return slot.index if slot.path is not None else (slot.driver, slot.vcpus, tuple(slot.props), report)

    for _, group in groupby(slots, likeness):
        run = list(group)
        if len(run) >= _FOLDED_FROM:
            yield run
        else:
            yield from ([slot] for slot in run)


def _state(slot: Slot) -> str:
    if slot.path is None:
        return "Free"
    return "Boot" if slot.boot else "Plugged"


def _device_id(slot: Slot) -> str | None:
    """The id of the device; None: it has none."""
    folder, _, name = (slot.path or "").rpartition("/")
    return name if folder == "/machine/peripheral" else None


def _props(run: Sequence[Slot]) -> str:
    """ "socket 0, core 3, thread 0", or of several slots "core 3-7"."""
    parts = []
    for key in run[0].props:
        # Numbers before words; one property is never both.
        values = sorted({slot.props[key] for slot in run}, key=lambda value: (str(type(value)), value))
        text = str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
        parts.append(f"{key.removesuffix('-id')} {text}")
    return ", ".join(parts)


def _in_progress(slot: Slot, report: Ost | None) -> bool:
    return slot.path is not None and report is not None and report.answer is Answer.IN_PROGRESS


def _pending(slot: Slot, report: Ost | None, requests: Mapping[CPU, Request]) -> Cell:
    request = requests.get(cpu_of(slot)) if slot.path is not None else None
    if request is not None:
        times = "" if request.attempts == 1 else f", {request.attempts} times"
        text = f"requested at {timestamp(request.requested_at)}{times}"
        if request.answer is None:
            return Styled(f"{text}, no answer", "yellow")
        return Styled(f"{text}: {request.answer.words}", "red" if request.answer.refused else "yellow")
    return Styled("in progress", "yellow") if _in_progress(slot, report) else "-"


def _last_ost(report: Ost | None) -> Cell:
    if report is None:
        return "-"
    words = ost_words(report) or "-"
    return Styled(words, "red") if report.answer is not None and report.answer.refused else words


def ost_words(report: Ost) -> str | None:
    """The last `_OST` report of a slot, with its code; None: there was none yet."""
    code = f"_OST {report.status:#x}"
    if (report.source, report.status) == (0, 0):
        return None
    if (answer := report.answer) is not None:
        if code in answer.words:
            return answer.words
        return f"refused, with a code that ACPI does not define ({code})"
    match report.source:
        case 0x03 | 0x103:
            return f"unplugged ({code})"
        case 0x00 | 0x01 | 0x200 if report.status == 0:
            return f"plug accepted ({code})"
        case 0x00 | 0x01 | 0x200:
            return f"plug rejected ({code})"
        case source:
            return f"about event {source:#x} ({code})"


def _online(found: Inspection, slot: Slot) -> Cell:
    if slot.path is None:
        return "-"
    return Styled("yes", "green") if found.all_online else "unknown"


def _notes(found: Inspection) -> Iterator[str]:
    if found.guest is not None and found.guest.cpus is not None and not found.all_online:
        yield (
            "ONLINE unknown: the guest uses its own CPU numbers, so offline CPUs cannot be matched to slots. ONLINE "
            "is known if all CPUs are online."
        )
    in_progress = any(_in_progress(slot, (found.machine.ost or {}).get(slot.index)) for slot in found.machine.occupied)
    if found.vcpuset is None and in_progress:
        yield (
            "PENDING shows what QEMU reports. QEMU does not report requests without an answer; the status of the "
            "VCPUSet has them: kubectl get vcpuset NAME -o yaml | vcpuset inspect MONITOR -f -"
        )
    if found.void:
        slots = ", ".join(str(request.slot) for request in found.void)
        yield f"Void requests in the status (the CPU is gone or belonged to another QEMU): slot {slots}."


def timestamp(time: datetime) -> str:
    """RFC 3339, in UTC and whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
