"""What can be at a monitor's address in place of a plain QMP monitor: it is served, or the message has the remedy."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.faults import Fault, Link
from harness.faulty import GREETING, Bytes, Error, FaultyMonitor, Refuse
from harness.guest import Guest
from harness.qmp import raw
from harness.wait import until
from qmp.sessions import Connect, Wakes
from vcpuset.domain.errors import CommandError, MonitorBusy, MonitorUnreachable
from vcpuset.domain.machine import Answer
from vcpuset.qmp.client import READ_LIMIT, UNSOLICITED_LIMIT

SHORT = 0.3

CHARDEV = "socket,id=other,path={path},server=on,wait=off"
PRETTY = ("-chardev", CHARDEV, "-mon", "chardev=other,mode=control,pretty=on")


@contextlib.asynccontextmanager
async def machine(folder: Path, *arguments: str, smp: str = "2,maxcpus=64") -> AsyncIterator[tuple[Guest, Path]]:
    """A stopped machine, and the socket that these arguments make at {path}."""
    path = folder / "other"
    extra = [argument.format(path=path) for argument in arguments]
    async with Guest(None, smp=smp, memory=64, socket_dir=folder, extra=extra) as guest:
        yield guest, path


async def test_a_monitor_with_pretty_on_is_served(namespace_folder: Path, connect: Connect, wakes: Wakes) -> None:
    async with machine(namespace_folder, *PRETTY) as (guest, path):
        session = await connect(path, wakes)
        await session.plug((await session.observe()).free[0])
        assert (await session.observe()).vcpus == 3
        async with raw(guest.control) as control:
            assert len(await control.call("query-cpus-fast")) == 3
            await control.call("system_reset")
        await until(lambda: wakes.count, 60, "an event in several lines")


async def test_the_longest_reply_is_read_from_a_monitor_with_pretty_on(
    namespace_folder: Path, connect: Connect
) -> None:
    async with machine(namespace_folder, *PRETTY, smp="1,maxcpus=4096") as (_, path):
        assert len((await (await connect(path)).observe()).slots or ()) == 4096


async def test_a_relay_of_libvirt_gets_one_command_at_a_time(
    namespace_folder: Path, connect: Connect, wakes: Wakes
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", cpus=2, slots=8, relay=True) as monitor:
        session = await connect(monitor.path, wakes)
        machines = await asyncio.gather(session.observe(), session.observe())
        assert [machine.vcpus for machine in machines] == [2, 2]
        monitor.faults["query-migrate"] = Error("GenericError", "no", times=1)
        with pytest.raises(CommandError):
            await session.observe()
        await session.plug((await session.observe()).free[0])
        assert (await session.observe()).vcpus == 3


async def test_the_events_of_a_relay_are_understood(namespace_folder: Path, connect: Connect, wakes: Wakes) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", cpus=3, slots=8, relay=True) as monitor:
        monitor.cpus.unplug[2] = Refuse(0x82)
        session = await connect(monitor.path, wakes)
        await session.unplug((await session.observe()).occupied[2])
        await until(lambda: session.answer(2) is Answer.BUSY, 60, "the guest's answer")
        await until(lambda: wakes.count, 60, "a wake because of it")
        monitor.emit("RTC_CHANGE")
        assert (await session.observe()).vcpus == 3


@dataclass
class Indented(Fault):
    """The message as QEMU sends it with pretty=on."""

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send_bytes(json.dumps(answer, indent=4).encode().replace(b"\n", b"\r\n") + b"\r\n")


@dataclass
class Followed(Fault):
    """The answer, and then this without being asked."""

    chunk: bytes

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send(answer)
        await link.send_bytes(self.chunk)


@pytest.mark.parametrize(
    ("fault", "limit"),
    [
        (Bytes(b"{\r\n" + b"    1,\r\n" * 200_000), READ_LIMIT),
        (Followed(b"{\r\n" + b"\r\n" * 10_000), UNSOLICITED_LIMIT),
    ],
    ids=["a-reply", "unasked"],
)
async def test_a_message_in_several_lines_is_as_limited_as_one_in_one(
    namespace_folder: Path, connect: Connect, fault: Fault, limit: int
) -> None:
    faults = {GREETING: Indented(), "query-hotpluggable-cpus": fault}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path)
        with pytest.raises(MonitorUnreachable, match=f"a message of more than {limit} bytes"):  # noqa: PT012 - at the first or the second look
            for _ in range(2):
                await session.observe()
            await until(lambda: not session.alive, 60, "the end of the session")
            await session.observe()


async def test_a_message_in_several_lines_is_not_waited_for_from_a_monitor_that_greets_in_one(
    namespace_folder: Path, connect: Connect
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-status": Bytes(b"{\r\n")}) as monitor:
        session = await connect(monitor.path)
        with pytest.raises(MonitorUnreachable, match="a message that is not JSON"):
            await session.observe()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-monitor", "unix:{path},server=on,wait=off"), "(HMP); use -qmp instead of -monitor, or add mode=control"),
        (("-chardev", CHARDEV, "-mon", "chardev=other"), "(HMP); use -qmp instead of -monitor, or add mode=control"),
        (("-chardev", f"{CHARDEV},telnet=on", "-mon", "chardev=other"), "(HMP); use -qmp instead of -monitor"),
        (("-chardev", f"{CHARDEV},telnet=on", "-mon", "chardev=other,mode=control"), "remove telnet=on"),
        (("-chardev", f"{CHARDEV},tn3270=on", "-mon", "chardev=other,mode=control"), "tn3270=on"),
    ],
    ids=["hmp", "mon-without-mode", "hmp-telnet", "telnet", "tn3270"],
)
async def test_a_monitor_that_speaks_something_else_is_recognised(
    namespace_folder: Path, connect: Connect, arguments: tuple[str, ...], words: str
) -> None:
    async with machine(namespace_folder, *arguments) as (_, path):
        with pytest.raises(MonitorUnreachable) as raised:
            await connect(path)
    assert str(raised.value).startswith("team-a/other does not speak QMP: ")
    assert words in str(raised.value)


AGENT = (
    "-device", "virtio-serial-pci", "-chardev", CHARDEV,
    "-device", "virtserialport,chardev=other,name=org.qemu.guest_agent.0",
)  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        AGENT,
        ("-chardev", CHARDEV, "-serial", "chardev:other"),
        ("-chardev", CHARDEV, "-gdb", "chardev:other"),
        ("-chardev", f"{CHARDEV},websocket=on", "-mon", "chardev=other,mode=control"),
    ],
    ids=["agent", "serial", "gdb", "websocket"],
)
async def test_a_socket_that_says_nothing_may_be_no_monitor(
    namespace_folder: Path, connect: Connect, arguments: tuple[str, ...]
) -> None:
    async with machine(namespace_folder, *arguments) as (_, path):
        with pytest.raises(
            MonitorBusy, match=r"this is not a QMP monitor \(but a guest agent's channel or a serial port\)"
        ):
            await connect(path, open_seconds=SHORT)


async def test_what_is_no_json_is_told_without_names_of_python(namespace_folder: Path, connect: Connect) -> None:
    for line in (b"\x80\r\n", b"login: \r\n", b"{'QMP': 1}\r\n"):
        async with FaultyMonitor(namespace_folder / "qmp", faults={GREETING: Bytes(line)}) as monitor:
            with pytest.raises(MonitorUnreachable, match=r"does not speak QMP: a message that is not JSON$"):
                await connect(monitor.path)
