"""The end of each command is told, with whose machine it was for and what came of it; metrics and health go by that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.faulty import Close, Error, Fault, FaultyMonitor, Hang
from vcpuset.domain.errors import CommandError, MonitorTimeout, MonitorUnreachable
from vcpuset.domain.resource import UID
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Outcome, Session
from vcpuset.qmp.sockets import open_socket

__all__: list[str] = []

Told = list[tuple[UID, str, Outcome]]


@asynccontextmanager
async def session(folder: Path, faults: dict[str, Fault]) -> AsyncIterator[tuple[Session, Told]]:
    """A kept session with a faulty monitor, and what is told."""
    told: Told = []

    def commanded(uid: UID, command: str, seconds: float, outcome: Outcome) -> None:
        assert 0 <= seconds < 300
        told.append((uid, command, outcome))

    monitors = Monitors(folder.parent, lambda _: None, commanded=commanded)
    async with FaultyMonitor(folder / "vm.sock", faults=faults):
        try:
            with open_socket(folder.parent, folder.name, "vm.sock") as endpoint:
                opened = await monitors.session(UID("web"), endpoint)
            opened._command_seconds = 0.2 if any(isinstance(fault, Hang) for fault in faults.values()) else 60
            yield opened, told
        finally:
            await monitors.close()


async def test_an_answer_is_told(namespace_folder: Path) -> None:
    async with session(namespace_folder, {}) as (opened, told):
        machine = await opened.observe()
        await opened.plug(machine.free[0])
    assert {(uid, outcome) for uid, _, outcome in told} == {("web", "done")}
    assert [command for _, command, _ in told][-1] == "device_add"
    assert len(told) >= 6


@pytest.mark.parametrize(
    ("fault", "error", "outcome"),
    [
        pytest.param(Error("GenericError", "no"), CommandError, "refused", id="refused"),
        pytest.param(Hang(), MonitorTimeout, "timeout", id="no answer"),
        pytest.param(Close(), MonitorUnreachable, "lost", id="lost"),
    ],
)
async def test_a_failure_is_told(
    namespace_folder: Path, fault: Fault, error: type[Exception], outcome: Outcome
) -> None:
    async with session(namespace_folder, {"query-status": fault}) as (opened, told):
        with pytest.raises(error):
            await opened.observe()
    assert told == [(UID("web"), "query-status", outcome)]
