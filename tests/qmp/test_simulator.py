"""The simulated machines: their words are QEMU's, and the product's own session cannot tell them from QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from harness import qmp
from harness.acpi import Acpi
from harness.cpus import Refuse
from harness.guest import Guest
from harness.simulation import Counted, Simulation
from harness.simulator import SimulatedMachine
from harness.wait import until
from qmp.recordings import QUERIES, Recording, load
from qmp.sessions import Connect, Wakes
from vcpuset.domain.errors import GuestNotReady, SlotTaken
from vcpuset.domain.machine import Answer, Machine

AT_ONCE = (0.0, 0.001)
LATE = (3600.0, 3600.0)


@contextlib.contextmanager
def simulated(path: Path, **options: Any) -> Iterator[SimulatedMachine]:
    """A machine that listens."""
    machine = SimulatedMachine(path, **options)
    machine.start()
    try:
        yield machine
    finally:
        machine.stop()


def recorded(name: str) -> Recording:
    """What QEMU said of a machine."""
    return next(machine for machine in load().machines if machine.name == name)


def without_threads(message: Any) -> Any:  # noqa: ANN401 - JSON
    """A reply without the host's thread ids, which no two processes share, nor the request's own id."""
    if isinstance(message, list):
        return [without_threads(each) for each in message]
    if isinstance(message, dict):
        # "thread-id" beside "core-id" is the topology's.
        of_host = {"thread-id"} if "qom-path" in message else set()
        return {key: without_threads(each) for key, each in message.items() if key not in of_host}
    return message


@contextlib.asynccontextmanager
async def wire(path: Path) -> AsyncIterator[Callable[..., Any]]:
    """A monitor without a client library: each call sends a command, or none, and returns the next line."""
    reader, writer = await asyncio.open_unix_connection(path)

    async def ask(command: str | None = None, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        if command is not None:
            writer.write(json.dumps({"execute": command, "arguments": arguments}).encode())
        async with asyncio.timeout(60):
            return json.loads(await reader.readline())

    try:
        yield ask
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_simulated_machine_says_word_for_word_what_qemu_said(tmp_path: Path) -> None:
    real = recorded("q35")
    with simulated(tmp_path / "vm", cpus=3, slots=6, status="paused") as machine:
        async with wire(machine.path) as ask:
            greeting = await ask()
            greeting["QMP"]["version"]["package"] = real.greeting["QMP"]["version"]["package"]
            assert greeting == real.greeting
            assert await ask("qmp_capabilities") == real.replies["qmp_capabilities"]
            plug = {"driver": "qemu64-x86_64-cpu", "id": "vcpu4", "socket-id": 0, "core-id": 4, "thread-id": 0}
            assert await ask("device_add", **plug) == real.replies["device_add"]
            event = await ask()
            assert event.pop("timestamp").keys() == {"seconds", "microseconds"}
            assert event["data"] == load().events[0]["data"]
            machine.unplug[1] = Refuse(0x82)
            await ask("device_del", id="/machine/unattached/device[2]")
            for _ in ("in progress", "refused"):
                await ask()
            for query in QUERIES:
                assert without_threads(await ask(query)) == without_threads(real.replies[query]), query
            assert await ask("device_del", id="vcpu4") == real.replies["device_del"]


async def test_a_cpu_that_leaves_sends_the_events_that_qemu_sends(tmp_path: Path) -> None:
    leaving = [each for each in load().events if each["event"] == "DEVICE_DELETED"]
    with simulated(tmp_path / "vm", cpus=1, slots=6, seconds=AT_ONCE) as machine:
        machine.cpus.plug(4)
        async with wire(machine.path) as ask:
            await ask()
            await ask("qmp_capabilities")
            await ask("device_del", id="vcpu4")
            events = [await ask() for _ in range(3)]
    names = [each["event"] for each in events]
    assert names == ["ACPI_DEVICE_OST", "DEVICE_DELETED", "ACPI_DEVICE_OST"]
    assert [each["data"] for each in events] == [each["data"] for each in load().events[-6:-3]]
    assert events[1]["data"] == leaving[0]["data"]


def comparable(machine: Machine) -> Machine:
    """A machine without what differs from one process to the next."""
    slots = tuple(replace(slot, thread_id=slot.thread_id and 1) for slot in machine.slots or ())
    return replace(machine, slots=slots, since=None)


async def test_a_session_sees_the_same_machine_in_the_simulator_and_in_a_real_qemu(
    namespace_folder: Path, q35: Guest, connect: Connect
) -> None:
    with simulated(namespace_folder / "vm", cpus=2, slots=64, status="paused", seconds=AT_ONCE) as machine:
        real, ours = await connect(q35.monitors[0]), await connect(machine.path)

        async def both() -> Machine:
            seen, expected = await ours.observe(), await real.observe()
            assert comparable(seen) == comparable(expected)
            return expected

        async with qmp.raw(q35.control) as control:
            acpi = Acpi(control)
            await acpi.leave_legacy()
            before = await both()
            assert before.slots is not None
            for slot in before.slots[2:5]:
                await real.plug(slot)
                await ours.plug(slot)
                await acpi.insert(slot.index)
            full = await both()
            assert full.vcpus == 5
            assert full.slots is not None
            for session in (real, ours):
                with pytest.raises(SlotTaken):
                    await session.plug(before.slots[3])
            for index in (1, 4):  # one that was there at the start, and one that was plugged
                await real.unplug(full.slots[index])
                await acpi.eject(index)
                await ours.unplug(full.slots[index])
            await until(lambda: machine.cpus.count == 3, 30, "two CPUs to leave")
            after = await both()
            assert after.vcpus == 3
            for index in (1, 4):
                # Success is told by the CPU's absence; what was heard before that is the same.
                assert real.answer(index) is ours.answer(index) is Answer.IN_PROGRESS


async def test_without_a_guest_an_unplug_is_refused_as_by_qemu(
    namespace_folder: Path, q35: Guest, connect: Connect
) -> None:
    with simulated(namespace_folder / "vm", cpus=2, slots=64, status="paused", guest=False) as machine:
        real, ours = await connect(q35.monitors[0]), await connect(machine.path)
        seen, expected = await ours.observe(), await real.observe()
        assert comparable(seen) == comparable(expected)
        assert expected.slots is not None
        words = []
        for session in (real, ours):
            with pytest.raises(GuestNotReady) as refusal:
                await session.unplug(expected.slots[1])
            words.append(str(refusal.value))
        assert words[0] == words[1]


async def test_one_client_is_served_two_wait_and_a_fourth_is_turned_away_as_by_qemu(
    namespace_folder: Path, q35: Guest
) -> None:
    with simulated(namespace_folder / "vm", cpus=2, slots=8) as machine:
        for path in (q35.monitors[0], machine.path):
            async with qmp.raw(path) as first:
                assert await first.count() == 2
                with contextlib.ExitStack() as waiting:
                    others = [waiting.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
                    for each in others:
                        each.setblocking(False)
                    assert [each.connect_ex(str(path)) for each in others] == [0, 0, errno.EAGAIN]
                    assert await first.count() == 2
                    with pytest.raises(BlockingIOError):
                        others[0].recv(1)
                    await first.disconnect()
                    for each in others[:2]:
                        async with asyncio.timeout(60):
                            assert b'"QMP"' in await asyncio.get_running_loop().sock_recv(each, 4096)
                        each.close()


async def test_a_request_that_is_repeated_is_one_request_and_ends_with_the_cpu(tmp_path: Path) -> None:
    with simulated(tmp_path / "vm", cpus=3, slots=8, seconds=LATE) as machine:
        async with qmp.raw(machine.path) as client:
            for _ in "ab":
                await client.device_del(2)
            assert await client.count() == 3
            machine.cpus.eject(2)
            assert await client.count() == 2
            await client.device_add(2)
            await client.device_del(2)
            assert await client.count() == 3


async def test_events_wake_the_session_that_waits_for_them(
    namespace_folder: Path, connect: Connect, wakes: Wakes
) -> None:
    with simulated(namespace_folder / "vm", cpus=2, slots=8, seconds=AT_ONCE) as machine:
        session = await connect(machine.path, wakes)
        slots = (await session.observe()).slots
        assert slots is not None
        await session.unplug(slots[1])
        await until(lambda: wakes.count and machine.cpus.count == 1, 30, "an event")
        machine.stop()
        await until(lambda: not session.alive, 30, "the loss of the session")


@pytest.mark.parametrize("text", ['{"execute": "query-status"}{"execute": "query-uuid"}', "\n {'no': 'JSON'}"])
async def test_requests_in_one_piece_or_in_many_are_answered_one_by_one(tmp_path: Path, text: str) -> None:
    with simulated(tmp_path / "vm", cpus=2, slots=8) as machine:
        reader, writer = await asyncio.open_unix_connection(machine.path)
        await reader.readline()
        for piece in ('{"execute": "qmp_capa', 'bilities", "id": 1}', text):
            writer.write(piece.encode())
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            assert json.loads(await reader.readline()) == {"return": {}, "id": 1}
            if "query" in text:
                assert json.loads(await reader.readline())["return"]["status"] == "running"
                assert "UUID" in json.loads(await reader.readline())["return"]
        writer.close()
        await writer.wait_closed()


async def test_what_cannot_be_done_is_refused_by_the_class_that_qemu_gives(tmp_path: Path) -> None:
    with simulated(tmp_path / "vm", cpus=2, slots=8) as machine:
        async with qmp.raw(machine.path) as client:
            for command, arguments, words in (
                ("qmp_capabilities", {}, "already complete"),
                ("no-such-command", {}, "has not been found"),
                ("device_del", {"id": "vcpu7"}, "not found"),
                ("device_del", {"id": "/machine/unattached/device[0]"}, "Boot CPU is unpluggable"),
            ):
                with pytest.raises(ExecuteError, match=words):
                    await client.call(command, arguments)


async def test_the_process_serves_its_machines_tells_of_changes_and_leaves_nothing(
    namespace_folder: Path, tmp_path: Path
) -> None:
    async with Simulation(namespace_folder, 20, cpus=(2, 6), slots=8, logs=tmp_path) as simulation:
        assert await qmp.count(namespace_folder / "vm-18.sock") == 2
        assert await qmp.count(namespace_folder / "vm-19.sock") == 6
        uuids = {str(await qmp.execute(namespace_folder / f"vm-{number}.sock", "query-uuid")) for number in range(20)}
        assert len(uuids) == 20
        assert simulation.news() == []
        await qmp.device_add(namespace_folder / "vm-0.sock", 2)
        await qmp.device_del(namespace_folder / "vm-1.sock", 5)
        told: list[Counted] = []

        def all_told() -> bool:
            told.extend(simulation.news())
            return len(told) == 2

        await until(all_told, 30, "two changes")
        assert {(each.machine, each.vcpus) for each in told} == {("vm-0", 3), ("vm-1", 5)}
    assert os.listdir(namespace_folder) == []  # noqa: PTH208
