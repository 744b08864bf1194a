"""libvirt beside the operator, according to docs/libvirt.md: who sees what, and what may not be mixed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.libvirt import QEMU_USER, Libvirt, Machine
from harness.operator import OperatorProcess
from harness.qmp import execute, slots
from harness.wait import until
from harness.world import User

PAGE: Final = Page(REPOSITORY / "docs" / "libvirt.md")

OPERATOR_GROUP: Final = 65532
"""As in the shipped DaemonSet."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def libvirt() -> AsyncIterator[Libvirt]:
    async with Libvirt() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    socket_root.chmod(0o755)
    async with OperatorProcess(control_plane, socket_root=socket_root) as running:
        yield running


@pytest.fixture
def monitor(folder: Path) -> Path:
    """Where the page's machine has its monitor for the operator, in folders with the page's owners and modes."""
    path = folder / "web"
    path.mkdir()
    for each in (folder, path):
        os.chown(each, QEMU_USER, OPERATOR_GROUP)
        each.chmod(0o2770)
    return path / "qmp.sock"


@pytest.fixture
async def machine(libvirt: Libvirt, monitor: Path, namespace: str) -> AsyncIterator[Machine]:
    """The page's machine, which is not started."""
    text = PAGE.block("xml", "machine").text.replace("/run/vcpuset/default/web/qmp.sock", str(monitor))
    made = await libvirt.machine(namespace, text)
    yield made
    await made.virsh("destroy", check=False)
    await made.virsh("undefine", check=False)


async def test_race(operator, machine, user, monitor) -> None:
    await user.create("web", 4, monitor="web/qmp.sock")
    bad = 0
    for _ in range(8):
        answer = await machine.virsh("start", check=False)
        print(answer)
        if answer.returncode:
            bad += 1
        else:
            await user.wait_ready("web")
            print(await machine.count())
            await machine.virsh("destroy")
    print(machine.libvirt.log())
    assert not bad
