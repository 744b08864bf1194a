"""Load on the API server from a benchmark, and what the audit log says of the load that others make.

Times are those of the API server: when it has answered, by its own clock. What this process notices, and when, would
say more about this process, which shares two cores with all that it measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from harness.controlplane import ControlPlane
from harness.world import API, manifest

__all__ = ["Audit", "Connection", "Load", "Record"]

AGENT: Final = "bench"
"""The user agent of the requests that are made here."""

CONNECTIONS: Final = 64
"""How many requests are under way at once: as many as an operator's workers make. With fewer, the API server spends its
time on what the operator writes about the first changes, and the others are accepted as slowly as those are carried
out. With many more, the operator waits for its answers."""

REQUEST_SECONDS: Final = 120.0
"""For all requests of a call together."""


class _Target(msgspec.Struct, frozen=True):
    resource: str = ""
    subresource: str = ""
    name: str = ""


class _Outcome(msgspec.Struct, frozen=True):
    code: int = 0


class _Line(msgspec.Struct, frozen=True, rename="camel"):
    verb: str
    stage_timestamp: datetime
    user_agent: str = ""
    object_ref: _Target = _Target()
    response_status: _Outcome = _Outcome()


@dataclass(frozen=True)
class Record:
    """A request that has changed something."""

    own: bool
    """Whether it was made by a `Load`."""
    name: str
    status: bool
    """Whether it was to the status of a set."""
    event: bool
    """Whether it was to an Event."""
    at: float
    """When it was answered, in seconds since 1970."""


class Audit:
    """The successful writes in an audit log, each told once. It reads on where it stopped: the log grows long."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._log = control_plane.audit_log
        self._read = 0
        self._decode = msgspec.json.Decoder(_Line).decode

    def news(self) -> list[Record]:
        """The writes since the last call."""
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            whole_lines, end, _ = stream.read().rpartition(b"\n")
        self._read += len(whole_lines + end)
        lines = map(self._decode, whole_lines.splitlines())
        return [
            Record(
                line.user_agent == AGENT,
                line.object_ref.name,
                line.object_ref.resource == "vcpusets" and line.object_ref.subresource == "status",
                line.object_ref.resource == "events",
                line.stage_timestamp.timestamp(),
            )
            for line in lines
            if line.verb not in {"get", "list", "watch"} and 200 <= line.response_status.code < 300
        ]


@functools.cache
def _trust(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


Request = tuple[str, str, Mapping[str, Any]]
"""Method, path and body."""

Send = Callable[[Sequence[Request]], Awaitable[None]]


class Connection:
    """A kept HTTP/1.1 connection to an API server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: str) -> None:
        self._reader = reader
        self._writer = writer
        self._headers = headers

    @classmethod
    async def open(cls, control_plane: ControlPlane) -> Self:
        """Connect as the user who may do everything."""
        host, _, port = control_plane.url.removeprefix("https://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=_trust(control_plane.certificate))
        return cls(
            reader, writer, f"Host: {host}\r\nAuthorization: Bearer {control_plane.token}\r\nUser-Agent: {AGENT}\r\n"
        )

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Send a request. Others may follow before it is answered: the server takes them one after the other."""
        content = b"" if body is None else json.dumps(body).encode()
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        head = (
            f"{method} {path} HTTP/1.1\r\n{self._headers}Content-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self._writer.write(head.encode() + content)

    async def answer(self) -> bytes:
        """The body of the next answer. Raises RuntimeError if a request was refused."""
        length = await self.head()
        if length is not None:
            return await self._reader.readexactly(length)
        chunks = []
        while chunk := await self.chunk():
            chunks.append(chunk)
        return b"".join(chunks)

    async def head(self) -> int | None:
        """Read the head of the next answer; the length of its body, or None: it comes in chunks."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        if not head.startswith("HTTP/1.1 2"):
            raise RuntimeError(head)
        length = re.search(r"^content-length: (\d+)", head, re.IGNORECASE | re.MULTILINE)
        return int(length[1]) if length else None

    async def chunk(self) -> bytes:
        """The next chunk of a body; empty: it has ended."""
        size = int(await self._reader.readline(), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    def close(self) -> None:
        """Close it."""
        self._writer.close()


class Load:
    """A client that makes and changes many sets of one namespace as fast as the API server takes them."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self._control_plane = control_plane
        self._namespace = namespace
        self.path = f"{API}/namespaces/{namespace}/vcpusets"

    async def create(self, sets: Mapping[str, int], **spec: Any) -> None:
        """Make sets of so many vCPUs, each with its monitor at `<name>.sock`; `spec` as for `manifest`."""
        bodies = (manifest(self._namespace, name, vcpus, **spec) for name, vcpus in sets.items())
        async with self.connected() as send:
            await send([("POST", self.path, body) for body in bodies])

    async def change(self, sets: Mapping[str, int]) -> None:
        """Declare so many vCPUs for these sets."""
        patches = [("PATCH", f"{self.path}/{name}", {"spec": {"vcpus": vcpus}}) for name, vcpus in sets.items()]
        async with self.connected() as send:
            await send(patches)

    async def sets(self) -> Iterable[Mapping[str, Any]]:
        """All sets as they are now."""
        connection = await Connection.open(self._control_plane)
        with contextlib.closing(connection):
            connection.send("GET", self.path)
            found: list[Mapping[str, Any]] = msgspec.json.decode(await connection.answer())["items"]
            return found

    @contextlib.asynccontextmanager
    async def connected(
        self, connections: int = CONNECTIONS
    ) -> AsyncIterator[Callable[[Sequence[Request]], Awaitable[None]]]:
        """Connections, and what sends requests over them: all at once, and then waits for the answers.

        What this process does after sending, and when, holds up nothing. The connections are made for each use because
        the API server closes those that are idle.
        """
        opened = [await Connection.open(self._control_plane) for _ in range(connections)]

        async def send(requests: Sequence[Request]) -> None:
            shares = [(each, requests[number::connections]) for number, each in enumerate(opened)]
            for connection, share in shares:
                for request in share:
                    connection.send(*request)
            async with asyncio.timeout(REQUEST_SECONDS):
                await asyncio.gather(*(_read(connection, len(share)) for connection, share in shares))

        try:
            yield send
        finally:
            for connection in opened:
                connection.close()


async def _read(connection: Connection, answers: int) -> None:
    for _ in range(answers):
        await connection.answer()
