"""The reasons that x86 machines cannot give: CPUs that never come back (s390x), whole cores only (ppc64)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.expect import READY, STALLED, shows
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import count, slots
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion: what the tests see is not a resync's."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


async def test_s390x_takes_cpus_and_never_gives_them_back(folder: Path, operator: OperatorProcess, user: User) -> None:
    machine = Guest(
        None,
        qemu="qemu-system-s390x",
        machine="s390-ccw-virtio",
        cpu=None,
        smp="2,maxcpus=4",
        monitor_paths=[folder / "vm.sock"],
    )
    async with machine as guest:
        await user.create("vm", 3, "vm.sock")
        seen = await shows(user, "vm", "Converged", READY, vcpus=3)
        assert (seen.status["machine"]["minVCPUs"], seen.status["machine"]["maxVCPUs"]) == (3, 4)

        await user.change("vm", vcpus=2)
        seen = await shows(
            user,
            "vm",
            "UnplugUnsupported",
            STALLED,
            "3 vCPUs present, 2 declared",
            "QEMU cannot unplug CPUs of this machine",
            "at least 3 vCPUs",
            vcpus=3,
        )
        assert seen.pending == []
        assert await count(guest.control) == 3

        await user.change("vm", vcpus=4)
        await shows(user, "vm", "Converged", READY, vcpus=4)


async def test_ppc64_comes_and_goes_in_whole_cores(folder: Path, operator: OperatorProcess, user: User) -> None:
    machine = Guest(
        None,
        qemu="qemu-system-ppc64",
        machine="pseries",
        cpu=None,
        memory=256,
        smp="2,threads=2,maxcpus=8",
        monitor_paths=[folder / "vm.sock"],
    )
    async with machine as guest:
        await user.create("vm", 5, "vm.sock")
        seen = await shows(
            user,
            "vm",
            "UnsupportedVCPUCount",
            STALLED,
            "4 vCPUs present, 5 declared",
            "cores of 2 vCPUs",
            "declare 4 or 6",
            vcpus=4,
        )
        assert (seen.status["machine"]["minVCPUs"], seen.status["machine"]["maxVCPUs"]) == (2, 8)
        assert await count(guest.control) == 4

        await user.change("vm", vcpus=6)
        await shows(user, "vm", "Converged", READY, vcpus=6)
        assert [index for index, slot in enumerate(await slots(guest.control)) if "qom-path" in slot] == [0, 1, 2]

        # A core that no guest has claimed leaves at once.
        await user.change("vm", vcpus=3)
        await shows(
            user, "vm", "UnsupportedVCPUCount", STALLED, "2 vCPUs present, 3 declared", "declare 2 or 4", vcpus=2
        )
        await user.change("vm", vcpus=1)
        seen = await shows(
            user, "vm", "UnplugUnsupported", STALLED, "slot 0 cannot be unplugged", "at least 2 vCPUs", vcpus=2
        )
        assert seen.pending == []
