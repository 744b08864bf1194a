"""The whole table of reasons at once: one set for each row, told apart by what `kubectl get -o json` prints."""

from __future__ import annotations

import asyncio
import json
import os
import select
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Unpack

import pytest_asyncio
from qemu.qmp import ExecuteError

from harness.acpi import Acpi, Source, Status
from harness.controlplane import ControlPlane
from harness.expect import HELD, READY, RECONCILING, STALLED, States, check_form
from harness.faults import Error
from harness.faulty import FaultyMonitor, Refuse
from harness.guest import Guest, GuestOptions
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.wait import until
from harness.world import Seen, User
from vcpuset.domain.reasons import Reason

ROWS: dict[str, tuple[str, States]] = {
    "matches": ("Converged", READY),
    "plug-refused": ("Plugging", RECONCILING),
    "giving": ("Unplugging", RECONCILING),
    "silent": ("UnplugPending", RECONCILING),
    "not-booted": ("WaitingForGuest", RECONCILING),
    "refusing": ("UnplugRefused", RECONCILING),
    "refusing-for-long": ("UnplugRefused", STALLED),
    "silent-for-long": ("UnplugTimedOut", STALLED),
    "absent": ("MonitorUnreachable", RECONCILING),
    "held": ("MonitorBusy", RECONCILING),
    "stuck": ("MonitorTimeout", RECONCILING),
    "incoming": ("MachineBusy", RECONCILING),
    "stopped-by-watchdog": ("MachineNotRunning", RECONCILING),
    "too-small": ("InsufficientSlots", STALLED),
    "s390x": ("UnplugUnsupported", STALLED),
    "grow-only": ("UnplugDisabled", STALLED),
    "boot-kept": ("BootVCPUsKept", STALLED),
    "ppc64": ("UnsupportedVCPUCount", STALLED),
    "riscv64": ("HotplugUnsupported", STALLED),
    "younger": ("MonitorConflict", STALLED),
    "link": ("InvalidMonitor", STALLED),
    "no-secret": ("CredentialsUnavailable", STALLED),
    "suspended": ("Suspended", HELD),
}
"""What is to be read of each set: reason, and the statuses of Ready, Reconciling and Stalled."""

REMEDIES = {
    "refusing": "Check what uses the CPUs",
    "absent": "check that QEMU is running",
    "held": "give the operator a dedicated monitor",
    "too-small": "or restart the VM with a larger -smp maxcpus",
    "s390x": "or restart the VM with fewer",
    "grow-only": "or set it to Enabled",
    "boot-kept": "or set it to Unplug",
    "ppc64": "declare 2 or 4",
    "riscv64": "restart the VM with the declared count, or with another machine type",
    "no-secret": "/monitor: create it, with ca.crt, tls.crt and tls.key",
    "younger": "delete one of the two, or set another monitor for this one",
}
"""What the message of a set says that helps."""

ELSEWHERE = {
    Reason.ADOPTING,
    Reason.AGENT_UNAVAILABLE,
    Reason.CONTESTED,
    Reason.GUEST_CPUS_OFFLINE,
    Reason.TERMINATING,
    Reason.UNSUPPORTED_SPEC,
    *(reason for reason in Reason if reason.startswith("Pod")),
}
"""Reasons that pass at once, or whose cause takes a story, a guest with an agent, a finalizer, a pod, another CRD."""

FOR_EVER = {"timeoutSeconds": 3600, "retrySeconds": 3600}
SHORT = {"timeoutSeconds": 1, "retrySeconds": 3600}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion: what the tests see is not a resync's."""
    flags = ("--resync-seconds=3600", "--allow-tcp=127.0.0.0/8")
    async with OperatorProcess(control_plane, *flags, socket_root=socket_root) as running:
        yield running


def test_every_reason_has_its_row() -> None:
    assert {reason for reason, _ in ROWS.values()} | ELSEWHERE == set(Reason)
    assert len(set(ROWS.values())) == len(ROWS)


async def test_all_rows_of_the_table_are_told_apart_in_one_look(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with AsyncExitStack() as stack:
        await _Stage(stack, folder, user).set_up()

        async def shown(name: str, row: tuple[str, States]) -> None:
            await user.wait(name, lambda seen: (seen.reason, seen.states) == row, f"{row}")

        await asyncio.gather(*(shown(name, row) for name, row in ROWS.items()))
        answer = await user.control_plane.kubectl("get", "vcpusets", "--namespace", user.namespace, "-o", "json")
        seen = {item["metadata"]["name"]: Seen(item) for item in json.loads(answer.stdout)["items"]}
        for each in seen.values():
            check_form(each)
        assert {name: (each.reason, each.states) for name, each in seen.items()} == ROWS
        told = {(each.reason, each.message.partition(" declared; ")[2] or each.message) for each in seen.values()}
        assert len({message for _, message in told}) == len(told), "no two reasons say the same"
        for name, remedy in REMEDIES.items():
            assert remedy in seen[name].message
        unseen = {name for name, each in seen.items() if each.vcpus is None}
        assert unseen == {"absent", "held", "stuck", "younger", "link", "no-secret"}, "never looked at: no count"


class _Stage:
    """The machines, each in the situation after which its set is named."""

    def __init__(self, stack: AsyncExitStack, folder: Path, user: User) -> None:
        self._stack = stack
        self._folder = folder
        self._user = user

    async def set_up(self) -> None:
        """Start every machine and create every set; returns when each guest has said what it has to say."""
        create = self._user.create
        await self._at_odds_with_its_type()
        await self._not_to_be_changed()
        await self._without_a_usable_monitor()
        await self._with_a_guest()
        await self._machine("matches")
        await create("matches", 2)
        refusal = Error("GenericError", "no memory for another CPU")
        monitor = FaultyMonitor(self._folder / "plug-refused.sock", faults={"device_add": refusal})
        await self._stack.enter_async_context(monitor)
        await create("plug-refused", 3)

    async def _at_odds_with_its_type(self) -> None:
        create = self._user.create
        await self._machine("too-small")
        await create("too-small", 9)
        await self._machine("s390x", qemu="qemu-system-s390x", machine="s390-ccw-virtio", cpu=None)
        await create("s390x", 1)
        await self._machine(
            "ppc64", qemu="qemu-system-ppc64", machine="pseries", cpu=None, memory=256, smp="2,threads=2,maxcpus=8"
        )
        await create("ppc64", 3)
        await self._machine("riscv64", qemu="qemu-system-riscv64", machine="virt", cpu=None, extra=["-bios", "none"])
        await create("riscv64", 3)

    async def _not_to_be_changed(self) -> None:
        create = self._user.create
        await self._machine("incoming", extra=["-incoming", "defer"])
        await create("incoming", 3)
        watchdog = await self._machine("stopped-by-watchdog", extra=["-device", "ib700", "-action", "watchdog=pause"])
        monitor = await self._monitor(watchdog)
        await monitor.call("cont")
        await monitor.hmp("o/b 0x443 15")

        async def stopped() -> bool:
            return bool((await monitor.call("query-status"))["status"] == "watchdog")

        await until(stopped, 60, "the watchdog to bark")
        await create("stopped-by-watchdog", 3)
        await self._machine("suspended")
        await create("suspended", 3, suspend=True)

    async def _without_a_usable_monitor(self) -> None:
        create = self._user.create
        await create("absent", 2)
        held = await self._machine("held")
        await self._stack.enter_async_context(raw(held.monitors[0]))
        await create("held", 2)
        stuck = await self._machine("stuck")
        await self._stack.enter_async_context(_writing_to_nobody(stuck, self._folder / "pipe"))
        await create("stuck", 2)
        (self._folder / "link.sock").symlink_to(held.monitors[0])
        await create("link", 2)
        await create("no-secret", 2, {"host": "127.0.0.1", "port": 4444, "tls": {"secretName": "monitor"}})

    async def _with_a_guest(self) -> None:
        create = self._user.create
        await self._machine("not-booted")
        await create("not-booted", 1)
        await self._booted("grow-only")
        await create("grow-only", 1, unplug={"policy": "Disabled"})
        await self._booted("boot-kept")
        older = await create("boot-kept", 1, unplug={"bootVCPUs": "Keep"})
        await self._booted("silent")
        await create("silent", 1, unplug=FOR_EVER)
        await self._booted("silent-for-long")
        await create("silent-for-long", 1, unplug=SHORT)
        acpi = await self._booted("refusing")
        await create("refusing", 1, unplug=FOR_EVER)
        await self._asked("refusing", acpi)
        await acpi.refuse(1)
        await self._user.touch("refusing")  # so that an answer that came after its second is looked at, too
        # This one refuses each repetition.
        machine = FaultyMonitor(self._folder / "refusing-for-long.sock", cpus=2)
        (await self._stack.enter_async_context(machine)).cpus.unplug = {1: Refuse()}
        await create("refusing-for-long", 1, unplug=SHORT)
        acpi = await self._booted("giving")
        await create("giving", 1, unplug=FOR_EVER)
        await self._asked("giving", acpi)
        await acpi.forget_removal(1)
        await acpi.ost(1, Source.EJECT_REQUEST, Status.IN_PROGRESS)
        await self._until_later_than(older)
        await create("younger", 2, "boot-kept.sock")

    async def _machine(self, name: str, **options: Unpack[GuestOptions]) -> Guest:
        paths = [self._folder / f"{name}.sock"]
        chosen: GuestOptions = {"smp": "2,maxcpus=8", **options, "monitor_paths": paths}
        return await self._stack.enter_async_context(Guest(None, **chosen))

    async def _monitor(self, guest: Guest) -> Raw:
        return await self._stack.enter_async_context(raw(guest.control))

    async def _booted(self, name: str) -> Acpi:
        acpi = Acpi(await self._monitor(await self._machine(name)))
        await acpi.leave_legacy()
        return acpi

    async def _until_later_than(self, older: Seen) -> None:
        """Of two sets of the same second, either may be the older one."""
        second = datetime.fromisoformat(older.body["metadata"]["creationTimestamp"])
        await until(lambda: datetime.now(UTC) >= second + timedelta(seconds=1), 60, "the next second")

    async def _asked(self, name: str, acpi: Acpi) -> None:
        async def removing() -> bool:
            return (await acpi.flags(1)).removing

        await until(removing, 60, f"the guest of {name} to be asked for slot 1")


@asynccontextmanager
async def _writing_to_nobody(guest: Guest, pipe: Path) -> AsyncIterator[None]:
    """QEMU waits for somebody to read what it writes, as for storage that hangs: it greets clients, and no more."""
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    async with raw(guest.control) as client:
        more_than_a_pipe_holds = {"val": 0, "size": 1 << 20, "filename": str(pipe)}
        writing = asyncio.create_task(client.call("pmemsave", more_than_a_pipe_holds, timeout=600))
        try:
            await until(lambda: select.select([reader], [], [], 0)[0], 60, "QEMU to write")
            yield
        finally:
            os.close(reader)
            with suppress(ExecuteError):  # nobody will ever read it
                await writing
