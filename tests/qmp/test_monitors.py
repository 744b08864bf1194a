"""The sessions kept between passes: one for each set, made again with growing pauses where they do not last."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness.faults import Link
from harness.faulty import GREETING, Close, Fault, FaultyMonitor
from harness.qmp import count
from harness.wait import until
from vcpuset.domain.errors import MonitorUnreachable
from vcpuset.domain.resource import UID, Spec, UnixMonitor, VCPUSet
from vcpuset.qmp import monitors as monitors_module
from vcpuset.qmp.monitors import Monitors, _pause_seconds
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import UnixEndpoint, find_socket, stamp_of
from vcpuset.qmp.watcher import SocketWatcher

ONE, TWO = UID("one"), UID("two")


@dataclass
class AnswersAndCloses(Fault):
    """The last answer on this connection."""

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send(answer)
        link.close()


@dataclass
class Keeper:
    """An operator's monitors, and what they tell."""

    folder: Path
    woken: list[UID] = field(default_factory=list)
    losses: list[int] = field(default_factory=list)
    """For how many losses in a row a pause was asked for."""

    def __post_init__(self) -> None:
        self.monitors = Monitors(self.folder.parent, self.woken.append, pause=self._pause)

    def _pause(self, losses: int) -> float:
        self.losses.append(losses)
        return 0.0

    def vcpuset(self, uid: UID = ONE, path: str = "vm.sock") -> VCPUSet:
        """A set with that monitor."""
        return VCPUSet(uid, self.folder.name, str(uid), 1, "1", datetime.now(UTC), Spec(2, UnixMonitor(path)))

    async def session(self, uid: UID = ONE, path: str = "vm.sock") -> Session:
        """What a pass gets."""
        with await self.monitors.resolve(self.vcpuset(uid, path)) as endpoint:
            return await self.monitors.session(uid, endpoint)

    async def pass_(self) -> None:
        """Look once, as a pass does, and wait for the loss of the session to be told."""
        before = len(self.woken)
        session = await self.session()
        await session.observe()
        await until(lambda: len(self.woken) > before, 60, "the loss to be told")


@asynccontextmanager
async def keeping(folder: Path) -> AsyncIterator[Keeper]:
    keeper = Keeper(folder)
    try:
        yield keeper
    finally:
        await keeper.monitors.close()


async def test_a_set_has_one_session_for_as_long_as_it_lasts(namespace_folder: Path) -> None:
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor, keeping(namespace_folder) as keeper:
        session = await keeper.session()
        assert await keeper.session() is session
        assert monitor.connections == 1
        monitor.cut()
        await until(lambda: keeper.woken == [ONE], 60, "the loss to be told")
        assert await keeper.session() is not session
        assert monitor.connections == 2


async def test_a_set_that_names_another_socket_gets_another_session_and_the_first_monitor_is_free(
    namespace_folder: Path,
) -> None:
    async with (
        FaultyMonitor(namespace_folder / "vm.sock") as here,
        FaultyMonitor(namespace_folder / "other.sock") as there,
        keeping(namespace_folder) as keeper,
    ):
        session = await keeper.session()
        assert await keeper.session(path="other.sock") is not session
        await until(lambda: not here._links, 60, "the first monitor to be free")
        assert there.connections == 1
        assert keeper.woken == []


async def test_a_monitor_is_searched_again_once_another_socket_may_be_there(
    namespace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    async def find(root: Path, namespace: str, path: str, *, connect: bool) -> UnixEndpoint:
        searched.append(path)
        return await find_socket(root, namespace, path, connect=connect)

    monkeypatch.setattr(monitors_module, "find_socket", find)
    changed: list[UID] = []
    watcher = SocketWatcher(namespace_folder.parent, changed.append)
    watching = asyncio.create_task(watcher.run())
    path = namespace_folder / "vm.sock"
    try:
        async with FaultyMonitor(path) as monitor, keeping(namespace_folder) as keeper:
            keeper.monitors = Monitors(namespace_folder.parent, keeper.woken.append, watcher=watcher)
            watcher.follow(ONE, keeper.vcpuset())
            session = await keeper.session()
            await until(lambda: watcher.shows(keeper.vcpuset(), stamp_of(path.stat())), 60, "the socket to be observed")
            assert await keeper.session() is session
            assert searched == ["vm.sock"]

            path.rename(namespace_folder / "elsewhere.sock")
            await until(lambda: changed == [ONE], 60, "the change to be told")
            with pytest.raises(MonitorUnreachable):
                await keeper.session()
            assert session.alive
            assert searched == ["vm.sock"] * 2

            (namespace_folder / "elsewhere.sock").rename(path)
            assert await keeper.session() is session
            monitor.cut()
            await until(lambda: not session.alive, 60, "the loss to be noticed")
            assert await keeper.session() is not session
            assert searched == ["vm.sock"] * 4
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def test_a_released_monitor_is_free_and_nobody_is_told(namespace_folder: Path) -> None:
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor, keeping(namespace_folder) as keeper:
        await keeper.session()
        await keeper.monitors.release(ONE)
        await keeper.monitors.release(ONE)
        assert await (await keeper.session(TWO)).observe()
        monitor.emit("RESET", {"guest": True, "reason": "guest-reset"})
        await until(lambda: keeper.woken, 60, "the event to be told")
        assert keeper.woken == [TWO]


async def test_nothing_is_remembered_of_a_set_that_is_gone_with_its_machine(namespace_folder: Path) -> None:
    async with keeping(namespace_folder) as keeper:
        async with FaultyMonitor(namespace_folder / "vm.sock"):
            await keeper.session()
        await until(lambda: keeper.woken, 60, "the loss to be told")
        await keeper.monitors.forget(ONE)
        assert keeper.monitors._losses == {}


async def test_a_session_that_has_had_its_turn_lets_those_who_wait_go_first(
    namespace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor, keeping(namespace_folder) as keeper:
        assert not await keeper.monitors.end_turn(ONE), "there is none"
        session = await keeper.session()
        assert not await keeper.monitors.end_turn(ONE)
        assert await keeper.session() is session, "its turn lasts"
        other = asyncio.create_task(count(namespace_folder / "vm.sock"))
        await until(lambda: monitor.connections == 2, 60, "another client in the queue")
        assert await keeper.session() is session

        monkeypatch.setattr(monitors_module, "TURN_SECONDS", 0.0)
        assert await keeper.monitors.end_turn(ONE)
        again = await keeper.session()
        assert again is not session
        assert await other == 2
        assert await again.observe()
        assert keeper.woken == []
        assert keeper.losses == []


async def test_a_turn_is_longer_where_an_answer_that_nobody_hears_is_lost(
    namespace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitors_module, "TURN_SECONDS", 0.0)
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor, keeping(namespace_folder) as keeper:
        del monitor._handlers["query-acpi-ospm-status"]
        await (await keeper.session()).observe()
        assert not await keeper.monitors.end_turn(ONE)
        monkeypatch.setattr(monitors_module, "EVENTS_TURN_SECONDS", 0.0)
        assert await keeper.monitors.end_turn(ONE)


async def test_sessions_that_break_soon_after_they_were_opened_are_counted_as_a_row(namespace_folder: Path) -> None:
    faults = {"query-hotpluggable-cpus": AnswersAndCloses()}
    async with FaultyMonitor(namespace_folder / "vm.sock", faults=faults), keeping(namespace_folder) as keeper:
        for _ in range(5):
            await keeper.pass_()
        assert keeper.losses == [1, 2, 3, 4, 5]


async def test_a_session_that_breaks_under_its_user_does_not_end_the_row(namespace_folder: Path) -> None:
    faults: dict[str, Fault] = {"query-hotpluggable-cpus": AnswersAndCloses()}
    async with (
        FaultyMonitor(namespace_folder / "vm.sock", faults=faults) as monitor,
        keeping(namespace_folder) as keeper,
    ):
        await keeper.pass_()
        monitor.faults["query-status"] = Close(times=1)
        session = await keeper.session()
        with pytest.raises(MonitorUnreachable):
            await session.observe()
        await keeper.monitors.release(ONE)
        await keeper.pass_()
        # The loss may also have been told before the release.
        assert keeper.losses in ([1, 2], [1, 2, 3])


async def test_a_session_that_has_lasted_begins_a_new_row(
    namespace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {"query-hotpluggable-cpus": AnswersAndCloses()}
    async with FaultyMonitor(namespace_folder / "vm.sock", faults=faults), keeping(namespace_folder) as keeper:
        for _ in range(3):
            await keeper.pass_()
        monkeypatch.setattr(monitors_module, "LASTING_SECONDS", 0.0)
        await keeper.pass_()
        assert keeper.losses == [1, 2, 3, 1]


async def test_a_set_that_gives_its_monitor_up_begins_a_new_row(namespace_folder: Path) -> None:
    faults: dict[str, Fault] = {"query-hotpluggable-cpus": AnswersAndCloses()}
    async with (
        FaultyMonitor(namespace_folder / "vm.sock", faults=faults) as monitor,
        keeping(namespace_folder) as keeper,
    ):
        for _ in range(3):
            await keeper.pass_()
        monitor.faults.clear()
        await (await keeper.session()).observe()
        await keeper.monitors.release(ONE)
        monitor.faults["query-hotpluggable-cpus"] = AnswersAndCloses()
        await keeper.pass_()
        assert keeper.losses == [1, 2, 3, 1]


async def test_what_is_told_late_is_told(namespace_folder: Path) -> None:
    woken: list[UID] = []
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor, keeping(namespace_folder) as keeper:
        keeper.monitors = Monitors(namespace_folder.parent, woken.append, pause=lambda _: 0.01)
        await keeper.session()
        monitor.cut()
        await until(lambda: woken == [ONE], 60, "the loss to be told")


async def test_an_opening_that_fails_keeps_nothing(namespace_folder: Path) -> None:
    faults: dict[str, Fault] = {GREETING: Close(times=1)}
    async with FaultyMonitor(namespace_folder / "vm.sock", faults=faults), keeping(namespace_folder) as keeper:
        with pytest.raises(MonitorUnreachable):
            await keeper.session()
        assert await (await keeper.session()).observe()
        assert keeper.woken == []


def test_the_first_loss_of_a_row_is_told_at_once_and_the_pauses_after_it_grow_to_half_a_minute() -> None:
    assert _pause_seconds(1) == 0
    for losses, longest in ((2, 0.25), (3, 0.5), (4, 1.0), (9, 30.0), (1_000_000, 30.0)):
        seen = {_pause_seconds(losses) for _ in range(200)}
        assert longest / 2 <= min(seen) < max(seen) <= longest, losses


async def test_a_monitor_that_another_set_has_is_left_at_once(namespace_folder: Path) -> None:
    """The thread that finds the socket connects before it is known whose it is."""
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor, keeping(namespace_folder) as keeper:
        with await keeper.monitors.resolve(keeper.vcpuset()):
            await until(lambda: monitor.connections == 1, 60, "the connection")
        await until(lambda: not monitor._links, 60, "the connection to be closed")


async def test_a_kept_session_is_the_only_connection_though_its_socket_is_searched_again(
    namespace_folder: Path,
) -> None:
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor, keeping(namespace_folder) as keeper:
        for _ in range(3):
            await (await keeper.session()).observe()
        assert monitor.connections == 1
