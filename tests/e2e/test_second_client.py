"""Another client of an OnDemand set's monitor gets its turn, as long as it likes, and so does the operator after it.

A monitor serves one client at a time and lets the others wait in a queue that holds very few. Machines without a guest
are used here, so that unplug requests stay unanswered for as long as a test wants.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest_asyncio

from harness.acpi import Acpi
from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, shows
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.wait import until
from harness.world import User

PATIENT = {"timeoutSeconds": 3600, "retrySeconds": 3600}
"""The requests stay in flight: the operator looks every second, and the report stays UnplugPending."""

TURN_SECONDS = 60.0
"""How long a client waits for its turn. It comes within seconds, unless the host is busy with other things."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks at idle machines every second: the most that it can get in the way of others."""
    async with OperatorProcess(control_plane, "--resync-seconds=1", socket_root=socket_root) as running:
        yield running


@asynccontextmanager
async def _silent(folder: Path, user: User) -> AsyncIterator[tuple[Raw, Acpi]]:
    """A machine with four CPUs whose guest was asked for two of them and says nothing."""
    async with (
        Guest(None, smp="4,maxcpus=16", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        await user.create("vm", 2, "vm.sock", connection="OnDemand", unplug=PATIENT)
        await shows(user, "vm", "UnplugPending", RECONCILING, "slots 2-3", vcpus=4)
        yield client, acpi


async def test_a_client_that_comes_while_a_guest_is_silent_gets_its_turn_and_keeps_it_as_long_as_it_likes(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with _silent(folder, user) as (client, acpi):
        before = (await user.get("vm")).pending
        async with raw(folder / "vm.sock", TURN_SECONDS) as other:
            await shows(
                user,
                "vm",
                "MonitorBusy",
                RECONCILING,
                "another client holds this monitor, QEMU hangs",
                vcpus=4,
            )
            # Meanwhile the guest gives one of them back, and the operator cannot see it.
            await acpi.eject(3)
            assert await other.count() == 3
            seen = await user.get("vm")
            assert (seen.vcpus, seen.pending) == (4, before), "what was seen last stands"
        await user.wait("vm", lambda seen: seen.vcpus == 3, "a look at the machine")
        assert (await acpi.flags(2)).removing
        await acpi.eject(2)
        await shows(user, "vm", "Converged", READY, vcpus=2)
        assert await client.count() == 2


async def test_a_guest_that_is_asked_again_every_second_does_not_cost_others_their_turn(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with _silent(folder, user) as (client, acpi):
        await user.change("vm", unplug={"timeoutSeconds": 3600, "retrySeconds": 1})
        await user.wait("vm", lambda seen: any(each["attempts"] > 2 for each in seen.pending), "a third request")
        async with raw(folder / "vm.sock", TURN_SECONDS) as other:
            for slot in (3, 2):
                await acpi.eject(slot)
            assert await other.count() == 2
        await shows(user, "vm", "Converged", READY, vcpus=2)
        assert await client.count() == 2


async def test_a_client_that_comes_again_and_again_and_the_operator_do_not_starve_each_other(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with _silent(folder, user) as (client, acpi), _coming_again(folder / "vm.sock") as turns:
        await _more(turns, 20)
        for slot in (3, 2):
            await acpi.eject(slot)
            await _more(turns, 5)
        await shows(user, "vm", "Converged", READY, vcpus=2)
        for vcpus in (4, 6, 8):
            await user.change("vm", vcpus=vcpus)
            await shows(user, "vm", "Converged", READY, vcpus=vcpus)
            await _more(turns, 5)
        assert await client.count() == 8


async def test_two_clients_that_come_again_and_again_and_the_operator_do_not_starve_one_another(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """With two others the queue of the monitor is full most of the time, and whoever comes is turned away."""
    async with (
        Guest(None, smp="2,maxcpus=16", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
        _coming_again(folder / "vm.sock") as one,
        _coming_again(folder / "vm.sock") as two,
    ):
        await user.create("vm", 3, "vm.sock", connection="OnDemand")
        for vcpus in (3, 5):
            await user.change("vm", vcpus=vcpus)
            await shows(user, "vm", "Converged", READY, vcpus=vcpus)
            await _more(one, 5)
            await _more(two, 5)
        assert await client.count() == 5


@asynccontextmanager
async def _coming_again(monitor: Path) -> AsyncIterator[Callable[[], int]]:
    """A client that connects, asks one thing, leaves, and is there again at once; yields how many turns it has had."""
    done = 0

    async def come() -> None:
        nonlocal done
        while True:
            async with raw(monitor, TURN_SECONDS) as client:
                await client.call("query-status")
            done += 1

    coming = asyncio.create_task(come())
    try:
        yield lambda: done
        assert not coming.done(), "it has had every turn that it wanted"
    finally:
        coming.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await coming


async def _more(turns: Callable[[], int], number: int) -> None:
    """Wait until a client has had so many more turns."""
    before = turns()
    await until(lambda: turns() >= before + number, 2 * TURN_SECONDS, f"{number} more turns of the other client")
