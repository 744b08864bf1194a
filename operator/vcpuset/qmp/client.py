"""`qemu.qmp`'s client (0.0.6) with what a long-running program needs.

The library's client is made for scripts. Open for days, and with peers that may misbehave, it needs some changes, all
of them in this module because they use internals of the library; this is why the version is pinned:

- It keeps every event, and formats every message for a log that is not used: for 4096 CPU slots that costs more than
  the query. Here events go to a callback and nothing is formatted.
- Its request ids start from 0 in every client, so that a reply to an earlier client of the same monitor could be taken
  for one of ours.
- `disconnect()` first waits until the peer has read everything, which a hanging peer never does, and on TLS never
  returns at all. Every command that matters has been awaited then: nothing needs flushing.
- A loss of the connection is only reported to pending commands.
- It takes the first message as the greeting, and the first message after `qmp_capabilities` as the reply. QEMU sends
  events that happen while it accepts a client before its greeting. QEMU, busy with a command of a client that has left,
  sends that reply to the next client; so here the negotiation has an id like every command.
- It takes an incomplete message before the end of a connection as a message.
- Each message goes through queues and tasks, and is encoded three times: a third of the CPU time of an observation.
  Here commands are written at once, and their replies are read as they come.
- A relay of libvirt (`virt-qemu-qmp-proxy` 9.0) answers nothing any more once it has two commands at a time, and the
  data of its events is text. Here it gets a command after the reply to the one before.
- Its limit for a reply is also that for unsolicited messages; and replies of many peers that arrive together are all
  parsed, to many times their size, before the first is used. Here only one long message at a time is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import re
import secrets
import socket
import ssl as tls
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec
from aiohappyeyeballs import AddrInfoType
from qemu.qmp import Message, QMPClient, Runstate, StateError
from qemu.qmp.qmp_client import NegotiationError

from vcpuset.qmp.exchange import Command, Exchange
from vcpuset.qmp.peer import UNKNOWN, peer_of
from vcpuset.qmp.replies import relayed
from vcpuset.qmp.sockets import Endpoint
from vcpuset.qmp.tcp import TCPEndpoint
from vcpuset.qmp.tls import Keys

__all__ = ["READ_LIMIT", "UNSOLICITED_LIMIT", "VALUES_LIMIT", "Client", "Stage"]

READ_LIMIT = 1280 * 1024
"""The longest accepted reply, in bytes. The longest known one of QEMU has 0.9 MB (4096 CPUs)."""

VALUES_LIMIT = 1 << 17
"""About how many values may be in a message that is longer than `UNSOLICITED_LIMIT`: two bytes can become an object of
70 bytes. QEMU's replies have at most 13 for each CPU."""

UNSOLICITED_LIMIT = 16 * 1024
"""The longest message while no reply is awaited: greetings and events have some hundred bytes. Thousands of sessions
are kept, and each peer could make the process hold a reply's length."""

_T = TypeVar("_T")

_BURST = 64
"""How many messages are taken from the buffer before other tasks run."""

# The library logs each failure and then raises it. Its caller translates and reports what it raises; a second report,
# as an error, would fill the log with monitors that do not exist yet.
_SILENT = logging.Logger("qemu.qmp")
_SILENT.disabled = True


class Stage(enum.Enum):
    """The progress of a connection."""

    RESOLVING = enum.auto()
    CONNECTING = enum.auto()
    SECURING = enum.auto()
    GREETING = enum.auto()
    """Connected, on TLS too; nothing was received yet."""
    NEGOTIATING = enum.auto()
    """Something was received: the peer has accepted this client."""


_NOT_QMP = (
    (
        re.compile(rb"(\xff[^{Q]*)?QEMU \S+ monitor"),
        "this is QEMU's human monitor (HMP); use -qmp instead of -monitor, or add mode=control to -mon",
    ),
    (
        re.compile(rb"\xff[\xfa-\xfe]"),
        "the chardev uses the telnet protocol; remove telnet=on (or tn3270=on)",
    ),
)
"""What QEMU sends instead of a greeting if so configured, and the remedy."""


class Client(QMPClient):
    """One connection to a monitor, from `connect` to `end`; cannot be used again after that.

    longest    the longest accepted reply, in bytes
    permit     called right before a message is sent; what it raises ends the connection instead
    stage      the progress of `open`
    peer       the kernel's information about the other end
    addresses  of the host, on TCP
    cause      why the connection was lost; None: it is not, or not known
    """

    _pending: Any  # the Exchange of each command, by its id

    def __init__(
        self,
        on_event: Callable[[Message], None],
        on_loss: Callable[[], None],
        permit: Callable[[], None] | None = None,
        longest: int = READ_LIMIT,
    ) -> None:
        super().__init__(readbuflen=UNSOLICITED_LIMIT)
        self.logger = _SILENT
        self.stage = Stage.RESOLVING
        self.peer = UNKNOWN
        self.addresses: Sequence[AddrInfoType] = ()
        self.cause: BaseException | None = None
        self._on_event = on_event
        self._on_loss = on_loss
        self._permit = permit or _nothing
        self._tls: dict[str, Any] = {}
        self._received = 0
        self._pretty = False
        self._relayed = False
        self._unsent: deque[bytes] = deque()
        """The commands that a relay gets after the reply to the one before."""
        self._unanswered = False
        self._longest = longest
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
            self.addresses = await endpoint.addresses()
            self.stage = Stage.CONNECTING
            connection = await endpoint.connect(self.addresses)
        else:
            connection = await endpoint.reach()
        self.stage = Stage.GREETING if keys is None else Stage.SECURING
        try:
            self.peer = peer_of(connection)
            await self._greet(connection)
        except BaseException:
            connection.close()
            raise

    async def _greet(self, connection: socket.socket) -> None:
        # The library only asserts that a connection which was closed right after the negotiation still exists.
        with contextlib.suppress(AssertionError):
            await self.connect(connection)
        if self.runstate is not Runstate.RUNNING:
            raise EOFError("closed right after the negotiation")

    async def end(self, seconds: float) -> None:
        """Close the connection, within `seconds`, whatever its state; never raises (except CancelledError)."""
        self._on_loss = _nothing
        self._abort()
        if self.runstate is Runstate.IDLE:
            return
        try:
            async with asyncio.timeout(seconds):
                await self.disconnect()
        except Exception as error:  # noqa: BLE001 - disconnect() raises again what broke the connection; closing must not fail because of that, and `cause` keeps it
            self.cause = self.cause or error

    def send(self, *commands: Command) -> Exchange:
        """Send commands in one write; QEMU executes them one after the other. `forget` the exchange in any case.

        Raises StateError if there is no connection.
        """
        if self._runstate is not Runstate.RUNNING:
            raise StateError("not connected", self._runstate, Runstate.RUNNING)
        exchange = Exchange(commands, [self._get_exec_id() for _ in commands])
        self._pending |= dict.fromkeys(exchange.idents, exchange)
        requests = []
        for ident, command in zip(exchange.idents, commands, strict=True):
            request: dict[str, object] = {"execute": command.name, "id": ident}
            requests.append(request if command.arguments is None else {**request, "arguments": command.arguments})
        encoded = map(msgspec.json.encode, requests)
        self._unsent += encoded if self._relayed else [b"".join(encoded)]
        self._send_next()
        return exchange

    def _send_next(self) -> None:
        if not self._unsent or (self._relayed and self._unanswered):
            return
        self._unanswered = True
        try:
            # Here and not earlier: a process can be stopped for any length of time at any point, and hardly any code
            # runs between here and the kernel's buffer.
            self._permit()
            self._write(self._unsent.popleft())
        except Exception as error:  # noqa: BLE001 - whatever `permit` raises instead of sending ends the connection; `cause` keeps it for the waiting command
            self.cause = error
            self._schedule_disconnect()

    def _answered(self) -> None:
        self._unanswered = False
        self._send_next()

    def forget(self, exchange: Exchange) -> None:
        """Drop the replies that have not come, and what has arrived of a long one."""
        for ident in exchange.idents:
            self._pending.pop(ident, None)
        reader: Any = self._reader
        if reader is not None and reader._limit > UNSOLICITED_LIMIT and not self._awaits_reply():
            self._abort()  # in the middle of a long message that is no longer needed

    async def execute(
        self,
        cmd: str,
        arguments: Mapping[str, object] | None = None,
        oob: bool = False,
        read: Callable[[Any], _T] = lambda result: result,
    ) -> _T:
        """Send one command, and return what `read` makes of its result, or raise its failure; no deadline, no `oob`."""
        exchange = self.send(Command(cmd, arguments, read))
        try:
            await exchange.wait()
        finally:
            self.forget(exchange)
        if exchange.failure is not None:
            raise exchange.failure
        return cast("_T", exchange.results[0])

    def _awaits_reply(self) -> bool:
        negotiating = self.runstate is Runstate.CONNECTING and self._greeting is not None
        return negotiating or not all(exchange.over for exchange in self._pending.values())

    # Overrides of the library's hooks.

    async def _do_connect(
        self, address: tuple[str, int] | str | socket.socket, ssl: tls.SSLContext | None = None
    ) -> None:
        # The library's own has no server name.
        assert isinstance(address, socket.socket)
        self._set_state(Runstate.CONNECTING)
        self._reader, self._writer = await asyncio.open_connection(sock=address, limit=self.readbuflen, **self._tls)
        self.stage = Stage.GREETING

    async def _negotiate(self) -> None:
        assert self._greeting is not None
        self._relayed = relayed(self._greeting.QMP.version)
        offered = "oob" in self._greeting.QMP.capabilities
        ident = self._get_exec_id()
        arguments: dict[str, object] = {"enable": ["oob"]} if offered else {}
        self._permit()
        self._write(msgspec.json.encode({"execute": "qmp_capabilities", "arguments": arguments, "id": ident}))
        while True:
            reply = await self._recv()
            # QEMU reports without an id that it could not read the request.
            if reply.get("id") == ident or ("error" in reply and "id" not in reply):
                break
        accepted = "return" in reply and "error" not in reply
        del reply  # as in `_do_recv`
        if not accepted:
            raise NegotiationError("Negotiation failed", ValueError("not accepted"))

    async def _recv(self) -> Message:
        # Used for the greeting and the negotiation only. QEMU 10.0 sends what happens while it accepts a client to that
        # client, even before its greeting.
        while "event" in (message := await self._do_recv()):
            pass
        return message

    async def _establish_session(self) -> None:
        # As the library's, but without a queue and a task for sending.
        self._greeting, self._pending = None, {}
        if self.await_greeting:
            self._greeting = await self._get_greeting()
        if self.negotiate:
            await self._negotiate()
        self._reader_task = asyncio.create_task(self._bh_loop_forever(self._bh_recv_message, "Reader"))
        self._reader_task.add_done_callback(self._note_cause)
        self._set_state(Runstate.RUNNING)
        await asyncio.sleep(0)

    def _note_cause(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled():
            self.cause = reader.exception() or self.cause

    def _set_state(self, state: Runstate) -> None:
        lost = self._runstate is Runstate.RUNNING and state is Runstate.DISCONNECTING
        super()._set_state(state)
        if lost:
            self._on_loss()

    async def _event_dispatch(self, msg: Message) -> None:
        if self._relayed and isinstance(text := msg.get("data"), str):
            msg["data"] = _parsed(text.encode())[0]
        self._on_event(msg)

    async def _on_message(self, msg: Message) -> None:
        ident = cast("str | None", msg.get("id"))
        if "event" not in msg:
            self._answered()
        if "event" not in msg and (exchange := self._pending.get(ident)) is not None:
            exchange.take(ident, msg)
        else:
            await super()._on_message(msg)

    def _write(self, chunk: bytes) -> None:
        assert self._writer is not None
        # If the connection has just been lost, uvloop would raise its own error; the reader reports the reason.
        if not self._writer.transport.is_closing():
            self._writer.write(chunk)

    async def _do_recv(self) -> Message:
        while True:
            # Reading from a full buffer never yields to the event loop: a storm of events would stop everything else.
            self._received += 1
            if self._received % _BURST == 0:
                await asyncio.sleep(0)
            line = await self._readline()
            exchange = next(iter(self._pending.values()), None)
            if exchange is None or not exchange.repeats(line):
                break
            self._answered()
        found, why = _parsed(line)
        del line  # An error keeps its frame's variables; it lives longer, and lines can be long.
        if found is None:
            raise ValueError(why)
        return Message(found, eager=False)

    async def _readline(self) -> bytes:
        line = await self._read_until(b"\n")
        # With pretty=on QEMU breaks each message, from the greeting on, into lines of which only the first and the last
        # are not indented.
        begun = line.rstrip() == b"{"
        if self.stage is Stage.GREETING:
            self._pretty = begun
        self.stage = Stage.NEGOTIATING
        return line + await self._read_until(b"\n}\r\n") if begun and self._pretty else line

    async def _read_until(self, end: bytes) -> bytes:
        reader: Any = self._reader
        try:
            while True:
                try:
                    line: bytes = await reader.readuntil(end)
                except asyncio.LimitOverrunError:
                    limit = self._longest if self._awaits_reply() else UNSOLICITED_LIMIT
                    if reader._limit >= limit:
                        raise ValueError(f"a message of more than {limit} bytes") from None
                    reader._limit = limit
                else:
                    return line
        except asyncio.IncompleteReadError as error:
            if error.partial:
                self.stage = Stage.NEGOTIATING
            raise EOFError("closed in the middle of a message" if error.partial else "closed") from None
        finally:
            reader._limit = UNSOLICITED_LIMIT

    async def _bh_recv_message(self) -> None:
        await self._on_message(await self._do_recv())

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


def _parsed(line: bytes) -> tuple[dict[str, object] | None, str]:
    """The message in a line, or why there is none."""
    if len(line) > UNSOLICITED_LIMIT:
        values = sum(map(line.count, (b",", b"[", b"{")))
        if values > VALUES_LIMIT:
            return None, f"a message of {values} values"
    try:
        found = msgspec.json.decode(line)
    except RecursionError:
        return None, "a message with too many nested levels"
    except ValueError:  # a `msgspec.DecodeError` is one
        return None, next((why for pattern, why in _NOT_QMP if pattern.match(line)), "a message that is not JSON")
    return (found, "") if isinstance(found, dict) else (None, "a message that is not a JSON object")


def _nothing() -> None:
    """The default of callbacks."""
