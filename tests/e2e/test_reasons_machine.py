"""Each reason of a set whose machine cannot be changed now, or not any more: caused, and read from the API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, shows
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import count, execute, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import Seen, User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks at every machine every two seconds, so that it soon sees one come back."""
    async with OperatorProcess(control_plane, "--resync-seconds=2", socket_root=socket_root) as running:
        yield running


async def test_a_machine_that_waits_for_its_incoming_state_is_busy(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    incoming = ["-incoming", "defer"]
    async with Guest(None, smp="2,maxcpus=8", extra=incoming, monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 3, "vm.sock")
        await shows(
            user, "vm", "MachineBusy", RECONCILING, "2 vCPUs present, 3 declared", "run state 'inmigrate'", vcpus=2
        )
        assert await count(guest.control) == 2


async def test_a_machine_that_migrates_is_left_alone_and_changed_when_the_migration_has_ended(
    folder: Path, operator: OperatorProcess, user: User, tmp_path: Path
) -> None:
    """The machine runs all the while: only query-migrate tells."""
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        _deaf_listener(tmp_path / "destination") as destination,
        raw(guest.control) as client,
    ):
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        await client.call("migrate", {"uri": f"unix:{destination}"})

        async def active() -> bool:
            return bool((await client.call("query-migrate"))["status"] == "active")

        await until(active, 60, "the migration to be under way")
        assert (await client.call("query-status"))["status"] == "running"
        for declared in (4, 1):
            await user.change("vm", vcpus=declared)
            seen = await shows(
                user, "vm", "MachineBusy", RECONCILING, f"{declared} declared", "a migration is in progress", vcpus=2
            )
            assert seen.pending == []
        await client.call("migrate_cancel")
        await shows(user, "vm", "Converged", READY, vcpus=1)


async def test_every_run_state_in_which_a_change_is_unsafe_is_waited_out(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """The states that pass too quickly to be met in a real machine, and one that no QEMU has yet."""
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as monitor:
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        await user.change("vm", vcpus=3, suspend=True)
        await user.wait_reason("vm", "Suspended")
        for state in ("save-vm", "restore-vm", "finish-migrate", "suspended", "io-error", "debug", "of-the-future"):
            monitor.status = state
            await user.change("vm", suspend=False)
            await user.touch("vm")
            await user.wait("vm", partial(_names, state), f"run state {state}")
            await shows(user, "vm", "MachineBusy", RECONCILING, f"run state '{state}'", vcpus=2)
        assert monitor.received("device_add") == []
        monitor.status = "running"
        await user.touch("vm")  # after so many vain looks the pause before the next one is long
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_guest_that_has_powered_off_is_not_running_until_it_is_started_again(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        await execute(guest.control, "set-action", {"shutdown": "pause"})  # as -no-shutdown
        await guest.shell("(sleep 1; poweroff -f) &")  # later, so that the shell can still say that it has understood
        await shows(user, "vm", "MachineNotRunning", RECONCILING, "run state is 'shutdown'", "runs again", vcpus=2)
        await user.change("vm", vcpus=4)
        await shows(user, "vm", "MachineNotRunning", RECONCILING, "run state is 'shutdown'", vcpus=2)
        assert await count(guest.control) == 2

        await execute(guest.control, "system_reset")
        await shows(user, "vm", "MachineBusy", RECONCILING, "run state 'prelaunch'", vcpus=2)
        await execute(guest.control, "cont")
        await shows(user, "vm", "Converged", READY, vcpus=4)


async def test_a_guest_that_has_panicked_is_not_running(folder: Path, operator: OperatorProcess, user: User) -> None:
    panic = ["-device", "pvpanic", "-action", "panic=pause"]
    async with (
        Guest(None, smp="2,maxcpus=8", extra=panic, monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await client.call("cont")
        await client.hmp("o/b 0x505 1")  # what a Linux guest writes when it panics
        await user.create("vm", 3, "vm.sock")
        await shows(user, "vm", "MachineNotRunning", RECONCILING, "run state is 'guest-panicked'", vcpus=2)
        assert await client.count() == 2

        await client.call("system_reset")
        await client.call("cont")
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_machine_that_was_migrated_away_is_not_running_here(
    folder: Path, operator: OperatorProcess, user: User, tmp_path: Path
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        await execute(guest.control, "cont")
        await guest.save(tmp_path / "state")
        await user.create("vm", 3, "vm.sock")
        await shows(user, "vm", "MachineNotRunning", RECONCILING, "run state is 'postmigrate'", vcpus=2)
        assert await count(guest.control) == 2


def _names(state: str, seen: Seen) -> bool:
    return f"'{state}'" in seen.message


@contextlib.asynccontextmanager
async def _deaf_listener(path: Path) -> AsyncIterator[Path]:
    """A migration's destination that takes the connection and reads nothing: the migration never gets on."""
    gone = asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport = writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        await gone.wait()
        transport.abort()

    server = await asyncio.start_unix_server(connected, path)
    try:
        yield path
    finally:
        gone.set()
        server.close()
        await server.wait_closed()
