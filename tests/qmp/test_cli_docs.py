"""docs/cli.md shows what the commands really print, on the machine that it describes."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml

from harness.cache import REPOSITORY
from harness.docpage import Page
from harness.guest import Guest
from harness.qmp import raw
from harness.saved import saved_guest
from harness.wait import until
from qmp.commandline import vcpuset

__all__: list[str] = []

PAGE = Page(REPOSITORY / "docs" / "cli.md")
ROOT = "/run/vcpuset"
"""The socket root on the page."""

PLUGGING = re.compile(r"^VCPUSet .*: Plugging: .*\n", re.MULTILINE)

VERSION = re.compile(r"^(QEMU: +)\S+.*(, x86_64)$", re.MULTILINE)


@pytest.fixture
async def machine() -> AsyncIterator[Path]:
    """The socket root of a machine: 1 vCPU from the boot, 3 plugged; its guest uses one of these, and keeps it."""
    root = Path(tempfile.mkdtemp(prefix="vcpuset-docs-"))
    folder = root / "default" / "web"
    folder.mkdir(parents=True)
    monitors = [folder / "qmp.sock"]
    try:
        async with saved_guest(
            agent=True, append="online=none", agent_path=folder / "agent.sock", monitor_paths=monitors
        ) as guest:
            await _prepare(guest)
            yield root
    finally:
        shutil.rmtree(root)


async def _prepare(guest: Guest) -> None:
    async with raw(guest.control) as client:
        for slot in (1, 2, 3):
            await client.device_add(slot)
        await until(lambda: len(guest.present()) == 4, 60, "the guest to know of four CPUs")
        await guest.shell("echo 1 > /sys/devices/system/cpu/cpu1/online")
        await guest.wait_online({0, 1})
        await guest.hold_cpus(1)
        await client.device_del(1)

        async def refused() -> bool:
            reports = await client.call("query-acpi-ospm-status")
            return any(report["slot"] == "1" and report["status"] == 0x82 for report in reports)

        await until(refused, 60, "the guest to refuse slot 1")


async def test_the_page_shows_what_the_commands_print(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for block in PAGE.blocks("yaml"):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text)
    seen = 0
    for command, expected in (example for block in PAGE.blocks("console") for example in block.commands()):
        words = shlex.split(command.replace(ROOT, str(machine)))
        if words[0] != "vcpuset" or "|" in words:
            continue
        seen += 1
        result = await vcpuset(*words[1:], status=1 if expected.startswith("Error") else 0)
        # On a busy host, a plug takes so long that it is reported meanwhile.
        output = PLUGGING.sub("", result.output.replace(str(machine), ROOT))
        assert VERSION.sub(r"\1…\2", output) == VERSION.sub(r"\1…\2", expected), command
    assert seen >= 5


async def test_the_page_names_every_field_of_the_documents(machine: Path) -> None:
    monitor = machine / "default" / "web" / "qmp.sock"
    inspected = yaml.safe_load((await vcpuset("inspect", monitor, "-o", "yaml")).stdout)
    text = "apiVersion: vcpuset.dev/v1alpha1\nkind: VCPUSet\nmetadata: {name: web}\n"
    text += "spec: {vcpus: 65, monitor: {unix: {path: web/qmp.sock}}}"
    planned = yaml.safe_load(
        (await vcpuset("plan", "-f", "-", "--socket-root", machine, "-o", "yaml", text=text)).stdout
    )
    for name in {*_names(inspected), *_names(planned)}:
        assert f"`{name}`" in PAGE.text, name


def _names(document: object) -> Iterator[str]:
    """The fields of a document, but not those of `props`, which are QEMU's."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield name
            if name != "props":
                yield from _names(value)
    elif isinstance(document, list):
        for each in document:
            yield from _names(each)
