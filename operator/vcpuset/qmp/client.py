"""`qemu.qmp`'s client (0.0.6) with what a long-running program needs of it.

The library's client suits a script. Kept open for days, and against peers that may misbehave, it needs some care, all
of which is in this module because it reaches into the library; the version is pinned for that reason:

- It keeps every event it ever saw, and formats every message for a log that nobody reads: for 4096 CPU slots that
  costs more than the query. Here events go to a callback and nothing is formatted.
- Its request ids start from 0 in every client, so that a reply left over from an earlier client of the same monitor
  could be taken for one of ours.
- `disconnect()` first waits until the peer has read everything, which a hanging peer never does, and on TLS never
  returns at all. Every command that matters has been awaited by then: nothing is worth flushing.
- A loss of the connection wakes nobody but pending commands.
- It takes the first message after `qmp_capabilities` for the reply. QEMU, busy with a command of a client that has
  left, answers that one to whoever comes next; so here the negotiation has an id like every command.
- It takes what stands before the end of a connection for a message, though the rest of that may be missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import secrets
import socket
import ssl as tls
from collections.abc import Callable, Mapping
from typing import Any, cast

from qemu.qmp import Message, QMPClient, Runstate
from qemu.qmp.qmp_client import NegotiationError

from vcpuset.qmp.sockets import Endpoint
from vcpuset.qmp.tcp import TCPEndpoint
from vcpuset.qmp.tls import Keys

__all__ = ["READ_LIMIT", "UNASKED_LIMIT", "Client", "Stage"]

READ_LIMIT = 2 * 1024 * 1024
"""The longest reply that is read, in bytes. The longest that QEMU is known to send has 0.9 MB (4096 CPUs)."""

UNASKED_LIMIT = 64 * 1024
"""The same for what comes while no reply is awaited: events have some hundred bytes. Sessions are kept by the thousand,
and whoever listens at one could have the process hold a reply's length for each."""

_BURST = 64
"""How many messages are taken from the buffer before others get their turn."""

# The library reports each failure to its log and then raises it. What it raises is translated, and told to the user,
# by its caller; saying it twice, as an error, would fill the log with monitors that are merely not there yet.
_SILENT = logging.Logger("qemu.qmp")
_SILENT.disabled = True


class Stage(enum.Enum):
    """How far a connection has come."""

    CONNECTING = enum.auto()
    SECURING = enum.auto()
    GREETING = enum.auto()
    """Connected, on TLS too; nothing has come yet."""
    NEGOTIATING = enum.auto()
    """Something has come: whoever speaks has let this client in."""


class Client(QMPClient):
    """One connection to a monitor, from `connect` to `end`; not to be used again after that.

    permit     called right before a message is sent; what it raises breaks the connection in place of that
    stage      how far `open` has come
    cause      why the connection was lost; None: it is not, or not known
    """

    def __init__(
        self, on_event: Callable[[Message], None], on_loss: Callable[[], None], permit: Callable[[], None] | None = None
    ) -> None:
        super().__init__(readbuflen=READ_LIMIT)
        self.logger = _SILENT
        self.stage = Stage.CONNECTING
        self.cause: BaseException | None = None
        self._on_event = on_event
        self._on_loss = on_loss
        self._permit = permit or _nothing
        self._tls: dict[str, Any] = {}
        self._received = 0
        self._execute_id = secrets.randbelow(1 << 40)

    async def open(self, endpoint: Endpoint, keys: Keys | None = None) -> None:
        """Connect, await the greeting, negotiate. No deadline.

        keys  for an endpoint on TLS; None: neither encrypted nor authenticated

        Raises InvalidMonitor, MonitorUnreachable, OSError, or what `qemu.qmp` raises.
        """
        if isinstance(endpoint, TCPEndpoint):
            assert (keys is None) == (endpoint.tls is None), "an endpoint on TLS is never opened without"
            if keys is not None and endpoint.tls is not None:
                self._tls = keys.options(endpoint.tls.server_name)
            connection = await endpoint.connect()
        else:
            connection = endpoint.connect()
        self.stage = Stage.GREETING if keys is None else Stage.SECURING
        try:
            await self._greet(connection)
        except BaseException:
            connection.close()
            raise

    async def _greet(self, connection: socket.socket) -> None:
        # The library only asserts that a connection which was closed right after the negotiation is still there.
        with contextlib.suppress(AssertionError):
            await self.connect(connection)
        if self.runstate is not Runstate.RUNNING:
            raise EOFError("closed right after the negotiation")
        self._read_at_most(UNASKED_LIMIT)

    async def end(self, seconds: float) -> None:
        """Close the connection, within `seconds`, whatever its state; never raises (but CancelledError)."""
        self._on_loss = _nothing
        self._abort()
        if self.runstate is Runstate.IDLE:
            return
        try:
            async with asyncio.timeout(seconds):
                await self.disconnect()
        except Exception as error:  # noqa: BLE001 - it raises again what broke the connection, of whatever type
            self.cause = self.cause or error

    async def execute(self, cmd: str, arguments: Mapping[str, object] | None = None, oob: bool = False) -> object:
        """As the library has it; one at a time."""
        self._read_at_most(READ_LIMIT)
        try:
            return await super().execute(cmd, arguments, oob)
        finally:
            self._read_at_most(UNASKED_LIMIT)

    def _read_at_most(self, limit: int) -> None:
        reader: Any = self._reader
        if reader is None:
            return
        reader._limit = limit
        if len(reader._buffer) > limit and b"\n" not in reader._buffer:
            self._abort()  # the reader, which waits for the rest already, would look at the limit only when more comes

    # What follows overrides the library's own hooks.

    async def _do_connect(
        self, address: tuple[str, int] | str | socket.socket, ssl: tls.SSLContext | None = None
    ) -> None:
        # The library's own knows no server name.
        assert isinstance(address, socket.socket)
        self._set_state(Runstate.CONNECTING)
        self._reader, self._writer = await asyncio.open_connection(sock=address, limit=self.readbuflen, **self._tls)
        self.stage = Stage.GREETING

    async def _negotiate(self) -> None:
        assert self._greeting is not None
        offered = "oob" in self._greeting.QMP.capabilities
        request = self.make_execute_msg("qmp_capabilities", {"enable": ["oob"]} if offered else {})
        request["id"] = ident = self._get_exec_id()
        await self._send(request)
        while True:
            reply = await self._recv()
            # QEMU tells without an id that it could not read what it was sent.
            if reply.get("id") == ident or ("error" in reply and "id" not in reply):
                break
        if "return" not in reply or "error" in reply:
            raise NegotiationError("Negotiation failed", ValueError(reply.get("error")))

    async def _establish_session(self) -> None:
        await super()._establish_session()
        assert self._bh_tasks is not None
        self._bh_tasks.add_done_callback(self._note_cause)

    def _note_cause(self, tasks: asyncio.Future[tuple[None, None]]) -> None:
        if not tasks.cancelled():
            self.cause = tasks.exception()

    def _set_state(self, state: Runstate) -> None:
        lost = self._runstate is Runstate.RUNNING and state is Runstate.DISCONNECTING
        super()._set_state(state)
        if lost:
            self._on_loss()

    async def _event_dispatch(self, msg: Message) -> None:
        self._on_event(msg)

    async def _on_message(self, msg: Message) -> None:
        waiting = self._pending.get(cast("str | None", msg.get("id")))
        if waiting is not None and waiting.full() and "event" not in msg:
            return  # A second reply with one id: its predecessor is about to be taken, and putting it would block.
        await super()._on_message(msg)

    def _do_send(self, msg: Message) -> None:
        # Here and not where the command is issued: a process can be stopped for any length of time at any point, and
        # between here and the kernel's buffer there is next to nothing.
        self._permit()
        super()._do_send(msg)

    async def _do_recv(self) -> Message:
        # Reading from a full buffer never yields to the event loop: a storm of events would stop everything else.
        self._received += 1
        if self._received % _BURST == 0:
            await asyncio.sleep(0)
        return await super()._do_recv()

    async def _readline(self) -> bytes:
        line = await super()._readline()
        self.stage = Stage.NEGOTIATING
        if not line.endswith(b"\n"):
            raise EOFError("closed in the middle of a message")
        return line

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    async def _bh_flush_writer(self) -> None:
        return

    async def _bh_close_stream(self, error_pathway: bool = False) -> None:
        self._abort()
        await super()._bh_close_stream(error_pathway)

    def _abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


def _nothing() -> None:
    """Nobody is told of a loss that was asked for; and who gave no `permit` may send."""
