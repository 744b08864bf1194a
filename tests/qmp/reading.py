"""What a conversation with a monitor comes to, read plainly from what the monitor sent.

The fuzz test's measure of right and wrong, written from the protocol's definition and apart from the code under test:
lines are JSON objects; the first greets; a reply carries the id of its command; events may stand anywhere; a line that
the end of the connection cuts off is none. It knows no connection and no waiting, only a transcript and its times.
Where two outcomes are right, since it depends on who is faster, it allows both.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qmp.peer import Asked, Entry, Line, Sent, lines
from vcpuset.domain.errors import (
    CommandError,
    MachineUnsettled,
    MonitorBusy,
    MonitorTimeout,
    MonitorUnreachable,
    VCPUSetError,
)
from vcpuset.domain.machine import Answer, Machine
from vcpuset.qmp.client import READ_LIMIT, UNSOLICITED_LIMIT
from vcpuset.qmp.session import COMMAND_SECONDS, OPEN_SECONDS

__all__ = ["Failure", "Reading", "parsed", "strict_json"]

Json = Any

ANSWERS = {
    1: "Failure", 2: "UnrecognizedNotify", 128: "NotSupported", 129: "InUse", 130: "Busy", 131: "DependencyBusy",
    132: "InProgress",
}  # fmt: skip
WAKING = {
    "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "GUEST_CRASHLOADED", "GUEST_PANICKED", "MIGRATION", "RESET",
    "RESUME", "SHUTDOWN", "STOP", "SUSPEND", "SUSPEND_DISK", "WAKEUP", "WATCHDOG",
}  # fmt: skip
NO_MIGRATION = {"none", "cancelled", "completed", "failed"}
ORDER = ["drawer-id", "book-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id"]
NEEDED = {
    "query-status", "query-migrate", "query-acpi-ospm-status", "query-cpus-fast", "query-hotpluggable-cpus",
    "query-uuid",
}  # fmt: skip
FIRST_ID = "__qmp#00007"
"""That of the negotiation, where ids are the same each time. Whoever guesses it may answer before being asked."""


@dataclass(frozen=True)
class Failure:
    """An error that is right: its type, and for what QEMU said itself, whose words they are."""

    kind: type[VCPUSetError]
    command: str = ""
    error_class: str = ""

    def fits(self, error: BaseException) -> bool:
        """Whether this is that error."""
        if self.kind is not CommandError:
            return type(error) is self.kind
        return (
            isinstance(error, CommandError)
            and error.command == self.command
            and error.error_class == self.error_class[:1000]
        )


LOST = Failure(MonitorUnreachable)
LATE = Failure(MonitorTimeout)
BUSY = Failure(MonitorBusy)
UNSETTLED = Failure(MachineUnsettled)


@dataclass(frozen=True)
class Reply:
    """A message with the id of a command.

    due  it came after the command was sent, so it counts unless one before was faster
    """

    at: float
    due: bool
    message: dict[str, Json]


class Senseless(Exception):
    """A value is not what QEMU sends."""


def parsed(line: Line) -> dict[str, Json] | None:
    """The message in a line; None: there is none, or it cannot be read."""
    if line.text is None or len(line.text) > READ_LIMIT or not line.text.endswith(b"\n"):
        return None
    try:
        value = strict_json(line.text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def strict_json(text: bytes) -> Json:
    """A value in JSON as RFC 8259 has it; ValueError or RecursionError for anything else.

    Python also reads NaN, numbers that become infinite, halves of surrogate pairs, and other encodings than UTF-8.
    """

    def members(pairs: list[tuple[str, Json]]) -> Json:
        json.dumps(pairs, allow_nan=False, ensure_ascii=False).encode()  # also the first of two with one name
        return dict(pairs)

    return members([("", json.loads(text.decode(), object_pairs_hook=members))])[""]


class Reading:
    """The conversation so far; each method takes the next step of it.

    events  those that the client has read by now
    lost    whether it has met the end of the connection, or what cannot be read
    """

    def __init__(self, transcript: Iterable[Entry], started: float) -> None:
        transcript = list(transcript)
        self._lines = [(line, parsed(line)) for line in lines(transcript)]
        sent = b"".join(entry.chunk for entry in transcript if isinstance(entry, Sent))
        self._unfinished = len(sent) - (sent.rfind(b"\n") + 1)
        self._next = 0
        self._started = started
        # Asked for once: one connection leads to one machine.
        self._uuids: list[dict[str, Json]] = [{}]
        self.events: list[dict[str, Json]] = []
        self.lost = False
        self._lost_at = 0.0

    def opened(self) -> list[Failure | None]:
        """The outcomes that are right for opening the session; None: it is open."""
        greeting = self._take_no_event()
        if isinstance(greeting, Failure) and self._lines and (self._lines[0][0].text or b"").rstrip() == b"{":
            return [LOST, BUSY]  # with pretty=on a greeting begins so; the rest of it may not come
        if isinstance(greeting, Failure):
            return [BUSY if greeting is LATE else greeting]
        match greeting:
            case {"QMP": {"version": dict(), "capabilities": list() | str()}}:
                pass
            case _:
                return [LOST]
        while True:
            reply = self._take_no_event()
            if isinstance(reply, Failure):
                return [reply]
            if reply.get("id") == FIRST_ID or ("error" in reply and "id" not in reply):
                break
        if "return" not in reply or "error" in reply:
            return [LOST]
        return [None, LOST] if self._trouble_by(1) else [None]

    def _take_no_event(self) -> dict[str, Json] | Failure:
        while True:
            message = self._take(self._started + OPEN_SECONDS)
            if isinstance(message, Failure) or "event" not in message:
                return message

    def observed(self, asked: Sequence[Asked]) -> list[Failure | dict[str, Json]]:
        """The outcomes that are right after these commands of an observation: errors, or what the machine is.

        They were sent together; each reply may take its time from the one before it.
        """
        found: dict[Json, list[Reply]] = {each.ident: [] for each in asked}
        # Replies that came before they were asked for make alternatives.
        stories = [(asked[0].at, story) for story in copy.deepcopy(self._uuids)]
        right: list[Failure | dict[str, Json]] = []
        for command in asked:
            self._read_for(command.ident, found, asked[0].number)
            ways = [(*each, story) for at, story in stories for each in self._ways(found[command.ident], at)]
            stories = []
            for at, reply, story in ways:
                value = _value(command.command, reply)
                if isinstance(value, Failure):
                    right.append(value)
                else:
                    stories.append((at, {**story, command.command: value}))
        complete = [story for _, story in stories if story.keys() >= NEEDED]
        self._uuids = [{"query-uuid": story["query-uuid"]} for story in complete] or self._uuids
        if any(_at_odds(story) for story in complete):
            right.append(UNSETTLED)
        return right + [machine(story) for story in complete if not _at_odds(story)]

    def _read_for(self, ident: Json, found: dict[Json, list[Reply]], first: int) -> None:
        """Read on until the reply to this command has come; `first` is the number of the first one sent with it."""
        while not self.lost and self._next < len(self._lines) and not any(each.due for each in found[ident]):
            line = self._lines[self._next][0]
            message = self._take(float("inf"))
            if isinstance(message, Failure):
                self._lost_at = line.at
            elif not self._is_event(message):
                whose = message.get("id")
                if isinstance(whose, dict | list) or ("error" in message and "id" not in message):
                    self.lost, self._lost_at = True, line.at
                elif isinstance(whose, str) and whose in found:
                    found[whose].append(Reply(line.at, line.after >= first, message))

    def _ways(self, replies: Sequence[Reply], began: float) -> Iterator[tuple[float, dict[str, Json] | Failure]]:
        """What may count as a command's reply, and when it has been taken."""
        deadline = began + COMMAND_SECONDS
        for reply in replies:
            if not reply.due:
                yield began, reply.message
            else:
                yield (max(began, reply.at), reply.message) if reply.at <= deadline else (deadline, LATE)
                return
        yield deadline, LOST if self.lost and self._lost_at <= deadline else LATE

    def carried_out(self, asked: Asked) -> list[Failure | None]:
        """The outcomes that are right for a command that returns nothing; None: it succeeded."""
        right: list[Failure | None] = []
        for reply in self.replies(asked):
            outcome = _returned(asked.command, reply)
            right.append(outcome if isinstance(outcome, Failure) else None)
        return [*right, LOST] if self._trouble_by(asked.number) else right

    def replies(self, asked: Asked) -> Iterator[dict[str, Json] | Failure]:
        """What may count as the reply; the last one does unless one before was faster."""
        while True:
            line = self._lines[self._next][0] if self._next < len(self._lines) else None
            message = self._take(asked.at + COMMAND_SECONDS)
            if isinstance(message, Failure):
                yield message
                return
            if self._is_event(message):
                continue
            ident = message.get("id")
            if ident == asked.ident and isinstance(ident, str):
                yield message
                if line is not None and line.after >= asked.number:
                    return
            elif isinstance(ident, dict | list) or ("error" in message and "id" not in message):
                self.lost = True
                yield LOST
                return

    def rest(self) -> None:
        """The client reads what is still there."""
        while self._next < len(self._lines) and not self.lost:
            message = self._take(float("inf"))
            if not isinstance(message, Failure) and not self._is_event(message):
                ident = message.get("id")
                self.lost = isinstance(ident, dict | list) or ("error" in message and "id" not in message)
        # Once no reply is awaited any more, no client waits for the end of so long a line.
        self.lost = self.lost or self._unfinished > UNSOLICITED_LIMIT

    def _take(self, deadline: float) -> dict[str, Json] | Failure:
        if self.lost:
            return LOST
        if self._next == len(self._lines) or self._lines[self._next][0].at > deadline:
            return LATE
        message = self._lines[self._next][1]
        self._next += 1
        if message is None:
            self.lost = True
            return LOST
        return message

    def _is_event(self, message: dict[str, Json]) -> bool:
        if "event" in message:
            self.events.append(message)
        return "event" in message

    def _trouble_by(self, number: int) -> bool:
        """Whether something that ends the connection came before the client could ask for more."""
        for line, message in self._lines[self._next :]:
            if line.after > number:
                return False
            if message is None:
                return True
            if "event" not in message:
                ident = message.get("id")
                if isinstance(ident, dict | list) or ("error" in message and "id" not in message):
                    return True
        return False


def answers(events: Iterable[dict[str, Json]]) -> dict[int, Answer]:
    """What the guest has said to unplug requests, by slot."""
    found = {}
    for event in events:
        report = _report(event)
        if report is not None and report[1] in {0x03, 0x103} and report[2] != 0:
            found[report[0]] = Answer(ANSWERS.get(report[2], "Other"))
    return found


def wakes(events: Iterable[dict[str, Json]]) -> bool:
    """Whether one of the events is an occasion to look at the machine."""
    for event in events:
        if isinstance(event["event"], str) and event["event"] in WAKING:
            return True
        report = _report(event)
        if report is not None and not (report[1] in {0x03, 0x103} and report[2] == 132):
            return True
    return False


def _report(event: dict[str, Json]) -> tuple[int, int, int] | None:
    """Slot, source and status of a report about a CPU."""
    try:
        if event["event"] != "ACPI_DEVICE_OST":
            return None
        entry = _an(dict, _an(dict, event.get("data")).get("info"))
        return _ost(entry)
    except Senseless:
        return None


# --- replies ----------------------------------------------------------------------------------------------------------


def _returned(command: str, reply: dict[str, Json] | Failure) -> Json | Failure:
    if isinstance(reply, Failure):
        return reply
    if "error" in reply:
        match reply["error"]:
            case {"class": str(error_class), "desc": str()}:
                return Failure(CommandError, command, error_class)
            case _:
                return LOST
    return reply.get("return", LOST)


def _value(command: str, reply: dict[str, Json] | Failure) -> Json | Failure:
    """What a reply says, in a form to make a machine of."""
    value = _returned(command, reply)
    if isinstance(value, Failure):
        assert isinstance(reply, dict) or value is reply
        if value.kind is CommandError and isinstance(reply, dict):
            if command in {"query-acpi-ospm-status", "query-stats"}:
                return None
            words = " ".join(reply["error"]["desc"].split())[:200]
            unknown = "does not support hot-plugging" in words or "does not support hotplugging" in words
            unknown |= "feature 'query-hotpluggable-cpus' is not enabled" in words
            if command == "query-hotpluggable-cpus" and (value.error_class == "CommandNotFound" or unknown):
                return None
        return value
    try:
        match command:
            case "query-status":
                return _text(_an(dict, value).get("status"))
            case "query-migrate":
                return "status" in _an(dict, value) and _text(value["status"]) not in NO_MIGRATION
            case "query-acpi-ospm-status":
                reports = [_ost(_an(dict, entry)) for entry in _an(list, value)]
                return {report[0]: report[1:] for report in reports if report is not None}
            case "query-cpus-fast":
                return _cpus(value)
            case "query-hotpluggable-cpus":
                return _slots(value)
            case "query-stats":
                return None  # whatever it says, the machine is what it is
            case "query-uuid":
                return _uuid(_an(dict, value).get("UUID"))
            case _:
                raise AssertionError(command)
    except Senseless:
        return LOST


def _at_odds(said: dict[str, Json]) -> bool:
    """Whether the two lists of CPUs are of different moments."""
    threads = _threads(said)
    slots = said["query-hotpluggable-cpus"]
    held = {slot["path"]: slot["vcpus"] for slot in slots or () if slot["path"] is not None}
    return slots is not None and held != {path: len(each) for path, each in threads.items()}


def _threads(said: dict[str, Json]) -> dict[str, list[int]]:
    threads: dict[str, list[int]] = {}
    for path, thread in said["query-cpus-fast"]["devices"]:
        threads.setdefault(path, []).append(thread)
    return threads


def machine(said: dict[str, Json]) -> dict[str, Json]:
    """What the replies together say of the machine."""
    cpus, slots, threads = said["query-cpus-fast"], said["query-hotpluggable-cpus"], _threads(said)
    for slot in slots or ():
        slot["thread_id"] = min(threads[slot["path"]]) if slot["path"] in threads else None
    return {
        "run_state": said["query-status"],
        "arch": cpus["arch"],
        "vcpus": len(cpus["devices"]),
        "slots": slots,
        "migrating": said["query-migrate"],
        "ost": said["query-acpi-ospm-status"],
        "uuid": said["query-uuid"],
    }


def plain(seen: Machine) -> dict[str, Json]:
    """A machine in the form of `machine`."""
    slots = None
    if seen.slots is not None:
        assert [slot.index for slot in seen.slots] == list(range(len(seen.slots)))
        slots = [
            {"driver": s.driver, "props": dict(s.props), "vcpus": s.vcpus, "path": s.path, "thread_id": s.thread_id}
            for s in seen.slots
        ]
    return {
        "run_state": seen.run_state,
        "arch": seen.arch,
        "vcpus": seen.vcpus,
        "slots": slots,
        "migrating": seen.migrating,
        "ost": None if seen.ost is None else {slot: (each.source, each.status) for slot, each in seen.ost.items()},
        "uuid": seen.uuid,
    }


def _uuid(value: Json) -> str | None:
    if not re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", _an(str, value)):
        raise Senseless
    return str(value) if value.strip("0-") else None


def _cpus(value: Json) -> Json:
    devices = []
    targets = set()
    for entry in _an(list, value):
        targets.add(_text(_an(dict, entry).get("target")))
        thread_of = re.fullmatch(r"(.*)/thread\[[^/]*", path := _text(entry.get("qom-path")))
        devices.append((thread_of[1] if thread_of else path, _number(entry.get("thread-id"), 0, 2**63 - 1)))
    if len(targets) > 1:
        raise Senseless
    return {"arch": targets.pop() if targets else "unknown", "devices": devices}


def _slots(value: Json) -> Json:
    found = []
    for entry in _an(list, value):
        props = _an(dict, _an(dict, entry).get("props"))
        for key, each in props.items():
            if type(each) is not int and (type(each) is not str or key in ORDER):
                raise Senseless
        path = _text(entry["qom-path"]) if "qom-path" in entry else None
        vcpus = _number(entry.get("vcpus-count"), 1, 1024)
        found.append({"driver": _text(entry.get("type")), "props": props, "vcpus": vcpus, "path": path})
    found.sort(key=lambda slot: [slot["props"].get(key, -1) for key in ORDER])
    paths = [slot["path"] for slot in found if slot["path"] is not None]
    places = [[slot["props"].get(key, -1) for key in ORDER] for slot in found]
    sizes = {slot["vcpus"] for slot in found}
    if len(set(paths)) < len(paths) or any(place in places[:at] for at, place in enumerate(places)) or len(sizes) > 1:
        raise Senseless
    return found


def _ost(entry: dict[str, Json]) -> tuple[int, int, int] | None:
    if _an(str, entry.get("slot-type")) != "CPU":
        return None
    if not re.fullmatch("[0-9]{1,5}", _an(str, entry.get("slot"))) or int(entry["slot"]) > 4095:
        raise Senseless
    return int(entry["slot"]), _an(int, entry.get("source")), _an(int, entry.get("status"))


def _an(kind: type, value: Json) -> Json:
    if type(value) is not kind:
        raise Senseless
    return value


def _text(value: Json) -> str:
    """A name: nothing that the status of a VCPUSet, or one line of a log, could not hold."""
    if type(value) is not str or not 1 <= len(value) <= 1024 or not value.isprintable():
        raise Senseless
    return value


def _number(value: Json, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Senseless
    return value
