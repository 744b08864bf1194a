"""The hand-played ACPI on a real QEMU without a guest."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from qemu.qmp import ExecuteError

from harness import qmp
from harness.acpi import Acpi, Flags, Source, Status
from harness.guest import Guest


@pytest.fixture(params=["q35", "pc"])
async def acpi_guest(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Guest, Acpi]]:
    """A machine without a guest and its ACPI, on the control monitor."""
    async with Guest(None, machine=request.param) as guest, qmp.raw(guest.control) as control:
        yield guest, Acpi(control, machine=request.param)


async def test_before_the_guests_acpi_has_begun_qemu_knows_no_status_and_refuses_unplugs(
    acpi_guest: tuple[Guest, Acpi],
) -> None:
    guest, acpi = acpi_guest
    async with qmp.raw(guest.monitors[0]) as monitor:
        await monitor.device_add(1)
        assert await monitor.call("query-acpi-ospm-status") == []
        with pytest.raises(ExecuteError, match="device unplug request for not supported device type"):
            await monitor.device_del(1)
        await acpi.leave_legacy()
        assert len(await monitor.call("query-acpi-ospm-status")) == 64
        await monitor.device_del(1)


async def test_a_plug_and_an_eject_are_flagged_reported_and_carried_out(acpi_guest: tuple[Guest, Acpi]) -> None:
    guest, acpi = acpi_guest
    async with qmp.raw(guest.monitors[0]) as monitor:
        await acpi.leave_legacy()
        await monitor.device_add(1)
        assert await acpi.flags(1) == Flags(enabled=True, inserting=True, removing=False)
        await acpi.insert(1)
        assert await acpi.flags(1) == Flags(enabled=True, inserting=False, removing=False)
        await monitor.device_del(1)
        assert await acpi.flags(1) == Flags(enabled=True, inserting=False, removing=True)
        await acpi.eject(1)
        assert await acpi.flags(1) == Flags(enabled=False, inserting=False, removing=False)
        assert await monitor.count() == 1


async def test_a_refusal_keeps_the_cpu_and_its_status_can_be_read(acpi_guest: tuple[Guest, Acpi]) -> None:
    guest, acpi = acpi_guest
    async with qmp.raw(guest.monitors[0]) as monitor:
        await acpi.leave_legacy()
        await monitor.device_add(1)
        await acpi.insert(1)
        await monitor.device_del(1)
        await acpi.refuse(1, Status.NOT_SUPPORTED)
        answer = (await monitor.call("query-acpi-ospm-status"))[1]
        assert (answer["source"], answer["status"]) == (Source.EJECT_REQUEST, Status.NOT_SUPPORTED)
        assert await acpi.flags(1) == Flags(enabled=True, inserting=False, removing=False)
        assert await monitor.count() == 2


async def test_a_machine_without_cpu_hotplug_says_so() -> None:
    async with Guest(None, machine="microvm") as guest:
        assert await qmp.execute(guest.control, "query-acpi-ospm-status") == []
        with pytest.raises(ExecuteError, match="does not support hot-plugging CPUs"):
            await qmp.slots(guest.control)
