"""What real QEMU machines said, word for word, in `recordings.json`: where the fuzz test begins.

A recording holds the greeting and one reply to each command that a session uses, as they came (without their ids). To
record again, with the QEMU that is installed:

    PYTHONPATH=tests .venv/bin/python -m qmp.recordings
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.acpi import Acpi
from harness.guest import Guest
from harness.qmp import Raw, raw
from harness.wait import until

__all__ = ["QUERIES", "Message", "Recording", "Recordings", "load"]

FILE = Path(__file__).with_suffix(".json")

Message = dict[str, Any]
"""A QMP message: greeting, return, error or event."""

QUERIES = (
    "query-status",
    "query-migrate",
    "query-uuid",
    "query-acpi-ospm-status",
    "query-cpus-fast",
    "query-hotpluggable-cpus",
)


@dataclass(frozen=True)
class Recording:
    """One machine."""

    name: str
    greeting: Message
    replies: Mapping[str, Message]
    """By command; also `qmp_capabilities`, and `device_add` and `device_del` of a CPU where QEMU takes them."""


@dataclass(frozen=True)
class Recordings:
    """All of `recordings.json`."""

    qemu: str
    machines: tuple[Recording, ...]
    events: tuple[Message, ...]
    """Events as they came, among them those of CPUs that came, left and stayed."""
    event_names: tuple[str, ...]
    """Every event that this QEMU knows."""
    agent: Mapping[str, Message]
    """What a guest's agent answered, by command; for `guest-set-vcpus ENOENT` to a CPU that is not there."""


def load() -> Recordings:
    """The recordings."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    machines = (Recording(name, each["greeting"], each["replies"]) for name, each in found["machines"].items())
    return Recordings(
        found["qemu"], tuple(machines), tuple(found["events"]), tuple(found["event_names"]), found["agent"]
    )


@dataclass
class _Wire:
    """A monitor without a client library in between: what is read is what was sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    events: list[Message] = field(default_factory=list)

    async def receive(self) -> Message:
        async with asyncio.timeout(30):
            found: Message = json.loads(await self.reader.readline())
            return found

    async def ask(self, command: str, arguments: Message | None = None) -> Message:
        self.writer.write(json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n")
        while "event" in (answer := await self.receive()):
            self.events.append(answer)
        return answer


@contextlib.asynccontextmanager
async def _wire(path: Path) -> AsyncIterator[_Wire]:
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
    try:
        yield _Wire(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


async def _record(wire: _Wire, control: Raw, *, plug: int | None, acpi: Acpi | None) -> Message:
    """One machine, with a CPU more in the slot `plug`; `acpi` plays a guest that has booted."""
    greeting = await wire.receive()
    replies = {"qmp_capabilities": await wire.ask("qmp_capabilities")}
    if acpi is not None:
        await acpi.leave_legacy()
    if plug is not None:
        slot = (await control.slots())[plug]
        arguments = {"driver": slot["type"], "id": f"vcpu{plug}", **slot["props"]}
        replies["device_add"] = await wire.ask("device_add", arguments)
    if acpi is not None and plug is not None:
        await acpi.insert(plug)
        await acpi.ost(1, 3, 0x82)
    for query in QUERIES:
        replies[query] = await wire.ask(query)
    if plug is not None:
        replies["device_del"] = await wire.ask("device_del", {"id": f"vcpu{plug}"})
    return {"greeting": greeting, "replies": replies}


async def _events(wire: _Wire, control: Raw, acpi: Acpi, slot: int) -> list[Message]:
    """A CPU is refused, asked for again and leaves; the machine runs and stops."""
    await acpi.refuse(slot)
    await control.device_del(slot)
    await acpi.eject(slot)
    for command in ("cont", "stop", "system_reset", "query-status"):
        await wire.ask(command)
    return wire.events


async def _agent() -> Message:
    """The agent of a Linux guest that has one CPU more than it uses."""
    async with Guest(smp="2,maxcpus=64", agent=True, append="online=none") as guest:
        await guest.ready()
        async with raw(guest.control) as control:
            await control.device_add(2)
        async with _wire(guest.agent_path) as wire:

            async def seen() -> bool:
                return len((await wire.ask("guest-get-vcpus"))["return"]) == 3

            await wire.ask("guest-sync", {"id": 1})
            await until(seen, 60, "the third CPU to be seen by the guest")
            online = {"vcpus": [{"logical-id": 2, "online": True}]}
            missing = {"vcpus": [{"logical-id": 99, "online": True}]}
            return {
                "guest-sync-delimited": await wire.ask("guest-sync", {"id": 1}),
                "guest-get-vcpus": await wire.ask("guest-get-vcpus"),
                "guest-set-vcpus": await wire.ask("guest-set-vcpus", online),
                "guest-set-vcpus ENOENT": await wire.ask("guest-set-vcpus", missing),
            }


async def _record_all() -> Message:
    machines: Message = {}
    events: list[Message] = []
    async with Guest(None, smp="3,maxcpus=6", memory=64) as guest, raw(guest.control) as control:
        async with _wire(guest.monitors[0]) as wire:
            machines["q35, guest not up"] = await _record(wire, control, plug=None, acpi=None)
        async with _wire(guest.monitors[0]) as wire:
            acpi = Acpi(control)
            machines["q35"] = await _record(wire, control, plug=4, acpi=acpi)
            events = await _events(wire, control, acpi, 4)
        schema = await control.call("query-qmp-schema")
    others: tuple[tuple[str, dict[str, Any], int | None], ...] = (
        (
            "pseries",
            {"qemu": "qemu-system-ppc64", "machine": "pseries", "cpu": None, "smp": "4,threads=2,maxcpus=8"},
            2,
        ),
        ("s390x", {"qemu": "qemu-system-s390x", "machine": "s390-ccw-virtio", "cpu": None, "smp": "2,maxcpus=4"}, 2),
        ("microvm", {"machine": "microvm", "smp": "2"}, None),
    )
    for name, options, plug in others:
        guest = Guest(None, memory=256, **options)
        async with guest, raw(guest.control) as control, _wire(guest.monitors[0]) as wire:
            machines[name] = await _record(wire, control, plug=plug, acpi=None)
    version = machines["q35"]["greeting"]["QMP"]["version"]["qemu"]
    return {
        "qemu": "{major}.{minor}.{micro}".format_map(version),
        "machines": machines,
        "agent": await _agent(),
        "events": events,
        "event_names": sorted(entry["name"] for entry in schema if entry["meta-type"] == "event"),
    }


_MESSAGE = {"return", "error", "QMP"}


def _lines(value: object, depth: int = 0) -> str:
    """JSON, with every message, and every entry of a list of objects, in a line of its own."""
    rows: Iterable[str]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows, ends = (json.dumps(each) for each in value), "[]"
    elif isinstance(value, dict) and (not _MESSAGE & value.keys() or isinstance(value.get("return"), list)):
        rows, ends = (f"{json.dumps(key)}: {_lines(each, depth + 1)}" for key, each in value.items()), "{}"
    else:
        return json.dumps(value)
    pad = "\n" + " " * depth
    return f"{ends[0]}{pad} " + f",{pad} ".join(rows) + f"{pad}{ends[1]}"


if __name__ == "__main__":
    FILE.write_text(_lines(asyncio.run(_record_all())) + "\n", encoding="utf-8")
