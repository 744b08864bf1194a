"""Requests that a guest never answered are void once another QEMU stands at the monitor's path.

Whoever counted them as leaving would ask the new machine for too few, and those whom nobody answers would be asked
again only after `retrySeconds`; here that is an hour, and nothing else gives the operator an occasion.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from harness.acpi import Acpi
from harness.controlplane import ControlPlane
from harness.expect import READY, shows
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.wait import until
from harness.world import Seen, User

ONE = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-555555555555"
PATIENT = {"timeoutSeconds": 3600, "retrySeconds": 3600}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


@asynccontextmanager
async def _machine(folder: Path, smp: str, uuid: str | None) -> AsyncIterator[tuple[Guest, Raw]]:
    """A machine whose guest is played by hand and takes unplug requests from the start."""
    extra = [] if uuid is None else ["-uuid", uuid]
    async with (
        Guest(None, smp=smp, extra=extra, monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await Acpi(client).leave_legacy()
        yield guest, client


@pytest.mark.parametrize("connection", ["OnDemand", "Persistent"])
@pytest.mark.parametrize(
    ("first", "second"), [(ONE, ONE), (ONE, OTHER), (None, None)], ids=["same-uuid", "other-uuid", "no-uuid"]
)
async def test_a_new_machine_is_asked_at_once_for_its_whole_surplus(
    folder: Path, operator: OperatorProcess, user: User, first: str | None, second: str | None, connection: str
) -> None:
    async with _machine(folder, "5,maxcpus=16", first) as (old, client):
        await user.create("vm", 3, "vm.sock", connection=connection, unplug=PATIENT)
        before = await _asked(user, client, 3, 4)
        assert before.status["machine"].get("uuid") == first
        old.kill()
        async with _machine(folder, "5,maxcpus=16", second) as (_, successor):
            after = await _asked(user, successor, 3, 4)
            assert after.status["machine"].get("uuid") == second
            assert [each["attempts"] for each in after.pending] == [1, 1]
            acpi = Acpi(successor)
            for slot in (4, 3):
                await acpi.eject(slot)
            done = await shows(user, "vm", "Converged", READY, vcpus=3)
            assert done.pending == []


async def test_a_new_machine_that_has_the_declared_count_is_asked_for_nothing(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with _machine(folder, "5,maxcpus=16", ONE) as (old, client):
        await user.create("vm", 3, "vm.sock", unplug=PATIENT)
        await _asked(user, client, 3, 4)
        old.kill()
        async with _machine(folder, "3,maxcpus=16", ONE) as (_, successor):
            done = await shows(user, "vm", "Converged", READY, vcpus=3)
            assert done.pending == []
            assert "may still" not in done.message
            acpi = Acpi(successor)
            assert not any([(await acpi.flags(slot)).removing for slot in range(3)])


async def test_a_count_that_rose_meanwhile_is_reached_on_the_new_machine_with_nothing_said_to_leave(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with _machine(folder, "5,maxcpus=16", ONE) as (old, client):
        await user.create("vm", 3, "vm.sock", unplug=PATIENT)
        await _asked(user, client, 3, 4)
        await user.change("vm", vcpus=5)
        await shows(user, "vm", "Converged", READY, "slots 3-4", "plugged again", vcpus=5)
        old.kill()
        async with _machine(folder, "2,maxcpus=16", ONE):
            done = await user.wait(
                "vm", lambda seen: seen.ready and not seen.pending and "may still" not in seen.message, "a clean book"
            )
            assert done.vcpus == 5


async def _asked(user: User, client: Raw, *slots: int) -> Seen:
    """Wait until QEMU passes requests for these slots on to the guest, and the status has them; returns the set."""
    acpi = Acpi(client)

    async def removing() -> bool:
        return all([(await acpi.flags(slot)).removing for slot in slots])

    await until(removing, 90, f"requests for {slots}")
    threads = await _threads(client)

    def book(seen: Seen) -> bool:
        known = [(each["slot"], each["threadID"]) for each in seen.pending]
        return known == [(slot, threads[slot]) for slot in sorted(slots)]

    return await user.wait("vm", book, f"requests for {slots} of this QEMU")


async def _threads(client: Raw) -> dict[int, int]:
    return {cpu["cpu-index"]: cpu["thread-id"] for cpu in await client.call("query-cpus-fast")}
