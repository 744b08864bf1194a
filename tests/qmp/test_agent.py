"""The guest's agent: what a real one says and does, and that each of its failures has its type and its end."""

import asyncio
import contextlib
import errno
import json
import logging
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from harness import qmp
from harness.faults import (
    GARBAGE,
    NOT_AN_OBJECT,
    NOT_UTF8,
    Bytes,
    Close,
    Delay,
    Error,
    Fault,
    Hang,
    NoId,
    Twice,
)
from harness.faultyagent import SYNC, FaultyAgent, Returns
from harness.guest import Guest
from harness.saved import saved_guest
from harness.wait import until
from qmp.peer import Asked, Step, connected
from vcpuset.domain.errors import AgentRefused, AgentTimeout, AgentUnreachable
from vcpuset.domain.guest import GuestCPU, GuestCPUs
from vcpuset.qmp import agent as agent_module
from vcpuset.qmp.agent import FIRST_BATCH, Agent
from vcpuset.qmp.client import READ_LIMIT
from vcpuset.qmp.sockets import UnixEndpoint, open_socket

GET = "guest-get-vcpus"
SET = "guest-set-vcpus"

SHORT = 0.4
"""Seconds, for a deadline that the test waits for."""
LONG = 60.0

BROKEN = pytest.mark.parametrize(
    "fault",
    [
        Bytes(GARBAGE * 2),
        Bytes(NOT_UTF8 * 2),
        Bytes(NOT_AN_OBJECT * 2),
        Bytes(b"[" * 200_000 + b"\n\n"),
        Bytes(b'"' + b"x" * 2 * READ_LIMIT + b'"\n\n'),
        Bytes(b'{"event": "STOP", "data": {}}\n'),
        Bytes(b"{}\n"),
        Close(),
        Close(after_bytes=10),
        Error("GenericError", "no"),
    ],
    ids=["garbage", "not-utf8", "no-object", "nested", "huge", "event", "empty", "closed", "cut", "refused"],
)


class Open(Protocol):
    """Opens a conversation with the agent at a path in a namespace's folder; it is closed when the test ends."""

    def __call__(self, path: Path, *, seconds: float = ...) -> Coroutine[None, None, Agent]: ...


def found(path: Path) -> UnixEndpoint:
    return open_socket(path.parent.parent, path.parent.name, path.name)


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


@pytest.fixture
async def open_agent() -> AsyncIterator[Open]:
    agents = []

    async def opened(path: Path, *, seconds: float = LONG) -> Agent:
        with found(path) as endpoint:
            agent = await Agent.open(endpoint, seconds=seconds)
        agents.append(agent)
        return agent

    yield opened
    for agent in agents:
        await agent.close()


@pytest.fixture
def path(namespace_folder: Path) -> Path:
    """Where the agent's socket is."""
    return namespace_folder / "agent.sock"


@pytest.fixture
async def guest(path: Path) -> AsyncIterator[Guest]:
    """A real guest with an agent and one CPU, which sets no CPU online by itself."""
    async with saved_guest(agent=True, append="online=none", agent_path=path) as running:
        yield running
    assert names(path.parent) == []


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever an agent does is told by an exception, and by nothing else."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


async def plug(guest: Guest, *slots: int) -> None:
    await qmp.device_add(guest.control, *slots)
    await until(lambda: guest.present() == {0, *slots}, 60, "the guest to see the CPUs")


async def stop_agent(guest: Guest) -> None:
    await guest.shell("kill -9 $(pidof qemu-ga); while pidof qemu-ga; do :; done")


async def start_agent(guest: Guest, options: str = "") -> None:
    await guest.shell(f"(qemu-ga -m virtio-serial -p /dev/vport0p1 -t /run {options} >/dev/null 2>&1 &)")


@contextlib.asynccontextmanager
async def another_client(path: Path, sends: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(sends)
        await writer.drain()
        yield reader
    finally:
        writer.transport.abort()


# A real agent.


async def test_a_plugged_cpu_shows_as_offline_until_the_agent_has_brought_it_online(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await plug(guest, 1, 2)
    agent = await open_agent(path)
    before = await agent.cpus()
    assert before == GuestCPUs((GuestCPU(0, True, False), GuestCPU(1, False, True), GuestCPU(2, False, True)))
    assert (before.online, before.offline) == (1, (1, 2))
    assert await agent.bring_online(before.offline) == {}
    await guest.wait_online({0, 1, 2})
    assert (await agent.cpus()).online == 3


async def test_cpus_that_are_online_already_and_none_at_all_are_brought_online_without_complaint(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await plug(guest, 1)
    agent = await open_agent(path)
    assert await agent.bring_online([]) == {}
    for _ in range(2):
        assert await agent.bring_online([1, 0, 1]) == {}
        await guest.wait_online({0, 1})


async def test_cpus_that_do_not_exist_are_named_with_the_agent_s_words_and_do_not_keep_the_others_offline(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await plug(guest, 1, 2, 3)
    agent = await open_agent(path)
    refused = await agent.bring_online([77, 1, 2, 78, 79, 3])
    assert refused == {
        cpu: f'open("/sys/devices/system/cpu/cpu{cpu}/"): No such file or directory' for cpu in (77, 78, 79)
    }
    await guest.wait_online({0, 1, 2, 3})


async def test_a_conversation_goes_on_after_the_agent_was_restarted(guest: Guest, path: Path, open_agent: Open) -> None:
    agent = await open_agent(path)
    await stop_agent(guest)
    await start_agent(guest)
    assert (await agent.cpus()).online == 1


async def test_without_an_agent_in_the_guest_the_error_says_so_and_vain_attempts_do_no_harm_later(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await stop_agent(guest)
    for _ in range(3):
        with pytest.raises(
            AgentTimeout, match=r"has not answered .* qemu-guest-agent is not running .* start the agent"
        ):
            await open_agent(path, seconds=SHORT)
    await start_agent(guest)
    assert (await (await open_agent(path)).cpus()).online == 1


async def test_an_agent_that_hangs_is_given_up_and_its_late_answer_does_not_disturb_the_next_client(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    agent = await open_agent(path, seconds=10.0)
    await guest.shell("kill -STOP $(pidof qemu-ga)")
    with pytest.raises(AgentTimeout, match=rf"{path.name} has not answered a query within 10 s"):
        await agent.cpus()
    with pytest.raises(AgentUnreachable, match="was closed"):
        await agent.cpus()
    await guest.shell("kill -CONT $(pidof qemu-ga)")
    assert (await (await open_agent(path)).cpus()).online == 1


async def test_answers_to_clients_that_have_gone_are_not_taken_for_ours(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await plug(guest, 1)
    for _ in range(5):
        requests = [
            {"execute": GET},
            {"execute": "guest-sync", "arguments": {"id": 5}, "id": {"not": ["a", "string"]}},
            {"execute": SYNC, "arguments": {"id": 5}},
        ]
        async with another_client(path, "".join(map(json.dumps, requests)).encode()):
            pass
        agent = await open_agent(path)
        assert [cpu.logical_id for cpu in (await agent.cpus()).cpus] == [0, 1]
        await agent.close()


@pytest.mark.parametrize(
    "half", [b'{"execute":"guest-get-v', b'{"execute":"guest-sync","arguments":{"id":[[[{"a":"', b"garbage{", b"\xff"]
)
async def test_half_a_request_of_an_earlier_client_does_not_swallow_ours(
    guest: Guest, path: Path, open_agent: Open, half: bytes
) -> None:
    # A whole request before it: when that is answered, the agent has read on.
    async with another_client(path, b'{"execute":"guest-ping"}' + half) as reader:
        async with asyncio.timeout(LONG):
            assert json.loads(await reader.readline()) == {"return": {}}
    assert (await (await open_agent(path)).cpus()).online == 1


async def test_another_client_on_the_socket_is_named_as_a_cause_and_waited_for_no_longer_than_told(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    first = await open_agent(path)
    with pytest.raises(AgentTimeout, match=r"another client holds its socket; .* only for the operator"):
        await open_agent(path, seconds=SHORT)
    assert (await first.cpus()).online == 1
    await first.close()
    assert (await (await open_agent(path)).cpus()).online == 1


async def test_a_queue_of_other_clients_that_is_full_is_told_at_once(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    first = await open_agent(path)  # QEMU takes nobody out of the queue as long as this one stays
    with contextlib.ExitStack() as stack:
        refusal = 0
        while refusal != errno.EAGAIN:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            waiting.setblocking(False)
            refusal = waiting.connect_ex(str(path))
        with pytest.raises(AgentTimeout, match="another client holds its socket"):
            await open_agent(path)
        assert (await first.cpus()).online == 1


async def test_commands_that_the_guest_s_administrator_has_disabled_are_refused_in_the_agent_s_words(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await plug(guest, 1)
    await stop_agent(guest)
    await start_agent(guest, f"-b {GET},{SET}")
    agent = await open_agent(path)
    with pytest.raises(AgentRefused, match=f"{GET}: Command {GET} has been disabled") as refused:
        await agent.cpus()
    assert (refused.value.command, refused.value.error_class) == (GET, "CommandNotFound")
    assert refused.value.description == f"Command {GET} has been disabled"
    words = f"Command {SET} has been disabled"
    assert await agent.bring_online([1, 2, 3]) == {1: words, 2: words, 3: words}


async def test_an_agent_that_may_not_even_answer_guest_sync_refuses_the_conversation(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await stop_agent(guest)
    await start_agent(guest, f"-b {SYNC}")
    with pytest.raises(AgentRefused, match=f"{SYNC}: Command {SYNC} has been disabled"):
        await open_agent(path)


async def test_a_machine_that_ends_is_unreachable_for_those_who_talk_and_those_who_come(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    agent = await open_agent(path)
    await guest.shell("kill -STOP $(pidof qemu-ga)")
    asking = asyncio.create_task(agent.cpus())
    await asyncio.sleep(0)
    guest.kill()
    with pytest.raises(AgentUnreachable, match="closed before a query was answered"):
        await asking
    with pytest.raises(AgentUnreachable, match="closed"):
        await agent.cpus()
    with pytest.raises(AgentUnreachable, match=r"nothing listens at .*: check that QEMU is running"):
        await open_agent(path)


async def test_a_qmp_monitor_is_no_agent(namespace_folder: Path, open_agent: Open) -> None:
    async with Guest(None, memory=64, socket_dir=namespace_folder) as machine:
        with pytest.raises(AgentUnreachable, match=r"the greeting of a QMP monitor: this is not a guest agent"):
            await open_agent(machine.monitors[0])
        assert await qmp.count(machine.monitors[0]) == 1


async def test_closing_is_harmless_at_any_time_and_cuts_what_is_being_asked(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    agent = await open_agent(path)
    await guest.shell("kill -STOP $(pidof qemu-ga)")
    asking = asyncio.create_task(agent.cpus())
    await asyncio.sleep(0)
    await asyncio.gather(agent.close(), agent.close())
    await agent.close()
    with pytest.raises(AgentUnreachable):
        await asking
    with pytest.raises(AgentUnreachable):
        await agent.bring_online([1])


async def test_opening_that_is_cancelled_leaves_the_socket_to_the_next_client(
    guest: Guest, path: Path, open_agent: Open
) -> None:
    await guest.shell("kill -STOP $(pidof qemu-ga)")
    for _ in range(4):  # more than the socket's queue holds
        opening = asyncio.create_task(open_agent(path))
        await asyncio.sleep(0.01)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    await guest.shell("kill -CONT $(pidof qemu-ga)")
    assert (await (await open_agent(path)).cpus()).online == 1


# What a real agent does not do.


async def test_255_cpus_take_few_commands(path: Path, open_agent: Open) -> None:
    ids = range(1, 256)
    async with FaultyAgent(path, offline=ids) as faulty:
        agent = await open_agent(path)
        assert await agent.bring_online((await agent.cpus()).offline) == {}
        assert faulty.online == set(range(256))
        assert (await agent.cpus()).offline == ()
        assert len(faulty.received(SET)) < 10


async def test_a_guest_that_takes_long_is_asked_for_fewer_cpus_at_a_time(path: Path, open_agent: Open) -> None:
    async with FaultyAgent(path, faults={SET: Delay(1.6)}) as faulty:
        agent = await open_agent(path, seconds=3.0)
        assert await agent.bring_online(range(1, FIRST_BATCH + 4)) == {}
        assert [len(arguments["vcpus"]) for arguments in faulty.received(SET)] == [FIRST_BATCH, FIRST_BATCH // 2, 1]


async def test_a_partial_result_is_gone_on_with(path: Path, open_agent: Open) -> None:
    async with FaultyAgent(path, faults={SET: Returns(1)}) as faulty:
        agent = await open_agent(path)
        assert await agent.bring_online([5, 3, 4]) == {}
        asked = [[entry["logical-id"] for entry in arguments["vcpus"]] for arguments in faulty.received(SET)]
        assert asked == [[5, 3, 4], [3, 4], [4]]


@pytest.mark.parametrize("number", [0, -1, 3, 1 << 70, True, 1.0, "1", None, {}], ids=repr)
async def test_a_number_of_cpus_that_makes_no_sense_ends_the_conversation(
    path: Path, open_agent: Open, number: object
) -> None:
    async with FaultyAgent(path, faults={SET: Returns(number)}) as faulty:
        agent = await open_agent(path)
        with pytest.raises(AgentUnreachable, match=rf"answered {SET} with .* of 2 entries: this is not a guest agent"):
            await agent.bring_online([1, 2])
        assert len(faulty.received(SET)) == 1
        with pytest.raises(AgentUnreachable):
            await agent.cpus()


@pytest.mark.parametrize(
    "reply",
    [
        None,
        {},
        [],
        ["0"],
        [{"logical-id": 0}],
        [{"online": True}],
        [{"logical-id": "0", "online": True}],
        [{"logical-id": True, "online": True}],
        [{"logical-id": -1, "online": True}],
        [{"logical-id": 0.0, "online": True}],
        [{"logical-id": 0, "online": 1}],
        [{"logical-id": 0, "online": None}],
        [{"logical-id": 0, "online": True, "can-offline": "no"}],
        [{"logical-id": 0, "online": True, "can-offline": None}],
        [{"logical-id": 0, "online": True}, {"logical-id": 0, "online": False}],
    ],
    ids=repr,
)
async def test_a_list_of_cpus_that_makes_no_sense_is_no_agent_s(path: Path, open_agent: Open, reply: object) -> None:
    async with FaultyAgent(path, faults={GET: Returns(reply)}):
        agent = await open_agent(path)
        with pytest.raises(AgentUnreachable, match=rf"answered {GET} with .*: this is not a guest agent"):
            await agent.cpus()


async def test_keys_that_are_unknown_and_a_missing_can_offline_are_no_fault(path: Path, open_agent: Open) -> None:
    reply = [{"logical-id": 4, "online": False, "new": {}}, {"logical-id": 0, "online": True, "can-offline": False}]
    async with FaultyAgent(path, faults={GET: Returns(reply)}):
        cpus = await (await open_agent(path)).cpus()
    assert cpus == GuestCPUs((GuestCPU(0, True, False), GuestCPU(4, False, False)))


@BROKEN
@pytest.mark.parametrize("command", [SYNC, GET])
async def test_garbage_and_a_cut_connection_are_told_apart_from_silence(
    path: Path, open_agent: Open, command: str, fault: Fault
) -> None:
    expected = AgentRefused if isinstance(fault, Error) else AgentUnreachable
    told = "a query" if isinstance(fault, Close) else command
    async with FaultyAgent(path, faults={command: fault}):
        with pytest.raises(expected, match=told):
            await (await open_agent(path)).cpus()


@pytest.mark.parametrize("fault", [Hang(), NoId(), Bytes(b'\xff{"return": 1, "id": "another"}\n')])
async def test_a_conversation_begins_only_with_the_answer_to_our_own_number(
    path: Path, open_agent: Open, fault: Fault
) -> None:
    async with FaultyAgent(path, faults={SYNC: fault}):
        with pytest.raises(AgentTimeout):
            await open_agent(path, seconds=SHORT)


@pytest.mark.parametrize("value", [1, "1", None, True, {}], ids=repr)
async def test_another_number_than_ours_is_no_agent_s(path: Path, open_agent: Open, value: object) -> None:
    async with FaultyAgent(path, faults={SYNC: Returns(value)}):
        with pytest.raises(AgentUnreachable, match="this is not a guest agent"):
            await open_agent(path)


async def test_one_line_of_garbage_and_then_silence_is_no_agent(path: Path, open_agent: Open) -> None:
    async with FaultyAgent(path, stale=b"login: \n", faults={SYNC: Hang()}):
        with pytest.raises(AgentUnreachable, match="sent other data: this is not a guest agent"):
            await open_agent(path, seconds=SHORT)


@pytest.mark.parametrize(
    "stale",
    [
        b'": false, "logical-id": 3}]}\n',
        b"\xa4\n",
        b"\n",
        b'}\n{"return": 5}\n\xff{"return": 6, "id": "x"}\n{"id": [], "error": {"class": "C", "desc": "no"}}\n',
        b'{"return": [], "id": ',
        b'{"return": {}}\n' * 10_000,
    ],
    ids=["rest-of-a-line", "rest-of-a-letter", "rest-of-an-end", "rest-and-whole-ones", "beginning", "many"],
)
async def test_what_the_line_still_holds_for_others_is_skipped(path: Path, open_agent: Open, stale: bytes) -> None:
    async with FaultyAgent(path, offline={1}, stale=stale):
        agent = await open_agent(path)
        assert (await agent.cpus()).offline == (1,)
        assert await agent.bring_online([1]) == {}


async def test_an_answer_that_comes_twice_is_taken_once(path: Path, open_agent: Open) -> None:
    async with FaultyAgent(path, faults={SYNC: Twice(), GET: Twice()}):
        agent = await open_agent(path)
        for _ in range(3):
            assert (await agent.cpus()).online == 1


async def test_bringing_many_cpus_online_begins_nothing_new_when_its_time_is_over(
    path: Path, open_agent: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "BRING_ONLINE_SECONDS", 0.0)
    async with FaultyAgent(path, offline={1, 2}) as faulty:
        agent = await open_agent(path)
        assert await agent.bring_online([1, 2]) == {}
        assert (await agent.cpus()).offline == (1, 2)
        assert faulty.received(SET) == []


async def test_more_cpus_than_any_machine_has_are_no_agent_s(path: Path, open_agent: Open) -> None:
    reply = [{"logical-id": number, "online": False} for number in range(4097)]
    async with FaultyAgent(path, faults={GET: Returns(reply)}):
        with pytest.raises(AgentUnreachable, match="more than 4096 CPUs: this is not a guest agent"):
            await (await open_agent(path)).cpus()


@pytest.mark.parametrize("command", [GET, SET])
async def test_a_command_that_is_never_answered_ends_by_its_deadline(
    path: Path, open_agent: Open, command: str
) -> None:
    async with FaultyAgent(path, faults={command: Hang()}):
        agent = await open_agent(path, seconds=SHORT)
        asking: Any = agent.cpus() if command == GET else agent.bring_online([1])
        what = "a query" if command == GET else command
        with pytest.raises(AgentTimeout, match=f"has not answered {what} within {SHORT:g} s"):
            await asking


async def test_a_path_without_a_listener_is_unreachable(path: Path, open_agent: Open) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(str(path))
    with pytest.raises(AgentUnreachable, match="nothing listens"):
        await open_agent(path)


async def test_the_rest_of_a_long_answer_to_an_earlier_client_is_passed_over() -> None:
    def answer(asked: Asked | None) -> list[Step]:
        if asked is None:
            return [b"x" * 100_000 + b"\n"]
        return [b"\xff" + json.dumps({"return": asked.arguments["id"], "id": asked.ident}).encode() + b"\n"]

    peer, endpoint = await connected(answer)
    try:
        await (await Agent.open(endpoint, seconds=LONG)).close()
    finally:
        peer.end()
