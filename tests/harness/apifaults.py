"""What can go wrong with a request to the API server: see `FaultProxy.fault`."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiohttp import web
from typing_extensions import override

from harness.faultproxy import Exchange, Passes, Stream

__all__ = ["Cut", "Ends", "ErrorEvent", "Freeze", "Hold", "InTurn", "LoseAnswer", "Refuse", "Replay", "Slow", "Swallow"]

REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


def status(code: int, message: str) -> bytes:
    """A refusal as the API server writes it."""
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": REASONS[code],
        "code": code,
    }
    return json.dumps(body).encode()


def _already() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class Refuse:
    """Answer with an HTTP status, and perhaps with a Retry-After in seconds. The API server is not asked."""

    code: int
    retry_after: int | None = None
    message: str = "injected by the test"

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """See `Passes`."""
        exchange.asked.code = self.code
        headers = {"Content-Type": "application/json"}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return web.Response(status=self.code, body=status(self.code, self.message), headers=headers)


@dataclass
class InTurn:
    """Each request meets the next one of these."""

    faults: Sequence[Passes]
    struck: int = 0

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """See `Passes`."""
        fault = self.faults[self.struck % len(self.faults)]
        self.struck += 1
        return await fault.serve(exchange)


class Hold:
    """Take the request and never answer it. The API server is not asked."""

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """See `Passes`."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable: only a client that goes away ends the wait")


class LoseAnswer:
    """Have the API server do what it is asked for, and cut the connection in place of the answer."""

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """See `Passes`."""
        async with exchange.forward() as upstream:
            await upstream.read()
        raise ConnectionResetError


@dataclass
class Slow:
    """Answer in so many pieces, each of them after so many seconds."""

    seconds: float
    pieces: int = 4

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """See `Passes`."""
        if exchange.asked.watch:
            async with exchange.stream() as stream:
                while line := await stream.line():
                    await self._trickle(stream.client, line)
                return stream.client
        async with exchange.forward() as upstream:
            raw = await upstream.read()
        client = web.StreamResponse(status=upstream.status, headers={"Content-Type": upstream.content_type})
        await client.prepare(exchange.request)
        await self._trickle(client, raw)
        await client.write_eof()
        return client

    async def _trickle(self, client: web.StreamResponse, text: bytes) -> None:
        size = max(1, -(-len(text) // self.pieces))
        for start in range(0, len(text), size):
            await asyncio.sleep(self.seconds)
            await client.write(text[start : start + size])


@dataclass
class StreamFault(ABC):
    """Watches that go well until `on` is set; without one, that is from the start. Other requests go well."""

    on: asyncio.Event = field(default_factory=_already, kw_only=True)

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """See `Passes`."""
        if not exchange.asked.watch:
            return await exchange.carry()
        async with exchange.stream() as stream:
            while not self.on.is_set():
                if line := await stream.line(unless=self.on):
                    await stream.write(line)
                elif not self.on.is_set():
                    return stream.client  # the server has ended it
            await self.strike(stream)
            await stream.client.write_eof()
            return stream.client

    @abstractmethod
    async def strike(self, stream: Stream) -> None:
        """Do the harm; when it returns, the watch ends in good order."""


@dataclass
class Cut(StreamFault):
    """The connection breaks: between two lines, or in the middle of one."""

    within_a_line: bool = False

    @override
    async def strike(self, stream: Stream) -> None:
        """See `StreamFault`."""
        if self.within_a_line:
            await stream.write(b'{"type":"MODIFIED","object":{"apiVersion":"vcpuset.d')
        raise ConnectionResetError


@dataclass
class Ends(StreamFault):
    """The watch ends in good order."""

    @override
    async def strike(self, stream: Stream) -> None:
        """See `StreamFault`."""


@dataclass
class ErrorEvent(StreamFault):
    """The watch says that it has failed, and ends."""

    code: int = 410
    message: str = "too old resource version: 1 (2)"

    @override
    async def strike(self, stream: Stream) -> None:
        """See `StreamFault`."""
        await stream.write(b'{"type":"ERROR","object":' + status(self.code, self.message) + b"}\n")


@dataclass
class Freeze(StreamFault):
    """The connection stands, and nothing comes any more, not even its end."""

    @override
    async def strike(self, stream: Stream) -> None:
        """See `StreamFault`."""
        await asyncio.Event().wait()


@dataclass
class Swallow(StreamFault):
    """Events of one type are left out, for a set of this name if one is given."""

    type: str = "DELETED"
    name: str = ""
    struck: int = 0

    @override
    async def strike(self, stream: Stream) -> None:
        """See `StreamFault`."""
        while line := await stream.line():
            event = json.loads(line)
            if event["type"] == self.type and self.name in {"", event["object"]["metadata"]["name"]}:
                self.struck += 1
            else:
                await stream.write(line)


@dataclass
class Replay(StreamFault):
    """Each event comes twice, and after it all earlier ones once more."""

    lines: int = 0
    wanted: Callable[[bytes], bool] = lambda line: b'"BOOKMARK"' not in line

    @override
    async def strike(self, stream: Stream) -> None:
        """See `StreamFault`."""
        seen: list[bytes] = []
        while line := await stream.line():
            await stream.write(line)
            if self.wanted(line):
                seen.append(line)
                for old in seen:
                    await stream.write(old)
                    self.lines += 1
