"""Machines without QEMU, by the thousand: one process that answers on each machine's monitor as QEMU 10.0.2 does.

For loads that no test host could carry with real machines. `FaultyMonitor` breaks what a test wants broken; here
nothing is ever broken, and each answer costs as little as possible, because the simulator shares the cores with what is
measured:

    machine = SimulatedMachine(path, cpus=2, slots=8)
    machine.start()                                  # in an event loop
    ...
    machine.stop()

As QEMU it accepts one client, greets it, and leaves the others to the listener's queue, which holds two. Requests to
unplug are latched; the guest carries them out some time later, in no hurry for being asked again.

As a process it serves many machines, and writes each change of a count into a journal; see `harness.simulation`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TextIO
from uuid import UUID

import msgspec

from harness.cpus import CommandError, Cpus, Unplug, kvm_counters

__all__ = ["DRIVER", "SimulatedMachine"]

DRIVER: Final = "qemu64-x86_64-cpu"

GUEST_SECONDS: Final = (0.03, 0.3)
"""How long a guest takes to give a CPU back: from, to."""

LONGEST_REQUEST: Final = 1 << 16
QUEUED: Final = 1
"""QEMU's listen(2): with this, two more clients can connect and wait."""

JOURNAL_SECONDS: Final = 0.05
"""How late a line of the journal may be; the time that it tells is exact."""

Message = dict[str, Any]

_GREETING: Final = {
    "QMP": {
        "version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "simulated"},
        "capabilities": ["oob"],
    }
}

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Message).decode
_scan = json.JSONDecoder().raw_decode


class SimulatedMachine:
    """A machine with a monitor on a unix socket, and a guest that gives CPUs back when it gets round to it.

    path     where the monitor listens; its folder exists
    cpus     boot CPUs
    slots    CPU slots
    uuid     the machine's; None: it was started without one
    status   the run state
    guest    whether a guest's ACPI is up; without one there are no _OST reports, and unplugs are refused
    kvm      whether query-stats has KVM's counters; without KVM it has none
    seconds  from when to when, after a request, the guest gives a CPU up
    moved    called with the count at each change of it
    """

    def __init__(
        self,
        path: Path,
        *,
        cpus: int,
        slots: int,
        uuid: UUID | None = None,
        status: str = "running",
        guest: bool = True,
        kvm: bool = True,
        seconds: tuple[float, float] = GUEST_SECONDS,
        moved: Callable[[int], None] = lambda _: None,
        chance: random.Random | None = None,
    ) -> None:
        self.path = path
        self.status = status
        self.guest = guest
        self.kvm = kvm
        self.cpus = _Guest(self, cpus, slots, seconds, moved, chance or random.Random())
        self.sessions = 0
        """How many clients have been greeted."""
        self._uuid = str(uuid or UUID(int=0))
        self._listener: socket.socket | None = None
        self._client: _Client | None = None

    @property
    def unplug(self) -> dict[int, Unplug]:
        """What the guest does, at once, with requests for these slots; all others it gives up after a while."""
        return self.cpus.unplug

    def start(self) -> None:
        """Listen."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(str(self.path))
        self._listener.listen(QUEUED)
        self._await_client()

    def stop(self) -> None:
        """Cut the client off and remove the socket, as an end of QEMU does. Safe to call again."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        if self._client is not None:
            self._client.close()
        else:
            asyncio.get_running_loop().remove_reader(listener)
        listener.close()
        self.path.unlink(missing_ok=True)
        self.cpus.forget_requests()

    def emit(self, name: str, data: Message | None) -> None:
        """Send an event to the client; without one it is lost, as in QEMU."""
        if self._client is not None:
            now = time.time()
            stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1_000_000)}
            event: Message = {"timestamp": stamp, "event": name}
            self._client.tell(event if data is None else {**event, "data": data})

    def _await_client(self) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has gone again
        # Nobody else is accepted before this one has left: who connects waits in the kernel's queue.
        asyncio.get_running_loop().remove_reader(self._listener)
        connection.setblocking(False)
        self.sessions += 1
        self._client = _Client(connection, self._answer, self._left)

    def _left(self) -> None:
        self._client = None
        if self._listener is not None:
            self._await_client()

    def _answer(self, command: str, arguments: Message) -> object:
        match command:
            case "query-status":
                return {"status": self.status, "running": self.status == "running"}
            case "query-migrate":
                return {}
            case "query-uuid":
                return {"UUID": self._uuid}
            case "query-version":
                return _GREETING["QMP"]["version"]
            case "query-acpi-ospm-status":
                return self.cpus.query_acpi_ospm_status(arguments) if self.guest else []
            case "query-cpus-fast":
                return self.cpus.query_cpus_fast(arguments)
            case "query-hotpluggable-cpus":
                return self.cpus.query_hotpluggable_cpus(arguments)
            case "query-stats":
                return [_half_busy(cpu["qom-path"]) for cpu in self.cpus.query_cpus_fast({})] if self.kvm else []
            case "device_add":
                return self.cpus.device_add(arguments)
            case "device_del" if not self.guest:
                raise CommandError("acpi: device unplug request for not supported device type: " + self.cpus.driver)
            case "device_del":
                return self.cpus.device_del(arguments)
            case _:
                raise CommandError(f"The command {command} has not been found", "CommandNotFound")


def _half_busy(path: str) -> Message:
    """KVM's counters of a vCPU that is busy half of the time."""
    now = time.monotonic_ns()
    return kvm_counters(path, exits=now >> 20, halt_wait_ns=now // 2)


class _Guest(Cpus):
    """The machine's CPUs, of which the guest gives one back some time after it was asked."""

    def __init__(
        self,
        machine: SimulatedMachine,
        cpus: int,
        slots: int,
        seconds: tuple[float, float],
        moved: Callable[[int], None],
        chance: random.Random,
    ) -> None:
        super().__init__(cpus, slots, DRIVER, self._tell)
        self.count = cpus
        self._machine = machine
        self._seconds = seconds
        self._moved = moved
        self._chance = chance
        self._latched: dict[int, asyncio.TimerHandle] = {}

    def forget_requests(self) -> None:
        """Nothing is given up any more."""
        for timer in self._latched.values():
            timer.cancel()
        self._latched.clear()

    def plug(self, slot: int, ident: str | None = None) -> None:
        """As everywhere, and counted."""
        super().plug(slot, ident)
        self._count(+1)

    def ask(self, slot: int) -> None:
        """Latch the request; to ask again changes nothing."""
        if slot in self.unplug:
            super().ask(slot)
        elif slot not in self._latched:
            later = self._chance.uniform(*self._seconds)
            self._latched[slot] = asyncio.get_running_loop().call_later(later, self.eject, slot)

    def eject(self, slot: int) -> None:
        """As everywhere, and counted."""
        if (timer := self._latched.pop(slot, None)) is not None:
            timer.cancel()
        super().eject(slot)
        self._count(-1)

    def _count(self, change: int) -> None:
        self.count += change
        self._moved(self.count)

    def _tell(self, name: str, data: Message) -> None:
        # Without a guest nobody reports.
        if self._machine.guest:
            self._machine.emit(name, data)


class _Client:
    """The client that is served. Without asyncio's streams and transports, which cost more than the answers."""

    def __init__(
        self, connection: socket.socket, answer: Callable[[str, Message], object], left: Callable[[], None]
    ) -> None:
        self._socket = connection
        self._answer = answer
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._unread = b""
        self._unsent = b""
        self._events: list[Message] | None = None  # while a command is being answered
        self._negotiated = False
        self._loop.add_reader(connection, self._receive)
        self._send(_GREETING)

    def close(self) -> None:
        """End the connection. Safe to call again."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._left()

    def tell(self, event: Message) -> None:
        """Send an event; one that a command has caused follows its answer, as in QEMU."""
        if self._events is None:
            self._send(event)
        else:
            self._events.append(event)

    def _receive(self) -> None:
        try:
            chunk = self._socket.recv(LONGEST_REQUEST)
        except BlockingIOError:
            return
        except ConnectionError:
            chunk = b""
        if not chunk or len(self._unread) > LONGEST_REQUEST:
            self.close()
            return
        self._unread += chunk
        while self._unread and (request := self._next_request()) is not None:
            self._serve(request)

    def _next_request(self) -> Message | None:
        """The next request, if all of it is here. QEMU needs no line end after one, and qemu.qmp sends none."""
        with suppress(msgspec.DecodeError):
            request = _decode(self._unread)
            self._unread = b""
            return request
        text = self._unread.decode(errors="replace").lstrip()
        with suppress(ValueError):
            several, end = _scan(text)
            self._unread = text[end:].strip().encode()
            return several if isinstance(several, dict) else {}
        return None

    def _serve(self, request: Message) -> None:
        self._events = []
        reply = self._reply(request.get("execute") or request.get("exec-oob") or "", request.get("arguments") or {})
        if "id" in request:
            reply["id"] = request["id"]
        self._send(reply)
        events, self._events = self._events, None
        for event in events:
            self._send(event)

    def _reply(self, command: str, arguments: Message) -> Message:
        if command == "qmp_capabilities":
            if self._negotiated:
                return _error("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
            self._negotiated = True
            return {"return": {}}
        if not self._negotiated:
            return _error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        try:
            return {"return": self._answer(command, arguments)}
        except CommandError as error:
            return _error(str(error), error.error_class)

    def _send(self, message: Message) -> None:
        if self._socket.fileno() < 0:
            return
        line = _encode(message) + b"\r\n"
        if self._unsent:
            self._unsent += line
            return
        try:
            sent = self._socket.send(line)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            return  # noticed when reading
        if sent < len(line):
            self._unsent = line[sent:]
            self._loop.add_writer(self._socket, self._flush)

    def _flush(self) -> None:
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except ConnectionError:
            self._unsent = b""
        if not self._unsent:
            self._loop.remove_writer(self._socket)


def _error(desc: str, error_class: str) -> Message:
    return {"error": {"class": error_class, "desc": desc}}


class _Journal:
    """Lines "machine count time": the time of the clock, in seconds since 1970."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._flushing: asyncio.TimerHandle | None = None

    def note(self, machine: str, count: int) -> None:
        """A machine has so many CPUs now."""
        self._stream.write(f"{machine} {count} {time.time():.6f}\n")
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(JOURNAL_SECONDS, self._flush)

    def _flush(self) -> None:
        self._flushing = None
        self._stream.flush()


def _machine(folder: Path, number: int, cpus: int, slots: int, journal: _Journal, *, kvm: bool) -> SimulatedMachine:
    name = f"vm-{number}"
    return SimulatedMachine(
        folder / f"{name}.sock",
        cpus=cpus,
        slots=slots,
        uuid=UUID(int=number + 1),
        kvm=kvm,
        moved=lambda count: journal.note(name, count),
        chance=random.Random(number),
    )


async def _serve(folder: Path, machines: int, cpus: list[int], slots: int, journal: Path, *, kvm: bool) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with journal.open("a", encoding="ascii") as stream:
        book = _Journal(stream)
        all_of_them = [
            _machine(folder, number, cpus[number % len(cpus)], slots, book, kvm=kvm) for number in range(machines)
        ]
        for machine in all_of_them:
            machine.start()
        stream.write("listening\n")
        stream.flush()
        await stop.wait()
        for machine in all_of_them:
            machine.stop()


def main() -> None:
    """Serve machines vm-0, vm-1, … until SIGTERM."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the sockets vm-0.sock, … are made")
    parser.add_argument("journal", type=Path, help="the file that tells of changes")
    parser.add_argument("--machines", type=int, required=True)
    parser.add_argument("--cpus", required=True, help="boot CPUs of the machines in turn, such as 2,6")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--tcg", action="store_true", help="without KVM, and so without its counters")
    given = parser.parse_args()
    cpus = [int(each) for each in given.cpus.split(",")]
    asyncio.run(_serve(given.folder, given.machines, cpus, given.slots, given.journal, kvm=not given.tcg))


if __name__ == "__main__":
    main()
