"""The first steps of the README and of docs/start.md, as a newcomer follows them: QEMU, a manifest, one command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cache import REPOSITORY
from harness.docpage import Page, Reader
from harness.processes import Completed
from harness.qmp import count
from harness.wait import until

__all__: list[str] = []

PAGE = Page(REPOSITORY / "README.md")
START = Page(REPOSITORY / "docs" / "start.md")

OF_PIP = ("HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""Of the user's environment: where pip's settings and the package index are."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a newcomer works; its name is short, for QEMU's sake."""
    folder = Path(tempfile.mkdtemp(prefix="vcpuset-readme-"))
    try:
        yield folder
    finally:
        pidfile = folder / "machines" / "web.pid"
        if pidfile.exists():
            os.kill(int(pidfile.read_text()), signal.SIGKILL)
        shutil.rmtree(folder)


@pytest.fixture
def reader(folder: Path) -> Iterator[Reader]:
    """A newcomer who has installed the program."""
    programs = folder / ".programs"
    programs.mkdir()
    program = programs / "vcpuset"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vcpuset.cli.main "$@"\n')
    program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    with Reader(folder, PATH=path, PYTHONPATH=os.environ.get("PYTHONPATH", "")) as newcomer:
        yield newcomer


@pytest.fixture
def cloner(folder: Path) -> Iterator[Reader]:
    """A newcomer who has a clone of the repository, git, make and Python, and nothing of the project installed."""
    not_in_a_clone = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY, folder, ignore=not_in_a_clone, dirs_exist_ok=True)
    own = Path(sys.executable).parent
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if Path(each) != own)
    settings = {name: text for name, text in os.environ.items() if name in OF_PIP or name.startswith("PIP_")}
    with Reader(folder, **{**settings, "PATH": path}) as newcomer:
        yield newcomer


def said(done: Completed) -> str:
    """What a command printed, without the report of a plug that takes longer than half a second, on a busy machine."""
    return re.sub(r"^VCPUSet default/web: Plugging: .*\n", "", done.stdout + done.stderr, flags=re.MULTILINE)


@pytest.mark.timeout(1200)  # pip installs into it, which takes minutes on a busy host
async def test_a_newcomer_with_a_clone_resizes_a_machine_before_there_is_any_cluster(cloner: Reader) -> None:
    monitor = cloner.folder / "machines" / "default" / "web.sock"
    await cloner.run(PAGE.block("sh", "install"), timeout=1000)
    await cloner.run(PAGE.block("sh", "machine"))
    cloner.write(PAGE.block("yaml", "first"))
    for mark, vcpus, status in (("first", 4, 0), ("too-many", 8, 1)):
        for command, expected in PAGE.block("console", mark).commands():
            done = await cloner.run(command, check=False)
            assert said(done) == expected
            assert done.returncode == (status if expected else 0)
        assert await count(monitor) == vcpus
    (end,) = [line for line in PAGE.text.splitlines() if line.startswith("`kill ")]
    await cloner.run(end.split("`")[1])
    await until(lambda: not monitor.exists(), 30, "the end of the machine")


async def test_the_first_steps_of_the_start_page_print_what_it_shows(reader: Reader) -> None:
    monitor = reader.folder / "machines" / "default" / "web.sock"
    await reader.run(START.block("sh", "machine"))
    reader.write(START.block("yaml", "first"))
    for mark, last in (("first", 0), ("fewer", 3)):
        for command, expected in START.block("console", mark).commands():
            done = await reader.run(command, check=False)
            assert said(done) == expected
        assert done.returncode == last
        assert await count(monitor) == 4
    await reader.run(START.block("sh", "end"))
    await until(lambda: not monitor.exists(), 30, "the end of the machine")


def test_the_start_page_has_no_other_commands_than_those_and_the_demo() -> None:
    marks = [block.marks for block in START.blocks() if block.language in ("sh", "console")]
    assert marks == [("install",), ("machine",), ("first",), ("fewer",), ("end",), ("demo",)]
    assert START.block("sh", "demo").text == "make demo KEEP=1\n"


def test_the_start_page_installs_the_program_as_the_readme_does() -> None:
    assert START.block("sh", "install").text == PAGE.block("sh", "install").text
