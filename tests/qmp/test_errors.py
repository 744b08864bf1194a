"""QEMU's refusals arrive as the errors that tell what to do: from a real QEMU where it can be made to refuse so."""

import dataclasses
import re
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError
from qemu.qmp.message import Message
from qemu.qmp.models import ErrorResponse

from harness.acpi import Acpi
from harness.faults import Error
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.qmp import raw
from harness.wait import until
from qmp.sessions import Connect
from vcpuset.domain.errors import (
    CommandError,
    CommandRefused,
    DeviceGone,
    GuestNotReady,
    Migrating,
    PermanentError,
    Preconfig,
    SlotTaken,
    TransientError,
)
from vcpuset.qmp import translate
from vcpuset.qmp.exchange import Command


async def test_plugging_into_an_occupied_slot(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0])
    with pytest.raises(SlotTaken, match=r"device_add: CPU\[0\] with APIC ID 0 exists") as raised:
        await session.plug((await session.observe()).occupied[0])
    assert isinstance(raised.value, TransientError)
    assert (raised.value.command, raised.value.error_class) == ("device_add", "GenericError")


async def test_a_cpu_whose_id_is_in_use_is_plugged_with_another_id(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0])
    free = (await session.observe()).free
    async with raw(q35.control) as other:
        # As avocado-vt names CPUs: from the last slot down, counted from another number.
        await other.device_add(free[-1].index, "vcpu2")
    await session.plug(free[0])
    await session.plug(free[1])
    paths = {slot.index: slot.path for slot in (await session.observe()).occupied}
    assert re.fullmatch("/machine/peripheral/vcpu2-[0-9a-f]{6}", paths[2] or "")
    assert paths[3] == "/machine/peripheral/vcpu3"


async def test_a_cpu_none_of_whose_ids_qemu_takes_is_not_tried_for_ever(
    namespace_folder: Path, connect: Connect
) -> None:
    refusal = Error("GenericError", "Duplicate device ID 'vcpu2'")
    async with FaultyMonitor(namespace_folder / "qmp", faults={"device_add": refusal}) as monitor:
        session = await connect(monitor.path)
        with pytest.raises(SlotTaken, match="Duplicate device ID"):
            await session.plug((await session.observe()).free[0])
        assert len(monitor.received("device_add")) == 2


@pytest.mark.parametrize(
    ("driver", "props"),
    [
        ("qemu32-i386-cpu", {}),
        ("Nehalem-x86_64-cpu", {}),
        ("virtio-balloon-nothing", {}),
        (None, {"no-such-property": 1}),
        (None, {"core-id": 99}),
        (None, {"core-id": "1"}),
    ],
)
async def test_plugging_what_does_not_fit(
    q35: Guest, connect: Connect, driver: str | None, props: dict[str, int | str]
) -> None:
    session = await connect(q35.monitors[0])
    free = (await session.observe()).free[0]
    with pytest.raises(PermanentError):
        await session.plug(dataclasses.replace(free, driver=driver or free.driver, props={**free.props, **props}))


async def test_unplugging_before_the_guest_has_booted(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0])
    with pytest.raises(GuestNotReady, match="not supported device type"):
        await session.unplug((await session.observe()).occupied[1])


async def test_unplugging_the_first_cpu(q35: Guest, connect: Connect) -> None:
    async with raw(q35.control) as control:
        await Acpi(control).leave_legacy()
    session = await connect(q35.monitors[0])
    with pytest.raises(PermanentError, match="Boot CPU is unpluggable"):
        await session.unplug((await session.observe()).occupied[0])


async def test_unplugging_what_is_not_there(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0])
    boot = (await session.observe()).occupied[1]
    with pytest.raises(DeviceGone) as raised:
        await session.unplug(dataclasses.replace(boot, path="/machine/peripheral/vcpu9"))
    assert raised.value.error_class == "DeviceNotFound"


async def test_unplugging_on_a_machine_type_without_hotplug(namespace_folder: Path, connect: Connect) -> None:
    async with Guest(None, machine="microvm", smp="2", memory=64, socket_dir=namespace_folder) as guest:
        async with raw(guest.control) as control:
            path = (await control.call("query-cpus-fast"))[1]["qom-path"]
        session = await connect(guest.monitors[0])
        with pytest.raises(PermanentError, match="unplug not supported by microvm"):
            await session._execute(Command("device_del", {"id": path}))


async def test_plugging_and_unplugging_while_a_migration_runs(
    q35: Guest, connect: Connect, namespace_folder: Path
) -> None:
    async with raw(q35.control) as control:
        await Acpi(control).leave_legacy()
        capability = {"capability": "pause-before-switchover", "state": True}
        await control.call("migrate-set-capabilities", {"capabilities": [capability]})
        await control.call("migrate", {"uri": f"file:{namespace_folder}/state"})

        async def paused() -> bool:
            return bool((await control.call("query-migrate"))["status"] == "pre-switchover")

        await until(paused, 60, "the migration to pause")
    session = await connect(q35.monitors[0])
    machine = await session.observe()
    with pytest.raises(Migrating):
        await session.plug(machine.free[0])
    with pytest.raises(Migrating):
        await session.unplug(machine.occupied[1])


@pytest.mark.parametrize(
    ("command", "words", "kind"),
    [
        ("query-migrate", "The command 'x' is permitted only after machine initialization has completed", Preconfig),
        ("device_del", "acpi: device unplug request for not supported device type: qemu64-x86_64-cpu", GuestNotReady),
        ("device_add", "device_add not allowed while migrating", Migrating),
        ("device_add", "Duplicate device ID 'vcpu3'", SlotTaken),
        ("device_add", "Duplicate ID 'vcpu3' for device", SlotTaken),
        ("device_add", "core 8 already populated", SlotTaken),
        ("device_add", "Unable to add CPU with core-id: 2, it already exists", SlotTaken),
        ("device_add", "cpu(id2=0:0:2) with arch-id 2 exists", SlotTaken),
        ("device_del", "Boot CPU core may not be unplugged", PermanentError),
        ("device_del", "hot-unplug of boot cpu(id0=0:0:0) not supported", PermanentError),
        ("device_del", "CPU hot unplug not supported on this machine", PermanentError),
        ("device_del", "CPU hot unplug not supported without ACPI", PermanentError),
        ("device_add", "cpu hotplug with SMI wasn't enabled by firmware", PermanentError),
        ("device_del", "cpu hot-unplug with SMI wasn't enabled by firmware", PermanentError),
        ("device_del", "Bus 'main-system-bus' does not support hotplugging", PermanentError),
        ("device_add", "Parameter 'driver' expects a pluggable device type", PermanentError),
        ("device_add", "Device 'max-arm-cpu' can not be hotplugged on this machine", PermanentError),
        (
            "device_add",
            "current -smp configuration requires kernel irqchip and X2APIC API support.",
            PermanentError,
        ),
        ("device_add", "Invalid CPU type, expected cpu type: 'qemu64-x86_64-cpu'", PermanentError),
        ("device_add", "Property 'qemu64-x86_64-cpu.bogus-id' not found", PermanentError),
        ("device_add", "core id 96 out of range", PermanentError),
        ("device_add", "invalid core id 3", PermanentError),
        ("device_add", "CPU core type should be power9_v2.0-spapr-cpu-core", PermanentError),
        ("device_add", "CPU socket-id is not set", PermanentError),
        ("device_add", "invalid node-id, must be 0", PermanentError),
        ("device_add", "something that QEMU will say in ten years", CommandRefused),
    ],
)
def test_texts_of_machines_that_are_not_at_hand(command: str, words: str, kind: type[CommandError]) -> None:
    error = translate.refusal(command, reply("GenericError", words))
    assert type(error) is kind
    assert str(error) == f"{command}: {words}"


def test_the_class_decides_where_qemu_gives_one() -> None:
    assert type(translate.refusal("device_del", reply("DeviceNotFound", "Device 'x' not found"))) is DeviceGone
    assert type(translate.refusal("device_add", reply("DeviceNotFound", "Device 'x' not found"))) is CommandRefused
    assert type(translate.refusal("device_add", reply("CommandNotFound", "no such command"))) is PermanentError


def test_a_text_of_any_length_and_kind_is_shown_in_one_short_printable_line() -> None:
    error = translate.refusal("device_add", reply("GenericError", "no\x1b[31m\n\r" * 1000))
    assert len(str(error)) < 250
    assert str(error).isprintable()


def reply(error_class: str, words: str) -> ExecuteError:
    message = Message({"error": {"class": error_class, "desc": words}})
    return ExecuteError(ErrorResponse(message), Message({}), message)


@pytest.mark.parametrize(
    "words",
    ["machine does not support hot-plugging CPUs", "The feature 'query-hotpluggable-cpus' is not enabled"],
)
def test_machines_without_cpu_hotplug_are_recognised(words: str) -> None:
    assert translate.says_no_hotplug(reply("GenericError", words))
