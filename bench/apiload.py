"""Load on the API server from a benchmark, and what the audit log says of the load that others make.

Times are those of the API server: when it has answered, by its own clock. What this process notices, and when, would
say more about this process, which shares two cores with all that it measures.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from harness.controlplane import ControlPlane
from harness.world import API, manifest

__all__ = ["Audit", "Connection", "Load", "Record"]

AGENT: Final = "bench"
"""The user agent of the requests that are made here."""

CONNECTIONS: Final = 128
"""How many requests the API server has to work at, at once. With 16 an operator that had 64 requests under way got most
of its time, and 1,000 changes took as long to be accepted as to be carried out."""

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


class Connection:
    """A kept HTTP/1.1 connection to an API server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: str) -> None:
        self._reader = reader
        self._writer = writer
        self._headers = headers

    @classmethod
    async def open(cls, control_plane: ControlPlane, trust: ssl.SSLContext) -> Self:
        """Connect as the user who may do everything."""
        host, _, port = control_plane.url.removeprefix("https://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=trust)
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
    """Somebody who makes and changes many sets of one namespace as fast as the API server takes them.

    All requests of a call are sent at once, over connections that are there already. What this process does after that,
    and when, holds up nothing.
    """

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self._control_plane = control_plane
        self._namespace = namespace
        self._path = f"{API}/namespaces/{namespace}/vcpusets"
        self._connections: list[Connection] = []

    async def __aenter__(self) -> Self:
        trust = ssl.create_default_context(cafile=str(self._control_plane.certificate))
        self._connections = [await Connection.open(self._control_plane, trust) for _ in range(CONNECTIONS)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()

    async def create(self, sets: Mapping[str, int], **spec: Any) -> None:
        """Make sets of so many vCPUs, each with its monitor at `<name>.sock`; `spec` as for `manifest`."""
        bodies = (manifest(self._namespace, name, vcpus, **spec) for name, vcpus in sets.items())
        await self._send([("POST", self._path, body) for body in bodies])

    async def change(self, sets: Mapping[str, int]) -> None:
        """Declare so many vCPUs for these sets."""
        await self._send(
            [("PATCH", f"{self._path}/{name}", {"spec": {"vcpus": vcpus}}) for name, vcpus in sets.items()]
        )

    async def sets(self) -> Iterable[Mapping[str, Any]]:
        """All sets as they are now."""
        self._connections[0].send("GET", self._path)
        found: list[Mapping[str, Any]] = msgspec.json.decode(await self._connections[0].answer())["items"]
        return found

    async def _send(self, requests: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        shares = [(each, requests[number::CONNECTIONS]) for number, each in enumerate(self._connections)]
        for connection, share in shares:
            for request in share:
                connection.send(*request)

        async def read(connection: Connection, answers: int) -> None:
            for _ in range(answers):
                await connection.answer()

        async with asyncio.timeout(REQUEST_SECONDS):
            await asyncio.gather(*(read(connection, len(share)) for connection, share in shares))
