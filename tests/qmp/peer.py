"""The other end of a connection, in the same event loop: it answers as it is told and writes everything down.

Nothing but a socket pair lies between it and the client under test, so that under a virtual clock a conversation is
the same each time, takes no time to wait for, and thousands of them take seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from vcpuset.qmp.sockets import UnixEndpoint

__all__ = ["CLOSE", "Asked", "Ended", "Entry", "Line", "Pair", "Peer", "Sent", "Step", "connected", "lines"]

CLOSE = None
"""A step: the connection is closed; bytes sent so far arrive."""

Step = bytes | float | None
"""What the peer does next: send bytes, wait for seconds, or close."""


@dataclass(frozen=True)
class Asked:
    """A command came in."""

    at: float
    number: int
    """From 1, over the whole connection."""
    command: str
    arguments: Any
    ident: Any


@dataclass(frozen=True)
class Sent:
    """Bytes went out."""

    at: float
    chunk: bytes


@dataclass(frozen=True)
class Ended:
    """The peer closed the connection."""

    at: float


Entry = Asked | Sent | Ended


@dataclass(frozen=True)
class Line:
    """One line as the client gets it, or the end of the connection (`text` is None)."""

    at: float
    after: int
    """How many commands had been asked by then."""
    text: bytes | None


def lines(transcript: Iterable[Entry]) -> list[Line]:
    """What was sent, cut into lines; a last one without its newline counts when the connection ends."""
    found = []
    rest = b""
    asked = 0
    for entry in transcript:
        match entry:
            case Asked():
                asked = entry.number
            case Sent():
                *whole, rest = (rest + entry.chunk).split(b"\n")
                found += [Line(entry.at, asked, line + b"\n") for line in whole]
            case Ended():
                if rest:
                    found.append(Line(entry.at, asked, rest))
                found.append(Line(entry.at, asked, None))
    return found


class Peer(asyncio.Protocol):
    """Answers commands, which come as JSON.

    answer      what to do when a command came in; with None, when the connection was made
    transcript  everything that happened, in order
    left        whether the connection has ended, on either side
    """

    def __init__(self, answer: Callable[[Asked | None], list[Step]]) -> None:
        self.transcript: list[Entry] = []
        self.left = False
        self._answer = answer
        self._asked = 0
        self._steps: list[Step] = []
        self._unread = ""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none of asyncio's classes
        self._do(self._answer(None))

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        # A client ends a command with its last brace and needs no newline; that of a guest agent begins with a 0xFF.
        self._unread += data.replace(b"\xff", b"").decode()
        while self._unread:
            try:
                request, end = json.JSONDecoder().raw_decode(self._unread)
            except ValueError:
                return  # the rest is on its way
            self._unread = self._unread[end:].lstrip()
            self._asked += 1
            command = request.get("execute") or request.get("exec-oob")
            asked = Asked(self._loop.time(), self._asked, command, request.get("arguments"), request.get("id"))
            self.transcript.append(asked)
            self._do(self._answer(asked))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self.left = True
        self.end()

    def end(self) -> None:
        """Be gone, with whatever was still to be done."""
        self._steps.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _do(self, steps: list[Step]) -> None:
        self._steps += steps
        if self._timer is None:
            self._go_on()

    def _go_on(self) -> None:
        self._timer = None
        assert self._transport is not None
        while self._steps:
            match self._steps.pop(0):
                case bytes(chunk):
                    if chunk:
                        self.transcript.append(Sent(self._loop.time(), chunk))
                        self._transport.write(chunk)
                case None:
                    self.transcript.append(Ended(self._loop.time()))
                    self._steps.clear()
                    self._transport.close()
                case seconds:
                    self._timer = self._loop.call_later(seconds, self._go_on)
                    return


class Pair(UnixEndpoint):
    """An endpoint that has its one connection already."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(-1, os.fstat(connection.fileno()), "the peer", "", "")
        self._connection = connection


async def connected(answer: Callable[[Asked | None], list[Step]]) -> tuple[Peer, Pair]:
    """A peer, and the endpoint that leads to it. Have the peer `end` afterwards."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    peer = Peer(answer)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: peer, theirs)
    return peer, Pair(ours)
