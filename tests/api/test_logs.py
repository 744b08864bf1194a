"""What a running operator logs about a set, in both formats."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import User

__all__: list[str] = []

WAIT = 60.0


@pytest.fixture
async def operator(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User, request: pytest.FixtureRequest
) -> AsyncIterator[OperatorProcess]:
    """An operator that logs everything in one format, and serves two sets whose machines are not there."""
    flags = (f"--log-format={request.param}", "--log-level=debug", f"--namespace={user.namespace}")
    async with OperatorProcess(control_plane, *flags, socket_root=socket_root) as running:
        for name in ("one", "two"):
            await user.create(name, 2, f"{name}.sock")
            await user.wait_reason(name, "MonitorUnreachable")
        yield running


@pytest.mark.parametrize("operator", ["json"], indirect=True)
async def test_in_json_the_lines_of_a_pass_name_its_set_and_all_others_name_none(operator: OperatorProcess) -> None:
    assert await operator.stop() == 0

    entries = [json.loads(line) for line in operator.text().splitlines()]
    told = [each for each in entries if each["message"].startswith("MonitorUnreachable")]
    assert {each["vcpuset"] for each in told} == {"one", "two"}
    for entry in entries:
        assert {"timestamp", "level", "logger", "message"} <= set(entry)
        assert {"vcpuset", "namespace", "node", "pass"} <= set(entry) or "pass" not in entry
        for name in {"one", "two"} - {entry.get("vcpuset")}:
            assert f"/{name}.sock" not in entry["message"] or "pass" not in entry, "a line of another set's pass"
    by_pass = {each["pass"]: each["vcpuset"] for each in told}
    assert len(by_pass) >= 2, "each pass has a name of its own"


@pytest.mark.parametrize("operator", ["text"], indirect=True)
async def test_in_text_the_fields_follow_the_message(operator: OperatorProcess, user: User) -> None:
    def told() -> re.Match[str] | None:
        return re.search(r"WARNING vcpuset\.\S+ MonitorUnreachable: .*one\.sock.*", operator.text())

    found = await until(told, WAIT, lambda: f"a line about the set one in:\n{operator.tail()}")
    assert found is not None
    assert " vcpuset=one" in found[0]
    assert f" namespace={user.namespace}" in found[0]
    assert re.search(r" pass=\S+", found[0])
    assert "node=" not in found[0]
