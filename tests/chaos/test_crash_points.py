"""The operator dies at one certain command, before QEMU has carried it out or after: its successor ends it right.

`test_kill` draws moments and so hardly ever hits the few microseconds that matter most. Here the monitor is one that
lets the operator wait in the very moment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from harness.controlplane import ControlPlane
from harness.faulty import FaultyMonitor, Hang, Silent
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import User

BOOT_VCPUS = 4
TIMEOUT_SECONDS = 3
PAUSE_SECONDS = 5
"""Until a request that has had no answer is made for the second time."""
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Death:
    """When the operator dies.

    vcpus     what is declared, of `BOOT_VCPUS`
    command   the command that it waits for
    executes  whether QEMU has carried that out
    asked     how often each slot's CPU has been asked for in the end
    """

    vcpus: int
    command: str
    executes: bool
    asked: dict[int, int]


DEATHS = {
    "before-it-has-seen-anything": Death(6, "query-status", executes=False, asked={}),
    "before-the-first-cpu-is-plugged": Death(6, "device_add", executes=False, asked={}),
    "when-one-of-two-cpus-is-plugged": Death(6, "device_add", executes=True, asked={}),
    # The request stands in the status and was never made: it is made again, and only then.
    "before-the-first-cpu-is-asked-for": Death(2, "device_del", executes=False, asked={2: 1, 3: 2}),
    # The CPU has gone when the successor looks.
    "when-one-of-two-cpus-has-left": Death(2, "device_del", executes=True, asked={2: 1, 3: 1}),
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())
async def test_a_successor_ends_what_its_dead_predecessor_began(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User, death: Death
) -> None:
    flags = f"--namespace={user.namespace}"
    unplug = {"timeoutSeconds": TIMEOUT_SECONDS, "retrySeconds": 600}
    async with (
        FaultyMonitor(folder / "vm.sock", cpus=BOOT_VCPUS) as machine,
        OperatorProcess(control_plane, flags, socket_root=socket_root) as operator,
    ):
        slots = _slots(machine)
        await user.create("vm", BOOT_VCPUS, "vm.sock", unplug=unplug)
        await user.wait_ready("vm")

        seen = len(machine.received(death.command))
        machine.faults[death.command] = Hang(executes=death.executes)
        await user.change("vm", vcpus=death.vcpus)
        await until(lambda: len(machine.received(death.command)) > seen, PATIENCE_SECONDS, f"a {death.command}")
        operator.kill()
        machine.faults.clear()
        await operator.start(ready=False)

        done = await user.wait_ready("vm")
        assert (done.vcpus, done.pending) == (death.vcpus, [])
        assert machine.cpus.occupied() == list(range(death.vcpus))
        assert _asked(machine, slots) == death.asked
        assert "Traceback" not in operator.text(), operator.text()


async def test_a_successor_does_not_repeat_requests_that_the_guest_is_silent_about_before_they_are_due(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User
) -> None:
    """It waits for them, as the status says, and repeats them once when the first pause is over."""
    flags = f"--namespace={user.namespace}"
    unplug = {"timeoutSeconds": TIMEOUT_SECONDS, "retrySeconds": 600}
    async with (
        FaultyMonitor(folder / "vm.sock", cpus=BOOT_VCPUS) as machine,
        OperatorProcess(control_plane, flags, socket_root=socket_root) as operator,
    ):
        slots = _slots(machine)
        machine.cpus.unplug = {2: Silent(), 3: Silent()}
        await user.create("vm", 2, "vm.sock", unplug=unplug)
        await until(lambda: _asked(machine, slots) == {2: 1, 3: 1}, PATIENCE_SECONDS, "two requests")
        operator.kill()
        first = (await user.get("vm")).pending
        assert [(each["slot"], each["attempts"]) for each in first] == [(2, 1), (3, 1)]
        await operator.start()

        await until(lambda: _asked(machine, slots) == {2: 2, 3: 2}, PATIENCE_SECONDS, "two requests more")
        again = await user.wait(
            "vm", lambda seen: [each["attempts"] for each in seen.pending] == [2, 2], "two attempts"
        )
        for before, after in zip(first, again.pending, strict=True):
            assert {**before, "requestedAt": "", "attempts": 2} == {**after, "requestedAt": ""}
            pause = datetime.fromisoformat(after["requestedAt"]) - datetime.fromisoformat(before["requestedAt"])
            assert pause >= timedelta(seconds=PAUSE_SECONDS)
        machine.cpus.eject(3)
        machine.cpus.eject(2)
        done = await user.wait_ready("vm")
        assert (done.vcpus, done.pending) == (2, [])
        assert _asked(machine, slots) == {2: 2, 3: 2}


def _slots(machine: FaultyMonitor) -> dict[str, int]:
    """Where the CPUs are, by their paths."""
    found = {slot: machine.cpus.at(slot) for slot in machine.cpus.occupied()}
    return {cpu.path: slot for slot, cpu in found.items() if cpu is not None}


def _asked(machine: FaultyMonitor, slots: dict[str, int]) -> dict[int, int]:
    """How often the CPU of each slot has been asked for."""
    return dict(Counter(slots[command.arguments["id"]] for command in machine.received("device_del")))
