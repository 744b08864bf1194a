"""What is particular to a pseries machine whose guest has taken its cores: it is asked, and answers without ACPI.

The machine's own firmware (SLOF) plays the guest: at its prompt it makes the RTAS calls with which Linux gives a core
back, or refuses to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, STALLED, shows
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.world import Seen, User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion: what the tests see is not a resync's."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


async def test_a_pseries_guest_is_asked_for_whole_cores_and_its_refusal_is_told_from_its_silence(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with _answering(folder / "vm.sock", smp="6,threads=2,maxcpus=8") as (client, guest):
        await user.create("vm", 6, "vm.sock", unplug={"timeoutSeconds": 3600, "retrySeconds": 3600})
        await user.wait_ready("vm")
        await user.change("vm", vcpus=2)
        pending = await shows(
            user, "vm", "UnplugPending", RECONCILING, "6 vCPUs present, 2 declared", "slots 1-2", vcpus=6
        )
        assert [(each["slot"], "answer" in each) for each in pending.pending] == [(1, False), (2, False)]
        # Each request is for a core: the path is the core's, the thread its first vCPU's.
        cpus = await client.call("query-cpus-fast")
        for each in pending.pending:
            threads = [cpu for cpu in cpus if cpu["qom-path"].startswith(f"{each['path']}/thread[")]
            assert len(threads) == 2
            assert each["threadID"] == min(cpu["thread-id"] for cpu in threads)

        await guest.refuse(core=2)
        await guest.give_back(core=4)
        seen = await shows(
            user,
            "vm",
            "UnplugRefused",
            RECONCILING,
            "4 vCPUs present, 2 declared",
            "slot 1: refused (DEVICE_UNPLUG_GUEST_ERROR)",
            "no other candidate",
            "up to 3600 s",
            vcpus=4,
        )
        assert _answers(seen) == {1: "GuestError"}
        assert await client.count() == 4

        # A count between two cores is met from below, so nobody has to leave, and who refused may be asked afresh.
        await user.change("vm", vcpus=5)
        await shows(
            user, "vm", "UnsupportedVCPUCount", STALLED, "4 vCPUs present, 5 declared", "declare 4 or 6", vcpus=4
        )

        await user.change("vm", vcpus=2)
        await user.wait("vm", lambda seen: _answers(seen) == {1: None}, "a new request")
        await guest.give_back(core=2)
        done = await shows(user, "vm", "Converged", READY, vcpus=2)
        assert done.pending == []
        assert (done.status["machine"]["minVCPUs"], done.status["machine"]["maxVCPUs"]) == (2, 8)


async def test_a_reset_of_a_pseries_machine_carries_out_what_its_guest_had_not_answered(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Unlike on x86, where a request outlives the reset."""
    async with _pseries(folder / "vm.sock", "4,threads=2,maxcpus=8") as guest, raw(guest.control) as client:
        await user.create("vm", 2, "vm.sock")
        await shows(user, "vm", "UnplugPending", RECONCILING, "slot 1", vcpus=4)
        await client.call("system_reset")
        done = await shows(user, "vm", "Converged", READY, vcpus=2)
        assert done.pending == []


def _answers(seen: Seen) -> dict[int, str | None]:
    return {each["slot"]: each.get("answer") for each in seen.pending}


class _Guest:
    """A guest's dealings with its cores (PAPR: set-indicator), typed at the firmware's prompt.

    Cores are called by their core-id, which goes up in steps of the threads that they have.
    """

    PROMPT = b"0 > "
    BOOT_SECONDS = 120.0
    ANSWER_SECONDS = 60.0
    ISOLATION_STATE = 9001
    ALLOCATION_STATE = 9003
    CPU_CONNECTOR = 1 << 28

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def boot(self) -> None:
        """Wait for the prompt, and teach the firmware the call: ( indicator connector state -- )."""
        await self._prompt(self.BOOT_SECONDS)
        await self._type('s" set-indicator" rtas-get-token rtas-cb rtas>token l!')
        await self._type(
            ": set-indicator rtas-cb rtas>args2 l! rtas-cb rtas>args1 l! rtas-cb rtas>args0 l! 3 rtas-cb rtas>nargs l! "
            '1 rtas-cb rtas>nret l! enter-rtas rtas-cb rtas>args3 l@ 0= if ." granted" then ;'
        )

    async def refuse(self, core: int) -> None:
        """Keep a core that was asked for: what is to be taken is declared to be in use."""
        await self._set(self.ISOLATION_STATE, core, 1)

    async def give_back(self, core: int) -> None:
        """Give up a core that was asked for."""
        await self._set(self.ISOLATION_STATE, core, 0)
        await self._set(self.ALLOCATION_STATE, core, 0)

    async def _set(self, indicator: int, core: int, state: int) -> None:
        # The firmware counts in hexadecimal, and echoes what is typed: the answer stands after that.
        said = await self._type(f"{indicator:x} {self.CPU_CONNECTOR | core:x} {state:x} set-indicator")
        assert b"granted" in said.rpartition(b"set-indicator")[2], said

    async def _type(self, line: str) -> bytes:
        self._writer.write(line.encode() + b"\r")
        return await self._prompt(self.ANSWER_SECONDS)

    async def _prompt(self, seconds: float) -> bytes:
        async with asyncio.timeout(seconds):
            return await self._reader.readuntil(self.PROMPT)


def _pseries(monitor: Path, smp: str, *extra: str) -> Guest:
    return Guest(
        None,
        qemu="qemu-system-ppc64",
        machine="pseries",
        cpu=None,
        memory=256,
        smp=smp,
        extra=extra,
        monitor_paths=[monitor],
    )


@asynccontextmanager
async def _answering(monitor: Path, smp: str) -> AsyncIterator[tuple[Raw, _Guest]]:
    """A running pseries machine, and who plays its guest."""
    terminal = monitor.with_name("terminal")
    device = ["-chardev", f"socket,id=terminal,path={terminal},server=on,wait=off", "-serial", "chardev:terminal"]
    async with (
        _pseries(monitor, smp, *device, "-prom-env", "auto-boot?=false") as machine,
        raw(machine.control) as client,
    ):
        reader, writer = await asyncio.open_unix_connection(terminal)
        try:
            guest = _Guest(reader, writer)
            await client.call("cont")
            await guest.boot()
            yield client, guest
        finally:
            writer.transport.abort()
            terminal.unlink(missing_ok=True)
