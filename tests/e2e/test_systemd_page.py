"""docs/systemd.md: systemd accepts its units, and their command lines do what the page says."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.processes import Child, run
from harness.wait import until
from harness.world import User

PAGE: Final = Page(REPOSITORY / "docs" / "systemd.md")
UNITS: Final = {"operator": "vcpuset.service", "machine": "vm-web.service"}


def command(unit: str) -> str:
    """The ExecStart of a unit, on one line."""
    found = re.search(r"^ExecStart=(.*?[^\\])$", PAGE.block("ini", unit).text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].replace("\\\n", " ")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
async def test_systemd_finds_no_fault_in_the_units(tmp_path: Path) -> None:
    for mark, name in UNITS.items():
        block = PAGE.block("ini", mark)
        program = command(mark).split()[0]
        # The program is not installed here, and its user does not exist.
        text = block.text.replace(program, "/bin/true").replace(
            "=vcpuset\n", "=daemon\n" if mark == "operator" else "=root\n"
        )
        (tmp_path / name).write_text(text)
    checked = await run(["systemd-analyze", "verify", *(tmp_path / name for name in UNITS.values())], check=False)
    said = [line for line in checked.stderr.splitlines() if any(name in line for name in UNITS.values())]
    assert said == []
    assert checked.returncode == 0, checked.stderr


async def test_the_units_command_lines_bring_the_machine_of_the_page_to_its_count(
    control_plane: ControlPlane, account: Path, user: User, socket_root: Path, tmp_path: Path
) -> None:
    folder = socket_root / user.namespace / "web"
    folder.mkdir(parents=True)
    here = {
        "/opt/vcpuset/bin/vcpuset run": f"{sys.executable} -m vcpuset.cli.main run --namespace={user.namespace}",
        "/etc/vcpuset/kubeconfig": str(account),
        "/run/vcpuset/default": str(folder.parent),
        "/run/vcpuset": str(socket_root),
        "accel=kvm -m 4G -drive file=/var/lib/vm/web.qcow2,if=virtio": "accel=tcg -m 64 -nic none -display none",
        "-nographic": "",
    }
    children: list[Child] = []

    def start(unit: str) -> Child:
        words = command(unit)
        for shown, used in here.items():
            words = words.replace(shown, used)
        child = Child.start(
            shlex.split(words), name=unit, log=tmp_path / f"{unit}-{len(children)}", env=dict(os.environ)
        )
        children.append(child)
        return child

    try:
        machine = start("machine")
        operator = start("operator")
        example = PAGE.block("yaml").document()
        example["metadata"]["namespace"] = user.namespace
        await user.create("web", example["spec"]["vcpus"], example["spec"]["monitor"]["unix"]["path"])
        assert (await user.wait_ready("web")).vcpus == 4

        machine.kill()
        await asyncio.to_thread((folder / "qmp.sock").unlink, missing_ok=True)
        start("machine")
        await until(lambda: (folder / "qmp.sock").exists(), 30, "the machine to be there again")
        await user.change("web", minVCPUs=1)  # a new generation, so that an old report does not count
        assert (await user.wait_ready("web")).vcpus == 4
        operator.require_running()
    finally:
        for child in children:
            child.kill()
