"""Who is told that sets have changed, by server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from secrets import token_hex
from typing import Final

from aiohttp import web

from vcpuset.domain.resource import UID

__all__ = ["HEARTBEAT_SECONDS", "LISTENERS", "PAUSE_SECONDS", "WRITE_SECONDS", "Feed"]

LISTENERS: Final = 32
"""So many at once; others are answered with 503."""

HEARTBEAT_SECONDS: Final = 15.0
"""After such a silence a comment is sent, so that proxies keep the connection and one that is lost is noticed."""

WRITE_SECONDS: Final = 10.0
"""A listener that has not taken what it was sent by then is dropped. The browser connects again."""

PAUSE_SECONDS: Final = 0.5
"""Changes within this time are sent together."""

logger = logging.getLogger(__name__)


class _Listener:
    """One connection. `dirty` has the sets to tell it about, in order, so its size is limited by their number."""

    def __init__(self, uid: UID | None, transport: asyncio.Transport | None) -> None:
        self.uid = uid
        self.transport = transport
        self.dirty: dict[UID, None] = {}
        self.woken = asyncio.Event()
        self.closed = asyncio.Event()

    def end(self) -> None:
        self.closed.set()
        self.woken.set()


class Feed:
    """The listeners of one process. No task of its own: each connection is served by its request's handler."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self._process = token_hex(4)
        self._count = 0
        self._closed = False
        # Each is rendered once, for all who listen to the same.
        self._messages: dict[tuple[UID | None, tuple[UID, ...]], str] = {}

    @property
    def version(self) -> str:
        """Names the present state: it is another one after each change, and in each process."""
        return f"{self._process}-{self._count}"

    def changed(self, uid: UID) -> None:
        """What the page shows of a set has changed."""
        self._count += 1
        self._messages.clear()
        for listener in self._listeners:
            if listener.uid in {None, uid}:
                listener.dirty[uid] = None
                listener.woken.set()

    def close(self) -> None:
        """End all connections now, and accept no more."""
        self._closed = True
        for listener in self._listeners:
            listener.end()

    async def serve(
        self, request: web.Request, uid: UID | None, render: Callable[[list[UID]], str | None]
    ) -> web.StreamResponse:
        """Send what changes until either side ends the connection.

        uid     the set to listen to; None: all
        render  HTML, in one line, that replaces the elements with the same ids; None: the page has to be loaded again
        """
        with self._listening(uid, request.transport) as listener:
            if listener is None:
                text = f"{LISTENERS} pages receive changes already; reload this one instead\n"
                return web.Response(status=503, text=text, headers={"Retry-After": "30"})
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            )
            known = request.headers.get("Last-Event-ID", request.query.get("version"))
            first = "retry: 3000\n\n" if known == self.version else self._message(None)
            with contextlib.suppress(ConnectionError):
                try:
                    await response.prepare(request)
                    await self._send(response, listener, first)
                    while not listener.closed.is_set():
                        await self._send(response, listener, await self._next(listener, render))
                except TimeoutError:
                    logger.info(
                        "the page at %s did not take its events for %g s; dropped", request.remote, WRITE_SECONDS
                    )
                    if listener.transport is not None:
                        listener.transport.abort()
            return response

    async def _next(self, listener: _Listener, render: Callable[[list[UID]], str | None]) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await listener.woken.wait()
        listener.woken.clear()
        dirty, listener.dirty = list(listener.dirty), {}
        if not dirty:
            return ": \n\n"
        known = (listener.uid, tuple(dirty))
        if known not in self._messages:
            self._messages[known] = self._message(render(dirty))
        return self._messages[known]

    async def _send(self, response: web.StreamResponse, listener: _Listener, text: str) -> None:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(text.encode())
        if not text.startswith(":"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_SECONDS):
                    await listener.closed.wait()

    def _message(self, html: str | None) -> str:
        event = "event: reload\ndata: -" if html is None else f"data: {html}"
        return f"id: {self.version}\n{event}\n\n"

    @contextlib.contextmanager
    def _listening(self, uid: UID | None, transport: asyncio.Transport | None) -> Iterator[_Listener | None]:
        """None: there are too many, or the process ends."""
        for gone in [each for each in self._listeners if each.transport is None or each.transport.is_closing()]:
            gone.end()  # its handler has not noticed yet
            self._listeners.discard(gone)
        if self._closed or len(self._listeners) >= LISTENERS:
            yield None
            return
        listener = _Listener(uid, transport)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
