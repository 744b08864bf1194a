"""Sets whose monitors hang wait for each other, and for nobody else; who mends one does not wait for the others."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, shows
from harness.faulty import GREETING, FaultyMonitor, Hang
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import User

__all__: list[str] = []

HUNG = 10


async def test_sets_that_are_sound_or_mended_are_served_before_those_whose_monitors_hang(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User
) -> None:
    async with AsyncExitStack() as stack:
        # Of two workers one is left to the sets that answer. Every pass of the others takes seconds.
        await stack.enter_async_context(
            OperatorProcess(control_plane, f"--namespace={user.namespace}", "--workers=2", socket_root=socket_root)
        )
        await stack.enter_async_context(FaultyMonitor(folder / "good"))
        hung = {
            f"hung-{number}": await stack.enter_async_context(
                FaultyMonitor(folder / f"hung-{number}", faults={GREETING: Hang()})
            )
            for number in range(HUNG)
        }
        for name in hung:
            await user.create(name, 2, name)
        for name in hung:
            await shows(user, name, "MonitorBusy", RECONCILING, vcpus=None)

        def tries() -> int:
            return sum(monitor.connections for monitor in hung.values())

        before = tries()
        await user.create("sound", 2, "good")
        await shows(user, "sound", "Converged", READY, vcpus=2)
        assert tries() <= before + HUNG // 2

        # The one that was tried last would otherwise have to wait for all others.
        seen = {name: monitor.connections for name, monitor in hung.items()}

        async def tried() -> list[str]:
            return [name for name, monitor in hung.items() if monitor.connections > seen[name]]

        (last, *_) = await until(tried, 60, "another try of a monitor that hangs")
        before = tries()
        await user.delete("sound")
        await user.change(last, monitor={"unix": {"path": "good"}})
        await shows(user, last, "Converged", READY, vcpus=2)
        assert tries() <= before + HUNG // 2
