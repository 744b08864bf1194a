"""Whatever a guest's agent says, it ends in an error of ours or in what the agent said of the guest's CPUs.

The same as `test_fuzz.py` for the other protocol: what a real agent answered, with something wrong in it, against a
plain reading of the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from harness.mutate import JUNK, encoded, restructure, scar
from qmp.fuzzing import Case, Distort, feed, settled
from qmp.peer import CLOSE, Asked, Entry, Step, connected, lines
from qmp.reading import strict_json
from qmp.recordings import Message, load
from vcpuset.domain.errors import AgentError, AgentRefused, AgentTimeout, AgentUnreachable
from vcpuset.domain.guest import GuestCPUs
from vcpuset.qmp.agent import AGENT_SECONDS, Agent

pytestmark = pytest.mark.looptime

RECORDED = load()
NUMBER = (1 << 52) + 1
"""What the client of these tests synchronises with."""

SYNC, GET, SET = "guest-sync-delimited", "guest-get-vcpus", "guest-set-vcpus"
ONLINE = (2, 5, 0, 9, 7, 3)
"""The CPUs that are to be set online; the first command is about four of them."""

LOST = AgentUnreachable
LATE = AgentTimeout
Refusal = tuple[str, str]
"""Class and words."""


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that differ from run to run would have other things come of a changed bit."""
    monkeypatch.setattr("secrets.randbelow", lambda _: 7)
    monkeypatch.setattr("secrets.randbits", lambda _: NUMBER)


# --- the plain reading ------------------------------------------------------------------------------------------------


class Reading:
    """What an agent's line carries: after the first answer to us, JSON objects with the ids of our commands."""

    def __init__(self, transcript: Sequence[Entry], started: float) -> None:
        self._lines = [(line.at, line.after, self._parsed(line.text)) for line in lines(transcript)]
        self._next = 0
        self._started = started
        self._synced = False

    @staticmethod
    def _parsed(text: bytes | None) -> dict[str, Any] | bytes | None:
        """A message; as bytes, if it is none; None: the end."""
        if text is None:
            return None
        text = text.rpartition(b"\xff")[2]
        try:
            value = strict_json(text)
        except (ValueError, RecursionError):
            return text
        return value if isinstance(value, dict) else text

    def reply(self, asked: Asked) -> list[dict[str, Any] | type[AgentError]]:
        """What may count as the answer: more than one if it depends on who is faster."""
        began = asked.at if self._synced else self._started
        right: list[dict[str, Any] | type[AgentError]] = []
        strange = False
        while True:
            if self._next == len(self._lines) or self._lines[self._next][0] > began + AGENT_SECONDS:
                return [*right, LOST if strange else LATE]
            _, after, message = self._lines[self._next]
            self._next += 1
            if isinstance(message, bytes) and self._next == 1:
                strange = True  # the rest of something that an earlier client has read the beginning of
                continue
            if not isinstance(message, dict) or _is_foreign(message):
                return [*right, LOST]
            if self._synced and _cannot_be_routed(message):
                right.append(LOST)
                if after > 1:
                    return right
                continue  # It came with the first answer, and the client may have taken it for a leftover.
            ours = isinstance(message.get("id"), str) and message["id"] == asked.ident
            if "event" in message and (ours or self._synced):
                continue  # never sent by an agent, and nothing to it
            if ours:
                right.append(message)
                if after >= asked.number:
                    self._synced = True
                    return [*right, LOST] if self._trouble_by(asked.number) else right

    def _trouble_by(self, number: int) -> bool:
        for _, after, message in self._lines[self._next :]:
            if after > number:
                return False
            if not isinstance(message, dict) or _is_foreign(message) or _cannot_be_routed(message):
                return True
        return False


def _is_foreign(message: dict[str, Any]) -> bool:
    """Whether a message shows that this is no agent."""
    return "QMP" in message or ("return" not in message and "error" not in message)


def _cannot_be_routed(message: dict[str, Any]) -> bool:
    """Whether a message cannot be an answer to any of our commands, nor one to somebody else's."""
    if "event" in message:
        return False
    return isinstance(message.get("id"), dict | list) or ("error" in message and "id" not in message)


def returned(reply: dict[str, Any] | type[AgentError]) -> object:
    """The value in a reply, a Refusal, or the error that it is."""
    if not isinstance(reply, dict):
        return reply
    if "error" in reply:
        match reply["error"]:
            case {"class": str(error_class), "desc": str(words)}:
                return AgentRefused, error_class, words
            case _:
                return LOST
    return [reply["return"]]


def guest(value: Any) -> dict[int, tuple[bool, bool]] | None:  # noqa: ANN401 - JSON
    """The CPUs in the answer to `guest-get-vcpus`; None: it makes no sense."""
    found: dict[int, tuple[bool, bool]] = {}
    if not isinstance(value, list):
        return None
    for entry in value:
        match entry:
            case {"logical-id": int(number), "online": bool(online)} if type(number) is int and 0 <= number < 1 << 63:
                can = entry.get("can-offline", False)
                if number in found or not isinstance(can, bool):
                    return None
                found[number] = (online, can)
            case _:
                return None
    return found or None


# --- conversations ----------------------------------------------------------------------------------------------------


class Line:
    """The agent at the other end of the line, which answers one command wrongly."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._target = case.rng.choice([SYNC, GET, GET, GET, SET, SET])
        self._leftover = case.rng.choice([b"", b"", b"", b'n": 1}\n', encoded({"return": {}, "id": "__qmp#00006"})])
        case.about = self._target

    def answer(self, asked: Asked | None) -> list[Step]:
        """What it says to a command."""
        if asked is None:
            return []
        message = {**RECORDED.agent[asked.command], "id": asked.ident}
        head = b""
        if asked.command == SYNC:
            message["return"] = asked.arguments["id"]
            parse_error = {"error": {"class": "GenericError", "desc": "JSON parse error, stray '\\xFF'"}}
            head = self._leftover + encoded(parse_error) + b"\xff"
        elif asked.command == SET:
            message["return"] = len(asked.arguments["vcpus"])
        right: list[Step] = [head, encoded(message)]
        if asked.command != self._target:
            return right
        steps: list[Step] = [head, *self._case.distort(self._case.rng, message)]
        self._case.fed += steps != right
        return steps


async def hold(case: Case) -> None:
    """Open, ask for the CPUs, set some online."""
    started = asyncio.get_running_loop().time()
    peer, endpoint = await connected(Line(case).answer)
    agent: Agent | None = None
    try:
        async with asyncio.timeout(1000):
            outcome = await settled(Agent.open(endpoint))
            asked = [entry for entry in peer.transcript if isinstance(entry, Asked)]
            read = Reading(peer.transcript, started)
            right = [returned(reply) for reply in read.reply(asked[0])]
            assess(case, outcome, [LOST if isinstance(each, list) and each != [NUMBER] else each for each in right])
            if not isinstance(outcome, Agent):
                return
            agent = outcome

            outcome = await settled(agent.cpus())
            new = [entry for entry in peer.transcript if isinstance(entry, Asked)][1:]
            read = Reading(peer.transcript, started)
            read.reply(asked[0])
            right = [returned(reply) for reply in read.reply(new[0])] if new else [LOST]
            sense = [guest(each[0]) or LOST if isinstance(each, list) else each for each in right]
            if isinstance(outcome, GuestCPUs):
                seen = {cpu.logical_id: (cpu.online, cpu.can_offline) for cpu in outcome.cpus}
                assert seen in sense, (outcome, right)
                assert list(seen) == sorted(seen)
                assert outcome.online == sum(online for online, _ in seen.values())
                assert outcome.offline == tuple(number for number, (online, _) in seen.items() if not online)
            assess(case, outcome, [each if not isinstance(each, dict) else [each] for each in sense])
            if isinstance(outcome, AgentUnreachable | AgentTimeout):
                return

            outcome = await settled(agent.bring_online(ONLINE))
            both = [entry for entry in peer.transcript if isinstance(entry, Asked)]
            read = Reading(peer.transcript, started)
            for before in both[:2]:
                over = LOST in read.reply(before)
            check_online(case, outcome, read, both[2:], over=over)
    except AssertionError as error:
        for entry in peer.transcript:
            error.add_note(f"{entry!r:.1000}")
        raise
    finally:
        if agent is not None:
            await agent.close()
        # A transport that was aborted is closed in the loop's next round.
        await asyncio.sleep(1)
        left = peer.left
        peer.end()
        await asyncio.sleep(1)
        assert left, "the connection was left open"


def assess(case: Case, outcome: object, right: Sequence[object]) -> None:
    """An error is one of those that are right; no error is right if a value is."""
    if isinstance(outcome, Exception):
        assert isinstance(outcome, AgentError), repr(outcome)
        assert str(outcome).isprintable()
        assert 0 < len(str(outcome)) < 1500
        if isinstance(outcome, AgentRefused):
            assert any(isinstance(each, tuple) and each[1][:1000] == outcome.error_class for each in right), (
                outcome,
                right,
            )
        else:
            assert type(outcome) in right, (outcome, right)
    else:
        assert any(isinstance(each, list) for each in right), (outcome, right)
    case.outcomes.append(type(outcome).__name__)


def check_online(case: Case, outcome: object, read: Reading, asked: Sequence[Asked], *, over: bool) -> None:
    """Each CPU is asked for until it is answered for, in order, and those refused are told.

    over  the connection may have ended before
    """
    left = list(ONLINE)
    refused: set[int] = set()
    right: list[object] = [LOST] if over and not asked else []
    for command in asked:
        batch = [entry["logical-id"] for entry in command.arguments["vcpus"]]
        assert batch
        assert batch == left[: len(batch)]
        assert all(entry["online"] is True for entry in command.arguments["vcpus"])
        right = []
        done = 0
        for each in (returned(reply) for reply in read.reply(command)):
            match each:
                case [int(count)] if type(count) is int and 1 <= count <= len(batch):
                    done = count
                    right.append(each)
                case [_]:
                    right.append(LOST)
                case (_, "CommandNotFound", _):
                    refused |= set(left)
                    done = len(left)
                    right.append([each])
                case (_, _, _):
                    refused.add(batch[0])
                    done = 1
                    right.append([each])
                case _:
                    right.append(each)
        del left[:done]
    if isinstance(outcome, dict):
        assert not left
        assert outcome.keys() == refused
        assert all(0 < len(words) <= 201 and words.isprintable() for words in outcome.values())
    assess(case, outcome, right)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def structure(rng: Random, message: Message) -> list[Step]:
    """Something else in the message, mostly below what it returns."""
    return [encoded(restructure(rng, message, (), ("return",) if rng.random() < 0.8 else ()))]


def scars(rng: Random, message: Message) -> list[Step]:
    """Bytes that are not as they were; a 0xFF among them has the client forget what was before."""
    line = encoded(message)
    for _ in range(rng.choice([1, 1, 2])):
        line = scar(rng, line) or b"\n"
    at = rng.randrange(len(line))
    return [line if rng.random() < 0.8 else line[:at] + b"\xff" + line[at:]]


def disorder(rng: Random, message: Message) -> list[Step]:
    """Ids and answers that belong to something else, twice, together, or not at all."""
    line = encoded(message)
    cut = rng.randrange(len(line))
    ids: list[Any] = ["__qmp#00006", "__qmp#00007", "__qmp#00008", "__qmp#00009", *JUNK]
    other = encoded({**message, "id": rng.choice(ids)})
    strangers: list[Any] = [{}, {"return": {}}, {"error": {}}, {"return": -1, "id": message["id"]}, {"event": "STOP"}]
    stranger = encoded(rng.choice([*strangers, RECORDED.machines[0].greeting, rng.choice(JUNK)]))
    late = rng.choice([0.5, 4.0, 30.0])
    ways: list[list[Step]] = [
        [other], [other, line], [line, other], [stranger, line], [line, stranger], [stranger], [line, line], [],
        [line[:cut]], [line[:cut], CLOSE], [line, CLOSE], [CLOSE], [late, line], [line[:cut], late, line[cut:]],
        [line * 200], [line.rstrip() + stranger], [line.rstrip(), CLOSE],
    ]  # fmt: skip
    return rng.choice(ways)


def refusals(rng: Random, message: Message) -> list[Step]:
    """Errors, whole and broken."""
    refused = {**RECORDED.agent[f"{SET} ENOENT"], "id": message["id"]}
    words = ("CommandNotFound", "GenericError", "Command guest-get-vcpus has been disabled", "\x1b[31m\n" * 999, "")
    return [encoded(refused if rng.random() < 0.1 else restructure(rng, refused, words, ("error",)))]


KINDS: dict[str, tuple[Distort, int]] = {
    "structure": (structure, 1200),
    "bytes": (scars, 800),
    "disorder": (disorder, 600),
    "refusals": (refusals, 400),
}


def test_there_are_enough_of_them() -> None:
    assert sum(wanted for _, wanted in KINDS.values()) >= 3000


@pytest.mark.parametrize("kind", KINDS)
async def test_a_wrong_answer_ends_in_an_error_of_ours_or_in_what_the_agent_said(kind: str) -> None:
    endings = await feed(kind, *KINDS[kind], hold)
    assert {"GuestCPUs", "AgentUnreachable", "dict"} <= endings
