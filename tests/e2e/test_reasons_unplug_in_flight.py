"""Unplug requests that the guest has not answered: the count may change, the operator may die, the guest may wake late.

What holds whatever happens: never more CPUs than declared are made, never more are asked for than are too many, nobody
is asked twice before its time, and the count is right in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest_asyncio
from typing_extensions import override

from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, history, shows
from harness.faults import Fault, Link
from harness.faulty import Command, FaultyMonitor, Silent, Working
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks without an occasion. It serves the sets that name no node."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


async def test_a_count_raised_again_is_met_although_the_guest_carries_the_old_requests_out_later(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        created = await user.create("vm", 6, "vm.sock")
        await user.wait_ready("vm")
        await guest.wait_online(6)
        await client.call("stop")
        await user.change("vm", vcpus=3)
        # Before all have been sent, a change of the count would keep back the rest.
        await shows(user, "vm", "UnplugPending", RECONCILING, "slots 3-5", vcpus=6)

        await user.change("vm", vcpus=6)
        ready = await shows(
            user, "vm", "Converged", READY, "6 vCPUs, as declared", "slots 3-5", "plugged again", vcpus=6
        )
        assert [each["slot"] for each in ready.pending] == [3, 4, 5]

        async with _most_seen(client) as most:
            await client.call("cont")
            done = await user.wait("vm", lambda seen: seen.ready and not seen.pending and seen.vcpus == 6, "six again")
            await guest.wait_online(6)
        assert most() == 6, "never more than declared"
        assert "may still" not in done.message
        assert max(seen.vcpus or 0 for seen in await history(user, created)) == 6


async def test_a_count_raised_halfway_asks_for_nothing_more_and_plugs_what_left_too_many(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 6, "vm.sock")
        await user.wait_ready("vm")
        await guest.wait_online(6)
        await client.call("stop")
        await user.change("vm", vcpus=3)
        await shows(user, "vm", "UnplugPending", RECONCILING, "slots 3-5", vcpus=6)
        await user.change("vm", vcpus=5)
        seen = await user.wait(
            "vm", lambda seen: seen.current and seen.states == RECONCILING, "a look at the new count"
        )
        assert [each["slot"] for each in seen.pending] == [3, 4, 5]
        assert [each["attempts"] for each in seen.pending] == [1, 1, 1]

        async with _most_seen(client) as most:
            await client.call("cont")
            await user.wait("vm", lambda seen: seen.ready and not seen.pending and seen.vcpus == 5, "five")
            await guest.wait_online(5)
        assert most() == 6, "six were there at the beginning, and never more"


async def test_a_request_stands_in_the_status_before_the_guest_is_asked(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """At the moment in which QEMU is told, the API server already knows."""
    async with FaultyMonitor(folder / "vm.sock", cpus=4) as monitor:
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        witness = _Witness(user, "vm")
        monitor.faults["device_del"] = witness
        await user.change("vm", vcpus=2)
        await shows(user, "vm", "Converged", READY, vcpus=2)
        assert witness.known == [{2, 3}, {2, 3}]


async def test_a_successor_of_a_killed_operator_does_not_ask_twice(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User
) -> None:
    async with FaultyMonitor(folder / "vm.sock", cpus=4) as monitor:
        monitor.cpus.unplug = {slot: Working() for slot in range(4)}
        async with _operator_of(control_plane, socket_root, user) as operator:
            unplug = {"timeoutSeconds": 3600, "retrySeconds": 3600}
            await user.create("vm", 2, "vm.sock", nodeName="here", unplug=unplug)
            await until(lambda: len(monitor.received("device_del")) == 2, 60, "two requests")
            for _ in range(2):
                operator.kill()
                before = len(monitor.received("query-cpus-fast"))
                await operator.start()
                await _looks(monitor, before + 2)
                await user.touch("vm")
            assert [_path(each) for each in monitor.received("device_del")] == [
                "/machine/unattached/device[4]",
                "/machine/unattached/device[3]",
            ]
            for slot in (2, 3):
                monitor.cpus.eject(slot)
            await shows(user, "vm", "Converged", READY, vcpus=2)
            assert len(monitor.received("device_del")) == 2


async def test_a_successor_repeats_a_request_without_an_answer_after_the_pause_that_its_record_gives(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User
) -> None:
    async with FaultyMonitor(folder / "vm.sock", cpus=3) as monitor:
        monitor.cpus.unplug = {2: Silent()}
        async with _operator_of(control_plane, socket_root, user) as operator:
            unplug = {"timeoutSeconds": 3, "retrySeconds": 3600}
            await user.create("vm", 2, "vm.sock", nodeName="here", unplug=unplug)
            await until(lambda: len(monitor.received("device_del")) == 1, 60, "a request")
            first = (await user.get("vm")).pending[0]
            operator.kill()
            await operator.start()
            seen = await user.wait(
                "vm", lambda seen: [each["attempts"] for each in seen.pending] == [2], "a second one"
            )
            made = [datetime.fromisoformat(each["requestedAt"]) for each in (first, seen.pending[0])]
            assert made[1] - made[0] >= timedelta(seconds=5)
            await until(lambda: len(monitor.received("device_del")) == 2, 60, "the second request")
            await user.wait_reason("vm", "UnplugTimedOut")


async def test_requests_to_a_machine_that_was_replaced_are_void(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """The path is the same; the thread is another, so the new machine is asked at once."""
    async with FaultyMonitor(folder / "vm.sock", cpus=3) as monitor:
        monitor.cpus.unplug = {2: Silent()}
        await user.create("vm", 2, "vm.sock", unplug={"timeoutSeconds": 3600, "retrySeconds": 3600})
        await until(lambda: len(monitor.received("device_del")) == 1, 60, "a request")
        monitor.restart(3)
        await until(lambda: len(monitor.received("device_del")) == 2, 60, "a request to the new machine")
        seen = await user.wait("vm", lambda seen: len(seen.pending) == 1, "one request")
        cpu = monitor.cpus.at(2)
        assert cpu is not None
        await user.wait(
            "vm", lambda seen: [each["threadID"] for each in seen.pending] == [cpu.thread_id], "the new one"
        )
        assert [each["attempts"] for each in seen.pending] == [1]
        monitor.cpus.eject(2)
        await shows(user, "vm", "Converged", READY, vcpus=2)


@asynccontextmanager
async def _operator_of(control_plane: ControlPlane, socket_root: Path, user: User) -> AsyncIterator[OperatorProcess]:
    """An operator for this test alone, to be killed: it serves the sets of one namespace on the node `here`."""
    running = OperatorProcess(
        control_plane,
        f"--namespace={user.namespace}",
        "--node-name=here",
        "--resync-seconds=1",
        socket_root=socket_root,
    )
    async with running:
        yield running


@asynccontextmanager
async def _most_seen(client: Raw) -> AsyncIterator[Callable[[], int]]:
    """Counts the machine's CPUs all the time; yields what the most was."""
    most = 0

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, await client.count())
            await asyncio.sleep(0.005)

    looking = asyncio.create_task(look())
    try:
        await until(lambda: most or looking.done(), 60, "a first count")
        yield lambda: most
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking


@dataclass
class _Witness(Fault):
    """No fault: reads, before it lets an answer go, which requests the API server knows of."""

    user: User
    name: str
    known: list[set[int]] = field(default_factory=list, init=False)

    @override
    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        self.known.append({each["slot"] for each in (await self.user.get(self.name)).pending})
        await link.send(answer)


async def _looks(monitor: FaultyMonitor, times: int) -> None:
    """Wait until the machine has been looked at so often, from the beginning."""
    await until(lambda: len(monitor.received("query-cpus-fast")) >= times, 60, f"{times} looks at the machine")


def _path(command: Command) -> str:
    return str(command.arguments["id"])
