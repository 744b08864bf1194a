"""Output that does not fit where it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.processes import run
from vcpuset.cli.render import Lines, show

__all__: list[str] = []

FULL = Path("/dev/full")

SHOW = """
from vcpuset.cli import main, render
import click
@main.main.command()
@click.argument("output")
def shown(output):
    render.show(output, {"x": "y" * 10_000}, [render.Lines(["y" * 10_000])])
main.main()
"""


@pytest.mark.parametrize(
    "arguments",
    [["-m", "vcpuset.cli.main", "--help"], ["-m", "vcpuset.cli.main", "run", "--help"]]
    + [["-m", "vcpuset.cli.main", "--version"]]
    + [["-c", SHOW, "shown", output] for output in ("table", "json", "yaml")],
    ids=["help", "run-help", "version", "table", "json", "yaml"],
)
def test_on_a_full_disk_one_line_says_so(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        ended = subprocess.run(
            [sys.executable, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert ended.stderr == "Error: the output cannot be written: No space left on device\n"
    assert ended.returncode == 1


async def test_a_reader_that_has_left_is_no_error_to_report() -> None:
    ended = await run(["bash", "-c", f"'{sys.executable}' -c \"$0\" shown table | true", SHOW], timeout=60)
    assert ended.stderr == ""


def test_where_there_is_no_standard_output_nothing_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    for output in ("table", "json", "yaml"):
        show(output, json.loads("{}"), [Lines(["a line"])])
