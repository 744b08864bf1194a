"""The API server fails in every way: machines are kept, nothing is lost, nobody is hammered, nobody exits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.outage import outage
from harness.apifaults import Cut, Ends, ErrorEvent, InTurn, Refuse
from harness.controlplane import ControlPlane
from harness.faultproxy import Asked, Passes
from harness.wait import until
from harness.world import User

__all__: list[str] = []

ATTEMPTS = 4


def about_sets(asked: Asked) -> bool:
    return asked.about_sets


def watches(asked: Asked) -> bool:
    return asked.watch


@pytest.mark.parametrize(
    ("fault", "where", "words"),
    [
        pytest.param(InTurn([Refuse(429, retry_after=1), Refuse(429)]), about_sets, "HTTP 429", id="too-many-requests"),
        pytest.param(
            InTurn([Refuse(500), Refuse(503, retry_after=1), Refuse(504)]), about_sets, "HTTP 503", id="server-errors"
        ),
        pytest.param(Refuse(401), about_sets, "the credentials are not accepted", id="unauthorized"),
        pytest.param(Refuse(403), about_sets, "the roles in deploy/ grant the required permissions", id="forbidden"),
        pytest.param(InTurn([Refuse(404), Refuse(409), Refuse(410)]), about_sets, "injected by the test", id="gone"),
        pytest.param(
            InTurn([Cut(), Cut(within_a_line=True), Ends()]), watches, "ended in less than", id="watch-cut-at-once"
        ),
        pytest.param(ErrorEvent(), watches, "ended in less than", id="watch-expired"),
        pytest.param(ErrorEvent(code=500), watches, "watching VCPUSets failed", id="watch-failed"),
    ],
)
async def test_while_it_refuses_machines_are_kept_and_afterwards_all_that_happened_is_obeyed(
    control_plane: ControlPlane,
    user: User,
    folder: Path,
    tmp_path: Path,
    fault: Passes,
    where: Callable[[Asked], bool],
    words: str,
) -> None:
    async with outage(control_plane, user, folder, tmp_path) as scene:
        with scene.proxy.fault(fault, where):
            scene.proxy.cut(watches)
            await scene.failed(1)
            await scene.machine_is_kept()
            await scene.life_goes_on()
            await scene.failed(ATTEMPTS)
            # Of answers in turn, chance says which one a given request gets.
            await until(lambda: words in scene.operator.text(), 120, f"{words!r} in the log")
        await scene.all_is_obeyed()
        scene.check_pace()
        scene.check_writes()
        scene.check_lists()


async def test_while_connections_are_refused_machines_are_kept_and_afterwards_all_that_happened_is_obeyed(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    async with outage(control_plane, user, folder, tmp_path) as scene:
        await scene.proxy.shut()
        await scene.failed(1)
        await scene.machine_is_kept()
        await scene.life_goes_on()
        await scene.failed(ATTEMPTS)
        assert "Cannot connect to host" in scene.operator.text()
        await scene.proxy.reopen()
        await scene.all_is_obeyed()
        scene.check_lists()
        pauses = scene.pauses()
        assert all(later >= earlier for earlier, later in zip(pauses, pauses[2:], strict=False)), pauses
