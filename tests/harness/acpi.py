"""The guest's part of ACPI CPU hotplug, played by hand: real QEMU answers and events without a guest.

The machine is started stopped and without a kernel (``Guest(None)``), and the registers that a guest's ACPI code uses
are written through the human monitor. A plug or an unplug then takes milliseconds, and the test decides whether the
"guest" obeys, refuses or keeps silent:

    async with Guest(None) as guest, raw(guest.control) as client:
        acpi = Acpi(client)
        await acpi.leave_legacy()       # before this, QEMU refuses device_del
        await client.device_add(1)
        await acpi.insert(1)
        await client.device_del(1)
        await acpi.refuse(1)            # or acpi.eject(1), or nothing

The registers are those of docs/specs/acpi_cpu_hotplug.rst in QEMU's source.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from harness.qmp import Raw

__all__ = ["Acpi", "Flags", "Source", "Status"]

BASE = {"q35": 0xCD8, "pc": 0xAF00}
"""The I/O port of the registers, by machine type."""

# Offsets from the base. The one of the data and of the selector is 32 bits wide, which HMP calls "w".
SELECTOR = 0
FLAGS = 4
COMMAND = 5
DATA = 8

SET_OST_EVENT = 1
SET_OST_STATUS = 2
"""Written to COMMAND: what the next DATA means. QEMU sends ACPI_DEVICE_OST when the status arrives."""


class Source(IntEnum):
    """What an _OST report is about (ACPI 6.5, 6.3.5)."""

    DEVICE_CHECK = 0x1
    EJECT_REQUEST = 0x3


class Status(IntEnum):
    """What an _OST report says (ACPI 6.5, 6.3.5)."""

    SUCCESS = 0x0
    FAILURE = 0x1
    NOT_SUPPORTED = 0x80
    IN_USE = 0x81
    BUSY = 0x82
    DEPENDENCY_BUSY = 0x83
    IN_PROGRESS = 0x84


@dataclass(frozen=True)
class Flags:
    """What QEMU shows to the guest about one slot."""

    enabled: bool
    """There is a CPU."""
    inserting: bool
    """It was plugged, and the guest has not taken notice."""
    removing: bool
    """The guest is asked to give it up, and has not taken notice."""


class Acpi:
    """The registers of a machine without a guest, through a monitor session (of its own: one client at a time)."""

    def __init__(self, monitor: Raw, machine: str = "q35") -> None:
        self._monitor = monitor
        self._base = BASE[machine]

    async def leave_legacy(self) -> None:
        """What a guest's ACPI does at boot, once for each QEMU process: a reset does not undo it."""
        await self._select(0)
        await self._select(0)
        await self._write_byte(COMMAND, 0)

    async def flags(self, slot: int) -> Flags:
        """The state of a slot as the guest sees it."""
        await self._select(slot)
        answer = await self._monitor.hmp(f"i/b {self._base + FLAGS:#x}")  # "portb[0x0cdc] = 0x01"
        value = int(answer.rpartition("=")[2], 16)
        return Flags(enabled=bool(value & 1), inserting=bool(value & 2), removing=bool(value & 4))

    async def insert(self, slot: int) -> None:
        """Take a plugged CPU, as Linux does."""
        await self._select(slot)
        await self._write_byte(FLAGS, 2)
        await self.ost(slot, Source.DEVICE_CHECK, Status.SUCCESS)

    async def eject(self, slot: int) -> None:
        """Give up a CPU, as Linux does: in progress, eject, success."""
        await self.forget_removal(slot)
        await self.ost(slot, Source.EJECT_REQUEST, Status.IN_PROGRESS)
        await self._select(slot)
        await self._write_byte(FLAGS, 8)
        await self.ost(slot, Source.EJECT_REQUEST, Status.SUCCESS)

    async def refuse(self, slot: int, status: int = Status.BUSY) -> None:
        """Refuse to give up a CPU, as Linux does: in progress, then `status`."""
        await self.forget_removal(slot)
        await self.ost(slot, Source.EJECT_REQUEST, Status.IN_PROGRESS)
        await self.ost(slot, Source.EJECT_REQUEST, status)

    async def forget_removal(self, slot: int) -> None:
        """Clear the "removing" flag, which a guest does first: without an answer after it, the request is lost."""
        await self._select(slot)
        await self._write_byte(FLAGS, 4)

    async def ost(self, slot: int, source: int, status: int) -> None:
        """Report a status: an ACPI_DEVICE_OST event, and the slot's entry in query-acpi-ospm-status."""
        await self._select(slot)
        await self._write_byte(COMMAND, SET_OST_EVENT)
        await self._write_word(DATA, source)
        await self._write_byte(COMMAND, SET_OST_STATUS)
        await self._write_word(DATA, status)

    async def _select(self, slot: int) -> None:
        await self._write_word(SELECTOR, slot)

    async def _write_byte(self, offset: int, value: int) -> None:
        await self._write("b", offset, value)

    async def _write_word(self, offset: int, value: int) -> None:
        await self._write("w", offset, value)

    async def _write(self, size: str, offset: int, value: int) -> None:
        if answer := await self._monitor.hmp(f"o/{size} {self._base + offset:#x} {value:#x}"):
            raise RuntimeError(f"the human monitor did not write {value:#x} to {self._base + offset:#x}: {answer}")
