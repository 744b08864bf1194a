"""The operator and QEMU are killed at random moments of changes, and every change ends right all the same.

Half of the changes come from a seed that is fixed, half from that of the run (`harness.effort`).

Everything is real: API server, Linux guest, operator process. The moments are fractions of what undisturbed changes
take, measured first, so that a slow machine meets the same phases.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chaos.script import BOOT_VCPUS, Change, QEMUDeath, script
from chaos.witness import Witness
from harness.controlplane import ControlPlane
from harness.effort import SEED
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import execute, slots
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User

FIXED_SEED = 20250704
SETTLE_SECONDS = 180.0
MEASURED = (3, 2, 8, 2, 3, 2, 8, 2)
"""What is measured first: changes by one CPU and by six, twice in each direction."""

UNPLUG = {"timeoutSeconds": 3, "retrySeconds": 5}
"""A request that was written down and perhaps never made is made again after three seconds, not sixty."""

RESYNC_SECONDS = 10
"""A QEMU that dies after the operator has looked for the last time is noticed at the next resync."""


@dataclass
class Arena:
    """One guest, its VCPUSet and the operator of the day."""

    user: User
    guest: Guest
    operator: OperatorProcess
    witness: Witness
    took: dict[tuple[bool, int], float] = field(default_factory=dict)
    """Seconds of an undisturbed change, by direction (up?) and number of CPUs."""
    start_seconds: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)

    async def measure(self) -> None:
        """What changes and a start of the operator take when nobody is killed."""
        count = BOOT_VCPUS
        for vcpus in MEASURED:
            began = time.monotonic()
            await self.user.change("vm", vcpus=vcpus)
            await until(self._is_ready, SETTLE_SECONDS, f"an undisturbed change; {self}", interval=0.005)
            kind = (vcpus > count, abs(vcpus - count))
            self.took[kind] = min(time.monotonic() - began, self.took.get(kind, SETTLE_SECONDS))
            await self.settled(vcpus, "an undisturbed change")
            count = vcpus
        self.operator.kill()
        began = time.monotonic()
        await self.operator.start()
        self.start_seconds = time.monotonic() - began

    async def undergo(self, change: Change) -> None:
        """Make the change, kill whom the script says, and wait until all is right."""
        unit = self._expected_seconds(change)
        with self.witness.expecting(change.bounds):
            await self.user.change("vm", vcpus=change.vcpus)
            async with asyncio.TaskGroup() as fates:
                fates.create_task(self._kill_operator(change, unit))
                if change.qemu is not None:
                    fates.create_task(self._kill_qemu(change.qemu, unit))
            await self.settled(change.vcpus, str(change))

    def _expected_seconds(self, change: Change) -> float:
        """What the change would take undisturbed, between the measured ones (or beyond them, along the same line)."""
        up = change.vcpus > change.old
        one, six = self.took[up, 1], self.took[up, 6]
        return max(one, one + (six - one) * (abs(change.vcpus - change.old) - 1) / 5)

    async def _kill_operator(self, change: Change, unit: float) -> None:
        await asyncio.sleep(change.after * unit)
        self.operator.kill()
        # It is dead: this is its last word.
        seen = await self.user.get("vm")
        self.phases[
            seen.reason or ("changed, not reported" if self.witness.count != change.old else "nothing done")
        ] += 1
        await self.operator.start(ready=False)
        if change.successor is not None:
            await asyncio.sleep(change.successor * self.start_seconds)
            self.operator.kill()
            await self.operator.start(ready=False)

    async def _kill_qemu(self, death: QEMUDeath, unit: float) -> None:
        await asyncio.sleep(death.after * unit)
        self.guest.kill()
        await asyncio.sleep(death.down_for)
        await self.guest.start()

    async def _is_ready(self) -> bool:
        return (await self.user.get("vm")).ready

    async def settled(self, vcpus: int, what: str) -> None:
        """Wait until everybody has the same count, and check the slots then."""
        report = "nothing"

        async def right() -> bool:
            nonlocal report
            self.operator.require_running()
            seen = await self.user.get("vm")
            cpus = await execute(self.guest.control, "query-cpus-fast")
            here = {(cpu["qom-path"], cpu["thread-id"]) for cpu in cpus}
            stale = [each for each in seen.pending if (each["path"], each["threadID"]) not in here]
            online, present = len(self.guest.online()), len(self.guest.present())
            report = f"QEMU {len(cpus)}, guest {online} of {present} online, stale requests {stale}, {seen.status}"
            return seen.ready and not stale and {seen.vcpus, len(cpus), online, present} == {vcpus}

        await until(right, SETTLE_SECONDS, lambda: f"{what}: {vcpus} vCPUs; {report}; {self}", interval=0.05)
        holders = [slot.get("qom-path") for slot in await slots(self.guest.control)]
        paths = [path for path in holders if path is not None]
        assert len(paths) == len(set(paths)) == vcpus, f"{what}: {paths}"
        for index, path in enumerate(holders):
            # While QEMU still gives up the CPU before, its id is in use.
            own = re.compile(rf"/machine/(unattached/.*|peripheral/vcpu{index}(-[0-9a-f]+)?)")
            named = path is None or own.fullmatch(path)
            assert named, f"{what}: slot {index} holds {path}"

    def __str__(self) -> str:
        return f"{self.witness}; the operator's log ends with:\n{self.operator.tail(60)}\n"


@pytest.mark.timeout(1200)
async def test_each_change_ends_right_though_the_operator_and_qemu_are_killed_at_random_moments(
    control_plane: ControlPlane,
    namespace: str,
    socket_root: Path,
    folder: Path,
    user: User,
) -> None:
    """As many dead operators as changes, and for five of these a dead successor and a dead QEMU.

    Right means: QEMU, the guest itself and the status have the declared count, no CPU sits in another's slot, no
    request for a CPU that is gone is left, and never were there more or fewer CPUs than before and after the change.
    """
    monitors = [folder / "vm.sock", folder / "witness.sock"]
    witness = Witness()
    flags = (f"--namespace={namespace}", f"--resync-seconds={RESYNC_SECONDS}")
    async with (
        saved_guest(smp=f"{BOOT_VCPUS},maxcpus=64", monitor_paths=monitors) as guest,
        OperatorProcess(control_plane, *flags, socket_root=socket_root) as operator,
        witness.watching(monitors[1]),
    ):
        arena = Arena(user, guest, operator, witness)
        await user.create("vm", BOOT_VCPUS, "vm.sock", unplug=UNPLUG)
        await arena.settled(BOOT_VCPUS, "the beginning")
        await arena.measure()
        count = BOOT_VCPUS
        for seed in (FIXED_SEED, SEED):
            for change in script(seed, count):
                try:
                    await arena.undergo(change)
                except BaseException as error:
                    error.add_note(f"seed {seed}, {change}")
                    raise
                count = change.vcpus

        # Else the moments were wrong, and nothing was put to the test.
        assert arena.phases["Converged"] <= 0.8 * arena.phases.total(), arena.phases
        log = operator.text()
        assert "Traceback" not in log, log
        assert "defect" not in log, log
