"""Machines that QEMU does not let change: by their type, without ACPI, or because their firmware did not ask for it.

Each is a real machine, read back with kubectl as a user would.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from harness.acpi import Acpi
from harness.controlplane import ControlPlane
from harness.expect import READY, STALLED, check_form, shows
from harness.guest import Guest, GuestOptions
from harness.operator import OperatorProcess
from harness.qmp import Raw, count, raw
from harness.world import Seen, User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks at a machine without an occasion: what the tests see is not a resync's."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(GuestOptions(qemu="qemu-system-aarch64", machine="virt", cpu="max"), id="aarch64-virt"),
        pytest.param(
            GuestOptions(qemu="qemu-system-riscv64", machine="virt", cpu=None, extra=["-bios", "none"]),
            id="riscv64-virt",
        ),
        pytest.param(GuestOptions(machine="microvm", cpu=None), id="x86-microvm"),
    ],
)
async def test_a_machine_type_without_cpu_hotplug_is_ready_at_its_own_count_and_stalls_at_any_other(
    folder: Path, operator: OperatorProcess, user: User, options: GuestOptions
) -> None:
    machine: GuestOptions = {**options, "smp": "2,maxcpus=4", "monitor_paths": [folder / "vm.sock"]}
    async with Guest(None, **machine) as guest:
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        seen = await _kubectl_get(user, "vm")
        assert (seen.reason, seen.states, seen.vcpus) == ("Converged", READY, 2)
        assert (seen.status["machine"]["minVCPUs"], seen.status["machine"]["maxVCPUs"]) == (2, 2), (
            "slots that cannot be filled do not count"
        )

        for declared in (4, 1):
            await user.change("vm", vcpus=declared)
            await shows(user, "vm", "HotplugUnsupported", STALLED, f"{declared} declared", vcpus=2)
            seen = await _kubectl_get(user, "vm")
            assert (seen.reason, seen.states, seen.vcpus) == ("HotplugUnsupported", STALLED, 2)
            assert (seen.status["machine"]["minVCPUs"], seen.status["machine"]["maxVCPUs"]) == (2, 2)
            assert seen.pending == []
            for words in (
                f"2 vCPUs present, {declared} declared",
                "the machine type does not support CPU hotplug",
                "restart the VM with the declared count, or with another machine type",
            ):
                assert words in seen.message
        assert await count(guest.control) == 2

        await user.change("vm", vcpus=2)
        await shows(user, "vm", "Converged", READY, vcpus=2)


async def test_a_machine_without_acpi_grows_and_says_with_qemu_s_words_that_it_cannot_shrink(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, machine="pc,acpi=off", smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 3, "vm.sock", unplug={"retrySeconds": 3600})
        await shows(user, "vm", "Converged", READY, vcpus=3)

        await user.change("vm", vcpus=2)
        await shows(user, "vm", "UnplugUnsupported", STALLED, "CPU hot unplug not supported without ACPI", vcpus=3)
        seen = await _kubectl_get(user, "vm")
        assert "QEMU refused to unplug slots 1-2" in seen.message
        assert "3 vCPUs present, 2 declared" in seen.message
        assert [(each["slot"], each["answer"]) for each in seen.pending] == [(1, "Rejected"), (2, "Rejected")]
        assert await count(guest.control) == 3

        await user.change("vm", vcpus=4)
        done = await shows(user, "vm", "Converged", READY, vcpus=4)
        assert done.pending == []


async def test_a_firmware_that_did_not_ask_for_cpu_hotplug_is_named_in_qemu_s_words(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    """As an OVMF with SMM that is older than QEMU's part of it."""
    async with (
        Guest(None, smp="2,maxcpus=8", extra=_Firmware.memory(_BROADCAST), monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await _Firmware(client).negotiate()
        await user.create("vm", 3, "vm.sock")
        await shows(
            user,
            "vm",
            "HotplugUnsupported",
            STALLED,
            "2 vCPUs present, 3 declared",
            "QEMU rejects the change permanently",
            "cpu hotplug with SMI wasn't enabled by firmware",
            vcpus=2,
        )
        assert (await _kubectl_get(user, "vm")).reason == "HotplugUnsupported"
        assert await client.count() == 2


async def test_a_firmware_that_asked_for_plug_only_is_told_from_a_guest_that_refuses(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    memory = _Firmware.memory(_BROADCAST | _HOTPLUG)
    async with (
        Guest(None, smp="2,maxcpus=8", extra=memory, monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await _Firmware(client).negotiate()
        await Acpi(client).leave_legacy()
        await user.create("vm", 3, "vm.sock")
        await shows(user, "vm", "Converged", READY, vcpus=3)
        await user.change("vm", vcpus=2)
        seen = await shows(
            user,
            "vm",
            "UnplugUnsupported",
            STALLED,
            "3 vCPUs present, 2 declared",
            "QEMU refused to unplug slots 1-2",
            "cpu hot-unplug with SMI wasn't enabled by firmware",
            vcpus=3,
        )
        assert {each["answer"] for each in seen.pending} == {"Rejected"}
        assert (await _kubectl_get(user, "vm")).reason == "UnplugUnsupported"


async def _kubectl_get(user: User, name: str) -> Seen:
    """A set as `kubectl get -o json` prints it."""
    answer = await user.control_plane.kubectl("get", "vcpuset", name, "--namespace", user.namespace, "-o", "json")
    seen = Seen(json.loads(answer.stdout))
    check_form(seen)
    return seen


_BROADCAST = 1 << 0
_HOTPLUG = 1 << 1
"""What firmware can ask QEMU for: an SMI that all CPUs get, and CPU hotplug with it (include/hw/southbridge/ich9.h)."""


class _Firmware:
    """Plays the firmware's part in the negotiation of SMI features, on q35 (docs/specs/fw_cfg.rst in QEMU's source).

    fw_cfg takes a value only by DMA, so the order to do that is put into the machine's memory when it is started.
    """

    ORDER = 0x10000
    WRITE = 0x10
    SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0x510, 0x511, 0x514, 0x518
    DIRECTORY = 0x19

    def __init__(self, monitor: Raw) -> None:
        self._monitor = monitor

    @classmethod
    def memory(cls, features: int) -> list[str]:
        """The arguments for QEMU: control and length, address, and there the features."""
        order = struct.pack(">IIQ", cls.WRITE, 8, cls.ORDER + 16) + struct.pack("<Q", features)
        arguments = []
        for offset in range(0, len(order), 8):
            value = int.from_bytes(order[offset : offset + 8], "little")
            arguments += ["-device", f"loader,addr={cls.ORDER + offset:#x},data={value:#x},data-len=8"]
        return arguments

    async def negotiate(self) -> None:
        """Ask for the features, and have QEMU take them."""
        keys = await self._files()
        await self._select(keys["etc/smi/requested-features"])
        await self._write("w", self.DMA_HIGH, 0)
        await self._write("w", self.DMA_LOW, int.from_bytes(self.ORDER.to_bytes(4, "big"), "little"))
        await self._select(keys["etc/smi/features-ok"])
        assert await self._read(1) == b"\1", "QEMU did not take what was asked for"

    async def _files(self) -> dict[str, int]:
        await self._select(self.DIRECTORY)
        (files,) = struct.unpack(">I", await self._read(4))
        keys = {}
        for _ in range(files):
            _, key, _, name = struct.unpack(">IHH56s", await self._read(64))
            keys[name.rstrip(b"\0").decode()] = int(key)
        return keys

    async def _select(self, key: int) -> None:
        await self._write("h", self.SELECTOR, key)

    async def _read(self, length: int) -> bytes:
        answers = [await self._monitor.hmp(f"i/b {self.DATA:#x}") for _ in range(length)]
        return bytes(int(answer.rpartition("=")[2], 16) for answer in answers)

    async def _write(self, size: str, port: int, value: int) -> None:
        assert not await self._monitor.hmp(f"o/{size} {port:#x} {value:#x}")
