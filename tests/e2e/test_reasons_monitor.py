"""Each reason of a set whose monitor is not there, not free or not right: caused, and read from the API."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, STALLED, shows
from harness.faulty import GARBAGE, GREETING, Bytes, FaultyMonitor, Hang
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import count, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks at every machine every two seconds, so that it soon misses one."""
    flags = ("--resync-seconds=2", "--allow-tcp=127.0.0.0/8")
    async with OperatorProcess(control_plane, *flags, socket_root=socket_root) as running:
        yield running


async def test_a_machine_that_is_not_there_yet_is_served_as_soon_as_it_is(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    await user.create("vm", 3, "vm.sock")
    seen = await shows(
        user,
        "vm",
        "MonitorUnreachable",
        RECONCILING,
        f"There is no {user.namespace}/vm.sock below the socket root",
        "check that QEMU is running",
        vcpus=None,
    )
    assert "machine" not in seen.status
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]):
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_namespace_without_a_folder_is_waited_for(
    socket_root: Path, operator: OperatorProcess, user: User
) -> None:
    await user.create("vm", 2, "run/vm.sock")
    await shows(user, "vm", "MonitorUnreachable", RECONCILING, f"There is no {user.namespace}", vcpus=None)
    path = socket_root / user.namespace / "run" / "vm.sock"
    path.parent.mkdir(parents=True)
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[path]):
        await shows(user, "vm", "Converged", READY, vcpus=2)


async def test_a_socket_that_nobody_listens_at_is_unreachable(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "vm.sock"))
    await user.create("vm", 2, "vm.sock")
    await shows(
        user,
        "vm",
        "MonitorUnreachable",
        RECONCILING,
        "Nothing listens at",
        "vm.sock",
        "check that QEMU is running",
        vcpus=None,
    )


async def test_a_tcp_port_that_nobody_listens_at_is_unreachable(operator: OperatorProcess, user: User) -> None:
    guest = Guest(None, smp="2,maxcpus=8", tcp=True)
    try:
        host, port = guest.tcp_address
        await user.create("vm", 2, (host, port))
        await shows(user, "vm", "MonitorUnreachable", RECONCILING, f"{host}:{port} refuses the connection", vcpus=None)
        await guest.start()
        await shows(user, "vm", "Converged", READY, vcpus=2)
    finally:
        await guest.stop()


async def test_a_tcp_address_outside_the_allowed_networks_is_invalid(operator: OperatorProcess, user: User) -> None:
    await user.create("vm", 2, ("192.0.2.10", 4444))
    await shows(
        user, "vm", "InvalidMonitor", STALLED, "192.0.2.10:4444 is not in an allowed network", "--allow-tcp", vcpus=None
    )


async def test_what_does_not_speak_qmp_is_unreachable(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with FaultyMonitor(folder / "vm.sock", faults={GREETING: Bytes(GARBAGE)}) as monitor:
        await user.create("vm", 2, "vm.sock")
        await shows(user, "vm", "MonitorUnreachable", RECONCILING, "does not speak QMP", vcpus=None)
        monitor.faults.clear()
        await shows(user, "vm", "Converged", READY, vcpus=2)


async def test_the_last_observation_stands_while_a_killed_machine_is_away_and_its_successor_is_brought_to_the_count(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 4, "vm.sock")
        await shows(user, "vm", "Converged", READY, vcpus=4)
        guest.kill()
        seen = await shows(user, "vm", "MonitorUnreachable", RECONCILING, "check that QEMU is running", vcpus=4)
        assert (seen.status["machine"]["minVCPUs"], seen.status["machine"]["maxVCPUs"]) == (1, 64)

        await guest.start()
        await shows(user, "vm", "Converged", READY, vcpus=4)
        assert await count(guest.control) == 4
        await guest.wait_online(4)


async def test_a_monitor_that_another_client_holds_is_waited_for(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]):
        async with raw(folder / "vm.sock"):
            await user.create("vm", 3, "vm.sock")
            await shows(
                user,
                "vm",
                "MonitorBusy",
                RECONCILING,
                "vm.sock does not greet",
                "another client holds this monitor, QEMU hangs, or this is not a QMP monitor",
                "a dedicated monitor",
                vcpus=None,
            )
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_machine_that_hangs_is_busy_until_it_goes_on(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 2, "vm.sock", connection="OnDemand")
        await shows(user, "vm", "Converged", READY, vcpus=2)
        guest.freeze()
        try:
            await user.change("vm", vcpus=3)
            await user.wait("vm", lambda seen: seen.states == RECONCILING, "a report of the hang")
            await shows(user, "vm", "MonitorBusy", RECONCILING, "QEMU hangs", vcpus=2)
        finally:
            guest.thaw()
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_command_without_an_answer_is_reported_and_what_it_did_all_the_same_is_not_done_twice(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Two machines at once, since it takes the command's whole deadline."""
    async with (
        FaultyMonitor(folder / "query", faults={"query-cpus-fast": Hang()}),
        FaultyMonitor(folder / "plug", faults={"device_add": Hang(times=1)}) as plug,
    ):
        await user.create("query", 2, "query")
        await user.create("plug", 3, "plug")
        await asyncio.gather(
            shows(user, "query", "MonitorTimeout", RECONCILING, "query has not answered a query", vcpus=None),
            shows(user, "plug", "Converged", READY, vcpus=3),
        )

        async def told() -> list[str]:
            return [each["note"] for each in await user.events("plug") if each["reason"] == "MonitorTimeout"]

        (note,) = await until(told, 60, "the Event about the time-out")
        assert "has not answered device_add" in note
        assert "may still execute it" in note
        assert len(plug.received("device_add")) == 1


async def test_a_monitor_that_greets_and_then_falls_silent_has_timed_out(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with FaultyMonitor(folder / "vm.sock", faults={"qmp_capabilities": Hang()}) as monitor:
        await user.create("vm", 2, "vm.sock")
        await shows(user, "vm", "MonitorTimeout", RECONCILING, "sent a greeting, but did not negotiate", vcpus=None)
        monitor.faults.clear()
        await shows(user, "vm", "Converged", READY, vcpus=2)


async def test_an_operator_without_a_socket_root_says_that_it_serves_no_unix_monitors(
    control_plane: ControlPlane, user: User
) -> None:
    async with OperatorProcess(control_plane, f"--namespace={user.namespace}", "--node-name=far"):
        await user.create("vm", 2, "vm.sock", nodeName="far")
        await shows(
            user, "vm", "InvalidMonitor", STALLED, "does not connect to unix monitors", "--socket-root", vcpus=None
        )
