"""Output that does not fit where it goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.processes import run
from vcpuset.cli.render import Lines, renderable, show, terminal

__all__: list[str] = []

FULL = Path("/dev/full")

MANIFEST = json.dumps(
    {
        "apiVersion": "vcpuset.dev/v1alpha1",
        "kind": "VCPUSet",
        "metadata": {"name": "web"},
        "spec": {"vcpus": 2, "monitor": {"unix": {"path": "web.sock"}}},
    },
    ensure_ascii=False,
)

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


APPLY = f"'{sys.executable}' -m vcpuset.cli.main apply --socket-root /nowhere -f -"


async def test_an_apply_whose_output_nothing_reads_ends_without_a_word() -> None:
    ended = await run(["bash", "-c", f"({APPLY}; echo $? >&2) <<< '{MANIFEST}' | true"], timeout=60)
    assert ended.stderr == "1\n"


async def test_an_apply_on_a_full_disk_ends_with_one_line() -> None:
    ended = await run(["bash", "-c", f"{APPLY} <<< '{MANIFEST}' > {FULL}; echo $? >&2"], timeout=60)
    assert ended.stderr == "Error: the output cannot be written: No space left on device\n1\n"


async def test_letters_that_the_output_lacks_are_escaped() -> None:
    manifest = MANIFEST.replace("web.sock", "w\N{LATIN SMALL LETTER L WITH STROKE}")
    for encoding in ("ascii", "latin-1"):
        command = f"{APPLY} <<< '{manifest}'; '{sys.executable}' -m vcpuset.cli.main run --help"
        ended = await run(["bash", "-c", f"export PYTHONIOENCODING={encoding}; {command}"], timeout=60)
        assert "default/w" in ended.stdout
        assert "Traceback" not in ended.stderr


async def test_ctrl_c_ends_a_command_that_reads_with_its_own_status(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = [sys.executable, "-m", "vcpuset.cli.main", "plan", "-f", str(pipe)]
    process = await asyncio.create_subprocess_exec(*words, stderr=subprocess.PIPE)
    writer = await asyncio.to_thread(pipe.open, "wb")  # opens when the command does
    try:
        process.send_signal(signal.SIGINT)
        _, stderr = await asyncio.wait_for(process.communicate(), 60)
    finally:
        writer.close()
    assert (stderr, process.returncode) == (b"", 130)


@pytest.mark.parametrize("columns", ["0", "1", "-1", "many"])
def test_a_terminal_of_unknown_width_is_not_left_empty(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    terminal().print(renderable(Lines(["a"])))
    assert "a" in capsys.readouterr().out


def test_where_there_is_no_standard_output_nothing_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    for output in ("table", "json", "yaml"):
        show(output, json.loads("{}"), [Lines(["a line"])])
