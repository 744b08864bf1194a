"""The faulty monitor: without faults it is a machine, and each fault is what its name says to the stock client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient

from harness import qmp
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
    Huge,
    NoId,
    Refuse,
    Silent,
    Storm,
    Twice,
    WrongId,
)
from harness.wait import until

SOON = 0.3
"""Long enough for an answer that comes to have come, and short enough to wait for one that never does."""


@pytest.fixture
async def monitor(tmp_path: Path) -> AsyncIterator[FaultyMonitor]:
    """A machine with 2 of 8 CPUs and no fault."""
    async with FaultyMonitor(tmp_path / "qmp", cpus=2, slots=8) as server:
        yield server


async def _events(listener: EventListener, number: int) -> list[tuple[str, Any]]:
    async with asyncio.timeout(30):
        events = [await listener.get() for _ in range(number)]
    return [(str(event["event"]), event["data"]) for event in events]


def _ost(slot: int, source: int, status: int, **device: str) -> tuple[str, Any]:
    info = {**device, "slot": str(slot), "slot-type": "CPU", "source": source, "status": status}
    return "ACPI_DEVICE_OST", {"info": info}


async def test_a_healthy_one_plugs_and_unplugs_with_the_events_of_a_real_machine(monitor: FaultyMonitor) -> None:
    async with qmp.raw(monitor.path) as client:
        with client.listener() as events:
            await client.device_add(2)
            assert await _events(events, 1) == [_ost(2, 1, 0, device="vcpu2")]
            assert await client.count() == 3
            await client.device_del(2)
            assert await _events(events, 3) == [
                _ost(2, 3, 0x84, device="vcpu2"),
                ("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu2/lapic"}),
                _ost(2, 3, 0),
            ]
            assert await client.count() == 2
            await client.device_del(1)
            assert (await _events(events, 3))[0] == _ost(1, 3, 0x84)
    assert monitor.cpus.occupied() == [0]
    assert [(c.connection, c.arguments["id"]) for c in monitor.received("device_del")] == [
        (1, "/machine/peripheral/vcpu2"),
        (1, "/machine/unattached/device[2]"),
    ]


async def test_each_slot_answers_an_unplug_as_scripted(monitor: FaultyMonitor) -> None:
    monitor.cpus.plug(2)
    monitor.cpus.plug(3)
    monitor.cpus.unplug = {2: Refuse(0x80), 3: Silent()}
    async with qmp.raw(monitor.path) as client:
        await client.device_del(2)
        await client.device_del(3)
        answers = await client.call("query-acpi-ospm-status")
        assert [(a["source"], a["status"]) for a in answers[2:4]] == [(3, 0x80), (1, 0)]
        assert await client.count() == 4
        monitor.cpus.eject(3)  # later than anybody thought
        assert await client.count() == 3


@pytest.mark.parametrize(
    ("command", "arguments", "error_class", "text"),
    [
        pytest.param("device_del", {"id": "nope"}, "DeviceNotFound", "'nope' not found", id="no such device"),
        pytest.param(
            "device_del",
            {"id": "/machine/unattached/device[0]"},
            "GenericError",
            "Boot CPU is unpluggable",
            id="slot 0",
        ),
        pytest.param("nonsense", {}, "CommandNotFound", "nonsense has not been found", id="no such command"),
        pytest.param(
            "device_add",
            {"driver": "qemu64-x86_64-cpu", "id": "a", "socket-id": 0, "core-id": 1, "thread-id": 0},
            "GenericError",
            "exists",
            id="occupied slot",
        ),
    ],
)
async def test_a_healthy_one_refuses_what_qemu_refuses(
    monitor: FaultyMonitor, command: str, arguments: dict[str, Any], error_class: str, text: str
) -> None:
    async with qmp.raw(monitor.path) as client:
        with pytest.raises(ExecuteError, match=text) as caught:
            await client.call(command, arguments)
    assert caught.value.error_class == error_class


async def test_a_restarted_one_has_its_boot_cpus_with_other_thread_ids(monitor: FaultyMonitor) -> None:
    async with qmp.raw(monitor.path) as client:
        before = await client.call("query-cpus-fast")
        await client.device_add(2)
        monitor.restart(cpus=2)
        await until(lambda: client.runstate.name != "RUNNING", 30, "the client to notice")
    after = await qmp.execute(monitor.path, "query-cpus-fast")
    assert [cpu["qom-path"] for cpu in after] == [cpu["qom-path"] for cpu in before]
    assert not {cpu["thread-id"] for cpu in after} & {cpu["thread-id"] for cpu in before}


async def test_a_second_client_is_greeted_when_the_first_has_left(monitor: FaultyMonitor) -> None:
    async with qmp.raw(monitor.path) as first:
        second = asyncio.create_task(qmp.count(monitor.path))
        await until(lambda: monitor.connections == 2, 30, "the second connection")
        assert await first.count() == 2
        assert not second.done()
    assert await second == 2
    assert [command.connection for command in monitor.received("query-cpus-fast")] == [1, 2]


@pytest.mark.parametrize("fault", [Hang(times=1), Deaf(times=1)], ids=["hang", "deaf"])
async def test_a_client_hears_no_greeting_and_the_next_one_does(monitor: FaultyMonitor, fault: Fault) -> None:
    monitor.faults[GREETING] = fault
    client = QMPClient()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.connect(str(monitor.path)), SOON)
    assert await qmp.count(monitor.path) == 2
    assert fault.struck == 1


@pytest.mark.parametrize("greeting", [Bytes(GARBAGE), Bytes(NOT_UTF8), Bytes(NOT_AN_OBJECT), Close(after_bytes=10)])
async def test_a_bad_greeting_is_no_session(monitor: FaultyMonitor, greeting: Fault) -> None:
    monitor.faults[GREETING] = greeting
    with pytest.raises(ConnectError):
        await QMPClient().connect(str(monitor.path))


async def test_a_slow_greeting_is_a_session_all_the_same(monitor: FaultyMonitor) -> None:
    monitor.faults[GREETING] = Delay(0.1)
    assert await qmp.count(monitor.path) == 2


@pytest.mark.parametrize("fault", [Hang(times=1), WrongId(times=1), NoId(times=1)], ids=["hang", "wrong id", "no id"])
async def test_one_command_stays_without_an_answer_and_the_next_is_answered(
    monitor: FaultyMonitor, fault: Fault
) -> None:
    monitor.faults["query-cpus-fast"] = fault
    async with qmp.raw(monitor.path) as client:
        with pytest.raises(TimeoutError):
            await client.call("query-cpus-fast", timeout=SOON)
        assert await client.count() == 2
    assert len(monitor.received("query-cpus-fast")) == 2


async def test_a_deaf_one_answers_nothing_any_more_in_this_session(monitor: FaultyMonitor) -> None:
    monitor.faults["query-cpus-fast"] = Deaf(times=1)
    async with qmp.raw(monitor.path) as client:
        for command in ("query-cpus-fast", "query-status"):
            with pytest.raises(TimeoutError):
                await client.call(command, timeout=SOON)
    assert monitor.received("query-status") == []
    assert await qmp.count(monitor.path) == 2


@pytest.mark.parametrize(
    "fault",
    [Bytes(GARBAGE), Bytes(NOT_UTF8), Bytes(NOT_AN_OBJECT), Close(after_bytes=30), Huge(11 << 20)],
    ids=["garbage", "not UTF-8", "not an object", "closed in the middle", "more than the client's 10 MiB"],
)
async def test_a_broken_answer_ends_the_session(monitor: FaultyMonitor, fault: Fault) -> None:
    monitor.faults["query-cpus-fast"] = fault
    async with qmp.raw(monitor.path) as client:
        with pytest.raises(ExecInterruptedError):
            await client.call("query-cpus-fast")
    del monitor.faults["query-cpus-fast"]
    assert await qmp.count(monitor.path) == 2


@pytest.mark.parametrize("fault", [Storm(3000, 3000), Twice(), Delay(0.1)], ids=["storm", "twice", "late"])
async def test_an_answer_is_found_in_spite_of_the_fault(monitor: FaultyMonitor, fault: Fault) -> None:
    monitor.faults["query-cpus-fast"] = fault
    async with qmp.raw(monitor.path) as client:
        assert await client.count() == 2
        assert (await client.call("query-status"))["status"] == "running"
    assert fault.struck == 1


async def test_a_scripted_error_has_its_class_and_text_and_changes_nothing(monitor: FaultyMonitor) -> None:
    monitor.faults["device_add"] = Error("GenericError", "not now", times=1)
    async with qmp.raw(monitor.path) as client:
        with pytest.raises(ExecuteError, match="not now"):
            await client.device_add(2)
        assert await client.count() == 2
        await client.device_add(2)
        assert await client.count() == 3


@pytest.mark.parametrize(("executes", "cpus"), [(True, 3), (False, 2)])
async def test_a_command_without_an_answer_was_carried_out_or_not_as_scripted(
    monitor: FaultyMonitor, executes: bool, cpus: int
) -> None:
    monitor.faults["device_add"] = Hang(executes=executes)
    async with qmp.raw(monitor.path) as client:
        slot = (await client.slots())[2]
        arguments = {"driver": slot["type"], "id": "vcpu2", **slot["props"]}
        with pytest.raises(TimeoutError):
            await client.call("device_add", arguments, timeout=SOON)
    assert len(monitor.cpus.occupied()) == cpus
