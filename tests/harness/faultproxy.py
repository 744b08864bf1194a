"""The way from clients to the API server, on which a test can do harm, and which records every request.

A reverse proxy in front of a real kube-apiserver, with the API server's own certificate. What goes wrong is a `Fault`
(`harness.apifaults`), in force for the requests that a rule names; besides, the whole way can be shut (connections are
refused) or blocked (connections stand and are taken, and nothing comes through).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
from aiohttp import web

from harness.controlplane import ControlPlane
from harness.processes import ReservedPort

__all__ = ["Asked", "Exchange", "FaultProxy", "Passes", "Stream"]

LINE_BYTES = 1 << 22
"""The longest line of a watch that can be carried."""

HANDSHAKE_SECONDS = 10.0
"""How long a TLS handshake may take. A client that is stopped would never end its own."""

DROPPED_HEADERS = frozenset(
    {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "accept-encoding", "date"}
)
"""Headers that are between two neighbours only. The API server is not to compress, so that events can be read."""


@dataclass
class Asked:
    """One request. Times are the loop's; `code` and `ended` are None while there is no answer, or no end."""

    verb: str
    path: str
    query: dict[str, str]
    agent: str
    token: str
    began: float
    code: int | None = None
    ended: float | None = None

    @property
    def watch(self) -> bool:
        """Whether it is a watch."""
        return self.query.get("watch") == "true"

    @property
    def about_sets(self) -> bool:
        """Whether it is about VCPUSets."""
        return "/vcpusets" in self.path

    @property
    def list(self) -> bool:
        """Whether it is a list of VCPUSets."""
        return self.verb == "GET" and self.path.endswith("/vcpusets") and not self.watch


class Passes(Protocol):
    """What becomes of a request."""

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """Answer it; ConnectionError: without an (end of the) answer, the connection is cut."""


class Stream:
    """A watch under way: its lines from the server, and the client."""

    def __init__(self, exchange: Exchange, upstream: aiohttp.ClientResponse, client: web.StreamResponse) -> None:
        self.client = client
        self._exchange = exchange
        self._upstream = upstream
        self._next: asyncio.Task[bytes] | None = None

    async def line(self, unless: asyncio.Event | None = None) -> bytes:
        """The next line of the server; empty at its end, or as soon as `unless` is set."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._upstream.content.readline())
        unwanted = asyncio.ensure_future((unless or asyncio.Event()).wait())
        try:
            await asyncio.wait({self._next, unwanted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            unwanted.cancel()
        if unless is not None and unless.is_set():
            return b""
        line, self._next = self._next.result(), None
        return line

    async def write(self, text: bytes) -> None:
        """Send something to the client."""
        await self._exchange.passable()
        await self.client.write(text)

    async def rest(self) -> None:
        """Carry all that is still to come."""
        while line := await self.line():
            await self.write(line)

    def close(self) -> None:
        """Let go of the server."""
        if self._next is not None:
            self._next.cancel()
        self._upstream.close()


@dataclass
class Exchange:
    """One request on its way."""

    request: web.BaseRequest
    asked: Asked
    body: bytes
    passable: Callable[[], Awaitable[object]] = field(repr=False)
    session: aiohttp.ClientSession = field(repr=False)
    server: str

    @asynccontextmanager
    async def forward(self) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask the API server."""
        headers = {key: value for key, value in self.request.headers.items() if key.lower() not in DROPPED_HEADERS}
        async with self.session.request(
            self.asked.verb, self.server + self.request.path_qs, headers=headers, data=self.body or None
        ) as upstream:
            self.asked.code = upstream.status
            yield upstream

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        """Begin a watch; the client has its head."""
        async with self.forward() as upstream:
            stream = Stream(self, upstream, _head(upstream))
            try:
                await stream.client.prepare(self.request)
                yield stream
            finally:
                stream.close()

    async def carry(self) -> web.StreamResponse:
        """Serve the request as the API server does."""
        if self.asked.watch:
            async with self.stream() as stream:
                await stream.rest()
                await stream.client.write_eof()
                return stream.client
        async with self.forward() as upstream:
            raw = await upstream.read()
        await self.passable()
        return web.Response(status=upstream.status, headers=_headers(upstream), body=raw)


class FaultProxy:
    """A port of its own that leads to an API server; `kubeconfig(of)` has clients go this way.

    requests  all that were made, oldest first
    """

    def __init__(self, control_plane: ControlPlane, directory: Path) -> None:
        self.requests: list[Asked] = []
        self.url = ""
        self._control_plane = control_plane
        self._directory = directory
        self._open = asyncio.Event()
        self._open.set()
        self._rules: list[tuple[Callable[[Asked], bool], Passes]] = []
        self._under_way: dict[int, tuple[Asked, web.BaseRequest]] = {}
        self._port = ReservedPort()
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._session: aiohttp.ClientSession | None = None
        certificate = control_plane.directory / "certificates" / "apiserver.crt"
        self._trust = ssl.create_default_context(cafile=str(certificate))
        self._identity = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._identity.load_cert_chain(certificate, certificate.with_suffix(".key"))

    def kubeconfig(self, of: Path) -> Path:
        """The same credentials as in `of`, for this way."""
        path = self._directory / f"proxied-{of.name}"
        path.touch(mode=0o600)
        path.write_text(of.read_text().replace(self._control_plane.url, self.url))
        return path

    # --- harm -----------------------------------------------------------------------------------------------------

    def block(self) -> None:
        """Let nothing through any more: what a failed switch or a changed firewall rule looks like to clients."""
        self._open.clear()

    def unblock(self) -> None:
        """Let everything through again, what was held back first."""
        self._open.set()

    async def shut(self) -> None:
        """Cut all connections and refuse new ones."""
        assert self._server is not None
        listener: Any = self._listener
        self._listener = None
        listener.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * HANDSHAKE_SECONDS):
                while True:
                    for each in list(self._server.connections):
                        if each.transport is not None:
                            each.transport.abort()
                    # Those in the TLS handshake are not among them yet, and nobody else would close them.
                    if not listener._active_count:
                        break
                    await asyncio.sleep(0.01)

    async def reopen(self) -> None:
        """Take connections again."""
        assert self._server is not None
        self._listener = await asyncio.get_running_loop().create_server(
            self._server,
            "127.0.0.1",
            self._port.number,
            reuse_port=True,
            ssl=self._identity,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
        )

    def cut(self, where: Callable[[Asked], bool] = lambda _: True) -> None:
        """Cut the connections of the requests under way that `where` names."""
        for asked, request in self._under_way.values():
            if where(asked) and request.transport is not None:
                request.transport.abort()

    @contextmanager
    def fault(self, fault: Passes, where: Callable[[Asked], bool] = lambda _: True) -> Iterator[None]:
        """Have `fault` answer the requests that `where` names, from now on; the latest rule that fits decides."""
        rule = (where, fault)
        self._rules.append(rule)
        try:
            yield
        finally:
            self._rules.remove(rule)

    # --- life -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self.url = f"https://127.0.0.1:{self._port.number}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._trust),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=LINE_BYTES,
            auto_decompress=False,
        )
        # Without its own log: broken connections are what this is for.
        self._server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        await self.reopen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._session is not None
        if self._listener is not None:
            await self.shut()
        self._open.set()
        await self._server.shutdown(1.0)
        await self._session.close()
        self._port.release()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert self._session is not None
        loop = asyncio.get_running_loop()
        headers = request.headers
        asked = Asked(
            request.method,
            request.path,
            dict(request.query),
            headers.get("User-Agent", ""),
            headers.get("Authorization", "").removeprefix("Bearer "),
            loop.time(),
        )
        # At once, so that who sees the request in the record knows what becomes of it.
        fault = next((fault for where, fault in reversed(self._rules) if where(asked)), None)
        self.requests.append(asked)
        self._under_way[id(asked)] = (asked, request)
        try:
            await self._open.wait()
            body = await request.read()
            exchange = Exchange(request, asked, body, self._open.wait, self._session, self._control_plane.url)
            return await (exchange.carry() if fault is None else fault.serve(exchange))
        except (aiohttp.ClientError, ConnectionError) as error:
            # One side is gone: so shall the other be.
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError from error
        finally:
            asked.ended = loop.time()
            del self._under_way[id(asked)]


def _headers(upstream: aiohttp.ClientResponse) -> dict[str, str]:
    return {key: value for key, value in upstream.headers.items() if key.lower() not in DROPPED_HEADERS}


def _head(upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    head = web.StreamResponse(status=upstream.status, headers=_headers(upstream))
    head.enable_chunked_encoding()
    return head
