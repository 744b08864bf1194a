"""Each reason of a set that is at its count, is growing, or cannot reach the count: caused, and read from the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from harness.acpi import Acpi
from harness.controlplane import ControlPlane
from harness.expect import HELD, READY, RECONCILING, STALLED, history, reasons, shows
from harness.faults import Delay, Error
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import count, device_add, raw, slots
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion: what the tests see is not a resync's."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


async def test_a_machine_that_has_its_count_is_converged(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]):
        await user.create("vm", 2, "vm.sock")
        seen = await shows(user, "vm", "Converged", READY, "QEMU has 2 vCPUs, as declared.", vcpus=2)
        assert (seen.status["machine"]["minVCPUs"], seen.status["machine"]["maxVCPUs"]) == (1, 8)
        assert seen.pending == []


async def test_a_plug_that_is_soon_done_is_reported_once(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        created = await user.create("vm", 2, "vm.sock")
        await shows(user, "vm", "Converged", READY, vcpus=2)
        await user.change("vm", vcpus=5)
        await shows(user, "vm", "Converged", READY, vcpus=5)
        assert await count(guest.control) == 5

        # A host so slow that it takes long reports it: see the next test.
        seen = [reason for reason, _ in reasons(await history(user, created)) if reason != "Plugging"]
        assert seen == ["Converged"]
        assert ("Converged", "Normal") in await _events(user, "vm", 1)


async def test_a_plug_that_takes_long_is_reported_while_it_is_under_way(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with FaultyMonitor(folder / "vm.sock", faults={"device_add": Delay(1.0)}):
        created = await user.create("vm", 5, "vm.sock")
        await shows(user, "vm", "Converged", READY, vcpus=5)

        versions = await history(user, created)
        assert reasons(versions) == [("Plugging", RECONCILING), ("Converged", READY)]
        plugging = next(seen for seen in versions if seen.reason == "Plugging")
        assert plugging.vcpus == 2, "the count is the one that was observed, not the one that is hoped for"
        assert plugging.message == "2 vCPUs present, 5 declared; plugging 3."
        assert await _events(user, "vm", 1) == [("Converged", "Normal")]


async def test_ids_that_other_devices_have_keep_no_slot_free(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    cpus = [f"qemu64-x86_64-cpu,socket-id=0,core-id={core},thread-id=0,id=vcpu{core - 1}" for core in (5, 6)]
    others = ["qemu-xhci", "usb-tablet,id=vcpu2", "usb-tablet,id=vcpu3", *cpus]
    extra = [word for device in others for word in ("-device", device)]
    async with Guest(None, smp="2,maxcpus=8", extra=extra, monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 8, "vm.sock")
        await shows(user, "vm", "Converged", READY, vcpus=8)
        paths = [slot["qom-path"] for slot in await slots(guest.control)]
        assert [path.startswith(f"/machine/peripheral/vcpu{index}-") for index, path in enumerate(paths)] == [
            False, False, True, True, True, False, False, False,
        ]  # fmt: skip
        assert paths[7] == "/machine/peripheral/vcpu7"


async def test_plugging_says_what_qemu_says_while_it_refuses_and_goes_on_when_it_does_not(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    refusal = Error("GenericError", "no memory for another CPU")
    async with FaultyMonitor(folder / "vm.sock", faults={"device_add": refusal}) as monitor:
        await user.create("vm", 3, "vm.sock")
        await shows(
            user, "vm", "Plugging", RECONCILING, "2 vCPUs present, 3 declared", "device_add: no memory", vcpus=2
        )
        monitor.faults.clear()
        await shows(user, "vm", "Converged", READY, vcpus=3)


async def test_a_machine_with_too_few_slots_runs_at_its_ceiling(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=4", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 6, "vm.sock")
        seen = await shows(
            user, "vm", "InsufficientSlots", STALLED, "6 declared", "slots for 4 vCPUs", "-smp maxcpus", vcpus=4
        )
        assert seen.status["machine"]["maxVCPUs"] == 4
        assert await count(guest.control) == 4
        assert ("InsufficientSlots", "Warning") in await _events(user, "vm", 1)

        await user.change("vm", vcpus=4)
        await shows(user, "vm", "Converged", READY, vcpus=4)


async def test_a_machine_type_without_cpu_hotplug_is_told_apart_in_both_directions(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, machine="microvm", cpu=None, smp="2", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 2, "vm.sock")
        seen = await shows(user, "vm", "Converged", READY, vcpus=2)
        assert (seen.status["machine"]["minVCPUs"], seen.status["machine"]["maxVCPUs"]) == (2, 2)
        for declared in (3, 1):
            await user.change("vm", vcpus=declared)
            await shows(
                user,
                "vm",
                "HotplugUnsupported",
                STALLED,
                f"2 vCPUs present, {declared} declared",
                "does not support CPU hotplug",
                "restart the VM",
                vcpus=2,
            )
        assert await count(guest.control) == 2


async def test_a_suspended_set_is_observed_and_nothing_is_changed(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 3, "vm.sock", suspend=True)
        await shows(user, "vm", "Suspended", HELD, "2 vCPUs present, 3 declared", "spec.suspend", vcpus=2)
        assert await count(guest.control) == 2

        await device_add(guest.control, 2)
        await user.touch("vm")
        await shows(user, "vm", "Converged", READY, vcpus=3)

        await device_add(guest.control, 3)
        await user.touch("vm")
        await shows(user, "vm", "Suspended", HELD, "4 vCPUs present, 3 declared", vcpus=4)

        await user.change("vm", vcpus=5, suspend=False)
        await shows(user, "vm", "Converged", READY, vcpus=5)


async def test_a_set_that_may_only_grow_says_so_and_still_grows(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        Guest(None, smp="3,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        await user.create("vm", 2, "vm.sock", unplug={"policy": "Disabled"})
        await shows(
            user,
            "vm",
            "UnplugDisabled",
            STALLED,
            "3 vCPUs present, 2 declared",
            "spec.unplug.policy is Disabled",
            "3 vCPUs",
            vcpus=3,
        )
        assert [(await acpi.flags(slot)).removing for slot in range(3)] == [False] * 3

        await user.change("vm", vcpus=4)
        await shows(user, "vm", "Converged", READY, vcpus=4)


async def test_kept_boot_vcpus_are_the_floor_and_the_others_are_given_back(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        Guest(None, smp="3,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        await user.create("vm", 5, "vm.sock", unplug={"bootVCPUs": "Keep"})
        await shows(user, "vm", "Converged", READY, vcpus=5)

        await user.change("vm", vcpus=1)
        await user.wait("vm", lambda seen: {each["slot"] for each in seen.pending} == {3, 4}, "two requests")
        for slot in (4, 3):
            await acpi.eject(slot)
        seen = await shows(
            user,
            "vm",
            "BootVCPUsKept",
            STALLED,
            "3 vCPUs present, 1 declared",
            "spec.unplug.bootVCPUs is Keep",
            vcpus=3,
        )
        assert seen.pending == []
        assert [(await acpi.flags(slot)).removing for slot in range(3)] == [False] * 3


async def _events(user: User, name: str, at_least: int) -> list[tuple[str, str]]:
    """Reason and type of the Events about a set, oldest first; they are posted a moment after the status."""

    async def posted() -> bool:
        return len(await user.events(name)) >= at_least

    await until(posted, 60, f"{at_least} Events about {name}")
    return [(each["reason"], each["type"]) for each in await user.events(name)]
