"""A QMP server with scripted faults, for what a real QEMU cannot be made to do.

Without faults it behaves like a machine, so that a test breaks one thing only:

    async with FaultyMonitor(path, cpus=2, slots=8, faults={"query-cpus-fast": Hang(times=1)}) as monitor:
        monitor.cpus.unplug[3] = Refuse(0x82)          # what the guest does when it is asked for a CPU
        monitor.faults[GREETING] = Delay(0.5)          # faults may be changed at any time
        ...
        assert [command.name for command in monitor.commands] == [...]

As a real monitor it serves one client at a time: others are accepted and hear nothing until their turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.cpus import CommandError, Cpus, Eject, Refuse, Silent, Working
from harness.faults import (
    GARBAGE,
    NOT_AN_OBJECT,
    NOT_UTF8,
    Answer,
    Bytes,
    Close,
    Deaf,
    Delay,
    Error,
    Fault,
    Hang,
    Huge,
    NoId,
    Storm,
    Twice,
    WrongId,
)
from harness.wait import until

__all__ = [
    "GARBAGE",
    "GREETING",
    "NOT_AN_OBJECT",
    "NOT_UTF8",
    "Bytes",
    "Close",
    "Command",
    "Deaf",
    "Delay",
    "Eject",
    "Error",
    "Fault",
    "FaultyMonitor",
    "Hang",
    "Huge",
    "NoId",
    "Refuse",
    "Silent",
    "Storm",
    "Twice",
    "Working",
    "WrongId",
]

GREETING = "greeting"
"""The name under which the greeting has its fault; no QMP command is called so."""

LONGEST_REQUEST = 1 << 16
FOREVER = 3600.0
"""Longer than any test."""


@dataclass(frozen=True)
class Command:
    """A command as it was received."""

    connection: int
    """The number of the connection, from 1 in the order in which they were accepted."""
    name: str
    arguments: Mapping[str, Any]
    ident: object
    """The client's id of the request."""


class FaultyMonitor:
    """A monitor on a unix socket, with a machine of CPUs behind it.

    path     where it listens; its folder exists
    cpus     boot CPUs
    slots    CPU slots
    driver   the type of the CPUs
    status   the run state that query-status shows
    relay    as libvirt's `virt-qemu-qmp-proxy` 9.0: nothing is answered any more once two commands have come together,
             and the data of events is text
    faults   by command name, or GREETING

    `commands` has every command received, whatever became of it; `connections` counts the accepted ones.
    """

    def __init__(
        self,
        path: Path,
        *,
        cpus: int = 2,
        slots: int = 8,
        driver: str = "qemu64-x86_64-cpu",
        status: str = "running",
        relay: bool = False,
        faults: Mapping[str, Fault] | None = None,
    ) -> None:
        self.path = path
        self.status = status
        self.relay = relay
        self.migration: Answer = {}
        """What query-migrate returns; {} means that there never was one."""
        self.stats: list[Answer] = []
        """What query-stats returns; as under TCG nothing, unless it is set."""
        self.faults: dict[str, Fault] = dict(faults or {})
        self.commands: list[Command] = []
        self.connections = 0
        self.cpus = Cpus(cpus, slots, driver, self.emit)
        self._server: asyncio.Server | None = None
        self._links: dict[_Connection, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._served: _Connection | None = None
        self._handlers: dict[str, Callable[[Answer], object]] = {
            "qmp_capabilities": lambda _: {},
            "query-status": lambda _: {"status": self.status, "running": self.status == "running"},
            "query-migrate": lambda _: self.migration,
            "query-uuid": lambda _: {"UUID": "00000000-0000-0000-0000-000000000000"},
            "query-cpus-fast": self.cpus.query_cpus_fast,
            "query-hotpluggable-cpus": self.cpus.query_hotpluggable_cpus,
            "query-acpi-ospm-status": self.cpus.query_acpi_ospm_status,
            "query-stats": lambda _: self.stats,
            "device_add": self.cpus.device_add,
            "device_del": self.cpus.device_del,
        }

    def received(self, name: str) -> list[Command]:
        """The commands of this name that have come in."""
        return [command for command in self.commands if command.name == name]

    def emit(self, name: str, data: Answer | None = None) -> None:
        """Send an event to the client that is being served; without one it is lost, as in QEMU."""
        if self._served is not None:
            now = time.time()
            event: Answer = {
                "event": name,
                "timestamp": {"seconds": int(now), "microseconds": int(now % 1 * 1_000_000)},
            }
            shown = json.dumps(data) if self.relay else data
            self._served.event(event if data is None else {**event, "data": shown})

    def restart(self, cpus: int) -> None:
        """Another QEMU takes the place of this one: connections are cut, the CPUs are new boot CPUs."""
        self.cut()
        self.cpus.boot(cpus)

    def cut(self) -> None:
        """Close all connections at once."""
        for link in list(self._links):
            link.close()

    async def start(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._accept, self.path, limit=LONGEST_REQUEST)
        return self

    async def stop(self) -> None:
        """Cut all connections and remove the socket. Safe to call again."""
        if self._server is not None:
            # asyncio needs three rounds from accepting a connection to `_accept`. Until then nobody would close it, and
            # a server closed in between (Python 3.11) drops it half made. So: accept no more, wait, close.
            for listener in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            for _ in range(4):
                await asyncio.sleep(0)
            self._server.close()
        tasks = list(self._links.values())
        for link in list(self._links):
            link.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _remove(self.path)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = _Connection(self.connections, reader, writer, together=not self.relay)
        task = asyncio.current_task()
        assert task is not None
        self._links[link] = task
        try:
            async with self._turn:
                self._served = link
                try:
                    await self._serve(link)
                finally:
                    self._served = None
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the server stops: this task had no other purpose
        finally:
            del self._links[link]
            link.abort()

    async def _serve(self, link: _Connection) -> None:
        """From the greeting to the end of the connection. A client that left while it waited ends it at once."""
        version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "qemu-10.0.2" if self.relay else "faulty"}
        await _deliver(link, self._strike(GREETING), {"QMP": {"version": version, "capabilities": ["oob"]}})
        negotiated = False
        while (request := await link.receive()) is not None:
            name = str(request.get("execute") or request.get("exec-oob"))
            command = Command(link.number, name, request.get("arguments", {}), request.get("id"))
            self.commands.append(command)
            fault = self._strike(name)
            answer: Answer = {"return": {}}
            with link.answering():
                if fault is None or fault.executes:
                    answer = self._execute(command, negotiated=negotiated)
                    negotiated = negotiated or (name == "qmp_capabilities" and "return" in answer)
                if "id" in request:
                    answer["id"] = request["id"]
                await _deliver(link, fault, answer)

    def _execute(self, command: Command, *, negotiated: bool) -> Answer:
        if negotiated and command.name == "qmp_capabilities":
            return _failed("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if not negotiated and command.name != "qmp_capabilities":
            return _failed("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        handler = self._handlers.get(command.name)
        if handler is None:
            return _failed(f"The command {command.name} has not been found", "CommandNotFound")
        try:
            return {"return": handler(dict(command.arguments))}
        except CommandError as error:
            return _failed(str(error), error.error_class)

    def _strike(self, name: str) -> Fault | None:
        """The fault that happens now, counted."""
        fault = self.faults.get(name)
        if fault is None or (fault.times is not None and fault.struck >= fault.times):
            return None
        fault.struck += 1
        return fault


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _deliver(link: _Connection, fault: Fault | None, answer: Answer) -> None:
    if fault is None:
        await link.send(answer)
    else:
        await fault.deliver(link, answer)


def _failed(desc: str, error_class: str = "GenericError") -> Answer:
    return {"error": {"class": error_class, "desc": desc}}


class _Connection:
    """One client.

    together  whether it may send several requests at once
    """

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, together: bool
    ) -> None:
        self.number = number
        self._together = together
        self._reader = reader
        self._writer = writer
        self._unread = ""
        self._held_back: list[Answer] | None = None  # events, while a command is being answered

    async def receive(self) -> Answer | None:
        """The next request; None: the client has left. QEMU needs no line end after one, and qemu.qmp sends none."""
        while True:
            text = self._unread.lstrip()
            with contextlib.suppress(ValueError):  # not all of it is here
                request, end = json.JSONDecoder().raw_decode(text)
                if self._together or end == len(text):
                    self._unread = text[end:]
                    assert isinstance(request, dict), f"not a QMP request: {request!r}"
                    return request
            chunk = await self._reader.read(LONGEST_REQUEST)
            if not chunk:
                return None
            self._unread = text + chunk.decode()

    def event(self, event: Answer) -> None:
        """Send an event; one that a command has caused follows its answer, as in QEMU."""
        if self._held_back is None:
            self._write(event)
        else:
            self._held_back.append(event)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Holds events back."""
        self._held_back = []
        try:
            yield
        finally:
            events, self._held_back = self._held_back, None
            for event in events:
                self._write(event)

    async def send(self, message: Answer) -> None:
        """Send one message, and wait while the client has too much to read."""
        self._write(message)
        await self._writer.drain()

    async def send_bytes(self, chunk: bytes) -> None:
        """Send these bytes as they are."""
        self._writer.write(chunk)
        await self._writer.drain()

    def _write(self, message: Answer) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\r\n")

    def close(self) -> None:
        """Close the connection; bytes sent so far arrive."""
        self._writer.close()

    def abort(self) -> None:
        """Close the connection and drop what was not sent."""
        self._writer.transport.abort()

    async def left(self) -> None:
        """Read nothing any more, and return when the client has closed the connection.

        asyncio learns of that only by reading, the kernel knows.
        """
        transport: Any = self._writer.transport  # it reads too; that of uvloop is none of asyncio's classes
        transport.pause_reading()
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), 0)  # POLLHUP is always reported
        await until(lambda: self._writer.is_closing() or poll.poll(0), FOREVER, "the client to leave")
        self.abort()  # ends the reader too, which hears nothing of it either
