"""Each reason of a set whose machine has too many CPUs: caused, and read from the API.

Most guests here are played by hand (harness.acpi), so that each test decides what the guest answers and when.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from harness.acpi import Acpi, Status
from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, STALLED, check_form, history, reasons, shows
from harness.faults import Error
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, count, execute, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion: what the tests see is not a resync's."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


@dataclass
class Played:
    """A machine without a guest, and the one who plays its guest."""

    guest: Guest
    client: Raw
    acpi: Acpi

    async def asked(self, slot: int) -> None:
        """Wait until QEMU passes an unplug request for this slot on to the guest."""

        async def removing() -> bool:
            return (await self.acpi.flags(slot)).removing

        await until(removing, 90, f"a request for slot {slot}")

    async def unasked(self, *wanted: int) -> None:
        """Check that the guest is not asked for these slots."""
        assert [slot for slot in wanted if (await self.acpi.flags(slot)).removing] == []


@asynccontextmanager
async def played(folder: Path, smp: str, *, booted: bool = True) -> AsyncIterator[Played]:
    """A machine whose guest has booted as far as it takes unplug requests, if `booted`."""
    async with Guest(None, smp=smp, monitor_paths=[folder / "vm.sock"]) as guest, raw(guest.control) as client:
        acpi = Acpi(client)
        if booted:
            await acpi.leave_legacy()
        yield Played(guest, client, acpi)


async def test_unplugging_is_reported_with_its_requests_and_then_that_no_answer_has_come(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with played(folder, "4,maxcpus=64") as machine:
        created = await user.create("vm", 2, "vm.sock")
        pending = await shows(user, "vm", "UnplugPending", RECONCILING, "slots 2-3", "not answered yet", vcpus=4)
        # That stays, and what came before it was soon over.
        seen = next(each for each in await history(user, created) if each.status.get("conditions"))
        check_form(seen)
        assert (seen.reason, seen.states, seen.vcpus) == ("Unplugging", RECONCILING, 4)
        assert "4 vCPUs present, 2 declared" in seen.message
        assert "unplug of slots 2-3" in seen.message
        assert [each["slot"] for each in seen.pending] == [2, 3]
        cpus = {cpu["cpu-index"]: cpu for cpu in await machine.client.call("query-cpus-fast")}
        for each in seen.pending:
            cpu = cpus[each["slot"]]
            assert (each["path"], each["threadID"]) == (cpu["qom-path"], cpu["thread-id"])
            assert each["attempts"] == 1
            assert "answer" not in each
        assert pending.pending == seen.pending
        for slot in (3, 2):
            await machine.asked(slot)
            await machine.acpi.eject(slot)
        done = await shows(user, "vm", "Converged", READY, vcpus=2)
        assert done.pending == []
        assert "unplug" not in done.status
        told = reasons(await history(user, created))
        # The first sign of an answer may be seen before the CPUs are gone: then Unplugging comes once more.
        assert told[:2] == [("Unplugging", RECONCILING), ("UnplugPending", RECONCILING)]
        assert told[-1] == ("Converged", READY)


async def test_a_paused_guest_is_waited_for(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        await execute(guest.control, "stop")
        await user.change("vm", vcpus=1)
        await shows(user, "vm", "UnplugPending", RECONCILING, "slot 1", "not answered yet", vcpus=2)
        await execute(guest.control, "cont")
        await shows(user, "vm", "Converged", READY, vcpus=1)
        await guest.wait_online({0})


async def test_a_guest_that_has_not_booted_is_waited_for_and_asked_once_it_can_answer(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with played(folder, "2,maxcpus=8", booted=False) as machine:
        await user.create("vm", 1, "vm.sock")
        seen = await shows(
            user, "vm", "WaitingForGuest", RECONCILING, "2 vCPUs present, 1 declared", "booting", "acpi=off", vcpus=2
        )
        assert seen.pending == []
        await machine.acpi.leave_legacy()
        await machine.asked(1)
        await machine.acpi.eject(1)
        await shows(user, "vm", "Converged", READY, vcpus=1)


async def test_a_linux_guest_booted_without_acpi_is_waited_for_while_more_cpus_are_plugged_all_the_same(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="2,maxcpus=64", append="acpi=off", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 1, "vm.sock")
        await shows(user, "vm", "WaitingForGuest", RECONCILING, "acpi=off", vcpus=2)
        await user.change("vm", vcpus=3)
        await shows(user, "vm", "Converged", READY, vcpus=3)
        assert await count(guest.control) == 3


async def test_a_refused_cpu_is_replaced_by_the_next_candidate(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Plugged CPUs come before those of the boot, the highest slot first."""
    async with played(folder, "3,maxcpus=64") as machine:
        await user.create("vm", 5, "vm.sock")
        await user.wait_ready("vm")
        await user.change("vm", vcpus=4)
        for refused, untouched in ((4, (1, 2, 3)), (3, (1, 2)), (2, (1,))):
            await machine.asked(refused)
            await machine.unasked(*untouched)
            await machine.acpi.refuse(refused)
        await machine.asked(1)
        await machine.acpi.eject(1)
        seen = await shows(user, "vm", "Converged", READY, vcpus=4)
        assert seen.pending == [], "who said no before is forgotten once the count is right"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.BUSY, "slot 1: device busy (_OST 0x82)"),
        (Status.NOT_SUPPORTED, "slot 1: not supported by the guest (_OST 0x80)"),
        (Status.IN_USE, "slot 1: device in use (_OST 0x81)"),
        (Status.DEPENDENCY_BUSY, "slot 1: a dependency is busy (_OST 0x83)"),
        (Status.FAILURE, "slot 1: non-specific failure (_OST 0x1)"),
    ],
)
async def test_a_refusal_is_told_in_words(
    folder: Path, operator: OperatorProcess, user: User, status: Status, words: str
) -> None:
    async with played(folder, "2,maxcpus=8") as machine:
        await user.create("vm", 1, "vm.sock")
        await machine.asked(1)
        await machine.acpi.refuse(1, status)
        seen = await shows(
            user,
            "vm",
            "UnplugRefused",
            RECONCILING,
            "2 vCPUs present, 1 declared",
            words,
            "no other candidate",
            "declare more vCPUs",
            "up to 300 s",
            vcpus=2,
        )
        assert [(each["slot"], each["attempts"]) for each in seen.pending] == [(1, 1)]


async def test_a_refusal_stalls_after_the_timeout_is_asked_again_and_ends_when_the_guest_agrees(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with played(folder, "2,maxcpus=64") as machine:
        created = await user.create("vm", 1, "vm.sock", unplug={"timeoutSeconds": 10, "retrySeconds": 3})
        await machine.asked(1)
        await machine.acpi.refuse(1)
        await shows(user, "vm", "UnplugRefused", RECONCILING, vcpus=2)
        for _ in range(3):
            await machine.asked(1)
            await machine.acpi.refuse(1)
        await machine.asked(1)
        await machine.acpi.refuse(1)
        stalled = await shows(user, "vm", "UnplugRefused", STALLED, "every 3 s", vcpus=2)
        assert stalled.condition("Stalled")["lastTransitionTime"] >= stalled.status["unplug"]["startedAt"][:19]

        await machine.asked(1)
        await machine.acpi.eject(1)
        await shows(user, "vm", "Converged", READY, vcpus=1)

        versions = await history(user, created)
        # On a busy host the first answer may be heard only after it was missed.
        told = reasons([each for each in versions if each.reason != "UnplugPending"])
        assert told == [
            ("Unplugging", RECONCILING),
            ("UnplugRefused", RECONCILING),
            ("UnplugRefused", STALLED),
            ("Converged", READY),
        ]
        requested = [_time(each["requestedAt"]) for seen in versions for each in seen.pending]
        made = sorted(set(requested))
        assert len(made) >= 5
        assert all(later - earlier >= timedelta(seconds=3) for earlier, later in itertools.pairwise(made))


async def test_a_linux_guest_that_holds_its_cpus_gives_them_back_when_the_cause_has_gone(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 2, "vm.sock", unplug={"timeoutSeconds": 2, "retrySeconds": 2})
        await user.wait_ready("vm")
        await guest.hold_cpus(1)
        await user.change("vm", vcpus=1)
        await shows(user, "vm", "UnplugRefused", STALLED, "no other candidate", vcpus=2)
        await user.wait("vm", lambda seen: "slot 1: device busy (_OST 0x82)" in seen.message, "the guest's answer")
        await guest.release_cpus()
        await shows(user, "vm", "Converged", READY, vcpus=1)
        await guest.wait_online({0})


async def test_silence_stalls_after_the_timeout_and_a_late_answer_is_still_taken(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with played(folder, "2,maxcpus=64") as machine:
        unplug = {"timeoutSeconds": 1, "retrySeconds": 3600}
        await user.create("vm", 1, "vm.sock", connection="OnDemand", unplug=unplug)
        await machine.asked(1)
        seen = await shows(
            user,
            "vm",
            "UnplugTimedOut",
            STALLED,
            "2 vCPUs present, 1 declared",
            "has not unplugged slot 1",
            "late answer is still accepted",
            "up to 3600 s",
            vcpus=2,
        )
        assert [each["attempts"] for each in seen.pending] == [1]
        # The session was given back meanwhile: others can use the monitor.
        assert await count(folder / "vm.sock") == 2
        await machine.acpi.eject(1)
        await user.touch("vm")
        done = await shows(user, "vm", "Converged", READY, vcpus=1)
        assert done.pending == []


async def test_a_silent_guest_is_asked_again_every_retry_seconds(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with played(folder, "2,maxcpus=64") as machine:
        await user.create("vm", 1, "vm.sock", unplug={"timeoutSeconds": 1, "retrySeconds": 2})
        for _ in range(2):
            # Taken notice of and not answered: the request is lost, and only a new one sets the flag again.
            await machine.asked(1)
            await machine.acpi.forget_removal(1)
        seen = await user.wait(
            "vm", lambda seen: any(each["attempts"] >= 3 for each in seen.pending), "a third request"
        )
        assert seen.states[2] == "True", "it stays stalled through the retries"
        assert seen.reason == "UnplugTimedOut"
        await machine.asked(1)
        await machine.acpi.eject(1)
        await shows(user, "vm", "Converged", READY, vcpus=1)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def test_a_machine_that_rejects_the_request_itself_is_told_from_a_guest_that_refuses(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """No QEMU for x86 that is known does so for a CPU that it lists; firmware without SMI for unplug would."""
    words = "cpu hot-unplug with SMI wasn't enabled by firmware"
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as monitor:
        monitor.faults["device_del"] = Error("GenericError", words)
        await user.create("vm", 1, "vm.sock", unplug={"timeoutSeconds": 60, "retrySeconds": 3})
        seen = await shows(user, "vm", "UnplugUnsupported", STALLED, "QEMU refused to unplug slot 1", words, vcpus=2)
        assert [each["answer"] for each in seen.pending] == ["Rejected"]
        monitor.faults.clear()
        await shows(user, "vm", "Converged", READY, vcpus=1)


@pytest.mark.parametrize("connection", ["OnDemand", "Persistent"])
async def test_a_linux_guest_that_is_asked_while_it_reboots_gives_its_cpus_back_once_it_is_up(
    folder: Path, operator: OperatorProcess, user: User, connection: str
) -> None:
    """QEMU takes the request, and the kernel that boots never sees it: only a repetition helps."""
    async with saved_guest(smp="5,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        created = await user.create("vm", 5, "vm.sock", connection=connection)
        await user.wait_ready("vm")
        await execute(guest.control, "system_reset")
        await user.change("vm", vcpus=3)
        await shows(user, "vm", "Converged", READY, vcpus=3)
        await guest.wait_online(3)
        versions = await history(user, created)
        assert len({each["requestedAt"] for seen in versions for each in seen.pending}) > 1, (
            "no repetition was recorded"
        )
        assert {seen.states for seen in versions if seen.states == STALLED} == set(), "that is no reason to worry"
