"""A machine on its way from one QEMU to another: left alone at both ends, and taken up where it arrives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.expect import HELD, READY, RECONCILING, shows
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, count, execute, raw
from harness.saved import saved_guest
from harness.sockets import listening
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks at every machine every two seconds, so that it soon sees one arrive."""
    async with OperatorProcess(control_plane, "--resync-seconds=2", socket_root=socket_root) as running:
        yield running


async def test_a_linux_guest_that_moves_is_left_alone_on_the_way_and_brought_to_its_count_where_it_arrives(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    way = folder / "way"
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "here.sock"]) as source,
        Guest(
            smp="2,maxcpus=64", extra=["-incoming", f"unix:{way}"], monitor_paths=[folder / "there.sock"]
        ) as destination,
    ):
        await user.create("vm", 2, "here.sock")
        await user.wait_ready("vm")
        async with _held_at_the_switchover(source, way) as client:
            await user.change("vm", vcpus=4)
            seen = await shows(
                user,
                "vm",
                "MachineBusy",
                RECONCILING,
                "2 vCPUs present, 4 declared",
                "run state 'finish-migrate'",
                "a migration is in progress",
                vcpus=2,
            )
            assert seen.pending == []
            await _switch_over(client)
        await shows(user, "vm", "MachineNotRunning", RECONCILING, "run state is 'postmigrate'", vcpus=2)

        await user.change("vm", monitor={"unix": {"path": "there.sock"}})
        await shows(user, "vm", "Converged", READY, vcpus=4)
        await destination.wait_online(4)
        await user.change("vm", vcpus=1)
        await shows(user, "vm", "Converged", READY, vcpus=1)
        await destination.wait_online({0})
        # QEMU would plug here, too: after a migration it no longer refuses.
        assert await count(source.control) == 2


async def test_a_destination_that_takes_over_the_monitor_s_path_is_busy_until_the_machine_has_arrived(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as source:
        await execute(source.control, "cont")
        await user.create("vm", 3, "vm.sock", suspend=True)
        await shows(user, "vm", "Suspended", HELD, "2 vCPUs present, 3 declared", vcpus=2)
        way = folder / "way"
        async with Guest(
            None, smp="2,maxcpus=8", extra=["-incoming", f"unix:{way}"], monitor_paths=[folder / "vm.sock"]
        ) as destination:
            async with _held_at_the_switchover(source, way) as client:
                await user.change("vm", suspend=False)
                await shows(user, "vm", "MachineBusy", RECONCILING, "run state 'inmigrate'", vcpus=2)
                await _switch_over(client)
            await shows(user, "vm", "Converged", READY, vcpus=3)
            assert (await count(source.control), await count(destination.control)) == (2, 3)


async def test_a_request_that_moves_with_its_guest_takes_a_cpu_that_is_then_plugged_again(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """The guest had no time to look before it moved; the count was raised again meanwhile."""
    way = folder / "way"
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "here.sock"]) as source,
        Guest(
            smp="2,maxcpus=64", extra=["-incoming", f"unix:{way}"], monitor_paths=[folder / "there.sock"]
        ) as destination,
    ):
        await user.create("vm", 2, "here.sock")
        await user.wait_ready("vm")
        await execute(source.control, "stop")
        await user.change("vm", vcpus=1)
        await user.wait("vm", lambda seen: [each["slot"] for each in seen.pending] == [1], "a request")
        await user.change("vm", vcpus=2)
        await shows(user, "vm", "Converged", READY, "may still unplug slot 1", vcpus=2)
        async with _held_at_the_switchover(source, way) as client:
            await _switch_over(client)

        await user.change("vm", monitor={"unix": {"path": "there.sock"}})
        moved = await user.wait("vm", lambda seen: seen.ready and not seen.pending, "no request of the old QEMU")
        assert moved.vcpus == 2
        async with raw(destination.control) as client:
            await client.call("cont")

            async def plugged_again() -> bool:
                return (await client.slots())[1].get("qom-path") == "/machine/peripheral/vcpu1"

            await until(plugged_again, 90, "a new CPU in slot 1")
        await shows(user, "vm", "Converged", READY, vcpus=2)
        await destination.wait_online({0, 1})


@asynccontextmanager
async def _held_at_the_switchover(guest: Guest, way: Path) -> AsyncIterator[Raw]:
    """A migration that has sent all but the last: the machine stands still at both ends until `_switch_over`."""
    await until(lambda: str(way) in listening(), 60, f"a destination that listens at {way}")
    async with raw(guest.control) as client:
        capability = {"capability": "pause-before-switchover", "state": True}
        await client.call("migrate-set-capabilities", {"capabilities": [capability]})
        await client.call("migrate-set-parameters", {"max-bandwidth": 1 << 34})
        await client.call("migrate", {"uri": f"unix:{way}"})
        await _migration(client, "pre-switchover")
        yield client


async def _switch_over(client: Raw) -> None:
    await client.call("migrate-continue", {"state": "pre-switchover"})
    await _migration(client, "completed")


async def _migration(client: Raw, status: str) -> None:
    async def reached() -> bool:
        now = (await client.call("query-migrate")).get("status")
        assert now != "failed"
        return bool(now == status)

    await until(reached, 60, f"a migration that is {status}")
