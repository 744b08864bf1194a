"""A guest agent with scripted faults, for what a real one cannot be made to say.

Without faults it answers as qemu-ga does, so that a test breaks one thing only:

    async with FaultyAgent(path, offline={1, 2}, faults={"guest-get-vcpus": Returns("nonsense")}) as agent:
        ...
        assert [len(arguments["vcpus"]) for arguments in agent.received("guest-set-vcpus")] == [2]

The faults are those of harness.faults and the one below. As the serial line behind a real socket, it serves one client
at a time, and says what was meant for an earlier one to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from typing_extensions import override

from harness.faults import Answer, Fault, Link

__all__ = ["SYNC", "FaultyAgent", "Returns"]

SYNC = "guest-sync-delimited"

DELIMITER = b"\xff"
CHUNK = 1 << 16


@dataclass
class Returns(Fault):
    """Another value is returned."""

    value: object

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.send({**answer, "return": self.value})


class FaultyAgent:
    """An agent on a unix socket, in a guest with CPU 0 and others that are offline.

    path      where it listens; its folder exists
    offline   the CPUs to be set online
    stale     what the line still holds for an earlier client
    faults    by command name

    `online` has the CPUs that are online.
    """

    def __init__(
        self,
        path: Path,
        *,
        offline: Collection[int] = (),
        stale: bytes = b"",
        faults: Mapping[str, Fault] | None = None,
    ) -> None:
        self.path = path
        self.online = {0}
        self.stats: list[Answer] = []
        """What guest-get-cpustats returns."""
        self.load: Answer = {"load15m": 3.69140625, "load5m": 1.73486328125, "load1m": 0.76123046875}
        """What guest-get-load returns; these are of qemu-ga 10.0.2."""
        self._cpus = sorted({0, *offline})
        self._stale = stale
        self._faults = dict(faults or {})
        self._received: list[tuple[str, Answer]] = []
        self._turn = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._handlers: dict[str, Callable[[Answer], object]] = {
            SYNC: lambda arguments: arguments["id"],
            "guest-get-vcpus": self._get,
            "guest-set-vcpus": self._set,
            "guest-get-cpustats": lambda _: self.stats,
            "guest-get-load": lambda _: self.load,
        }

    def received(self, name: str) -> list[Answer]:
        """The arguments of the commands of this name that have come in."""
        return [arguments for received, arguments in self._received if received == name]

    def _get(self, _: Answer) -> object:
        return [{"logical-id": cpu, "online": cpu in self.online, "can-offline": cpu > 0} for cpu in self._cpus]

    def _set(self, arguments: Answer) -> object:
        entries = arguments["vcpus"]
        assert all(entry["online"] is True for entry in entries)
        self.online.update(entry["logical-id"] for entry in entries)
        return len(entries)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        # asyncio needs three rounds from accepting a connection to `_accept`; see harness.faulty.
        for listener in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        for _ in range(4):
            await asyncio.sleep(0)
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.current_task()
        assert client is not None
        self._clients.add(client)
        try:
            async with self._turn:
                await self._serve(reader, _Line(reader, writer))
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the agent stops: this task had no other purpose
        finally:
            self._clients.discard(client)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, line: _Line) -> None:
        await line.send_bytes(self._stale)
        self._stale = b""
        async for request in _requests(reader):
            if request is None:
                desc = "JSON parse error, stray '\\uFFFD'"
                await line.send({"error": {"class": "GenericError", "desc": desc}})
                continue
            name, arguments = request["execute"], request.get("arguments", {})
            self._received.append((name, arguments))
            fault = self._strike(name)
            carried_out = fault is None or fault.executes
            answer = {"return": self._handlers[name](arguments) if carried_out else None, "id": request["id"]}
            if name == SYNC:
                await line.send_bytes(DELIMITER)
            if fault is None:
                await line.send(answer)
            else:
                await fault.deliver(line, answer)

    def _strike(self, name: str) -> Fault | None:
        """The fault that happens now, counted."""
        fault = self._faults.get(name)
        if fault is None or (fault.times is not None and fault.struck >= fault.times):
            return None
        fault.struck += 1
        return fault


async def _requests(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """The requests of a client until it leaves; None for a 0xFF, which ends whatever came before it."""
    unread = b""
    while chunk := await reader.read(CHUNK):
        unread += chunk
        while True:
            _, delimiter, rest = unread.partition(DELIMITER)
            if delimiter:
                unread = rest
                yield None
                continue
            text = unread.decode().lstrip()
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:  # not all of it is here
                break
            unread = text[end:].encode()
            yield request


class _Line:
    """The connection as the faults see it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: Answer) -> None:
        await self.send_bytes(json.dumps(message).encode() + b"\n")

    async def send_bytes(self, chunk: bytes) -> None:
        self._writer.write(chunk)
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()

    async def left(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._reader.read()
