"""Sets whose monitors hang or answer slowly wait for each other only; a set that is mended does not wait for them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from harness.controlplane import ControlPlane
from harness.expect import READY, shows
from harness.faults import Delay, Fault
from harness.faulty import GREETING, FaultyMonitor, Hang
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import User

__all__: list[str] = []

EACH = 5

SLOTS = 64
"""More than a monitor that takes seconds over a CPU can have filled by the end of the test."""


def _tries(name: str, monitor: FaultyMonitor) -> int:
    """How many passes have waited for this monitor."""
    return monitor.connections if name.startswith("hung") else len(monitor.received("device_add"))


async def test_sets_that_are_sound_or_mended_are_served_before_those_whose_monitors_hang_or_answer_slowly(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User
) -> None:
    async with AsyncExitStack() as stack:
        # Of two workers one is left to the sets that answer. Every pass of the others takes seconds.
        await stack.enter_async_context(
            OperatorProcess(control_plane, f"--namespace={user.namespace}", "--workers=2", socket_root=socket_root)
        )
        await stack.enter_async_context(FaultyMonitor(folder / "good"))
        others: dict[str, FaultyMonitor] = {}
        for number in range(EACH):
            kinds: dict[str, dict[str, Fault]] = {"hung": {GREETING: Hang()}, "slow": {"device_add": Delay(3.0)}}
            for kind, faults in kinds.items():
                monitor = FaultyMonitor(folder / f"{kind}-{number}", slots=SLOTS, faults=faults)
                others[f"{kind}-{number}"] = await stack.enter_async_context(monitor)
        for name in others:
            await user.create(name, 2 if name.startswith("hung") else SLOTS, name)

        def tries() -> int:
            return sum(_tries(name, monitor) for name, monitor in others.items())

        for name in others:
            await user.wait_reason(name, "MonitorBusy" if name.startswith("hung") else "Plugging")

        before = tries()
        await user.create("sound", 2, "good")
        await shows(user, "sound", "Converged", READY, vcpus=2)
        assert tries() <= before + EACH

        # The one that was tried last would otherwise have to wait for all others.
        seen = {name: _tries(name, monitor) for name, monitor in others.items()}

        async def tried() -> list[str]:
            return [name for name, monitor in others.items() if _tries(name, monitor) > seen[name]]

        (last, *_) = await until(tried, 60, "another try of a monitor that hangs or is slow")
        before = tries()
        await user.delete("sound")
        await user.change(last, vcpus=2, monitor={"unix": {"path": "good"}})
        await shows(user, last, "Converged", READY, vcpus=2)
        assert tries() <= before + EACH
