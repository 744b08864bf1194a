"""The main job: a user declares a count with kubectl, and a real Linux guest has as many CPUs."""

from __future__ import annotations

import json
from pathlib import Path

from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.qmp import count, device_add, device_del, slots
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User, manifest


async def test_kubectl_apply_and_scale_resize_a_running_guest(
    control_plane: ControlPlane, namespace: str, folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Up, down, below the boot count, and up again; each step ends with `kubectl wait` and the guest's own count."""

    async def kubectl(*arguments: str, text: str | None = None) -> None:
        await control_plane.kubectl("-n", namespace, *arguments, input=text)

    async def settles(vcpus: int) -> None:
        await kubectl("wait", "--for=condition=Ready", "vcs/vm", "--timeout=90s")
        seen = await user.get("vm")
        assert (seen.vcpus, seen.reason) == (vcpus, "Converged")
        assert await count(guest.control) == vcpus
        await guest.wait_online(vcpus)

    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await kubectl("apply", "-f", "-", text=json.dumps(manifest(namespace, "vm", 2, "vm.sock")))
        await settles(2)
        for vcpus in (6, 3):
            await kubectl("scale", "vcs", "vm", f"--replicas={vcpus}")
            await settles(vcpus)
        await kubectl("apply", "-f", "-", text=json.dumps(manifest(namespace, "vm", 8, "vm.sock")))
        await settles(8)
        await kubectl("scale", "vcs", "vm", "--replicas=1")
        await settles(1)
        assert [slot["qom-path"] is not None for slot in await slots(guest.control) if "qom-path" in slot] == [True]
        await kubectl("scale", "vcs", "vm", "--replicas=8")
        await settles(8)


async def test_the_status_only_ever_shows_counts_that_were_observed(
    control_plane: ControlPlane, folder: Path, operator: OperatorProcess, user: User
) -> None:
    """While the guest holds its CPUs, status.vcpus stays at what QEMU has, whatever is declared."""
    async with saved_guest(smp="4,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        await guest.hold_cpus(1, 2, 3)
        await user.change("vm", vcpus=1)
        seen = await user.wait_reason("vm", "UnplugRefused")
        assert seen.vcpus == 4
        assert seen.status["machine"]["minVCPUs"] == 1
        assert seen.status["machine"]["maxVCPUs"] == 64


async def test_what_someone_else_does_behind_the_back_of_an_on_demand_set_is_undone_when_the_spec_changes(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 3, "vm.sock", connection="OnDemand")
        await user.wait_ready("vm")
        await guest.wait_online(3)

        await device_add(guest.control, 5, ident="stranger")
        assert await count(guest.control) == 4
        await user.touch("vm")
        await until(lambda: _has(guest.control, 3), 60, "the stranger's CPU to be gone")
        assert [slot.get("qom-path", "").rsplit("/", 1)[-1] for slot in (await slots(guest.control))[2:6]] == [
            "vcpu2",
            "",
            "",
            "",
        ]
        # Until its report the operator watches the machine, and would undo the next change before it is seen here.
        await user.wait("vm", lambda seen: seen.ready and seen.vcpus == 3 and not seen.pending, "the report")

        await device_del(guest.control, 2)
        await until(lambda: _has(guest.control, 2), 60, "the CPU to be gone")
        await user.touch("vm")
        await until(lambda: _has(guest.control, 3), 60, "the CPU to be back")
        await guest.wait_online(3)


async def _has(monitor: Path, vcpus: int) -> bool:
    return await count(monitor) == vcpus
