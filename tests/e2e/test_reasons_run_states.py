"""What happens in a machine and stops or hangs it, or makes its guest say no: caused, and read from the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from harness.acpi import Acpi, Source, Status
from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, shows
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks at every machine every two seconds, so that it soon sees one come back."""
    async with OperatorProcess(control_plane, "--resync-seconds=2", socket_root=socket_root) as running:
        yield running


async def test_a_machine_that_stands_still_after_an_error_of_its_storage_is_busy_until_it_goes_on(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """The firmware looks for something to boot. Of the reads that fail, the first is QEMU's own at the start."""
    errors = [f"inject-error.{n}.event=none,inject-error.{n}.iotype=read,inject-error.{n}.once=on" for n in range(2)]
    image = "image.driver=null-co,image.size=1048576,image.read-zeroes=on"
    disk = ["-blockdev", ",".join(["driver=blkdebug,node-name=disk", image, *errors])]
    disk += ["-device", "virtio-blk-pci,drive=disk,rerror=stop"]
    async with (
        Guest(None, smp="2,maxcpus=8", extra=disk, monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await client.call("cont")
        await _run_state(client, "io-error")
        await user.create("vm", 3, "vm.sock")
        seen = await shows(
            user,
            "vm",
            "MachineBusy",
            RECONCILING,
            "2 vCPUs present, 3 declared",
            "cannot be changed in run state 'io-error'",
            vcpus=2,
        )
        assert "migration" not in seen.message
        assert await client.count() == 2

        await client.call("cont")
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_linux_guest_that_sleeps_is_busy_until_it_is_woken(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        await guest.shell("(sleep 0.1; echo mem > /sys/power/state) &")
        await _run_state(client, "suspended")
        await user.change("vm", vcpus=3)
        await shows(user, "vm", "MachineBusy", RECONCILING, "3 declared", "run state 'suspended'", vcpus=2)
        await user.change("vm", vcpus=1)
        seen = await shows(user, "vm", "MachineBusy", RECONCILING, "1 declared", "run state 'suspended'", vcpus=2)
        assert seen.pending == [], "nobody is asked while asleep"

        await user.change("vm", vcpus=3)
        await client.call("system_wakeup")
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_machine_that_its_watchdog_has_stopped_is_not_running(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    watchdog = ["-device", "ib700", "-action", "watchdog=pause"]
    async with (
        Guest(None, smp="2,maxcpus=8", extra=watchdog, monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await client.call("cont")
        await client.hmp("o/b 0x443 15")  # a guest's driver: bark in 0 s
        await _run_state(client, "watchdog")
        await user.create("vm", 3, "vm.sock")
        await shows(user, "vm", "MachineNotRunning", RECONCILING, "run state is 'watchdog'", vcpus=2)
        assert await client.count() == 2

        await client.call("cont")
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_machine_with_an_internal_error_is_not_running(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Real machines get there by faults of KVM only, which these tests do without."""
    async with FaultyMonitor(folder / "vm.sock", cpus=2, status="internal-error") as monitor:
        await user.create("vm", 3, "vm.sock")
        await shows(user, "vm", "MachineNotRunning", RECONCILING, "run state is 'internal-error'", vcpus=2)
        assert monitor.received("device_add") == []
        monitor.status = "running"
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_machine_that_hangs_while_its_guest_is_asked_has_timed_out_and_is_not_asked_twice(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        unplug = {"timeoutSeconds": 3600, "retrySeconds": 3600}
        await user.create("vm", 1, "vm.sock", unplug=unplug)

        async def asked() -> bool:
            return (await acpi.flags(1)).removing

        await until(asked, 60, "a request for slot 1")
        await acpi.ost(1, Source.EJECT_REQUEST, Status.IN_PROGRESS)
        await user.wait("vm", lambda seen: [each.get("answer") for each in seen.pending] == ["InProgress"], "an answer")
        guest.freeze()
        try:
            hung = await shows(user, "vm", "MonitorTimeout", RECONCILING, "vm.sock has not answered a query", vcpus=2)
            assert [each["slot"] for each in hung.pending] == [1], "what was asked is not forgotten"
            # A client that connects again hears nothing at all, which may have another cause.
            await shows(user, "vm", "MonitorBusy", RECONCILING, "QEMU hangs", vcpus=2)
        finally:
            guest.thaw()
        seen = await shows(user, "vm", "Unplugging", RECONCILING, "slot 1", vcpus=2)
        assert [(each["slot"], each["attempts"]) for each in seen.pending] == [(1, 1)]
        await acpi.eject(1)
        await shows(user, "vm", "Converged", READY, vcpus=1)


async def test_a_linux_guest_that_holds_one_cpu_gives_another_and_says_why_when_it_holds_them_all(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="4,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 4, "vm.sock", unplug={"timeoutSeconds": 3600, "retrySeconds": 2})
        await user.wait_ready("vm")
        await guest.hold_cpus(3)
        await user.change("vm", vcpus=3)
        done = await shows(user, "vm", "Converged", READY, vcpus=3)
        assert done.pending == []
        await guest.wait_online({0, 1, 3})

        await guest.hold_cpus(1)
        await user.change("vm", vcpus=1)
        seen = await shows(
            user,
            "vm",
            "UnplugRefused",
            RECONCILING,
            "3 vCPUs present, 1 declared",
            "slots 1, 3: device busy (_OST 0x82)",
            "no other candidate",
            "Check what uses the CPUs",
            vcpus=3,
        )
        assert {each["answer"] for each in seen.pending} <= {"Busy", "InProgress"}
        await guest.release_cpus()
        await shows(user, "vm", "Converged", READY, vcpus=1)
        await guest.wait_online({0})


async def _run_state(client: Raw, wanted: str) -> None:
    async def reached() -> bool:
        return bool((await client.call("query-status"))["status"] == wanted)

    await until(reached, 60, f"run state {wanted}")
