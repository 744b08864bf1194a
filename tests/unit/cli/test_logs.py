"""Log lines in both formats, as the handler of a running operator writes them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from vcpuset.cli.logs import make_handler
from vcpuset.runtime.logcontext import log_context

__all__: list[str] = []


class Log:
    """A logger of its own that writes in one format."""

    def __init__(self, log_format: Literal["text", "json"]) -> None:
        self.stream = io.StringIO()
        self.handler = make_handler(log_format, self.stream)
        self.logger = logging.getLogger("vcpuset.test_logs")

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@contextmanager
def logging_as(log_format: Literal["text", "json"]) -> Iterator[Log]:
    log = Log(log_format)
    log.logger.addHandler(log.handler)
    log.logger.propagate = False
    log.logger.setLevel("INFO")
    try:
        yield log
    finally:
        log.logger.removeHandler(log.handler)
        log.logger.propagate = True
        log.logger.setLevel(logging.NOTSET)


A_PASS = {"vcpuset": "web", "namespace": "default", "node": None, "pass": "a1"}


def test_in_json_a_line_of_a_pass_has_the_fields_as_members() -> None:
    with logging_as("json") as log:
        with log_context(**A_PASS):
            log.logger.info("plugged %d", 2)
        log.logger.info("idle")

    inside, outside = log.entries
    timestamp = inside.pop("timestamp")
    assert timestamp.endswith("+00:00")
    assert inside == {"level": "INFO", "logger": "vcpuset.test_logs", "message": "plugged 2", **A_PASS}
    assert set(outside) == {"timestamp", "level", "logger", "message"}


def test_in_text_the_fields_follow_the_message_without_the_empty_ones() -> None:
    with logging_as("text") as log:
        with log_context(**A_PASS):
            log.logger.warning("refused")
        log.logger.info("idle")

    inside, outside = log.lines
    assert inside.endswith("WARNING vcpuset.test_logs: refused vcpuset=web namespace=default pass=a1")
    assert outside.endswith("INFO    vcpuset.test_logs: idle")


def test_in_json_an_exception_is_one_member_of_one_line() -> None:
    with logging_as("json") as log:
        try:
            _ = dict[str, int]()["slot 3"]
        except KeyError:
            log.logger.exception("lost\nit")

    (entry,) = log.entries
    assert entry["message"] == "lost\nit"
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("KeyError: 'slot 3'")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_of_kopf_says_which_object_it_is_about_and_leaves_out_the_settings(
    log_format: Literal["text", "json"],
) -> None:
    reference = {"apiVersion": "v1", "kind": "VCPUSet", "name": "web", "uid": "u", "namespace": "default"}
    with logging_as(log_format) as log:
        log.logger.error("it failed", extra={"k8s_ref": reference, "k8s_skip": True, "settings": object()})

    if log_format == "json":
        (entry,) = log.entries
        assert set(entry) == {"timestamp", "level", "logger", "message", "vcpuset", "namespace"}
        assert (entry["vcpuset"], entry["namespace"]) == ("web", "default")
    else:
        assert log.lines[0].endswith("it failed vcpuset=web namespace=default")


def test_a_line_that_cannot_be_formatted_is_written_all_the_same() -> None:
    with logging_as("json") as log:
        log.logger.info("%d of %d", 1)  # noqa: PLE1206 - that is the point

    (entry,) = log.entries
    assert "'%d of %d' cannot be formatted with (1,)" in entry["message"]


UNEXPECTED = """
import asyncio, logging, sys, threading, warnings
from vcpuset.cli.logs import configure

class Unclosable:
    def __del__(self):
        raise OSError("cannot be closed")

async def main():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
    asyncio.get_running_loop().create_future().set_exception(LookupError("nobody asks"))

configure(sys.argv[1], "info", sys.stderr)
warnings.warn("old ways", UserWarning)
thread = threading.Thread(target=lambda: [][1], name="aside")
thread.start()
thread.join()
Unclosable()
asyncio.run(main())
logging.getLogger("kopf.objects").error("from kopf")
raise RuntimeError("that is all")
"""


def test_in_json_warnings_and_exceptions_that_nobody_caught_are_lines_too() -> None:
    """In a process of its own: hooks of the interpreter belong to all of a process."""
    ended = subprocess.run(
        [sys.executable, "-c", UNEXPECTED, "json"], capture_output=True, text=True, timeout=120, check=False
    )
    entries = [json.loads(line) for line in ended.stderr.splitlines()]

    assert ended.returncode == 1
    assert ended.stdout == ""
    told = [(entry["logger"], entry["message"] + entry.get("exception", "")) for entry in entries]
    for logger, text in (
        ("py.warnings", "UserWarning: old ways"),
        ("vcpuset", "IndexError: list index out of range"),
        ("vcpuset", "OSError: cannot be closed"),
        ("asyncio", "ZeroDivisionError"),
        ("asyncio", "LookupError: nobody asks"),
        ("kopf.objects", "from kopf"),
        ("vcpuset", "RuntimeError: that is all"),
    ):
        assert any(name == logger and text in message for name, message in told), f"{text} in {told}"
    assert entries[-1]["level"] == "CRITICAL"
    assert entries[-1]["message"] == "the program exits: that is all"
