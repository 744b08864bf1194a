"""The way from one client to the API server, which a test can block.

Blocked, the way keeps its connections and takes new ones, and no byte comes through in either direction: what a failed
switch or a changed firewall rule looks like to a client, and harder to deal with than a refused connection.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.controlplane import ControlPlane

__all__ = ["Wire"]

CHUNK = 1 << 16
"""How many bytes are carried at once, at most."""


class Wire:
    """A port of its own that leads to an API server; `kubeconfig(of)` has clients go this way."""

    def __init__(self, control_plane: ControlPlane, directory: Path) -> None:
        self._control_plane = control_plane
        self._directory = directory
        self._open = asyncio.Event()
        self._open.set()
        self._over = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.url = ""

    def block(self) -> None:
        """Let nothing through any more."""
        self._open.clear()

    def unblock(self) -> None:
        """Let everything through again, what was held back first."""
        self._open.set()

    def kubeconfig(self, of: Path) -> Path:
        """The same credentials as in `of`, for this way."""
        path = self._directory / f"wired-{of.name}"
        path.touch(mode=0o600)
        path.write_text(of.read_text().replace(self._control_plane.url, self.url))
        return path

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"https://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        # As in `FaultyMonitor.stop`: a server that is closed between accepting a connection and `_accept` drops it half
        # made.
        for listener in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        for _ in range(4):
            await asyncio.sleep(0)
        self._server.close()
        while self._connections:
            self._over.set()
            await asyncio.wait(self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        host, _, port = self._control_plane.url.removeprefix("https://").partition(":")
        try:
            # Never cancelled, as that can lose a connection that has just been made.
            there, onward = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        ends = [
            asyncio.create_task(self._over.wait()),
            asyncio.create_task(self._carry(reader, onward)),
            asyncio.create_task(self._carry(there, writer)),
        ]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for each in ends:
            each.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        writer.transport.abort()
        onward.transport.abort()
        await asyncio.gather(writer.wait_closed(), onward.wait_closed(), return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the sender has no more to say."""
        while chunk := await reader.read(CHUNK):
            await self._open.wait()
            writer.write(chunk)
            await writer.drain()
        await self._open.wait()
