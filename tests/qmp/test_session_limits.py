"""What a peer can cost a session: time of the event loop, memory, and observations."""

import asyncio
import contextlib
import gc
import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from qemu.qmp import ExecuteError

from harness.faults import Link
from harness.faulty import (
    Bytes,
    Error,
    Fault,
    FaultyMonitor,
    Storm,
)
from harness.wait import until
from qmp.sessions import Connect, Preceded, Wakes
from vcpuset.domain.errors import CommandError, MonitorTimeout, MonitorUnreachable
from vcpuset.qmp import client, ratelimiter
from vcpuset.qmp.client import READ_LIMIT, UNSOLICITED_LIMIT


@dataclass
class Followed(Fault):
    """The answer, and the beginning of a line that never ends: at once, or when `later` is set."""

    chunk: bytes
    later: asyncio.Event | None = None

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        if self.later is None:
            await link.send_bytes(json.dumps(answer).encode() + b"\r\n" + self.chunk)
        else:
            await link.send(answer)
            await self.later.wait()
            await link.send_bytes(self.chunk)


@dataclass
class Returns(Fault):
    """This in place of what the command returns; together with others, where that is given."""

    value: object
    together: asyncio.Barrier | None = None

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        if self.together is not None:
            await self.together.wait()
        await link.send({"id": answer["id"], "return": self.value})


async def test_a_storm_of_events_neither_blocks_the_loop_nor_leaves_anything_behind(
    namespace_folder: Path, connect: Connect, wakes: Wakes
) -> None:
    faults: dict[str, Fault] = {"query-status": Storm(before=5000, after=5000)}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path, wakes)
        at_each_turn = [0]

        async def others() -> None:
            while True:
                at_each_turn.append(session._client._received)
                await asyncio.sleep(0)

        other = asyncio.create_task(others())
        for _ in range(2):
            assert (await session.observe()).vcpus == 2
        other.cancel()
        assert at_each_turn[-1] > 20_000
        assert max(later - earlier for earlier, later in pairwise(at_each_turn)) < 200
        assert wakes.count == 0  # RTC_CHANGE tells nothing about CPUs
        gc.collect()
        kept = sum(type(thing).__name__ == "Message" for thing in gc.get_objects())
        assert kept < 10


async def test_a_reply_of_more_values_than_any_machine_has_is_not_made_objects_of(
    namespace_folder: Path, connect: Connect
) -> None:
    faults: dict[str, Fault] = {"query-status": Returns([[]] * 200_000)}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path)
        with pytest.raises(
            MonitorUnreachable, match=r"broke before query-status was answered: a message of \d+ values"
        ):
            await session.observe()


class Kept(list[object]):
    """A list whose life can be followed."""


async def test_long_replies_that_come_at_once_are_made_objects_of_one_after_the_other_and_errors_keep_none(
    namespace_folder: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: WeakSet[Kept] = WeakSet()
    most = 0

    def followed(line: bytes) -> tuple[dict[str, object] | None, str]:
        nonlocal most
        found, why = parsed(line)
        if found is not None and isinstance(reply := found.get("return"), list):
            found["return"] = kept = Kept(reply)
            alive.add(kept)
            most = max(most, len(alive))
        return found, why

    parsed = client._parsed
    monkeypatch.setattr(client, "_parsed", followed)
    monkeypatch.setattr(Kept, "__hash__", object.__hash__)
    together = asyncio.Barrier(8)
    faults: dict[str, Fault] = {"query-status": Returns([[9]] * 20_000, together)}
    async with contextlib.AsyncExitStack() as monitors:
        sessions = []
        for number in range(together.parties):
            monitor = await monitors.enter_async_context(
                FaultyMonitor(namespace_folder / f"qmp{number}", faults=faults)
            )
            sessions.append(await connect(monitor.path))
        errors = await asyncio.gather(*(session.observe() for session in sessions), return_exceptions=True)
        assert {type(error) for error in errors} == {MonitorUnreachable}
        gc.collect()
        assert (most, len(alive)) == (1, 0)


async def test_a_refusal_keeps_no_more_of_a_reply_than_its_beginning(namespace_folder: Path, connect: Connect) -> None:
    faults: dict[str, Fault] = {"query-status": Error("C" * 100_000, "x" * 1_000_000)}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path)
        with pytest.raises(CommandError) as raised:
            await session.observe()
        cause = raised.value.__cause__
        assert isinstance(cause, ExecuteError)
        assert len(str(raised.value)) + len(str(cause.error)) + len(str(cause.args)) < 20_000


async def test_a_reply_that_has_not_ended_at_the_deadline_is_read_no_further(
    namespace_folder: Path, connect: Connect
) -> None:
    faults: dict[str, Fault] = {"query-hotpluggable-cpus": Bytes(b'{"return": "' + b"x" * 100_000)}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path, command_seconds=1.0)
        with pytest.raises(MonitorTimeout):
            await session.observe()
        await until(lambda: not session.alive, 60, "the session to be cut")


async def test_a_greeting_of_whatever_length_holds_up_no_other_monitor(
    namespace_folder: Path, connect: Connect, wakes: Wakes
) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, end = b'{"x":"', b'"}\n'
        writer.write(head + b"x" * (lengths.pop() - len(head + end)) + end)
        await reader.read()
        writer.close()

    lengths = list(range(UNSOLICITED_LIMIT - 2, UNSOLICITED_LIMIT + 4))
    path = namespace_folder / "odd"
    odd = await asyncio.start_unix_server(greet, path)
    async with odd, FaultyMonitor(namespace_folder / "qmp", slots=200) as monitor:
        while lengths:
            with pytest.raises(MonitorUnreachable):
                await connect(path, wakes)
            session = await connect(monitor.path, wakes)
            assert (await session.observe()).slots
            await session.close()


@pytest.mark.parametrize("at_once", [True, False], ids=["behind the answer", "later"])
async def test_a_kept_session_holds_no_more_than_an_event_of_what_nobody_asked_for(
    namespace_folder: Path, connect: Connect, wakes: Wakes, at_once: bool
) -> None:
    """Sessions are kept by the thousand, and each could hold as much as the longest reply."""
    later = None if at_once else asyncio.Event()
    faults: dict[str, Fault] = {"query-hotpluggable-cpus": Followed(b'{"event": "' + b"x" * (READ_LIMIT - 1000), later)}
    async with FaultyMonitor(namespace_folder / "qmp", faults=faults) as monitor:
        session = await connect(monitor.path, wakes)
        with contextlib.suppress(MonitorUnreachable):  # in one go with the answer, it can be seen before it
            await session.observe()
        if later is not None:
            assert session.alive
            later.set()
        await until(lambda: not session.alive, 60, "the session to be cut")


async def test_what_the_guest_reports_of_a_cpu_that_was_plugged_silently_wakes_nobody(
    namespace_folder: Path, connect: Connect, wakes: Wakes
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", cpus=2, slots=8) as monitor:
        session = await connect(monitor.path, wakes)
        machine = await session.observe()
        await session.plug(machine.free[0], silently=True)
        machine = await session.recount(machine)
        assert session._waking is None

        await session.plug(machine.free[0])
        await until(lambda: wakes.count == 1, 60, "a report that is awaited")
        monitor.cpus.eject(2)
        await until(lambda: wakes.count == 2, 60, "the departure of a CPU")
        monitor.cpus.plug(2)
        await until(lambda: wakes.count == 3, 60, "the report of another client's CPU in the same slot")


async def test_a_session_that_has_heard_thousands_of_events_has_kept_none_of_them(
    namespace_folder: Path, connect: Connect, wakes: Wakes
) -> None:
    """Of the kinds that it looks into or wakes for, with what the library would keep of each."""
    async with FaultyMonitor(namespace_folder / "qmp", cpus=2, slots=8) as monitor:
        session = await connect(monitor.path, wakes)

        async def hear(rounds: int) -> int:
            """How many blocks of memory are in use after so many rounds of 500 events."""
            for _ in range(rounds):
                for number in range(100):
                    ost = {"slot": str(number % 8), "slot-type": "CPU", "source": 3, "status": number % 0x84}
                    monitor.emit("ACPI_DEVICE_OST", {"info": ost})
                    monitor.emit("DEVICE_DELETED", {"path": f"/machine/peripheral/vcpu{number}"})
                    monitor.emit("DEVICE_UNPLUG_GUEST_ERROR", {"path": f"/machine/peripheral/vcpu{number}"})
                    monitor.emit("RESET", {"guest": True, "reason": "guest-reset"})
                    monitor.emit("RTC_CHANGE", {"offset": number, "qom-path": "/machine/rtc"})
                await session.observe()
            monitor.commands.clear()
            gc.collect()
            return sys.getallocatedblocks()

        before = await hear(4)
        grown = await hear(40) - before
        assert session._client._received > 22_000
        assert wakes.count
        assert grown < 2000, "an event kept would be several blocks, and these were 20,000"


async def test_many_events_at_once_wake_few_times(namespace_folder: Path, connect: Connect, wakes: Wakes) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        session = await connect(monitor.path, wakes)
        for _ in range(1000):
            monitor.emit("RESET", {"guest": True, "reason": "guest-reset"})
        await session.observe()
        await until(lambda: wakes.count, 60, "a wake")
        assert wakes.count < 100


async def test_a_guest_that_makes_events_without_end_has_a_limited_number_of_wakes_and_a_loss_is_told_all_the_same(
    namespace_folder: Path, connect: Connect, wakes: Wakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ratelimiter, "WAKES_AT_ONCE", 3)
    monkeypatch.setattr(ratelimiter, "WAKES_PER_SECOND", 0.0001)
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        session = await connect(monitor.path, wakes)
        for number in range(1, 4):
            monitor.emit("RESET", {"guest": True, "reason": "guest-reset"})
            await until(lambda: wakes.count == number, 60, "a wake")  # noqa: B023 - used at once
        for _ in range(20):
            monitor.emit("RESET", {"guest": True, "reason": "guest-reset"})
            await session.observe()
        assert wakes.count == 3
        monitor.cut()
        await until(lambda: wakes.count == 4, 60, "the loss to be told")


@pytest.mark.parametrize(
    "event",
    [b'{"event": ["RESET"]}', b'{"event": {}}', b'{"event": "ACPI_DEVICE_OST"}',
     b'{"event": "ACPI_DEVICE_OST", "data": {"info": {"slot-type": "CPU", "slot": 7}}}',
     b'{"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": 5}', b'{"event": "NEWS", "data": null}'],
)  # fmt: skip
async def test_a_malformed_event_does_no_harm(namespace_folder: Path, connect: Connect, event: bytes) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        session = await connect(monitor.path)
        monitor.faults["query-status"] = Preceded(event + b"\r\n")
        assert (await session.observe()).vcpus == 2
        assert session.alive
