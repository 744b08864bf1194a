"""Opening, losing and closing a session: each wait ends, each failure has its type, nothing stays behind."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPError

from harness.faults import Link
from harness.faulty import (
    GARBAGE,
    GREETING,
    NOT_AN_OBJECT,
    NOT_UTF8,
    Bytes,
    Close,
    Deaf,
    Delay,
    Error,
    Fault,
    FaultyMonitor,
    Hang,
    NoId,
    Twice,
    WrongId,
)
from harness.guest import Guest
from harness.qmp import Raw, raw
from harness.wait import until
from qmp.sessions import Connect, Preceded, Wakes
from vcpuset.domain.errors import MonitorBusy, MonitorTimeout, MonitorUnreachable
from vcpuset.qmp.exchange import Command
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import open_socket
from vcpuset.qmp.tcp import TCPEndpoint

SHORT = 0.3
"""Seconds, for a deadline that the test waits for."""

BROKEN = pytest.mark.parametrize(
    "fault",
    [
        Bytes(GARBAGE),
        Bytes(NOT_UTF8),
        Bytes(NOT_AN_OBJECT),
        Bytes(b"\r\n"),
        Bytes(b"[" * 200_000 + b"\r\n"),
        Bytes(b'{"error": {}}\r\n'),
        Close(),
        Close(after_bytes=10),
        Bytes(b'"' + b"x" * (8 << 20) + b'"\r\n'),
    ],
    ids=["garbage", "not-utf8", "no-object", "empty-line", "nested", "error-without-id", "closed", "cut", "huge"],
)


@dataclass
class AnsweredAndClosed(Fault):
    """The whole answer, and the end of the connection."""

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send(answer)
        link.close()


@dataclass
class Halfway(Fault):
    """An error that has neither class nor text."""

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send({"id": answer["id"], "error": {"class": 5}})


@dataclass
class GarbageFromTheDeaf(Fault):
    """Garbage, while nothing is read any more."""

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send_bytes(GARBAGE)
        await link.left()


@contextlib.asynccontextmanager
async def tcp(host: str, monitor: Path | None) -> AsyncIterator[tuple[str, int]]:
    """A TCP address from which bytes are passed to a unix monitor; without one it accepts and says nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    passing: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            if monitor is None:
                await reader.read()
                return
            far_reader, far_writer = await asyncio.open_unix_connection(monitor)
            with contextlib.closing(far_writer):
                back = asyncio.create_task(copy(far_reader, writer))
                passing.add(back)
                await copy(reader, far_writer)
                await back

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await source.read(1 << 16):
                target.write(chunk)
                await target.drain()
            target.write_eof()

    with socket.create_server((host, 0), family=family) as listener:
        server = await asyncio.start_server(serve, sock=listener)
        async with server:
            yield host, listener.getsockname()[1]
        await asyncio.gather(*passing)


def opened_sockets() -> int:
    return sum("socket:" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


async def test_a_session_with_a_real_qemu_opens_observes_and_closes(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0])
    assert session.alive
    assert (await session.observe()).vcpus == 2
    await session.close()
    assert not session.alive


async def test_a_closed_session_leaves_the_monitor_to_the_next_client(q35: Guest, connect: Connect) -> None:
    for _ in range(20):
        session = await connect(q35.monitors[0])
        await session.close()
    assert (await (await connect(q35.monitors[0])).observe()).vcpus == 2


async def test_a_stale_socket_is_unreachable(q35: Guest, connect: Connect) -> None:
    q35.kill()
    with pytest.raises(MonitorUnreachable, match=r"nothing listens at team-a/qmp0: check that QEMU is running"):
        await connect(q35.monitors[0])


async def test_a_socket_that_may_not_be_written_to_is_unreachable_with_a_remedy(
    namespace_folder: Path, connect: Connect
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        namespace_folder.parent.chmod(0o755)
        monitor.path.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(MonitorUnreachable, match="write access"):
                await connect(monitor.path)
        finally:
            if root:
                os.seteuid(0)


async def test_a_monitor_that_another_client_holds_is_busy(q35: Guest, connect: Connect) -> None:
    async with raw(q35.monitors[0]):
        with pytest.raises(MonitorBusy, match="holds this monitor, QEMU hangs, or this is not a QMP monitor"):
            await connect(q35.monitors[0], open_seconds=SHORT)


async def test_a_monitor_whose_queue_is_full_is_busy_without_waiting(q35: Guest, connect: Connect) -> None:
    async def pass_through() -> None:
        await (await connect(q35.monitors[0])).close()

    async with raw(q35.monitors[0]):
        waiting = [asyncio.create_task(pass_through()) for _ in range(6)]
        done, pending = await asyncio.wait(waiting, timeout=60, return_when=asyncio.FIRST_EXCEPTION)
        assert {type(task.exception()) for task in done} == {MonitorBusy}
    # Those in the queue get their turn one by one, once the client has left.
    await asyncio.gather(*pending, return_exceptions=True)


async def test_a_qemu_that_hangs_is_busy_when_opening_and_times_out_when_asked(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0], command_seconds=SHORT)
    q35.freeze()
    try:
        with pytest.raises(MonitorTimeout, match=r"has not answered a query within 0\.3 s"):
            await session.observe()
        await session.close()
        with pytest.raises(MonitorBusy):
            await connect(q35.monitors[0], open_seconds=SHORT)
    finally:
        q35.thaw()


async def test_a_slow_greeting_is_waited_for(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={GREETING: Delay(0.2)}) as monitor:
        assert (await connect(monitor.path)).alive


async def test_events_that_come_before_the_greeting_are_passed_over(namespace_folder: Path, connect: Connect) -> None:
    """QEMU sends what happens while it accepts a client: measured with 10.0, 1.5 % of clients during a storm."""
    faults: dict[str, Fault] = {GREETING: Preceded(b'{"event": "RESUME"}\r\n' * 2)}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        assert (await (await connect(monitor.path)).observe()).vcpus == 2


@BROKEN
async def test_what_does_not_greet_in_qmp_is_unreachable(
    namespace_folder: Path, connect: Connect, fault: Fault, wakes: Wakes
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={GREETING: fault}) as monitor:
        cut = isinstance(fault, Close)
        words = "closed the connection before the session was established" if cut else "does not speak QMP"
        with pytest.raises(MonitorUnreachable, match=words) as raised:
            await connect(monitor.path, wakes)
        assert len(str(raised.value)) < 300
        assert str(raised.value).isprintable()
        assert wakes.count == 0


@BROKEN
async def test_a_negotiation_that_fails_is_unreachable(
    namespace_folder: Path, connect: Connect, fault: Fault, wakes: Wakes
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"qmp_capabilities": fault}) as monitor:
        with pytest.raises(MonitorUnreachable):
            await connect(monitor.path, wakes)
        assert wakes.count == 0


async def test_a_refused_negotiation_is_unreachable(namespace_folder: Path, connect: Connect) -> None:
    refused = Error("CommandNotFound", "not now")
    async with FaultyMonitor(namespace_folder / "qmp", faults={"qmp_capabilities": refused}) as monitor:
        with pytest.raises(MonitorUnreachable, match="did not accept qmp_capabilities"):
            await connect(monitor.path)


@pytest.mark.parametrize(
    "stray",
    [b'{"id": "another", "error": {"class": "GenericError", "desc": "no"}}', b'{"id": "another", "return": {}}',
     b'{"return": {}}', b'{"event": "RESUME"}'],
    ids=["error", "return", "return without id", "event"],
)  # fmt: skip
async def test_what_comes_before_the_reply_to_the_negotiation_is_not_taken_for_it(
    namespace_folder: Path, connect: Connect, stray: bytes
) -> None:
    faults: dict[str, Fault] = {"qmp_capabilities": Preceded(stray + b"\r\n")}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        assert (await (await connect(monitor.path)).observe()).vcpus == 2


async def silent(monitor: Raw) -> bool:
    try:
        await monitor.call("query-status", timeout=2)
    except TimeoutError:
        return True
    return False


async def test_qemu_that_answers_a_client_that_has_left_is_understood(q35: Guest, namespace_folder: Path) -> None:
    """It greets while a command of the former client is carried out, and sends that one's reply to the new one."""
    fifo = namespace_folder.parent / "fifo"
    os.mkfifo(fifo)
    async with raw(q35.control) as witness:
        async with raw(q35.monitors[0]) as former:
            saving = {"val": 0, "size": 1 << 25, "filename": str(fifo)}
            slow = asyncio.create_task(former.call("pmemsave", saving))  # until somebody reads there
            await until(partial(silent, witness), 60, "QEMU to be busy with it")
        with pytest.raises(QMPError):
            await slow
        greeted = asyncio.Event()
        with open_socket(namespace_folder.parent, namespace_folder.name, q35.monitors[0].name) as endpoint:
            opening = asyncio.create_task(
                Session.open(endpoint, lambda: None, permit=greeted.set, open_seconds=60, command_seconds=60)
            )
            await until(greeted.is_set, 60, "the greeting")
            await asyncio.to_thread(lambda: os.close(os.open(fifo, os.O_RDONLY)))
            session = await opening
            assert (await session.observe()).vcpus == 2
            await session.close()


async def test_a_connection_that_is_closed_right_after_the_negotiation_is_unreachable(
    namespace_folder: Path, connect: Connect, wakes: Wakes
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"qmp_capabilities": Close(after_bytes=1000)}) as monitor:
        with pytest.raises(MonitorUnreachable, match="closed the connection before the session was established"):
            await connect(monitor.path, wakes)
        assert wakes.count == 0


async def test_a_monitor_that_greets_and_then_says_no_more_times_out(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"qmp_capabilities": Hang()}) as monitor:
        with pytest.raises(MonitorTimeout, match="sent a greeting, but did not negotiate"):
            await connect(monitor.path, open_seconds=SHORT)


async def test_failed_and_cancelled_openings_leave_no_socket_behind(namespace_folder: Path) -> None:
    before = opened_sockets()
    async with FaultyMonitor(namespace_folder / "qmp", faults={GREETING: Hang()}) as monitor:
        with open_socket(namespace_folder.parent, "team-a", "qmp") as endpoint:
            with pytest.raises(MonitorBusy):
                await Session.open(endpoint, lambda: None, open_seconds=SHORT)
            opening = asyncio.create_task(Session.open(endpoint, lambda: None, open_seconds=60))
            await until(lambda: monitor.connections == 2, 60, "the second connection")
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            await until(lambda: not monitor._links, 60, "both connections to be closed")
    await until(lambda: opened_sockets() == before, 60, "all sockets to be closed")


async def test_request_ids_differ_from_session_to_session(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        for _ in range(2):
            session = await connect(monitor.path)
            await session.observe()
            await session.close()
        idents = [command.ident for command in monitor.commands if command.ident is not None]
        assert len(idents) == 14  # the negotiation and six queries each: the first look asks for the machine's UUID
        assert len(set(idents)) == 14


async def test_a_command_without_a_reply_times_out_and_the_next_one_works(
    namespace_folder: Path, connect: Connect
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-cpus-fast": Hang(times=1)}) as monitor:
        session = await connect(monitor.path, command_seconds=1.0)
        with pytest.raises(
            MonitorTimeout, match=r"has not answered a query within 1 s: check whether the QEMU process"
        ):
            await session.observe()
        assert session.alive
        assert (await session.observe()).vcpus == 2


@pytest.mark.parametrize("fault", [WrongId(), NoId()], ids=["wrong", "none"])
async def test_a_reply_that_cannot_be_matched_by_its_id_is_no_reply(
    namespace_folder: Path, connect: Connect, fault: Fault
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-status": fault}) as monitor:
        session = await connect(monitor.path, command_seconds=SHORT)
        with pytest.raises(MonitorTimeout):
            await session.observe()


async def test_a_reply_that_comes_twice_is_taken_once(namespace_folder: Path, connect: Connect) -> None:
    faults: dict[str, Fault] = {"query-status": Twice(), "query-cpus-fast": Twice()}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path)
        for _ in range(5):
            assert (await session.observe()).vcpus == 2


@BROKEN
async def test_a_connection_that_breaks_during_a_command_is_unreachable_and_wakes_once(
    namespace_folder: Path, connect: Connect, wakes: Wakes, fault: Fault
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-cpus-fast": fault}) as monitor:
        session = await connect(monitor.path, wakes)
        lost = "a query was answered: it was closed by the other end" if isinstance(fault, Close) else "query-cpus-fast"
        with pytest.raises(MonitorUnreachable, match=lost) as raised:
            await session.observe()
        assert len(str(raised.value)) < 400
        assert "Error" not in str(raised.value)
        await until(lambda: wakes.count, 60, "the wake")
        assert not session.alive
        with pytest.raises(MonitorUnreachable, match="the connection to team-a/qmp broke before"):
            await session.observe()
        await session.close()
        assert wakes.count == 1


async def test_a_reply_that_is_cut_off_by_the_end_of_the_connection_is_a_loss(
    namespace_folder: Path, connect: Connect
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-status": Close(after_bytes=10)}) as monitor:
        session = await connect(monitor.path)
        words = r"the connection to team-a/qmp broke before a query was answered: it was closed by the other end"
        with pytest.raises(MonitorUnreachable, match=words):
            await session.observe()


async def test_a_command_after_a_reply_with_which_the_connection_ended_is_told_in_words_for_users(
    namespace_folder: Path, connect: Connect
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-status": AnsweredAndClosed()}) as monitor:
        session = await connect(monitor.path)
        broken = "^the connection to team-a/qmp broke before a query was answered: it was closed by the other end$"
        with pytest.raises(MonitorUnreachable, match=broken):
            await session.observe()


async def test_an_error_reply_without_class_and_text_is_unreachable(namespace_folder: Path, connect: Connect) -> None:
    faults: dict[str, Fault] = {"query-status": Halfway()}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path)
        with pytest.raises(MonitorUnreachable, match="did not answer query-status: QMP error reply is malformed"):
            await session.observe()


async def test_the_death_of_qemu_is_noticed_without_asking(q35: Guest, connect: Connect, wakes: Wakes) -> None:
    session = await connect(q35.monitors[0], wakes)
    q35.kill()
    await until(lambda: wakes.count, 60, "the wake")
    assert not session.alive
    await session.close()
    await session.close()
    assert wakes.count == 1


async def test_a_closed_session_wakes_nobody_and_answers_no_command(q35: Guest, connect: Connect, wakes: Wakes) -> None:
    session = await connect(q35.monitors[0], wakes)
    q35.freeze()
    observing = asyncio.create_task(session.observe())
    await asyncio.sleep(0)
    await asyncio.gather(session.close(), session.close())
    with pytest.raises(MonitorUnreachable):
        await observing
    with pytest.raises(MonitorUnreachable):
        await session.observe()
    q35.kill()
    await q35.wait_ended()
    assert wakes.count == 0


async def test_closing_does_not_wait_for_a_peer_that_reads_nothing(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-status": Deaf()}) as monitor:
        session = await connect(monitor.path, command_seconds=SHORT)
        with pytest.raises(MonitorTimeout):
            await session.observe()
        long = Command("x" * (1 << 20))  # four are more than buffers hold
        stuck = [asyncio.create_task(session._execute(long)) for _ in range(4)]
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await session.close()
        results = await asyncio.gather(*stuck, return_exceptions=True)
        assert {type(result) for result in results} <= {MonitorTimeout, MonitorUnreachable}


async def test_a_break_is_told_at_once_even_if_the_peer_reads_nothing(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-status": GarbageFromTheDeaf()}) as monitor:
        session = await connect(monitor.path)
        commands = ["query-status", *["x" * (1 << 20)] * 4]
        executing = (session._execute(Command(command)) for command in commands)
        results = await asyncio.gather(*executing, return_exceptions=True)
        assert [type(result) for result in results] == [MonitorUnreachable] * 5


async def test_a_cancelled_close_has_cut_the_connection_all_the_same(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        session = await connect(monitor.path)
        closing = asyncio.create_task(session.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not session.alive
        await until(lambda: not monitor._links, 60, "the connection to be cut")


async def test_the_library_writes_nothing_into_the_log(
    namespace_folder: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qemu")
    with contextlib.suppress(MonitorUnreachable):
        await connect(("127.0.0.1", 1))
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-cpus-fast": Close()}) as monitor:
        session = await connect(monitor.path)
        with pytest.raises(MonitorUnreachable):
            await session.observe()
        await session.close()
    assert not [record for record in caplog.records if record.name.startswith("qemu")]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
async def test_a_monitor_on_tcp_is_reached_by_name_and_by_address(q35: Guest, connect: Connect, host: str) -> None:
    try:
        async with tcp("::1" if host == "::1" else "127.0.0.1", q35.monitors[0]) as (_, port):
            session = await connect((host, port))
            assert (await session.observe()).vcpus == 2
            await session.close()
    except OSError as error:
        if host != "::1":
            raise
        pytest.skip(f"no IPv6 here: {error}")


async def test_a_tcp_port_without_a_listener_is_unreachable(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = unused.getsockname()
        with pytest.raises(MonitorUnreachable, match=rf":{address[1]} refuses the connection: check that QEMU.*policy"):
            await connect(address)


async def test_a_tcp_server_that_says_nothing_is_busy(connect: Connect) -> None:
    async with tcp("127.0.0.1", None) as address:
        with pytest.raises(MonitorBusy):
            await connect(address, open_seconds=SHORT)


async def test_a_tcp_host_that_takes_no_connection_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        with contextlib.ExitStack() as queue:
            for _ in range(3):  # fill the backlog: the kernel drops what comes after
                waiting = queue.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
            with pytest.raises(MonitorUnreachable, match=r"did not accept the connection: its host is unreachable"):
                await Session.open(TCPEndpoint(*address), lambda: None, open_seconds=SHORT)
