"""`vcpuset run` as a process: what it says while there is no cluster, and how it ends."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.operator import OperatorProcess
from harness.processes import free_port, run
from harness.wait import until

__all__: list[str] = []

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: it
contexts: [{{name: it, context: {{cluster: it, user: it}}}}]
clusters: [{{name: it, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: it, user: {{token: secret-token}}}}]
"""

START_SECONDS = 60.0


@dataclass
class Nowhere:
    """A cluster whose API server does not exist."""

    kubeconfig: Path


@pytest.fixture
async def operator(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[OperatorProcess]:
    """An operator that cannot reach its API server, with the flags that the test gives."""
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG.format(port=free_port()))
    process = OperatorProcess(Nowhere(kubeconfig), *getattr(request, "param", ()))
    try:
        yield await process.start(ready=False)
    finally:
        await process.__aexit__(None, None, None)


async def _complaint(operator: OperatorProcess) -> str:
    """The first log line about the list that failed."""

    def found() -> str | None:
        operator.require_running()
        return next((line for line in operator.text().splitlines() if "first list" in line), None)

    line = await until(found, START_SECONDS, lambda: f"a line about the first list in:\n{operator.tail()}")
    assert line is not None
    return line


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own URL
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


async def test_without_an_api_server_it_goes_on_trying_says_so_and_is_not_ready(operator: OperatorProcess) -> None:
    line = await _complaint(operator)

    assert "retrying in" in line
    assert "WARNING" in line
    assert "secret-token" not in operator.text()
    assert await asyncio.to_thread(_status, f"{operator.url}/healthz") == 200
    assert await asyncio.to_thread(_status, f"{operator.url}/readyz") == 503
    assert await asyncio.to_thread(_status, f"{operator.url}/metrics") == 200


async def test_it_ends_with_sigterm_also_before_the_first_list(operator: OperatorProcess) -> None:
    await _complaint(operator)

    assert await operator.stop() == 0


@pytest.mark.parametrize("operator", [("--log-format=json",)], indirect=True)
async def test_in_json_each_line_is_an_object_with_time_level_logger_and_message(operator: OperatorProcess) -> None:
    entry = json.loads(await _complaint(operator))

    assert entry["level"] == "WARNING"
    assert entry["logger"].startswith("vcpuset.")
    assert "first list" in entry["message"]
    assert entry["timestamp"]


@pytest.mark.parametrize("operator", [("--log-format=json", "--log-level=debug")], indirect=True)
async def test_in_json_every_line_is_an_object_from_the_start_to_the_end(operator: OperatorProcess) -> None:
    await _complaint(operator)
    assert await operator.stop() == 0

    entries = [json.loads(line) for line in operator.text().splitlines()]
    assert entries[-1]["message"] == "stopped"
    for entry in entries:
        assert {"timestamp", "level", "logger", "message"} <= set(entry)
        assert "pass" not in entry


async def test_an_operator_that_cannot_start_says_why_in_the_log(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text("[]")
    process = OperatorProcess(Nowhere(kubeconfig), "--log-format=json")
    try:
        await process.start(ready=False)

        def last() -> str | None:
            lines = process.text().splitlines()
            return lines[-1] if lines else None

        line = await until(last, START_SECONDS, "a line in the log")
    finally:
        await process.__aexit__(None, None, None)
    assert line is not None
    entry = json.loads(line)
    assert entry["level"] == "CRITICAL"
    assert str(kubeconfig) in entry["message"]


async def test_an_http_address_that_is_taken_ends_it_with_one_line_and_the_remedy(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG.format(port=free_port()))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = [sys.executable, "-m", "vcpuset.cli.main", "run", f"--http-address=127.0.0.1:{port}"]
        ended = await run([*program, f"--kubeconfig={kubeconfig}"], timeout=START_SECONDS, check=False)

    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert f"CRITICAL vcpuset: cannot listen on --http-address 127.0.0.1:{port}: Address already in use; set" in line
