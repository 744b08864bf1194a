"""docs/start.md, followed by somebody who has installed the program: a machine is resized without a cluster."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cache import REPOSITORY
from harness.docpage import Page, Reader
from harness.qmp import count
from harness.wait import until

__all__: list[str] = []

PAGE = Page(REPOSITORY / "docs" / "start.md")


@pytest.fixture
def reader() -> Iterator[Reader]:
    """Somebody who has installed the program; the folder has a short name, for QEMU's sake."""
    folder = Path(tempfile.mkdtemp(prefix="vcpuset-start-"))
    try:
        programs = folder / ".programs"
        programs.mkdir()
        program = programs / "vcpuset"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vcpuset.cli.main "$@"\n')
        program.chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        with Reader(folder, PATH=path, PYTHONPATH=os.environ.get("PYTHONPATH", "")) as newcomer:
            yield newcomer
    finally:
        pidfile = folder / "machines" / "web.pid"
        if pidfile.exists():
            os.kill(int(pidfile.read_text()), signal.SIGKILL)
        shutil.rmtree(folder)


async def test_the_first_steps_print_what_the_page_shows(reader: Reader) -> None:
    monitor = reader.folder / "machines" / "default" / "web.sock"
    await reader.run(PAGE.block("sh", "machine"))
    reader.write(PAGE.block("yaml", "first"))
    for mark, last in (("first", 0), ("fewer", 3)):
        for command, expected in PAGE.block("console", mark).commands():
            done = await reader.run(command, check=False)
            assert done.stdout + done.stderr == expected
        assert done.returncode == last
        assert await count(monitor) == 4
    await reader.run(PAGE.block("sh", "end"))
    await until(lambda: not monitor.exists(), 30, "the end of the machine")


def test_the_page_has_no_commands_but_those_that_this_and_the_tests_of_the_demo_and_of_the_image_run() -> None:
    marks = [block.marks for block in PAGE.blocks() if block.language in ("sh", "console")]
    assert marks == [("install",), ("machine",), ("first",), ("fewer",), ("end",), ("demo",)]
    assert "-c constraints.txt ." in PAGE.block("sh", "install").text
    assert PAGE.block("sh", "demo").text == "make demo KEEP=1\n"
