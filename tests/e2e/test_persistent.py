"""The default, a kept monitor: what others do to a machine is undone at once, and the monitor is given up in time.

The operator here looks at nothing without an occasion, so that whatever it puts right it has been told of by an event
of QEMU, by the loss of the connection, or by a socket that appeared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from harness.acpi import Acpi
from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, STALLED, check_form, shows
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, count, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import Seen, User
from vcpuset.domain.contest import CHANGES

ENTRY_SECONDS = 60.0
"""How long a client waits for a monitor that it must be given."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion: what the tests see is not a resync's."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


async def test_a_cpu_that_someone_else_unplugs_is_plugged_again(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        await guest.wait_online(4)
        for _ in range(3):
            theirs = await _threads(client)
            await client.device_del(3)
            await _repaired(client, 4, gone=theirs[3])
            await guest.wait_online(4)
        await shows(user, "vm", "Converged", READY, vcpus=4)


async def test_a_cpu_that_someone_else_plugs_is_taken_away(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 3, "vm.sock")
        await user.wait_ready("vm")
        for number in range(3):
            await guest.wait_online(3)
            await client.device_add(9, f"somebody-elses-{number}")
            await _repaired(client, 3)
            assert "qom-path" not in (await client.slots())[9], "the one that came last is the one that goes"
        seen = await user.wait("vm", lambda seen: seen.ready and not seen.pending, "Ready with no request left")
        check_form(seen)
        assert seen.vcpus == 3
        await guest.wait_online(3)


async def test_a_machine_that_someone_else_changes_again_and_again_is_reported_and_not_fought_over(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")

        async def take() -> int:
            theirs = (await _threads(client))[3]
            await client.device_del(3)
            await acpi.eject(3)
            return theirs

        for _ in range(CHANGES - 1):
            await _repaired(client, 4, gone=await take())
            await user.wait_ready("vm")
        await take()
        await shows(user, "vm", "Contested", STALLED, "another client has changed them 5 times", vcpus=3)
        assert await client.count() == 3
        await user.change("vm", vcpus=5)
        await shows(user, "vm", "Converged", READY, vcpus=5)


async def test_a_machine_that_is_reset_is_ready_again_with_all_its_cpus_in_the_guest(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        await guest.wait_online(4)
        boots = _boots(guest)
        await client.call("system_reset")
        await until(lambda: _boots(guest) > boots, 180, "the guest to boot again")
        await guest.wait_online(4)
        await shows(user, "vm", "Converged", READY, vcpus=4)

        # The session has outlived the reset: its events still come.
        theirs = await _threads(client)
        await client.device_del(3)
        await _repaired(client, 4, gone=theirs[3])
        await guest.wait_online(4)
        await shows(user, "vm", "Converged", READY, vcpus=4)


async def test_what_someone_else_does_to_a_stopped_machine_is_put_right_when_it_goes_on(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """A plug makes no event, and a guest that stands still says nothing: `cont` is the first sign."""
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        await guest.wait_online(4)
        await client.call("stop")
        await client.device_add(9, "somebody-elses")
        theirs = await _threads(client)
        await client.device_del(3)
        await client.call("cont")
        await _repaired(client, 4, gone=theirs[3])

        async def settled() -> bool:
            seen = await user.get("vm")
            return seen.ready and not seen.pending and await client.count() == len(guest.online()) == 4

        await until(settled, 90, "four CPUs, all in use, and no request left")
        check_form(await user.get("vm"))


async def test_the_death_of_a_machine_is_reported_and_its_successor_brought_to_the_count(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        guest.kill()
        await shows(user, "vm", "MonitorUnreachable", RECONCILING, "check that QEMU is running", vcpus=4)
        await guest.start()
        await shows(user, "vm", "Converged", READY, vcpus=4)
        await guest.wait_online(4)

        # The new session is kept, too.
        async with raw(guest.control) as client:
            theirs = await _threads(client)
            await client.device_del(3)
            await _repaired(client, 4, gone=theirs[3])


async def test_a_connection_that_breaks_is_made_again(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with FaultyMonitor(folder / "vm.sock", cpus=4) as monitor:
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        for broken in (1, 2, 3):
            monitor.cut()
            await until(lambda: monitor.connections > broken, 60, "a new connection")  # noqa: B023 - used at once
        monitor.cpus.eject(3)
        await until(lambda: len(monitor.cpus.occupied()) == 4, 60, "four CPUs")
        assert {each.connection for each in monitor.received("device_add")} == {4}


async def test_one_session_serves_all_passes(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as monitor:
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        for vcpus in (3, 5, 2):
            await user.change("vm", vcpus=vcpus)
            await user.wait_ready("vm")
        monitor.emit("RESET", {"guest": True, "reason": "guest-reset"})
        looks = len(monitor.received("query-cpus-fast"))
        await until(lambda: len(monitor.received("query-cpus-fast")) > looks, 60, "a look after the event")
        assert {each.connection for each in monitor.commands} == {1}


async def _becomes_on_demand(user: User) -> None:
    await user.change("vm", monitor={"connection": "OnDemand"})


async def _is_deleted(user: User) -> None:
    await user.delete("vm")


async def _moves_to_another_machine(user: User) -> None:
    await user.change("vm", monitor={"unix": {"path": "other.sock"}})


async def _moves_to_where_nothing_is(user: User) -> None:
    await user.change("vm", monitor={"unix": {"path": "nothing-there.sock"}})


async def _moves_to_another_operator(user: User) -> None:
    await user.change("vm", nodeName="elsewhere")


async def _yields_to_an_older_set(user: User) -> None:
    await user.change("elder", monitor={"unix": {"path": "vm.sock"}})
    await shows(user, "vm", "MonitorConflict", STALLED, "/elder is older", vcpus=5)
    await shows(user, "elder", "Converged", READY, vcpus=6)


@pytest.mark.parametrize(
    "gives_up",
    [
        _becomes_on_demand,
        _is_deleted,
        _moves_to_another_machine,
        _moves_to_where_nothing_is,
        _moves_to_another_operator,
        _yields_to_an_older_set,
    ],
    ids=lambda each: each.__name__.strip("_"),
)
async def test_a_kept_monitor_is_held_until_the_set_has_no_more_use_for_it(
    folder: Path, operator: OperatorProcess, user: User, gives_up: Callable[[User], Awaitable[None]]
) -> None:
    async with (
        Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]),
        Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "other.sock"]),
    ):
        elder = await user.create("elder", 6, "unused.sock")
        await _create_later(user, elder)
        await shows(user, "vm", "Converged", READY, vcpus=3)
        waiting = asyncio.create_task(_enter(folder / "vm.sock"))
        try:
            for vcpus in (4, 5):
                await user.change("vm", vcpus=vcpus)
                await shows(user, "vm", "Converged", READY, vcpus=vcpus)
            assert not waiting.done(), "the monitor is held"
            await gives_up(user)
            assert await waiting >= 5
        finally:
            waiting.cancel()


async def test_an_idle_on_demand_set_whose_machine_is_started_again_is_back_at_its_count_at_once(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Nobody is told of the death; it is the new socket that the operator notices."""
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 4, "vm.sock", connection="OnDemand")
        await user.wait_ready("vm")
        for _ in range(2):
            await guest.restart()
            await until(lambda: _has(guest.control, 4), 90, "four CPUs")
            await guest.wait_online(4)
            await shows(user, "vm", "Converged", READY, vcpus=4)


async def test_an_idle_on_demand_set_whose_machine_ends_or_whose_folder_goes_says_so_at_once(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """QEMU removes its socket when it ends."""
    (folder / "run").mkdir()
    for path in ("vm.sock", "run/vm.sock"):
        async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / path]) as guest, raw(guest.control) as client:
            await user.create("vm", 2, path, connection="OnDemand")
            await shows(user, "vm", "Converged", READY, vcpus=2)
            if path == "vm.sock":
                await client.call("quit")
            else:
                (folder / "run").rename(folder / "away")
            await shows(user, "vm", "MonitorUnreachable", RECONCILING, vcpus=2)
            await user.delete("vm")


async def _create_later(user: User, elder: Seen) -> None:
    """A set `vm` that counts as younger: within one second the uid would decide."""

    async def younger() -> bool:
        seen = await user.create("vm", 3, "vm.sock")
        if _seniority(seen) > _seniority(elder):
            return True
        await user.delete("vm")
        return False

    await until(younger, 60, "a set that is younger")


def _seniority(seen: Seen) -> tuple[str, str]:
    return seen.body["metadata"]["creationTimestamp"], seen.body["metadata"]["uid"]


async def _enter(monitor: Path) -> int:
    """What another client of the monitor counts when it gets its turn."""
    async with raw(monitor, ENTRY_SECONDS) as client:
        return await client.count()


async def _has(monitor: Path, vcpus: int) -> bool:
    return await count(monitor) == vcpus


async def _threads(client: Raw) -> dict[int, int]:
    """The host's thread for each CPU: it tells a CPU from the one that takes its place."""
    return {cpu["cpu-index"]: cpu["thread-id"] for cpu in await client.call("query-cpus-fast")}


async def _repaired(client: Raw, vcpus: int, gone: int | None = None) -> None:
    """Wait until there are so many CPUs, and the one on this thread is none of them."""

    async def reached() -> bool:
        threads = await _threads(client)
        return len(threads) == vcpus and gone not in threads.values()

    await until(reached, 90, f"{vcpus} CPUs")


def _boots(guest: Guest) -> int:
    """How often the guest has said since QEMU's start that it has booted."""
    return sum("guest: ready" in line for line in guest.console)
