"""Whatever a monitor says, a session ends in an error of its own or in the machine that the monitor showed.

Conversations of real machines (`recordings.json`) are replayed with something wrong in them, and what comes of each is
held against a plain reading of the same bytes (`reading.py`). Time is virtual, so that deadlines cost nothing and a
case is the same on each machine. `fuzzing.py` says how to look for longer.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Sequence
from random import Random
from typing import Any

import pytest

from harness.mutate import JUNK, encoded, restructure, scar
from qmp import reading
from qmp.decisions import check_decisions
from qmp.fuzzing import Case, Distort, feed, settled
from qmp.peer import CLOSE, Asked, Entry, Step, connected
from qmp.reading import Failure, Reading
from qmp.recordings import Message, Recording, load
from vcpuset.domain.assessment import failure
from vcpuset.domain.errors import VCPUSetError
from vcpuset.domain.machine import Machine
from vcpuset.qmp.session import Session

pytestmark = pytest.mark.looptime

RECORDED = load()

GREETING = "greeting"
TARGETS = (
    GREETING, "qmp_capabilities", "query-status", "query-migrate", "query-acpi-ospm-status", "query-cpus-fast",
    "query-hotpluggable-cpus", "query-uuid", "device_add", "device_del",
)  # fmt: skip
WEIGHTS = (2, 1, 3, 3, 4, 8, 8, 1, 2, 2)


@pytest.fixture(autouse=True)
def _the_same_ids_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that differ from run to run would have other things come of a changed bit."""
    monkeypatch.setattr("secrets.randbelow", lambda _: 7)


WORDS = (
    "running", "paused", "inmigrate", "shutdown", "io-error", "active", "completed", "setup", "CPU", "DIMM", "x86_64",
    "ppc64", "s390x", "0", "1", "2", "5", "/machine/unattached/device[0]", "/machine/peripheral/vcpu5",
    "/machine/peripheral/vcpu4/thread[0]", "return", "error",
)  # fmt: skip
"""Strings that mean something in one reply or another."""

REFUSALS = (
    "CPU[3] with APIC ID 3 exists", "machine does not support hot-plugging CPUs", "Device 'x' not found",
    "device_add not allowed while migrating",
    "acpi: device unplug request for not supported device type: qemu64-x86_64-cpu", "Boot CPU is unpluggable", "",
    "\x1b[31m\n" * 999, "Duplicate device ID 'vcpu3'", "\ud800",
)  # fmt: skip


class Monitor:
    """The monitor of one recorded machine, which answers some commands wrongly."""

    def __init__(self, case: Case, wrong: int) -> None:
        self._case = case
        self._machine: Recording = case.rng.choice(RECORDED.machines)
        self.targets = case.rng.choices(TARGETS, WEIGHTS, k=wrong)
        self.second_look = case.rng.random() < 0.15
        """Whether queries are answered wrongly only when they are asked a second time."""
        case.about = f"{self._machine.name}, {self.targets}"

    def answer(self, asked: Asked | None) -> list[Step]:
        """What it says to a command, or at the beginning."""
        if asked is None:
            name, message = GREETING, {**self._machine.greeting}
        else:
            name, message = asked.command, {**self._machine.replies.get(asked.command, {"return": {}})}
            if asked.ident is not None:
                message["id"] = asked.ident
        right: list[Step] = [encoded(message)]
        first = name.startswith("query-") and not self._case.outcomes
        if name not in self.targets or (self.second_look and first):
            return right
        steps = self._case.distort(self._case.rng, message)
        self._case.fed += steps != right
        return steps


async def hold(case: Case, wrong: int = 1) -> None:
    """One conversation, from opening to closing, and what is to be said of it.

    wrong  how many replies are
    """
    wakes: list[float] = []
    closed = False

    def wake() -> None:
        assert not closed
        wakes.append(loop.time())

    loop = asyncio.get_running_loop()
    started = loop.time()
    monitor = Monitor(case, wrong)
    peer, endpoint = await connected(monitor.answer)
    session: Session | None = None
    try:
        async with asyncio.timeout(1000):
            story = Story(case, monitor, peer.transcript, started)
            session = await story.open(Session.open(endpoint, wake))
            machine = await story.observe(session) if session is not None else None
            if session is not None and machine is not None:
                if await story.change(session, machine):
                    machine = await story.observe(session)
                await asyncio.sleep(1)
                if machine is not None:
                    story.compare_events(session, wakes)
    except AssertionError as error:
        for entry in peer.transcript:
            error.add_note(f"{entry!r:.1000}")
        raise
    finally:
        if session is not None:
            await session.close()
        closed = True
        # A transport that was aborted is closed in the loop's next round.
        await asyncio.sleep(1)
        left = peer.left
        peer.end()
        await asyncio.sleep(1)
        assert left, "the connection was left open"


class Story:
    """Does one thing after the other with a session, and compares what comes of it with the reading."""

    def __init__(self, case: Case, monitor: Monitor, transcript: Sequence[Entry], started: float) -> None:
        self._case = case
        self._monitor = monitor
        self._transcript = transcript
        self._started = started
        self._asked = 0
        self._results: list[tuple[str, list[Asked]]] = []

    async def open(self, opening: Awaitable[object]) -> Session | None:
        outcome = await settled(opening)
        self._new_commands()
        right = self._reading().opened()
        self._assess("open", outcome, right, None)
        return outcome if isinstance(outcome, Session) else None

    async def observe(self, session: Session) -> Machine | None:
        outcome = await settled(session.observe())
        asked = self._new_commands()
        reading_ = self._reading()
        self._replay(reading_)
        right = reading_.observed(asked) if asked else [reading.LOST]
        seen = outcome
        if isinstance(outcome, Machine):
            seen = reading.plain(outcome)
        self._assess("observe", seen, right, "Machine")
        self._results.append(("observe", asked))
        if not isinstance(outcome, Machine):
            return None
        if self._case.fed:
            check_decisions(outcome)
        return outcome

    async def change(self, session: Session, machine: Machine) -> bool:
        """Plug or unplug, if the case is about that. False: an error."""
        outcome: object = None
        if "device_add" in self._monitor.targets and machine.free:
            outcome = await settled(session.plug(machine.free[0]))
        elif "device_del" in self._monitor.targets and len(machine.occupied) > 1:
            outcome = await settled(session.unplug(machine.occupied[-1]))
        elif not self._monitor.second_look:
            return False
        asked = self._new_commands()
        if asked:
            reading_ = self._reading()
            self._replay(reading_)
            # A refusal that can be about the id has a second try, whose outcome counts.
            for each in asked:
                right = reading_.carried_out(each)
            self._assess("change", outcome, right, None)
            self._results.append(("change", asked))
        return outcome is None

    def compare_events(self, session: Session, wakes: Sequence[float]) -> None:
        """What the guest has answered, and whether there was an occasion to look again."""
        read = self._reading()
        self._replay(read)
        read.rest()
        unplugged = any(asked.command == "device_del" for _, each in self._results for asked in each)
        if not unplugged:
            found = reading.answers(read.events)
            for slot in {*found, 0, 1, 4}:
                assert session.answer(slot) == found.get(slot)
        assert bool(wakes) == (reading.wakes(read.events) or read.lost)
        assert session.alive == (not read.lost)

    def _reading(self) -> Reading:
        return Reading(self._transcript, self._started)

    def _replay(self, read: Reading) -> None:
        """Bring a new reading to where the conversation is."""
        read.opened()
        for what, asked in self._results:
            if what == "observe":
                read.observed(asked)
            else:
                for each in asked:
                    read.carried_out(each)

    def _new_commands(self) -> list[Asked]:
        """The commands asked since the last look, without the negotiation."""
        found = [entry for entry in self._transcript if isinstance(entry, Asked)]
        new = [entry for entry in found[self._asked :] if entry.command != "qmp_capabilities"]
        self._asked = len(found)
        return new

    def _assess(self, what: str, outcome: object, right: Sequence[object], success: str | None) -> None:
        if isinstance(outcome, Exception):
            assert isinstance(outcome, VCPUSetError), f"{what}: {outcome!r}"
            assert any(isinstance(each, Failure) and each.fits(outcome) for each in right), (what, outcome, right)
            assert str(outcome).isprintable()
            assert 0 < len(str(outcome)) < 1500
            assert failure(outcome).message
            self._case.outcomes.append(type(outcome).__name__)
        elif success is None:
            assert None in right, (what, right)
        else:
            assert outcome in right, f"{what}: {outcome}\nis none of {right}"
            self._case.outcomes.append(success)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def structure(rng: Random, message: Message) -> list[Step]:
    """Something else in the message, mostly below what it returns."""
    within = ("return", "QMP", "error") if rng.random() < 0.9 else ()
    return [encoded(restructure(rng, message, WORDS, within))]


def scars(rng: Random, message: Message) -> list[Step]:
    """Bytes that are not as they were."""
    line = encoded(message)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        line = scar(rng, line) or b"\n"
    return [line]


def disorder(rng: Random, message: Message) -> list[Step]:
    """Ids and replies that belong to something else, twice, or together."""
    ident = message.get("id", "__qmp#00007")
    number = int(ident.rpartition("#")[2])
    others: list[Any] = [None, 0, 7, "", [ident], {"id": ident}, True, 1.5, ident + " ", ident.upper(), *JUNK]
    others += [f"__qmp#{number + step:05d}" for step in (-1, 1, 2)] * 4
    other = {**message, "id": rng.choice(others)}
    empty: Message = {"return": {}, "id": ident}
    anonymous = {key: value for key, value in message.items() if key != "id"}
    strangers: list[Any] = [
        {},
        empty,
        other,
        anonymous,
        RECORDED.machines[1].greeting,
        {"error": {}},
        {"error": {}, "id": "x"},
    ]
    stranger = rng.choice([*strangers, rng.choice(JUNK), rng.choice(JUNK)])
    match rng.randrange(9):
        case 0 | 1:
            return [encoded(other)]
        case 2:
            return [encoded(anonymous)]
        case 8:
            return [encoded(stranger)]
        case 3:
            return [encoded(message) * rng.choice([2, 3, 200])]
        case 4:
            return [encoded(stranger) + encoded(message)]
        case 5:
            return [encoded(message) + encoded(stranger)]
        case 6:
            return [encoded(message).strip() + encoded(stranger)]
        case _:
            return [encoded(message), 0.5, encoded(other)]


def refusals(rng: Random, message: Message) -> list[Step]:
    """Errors, whole and broken."""
    classes = ["GenericError", "CommandNotFound", "DeviceNotFound", "DeviceNotActive", "KVMMissingCap", "New", ""]
    error = {"class": rng.choice(classes), "desc": rng.choice(REFUSALS)}
    refused = {key: value for key, value in message.items() if key not in {"return", "QMP"}} | {"error": error}
    match rng.randrange(6):
        case 0 | 1:
            return [encoded(refused)]
        case 2:
            return [encoded({**message, "error": error})]
        case 3:
            return [encoded({**refused, "error": rng.choice(JUNK)})]
        case _:
            return [encoded(restructure(rng, refused, REFUSALS, ("error",)))]


def events(rng: Random, message: Message) -> list[Step]:
    """Events of all names, right and wrong, around the reply and within it."""
    found: list[bytes] = []
    for _ in range(rng.choice([1, 1, 2, 5, 100])):
        event = copy.deepcopy(rng.choice(RECORDED.events))
        if rng.random() < 0.4:
            event["event"] = rng.choice(RECORDED.event_names)
        if rng.random() < 0.7:
            event = restructure(rng, event, (*WORDS, *RECORDED.event_names))
        if rng.random() < 0.05 and isinstance(event, dict):
            event["id"] = message.get("id")
        found.append(encoded(event) if rng.random() < 0.97 else scar(rng, encoded(event)))
    at = rng.randrange(len(found) + 1)
    before, after = b"".join(found[:at]), b"".join(found[at:])
    if rng.random() < 0.1:
        line = encoded(message)
        cut = rng.randrange(len(line))
        return [line[:cut] + before + line[cut:] + after]
    return [before, encoded(message), after] if rng.random() < 0.8 else [before, 0.1, encoded(message), 0.1, after]


def endings(rng: Random, message: Message) -> list[Step]:
    """Replies that come in pieces, late, in part or not at all."""
    line = encoded(message)
    cut = rng.randrange(len(line))
    if rng.random() < 0.004:
        return [line[:cut] + b" " * (5 << 20) + line[cut:]]
    late = rng.choice([0.5, 2.5, 6.0, 50.0])
    ways: list[list[Step]] = [
        [line[:cut], CLOSE], [line, CLOSE], [line.rstrip(), CLOSE], [line[:cut]], [], [CLOSE], [late, line],
        [line[:cut], late, line[cut:]], [line, rng.choice([0.01, 0.5]), CLOSE],
        [step for at in range(0, len(line), 7) for step in (line[at : at + 7], 0.001)],
    ]  # fmt: skip
    return rng.choice(ways)


KINDS: dict[str, tuple[Distort, int]] = {
    "structure": (structure, 2300),
    "bytes": (scars, 1500),
    "disorder": (disorder, 900),
    "refusals": (refusals, 900),
    "events": (events, 900),
    "endings": (endings, 700),
}


SEVERAL = 900


def test_there_are_enough_of_them() -> None:
    assert sum(wanted for _, wanted in KINDS.values()) + SEVERAL >= 8000


@pytest.mark.parametrize("kind", KINDS)
async def test_one_wrong_reply_ends_in_an_error_of_ours_or_in_the_machine_that_was_shown(kind: str) -> None:
    endings = await feed(kind, *KINDS[kind], hold)
    # Both ways out were taken: the measure is not one that everything passes.
    assert {"Machine", "MonitorUnreachable"} <= endings


async def test_several_wrong_replies_do_so_too() -> None:
    def anything(rng: Random, message: Message) -> list[Step]:
        return rng.choice([structure, structure, structure, refusals, events, scars, disorder, endings])(rng, message)

    found = await feed("several", anything, SEVERAL, lambda case: hold(case, wrong=4))
    assert {"Machine", "MonitorUnreachable"} <= found


# --- what was found so ------------------------------------------------------------------------------------------------


async def test_an_event_that_comes_with_the_id_of_an_answered_command_is_an_event() -> None:
    def answer(asked: Asked | None) -> list[Step]:
        if asked is None:
            return [encoded(RECORDED.machines[0].greeting)]
        reply = {**RECORDED.machines[0].replies[asked.command], "id": asked.ident}
        return [encoded(reply) + encoded({"event": "STOP", "id": asked.ident})]

    woken = asyncio.Event()
    peer, endpoint = await connected(answer)
    session = await Session.open(endpoint, woken.set)
    try:
        await session.observe()
        async with asyncio.timeout(10):
            await woken.wait()
    finally:
        await session.close()
        peer.end()
