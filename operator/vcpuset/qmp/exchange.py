"""Commands that are sent together over one connection, and their replies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from qemu.qmp import ExecInterruptedError, ExecuteError, Message, QMPError
from qemu.qmp.models import ErrorResponse

from vcpuset.qmp import translate
from vcpuset.qmp.replies import Malformed

__all__ = ["Command", "Exchange"]

_KEPT = 1000
"""Characters of an error's text; it may be kept for each CPU of a machine."""


@dataclass(slots=True)
class Command:
    """A command, and how its reply is read. A query that is sent again and again remembers its last reply.

    read      the value of a result; the same for the same text
    optional  whether an error of QEMU means that there is no result: None
    """

    name: str
    arguments: Mapping[str, object] | None = None
    read: Callable[[Any], Any] = lambda result: result
    optional: Callable[[ExecuteError], bool] = lambda _: False
    _text: bytes | None = field(default=None, init=False)
    """A digest of the last reply without its id; None: none is remembered."""
    _value: Any = field(default=None, init=False)

    def forget(self) -> None:
        """Read the next reply, whatever its text."""
        self._text = self._value = None


class Exchange:
    """The replies are read as they come, in the order of the commands. The first that is not a result ends it.

    results  the values of the replies that were read, in this order
    seconds  how long each of them took from the one before, and then the failure
    failure  why there are no more: ExecuteError, or another QMPError, with the beginning of QEMU's text, TimeoutError,
             or what `read` has raised; None: there is none
    """

    def __init__(self, commands: Sequence[Command], idents: Sequence[str]) -> None:
        self.idents = idents
        self.results: list[Any] = []
        self.seconds: list[float] = []
        self.failure: Exception | None = None
        self._commands = commands
        self._early: dict[str, Message] = {}
        self._text: bytes | None = None
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()

    @property
    def over(self) -> bool:
        """Whether all replies are there, or none is expected any more."""
        return self._ended.done()

    async def wait(self, seconds: float | None = None) -> None:
        """Until it is over, which it also is when a reply does not come within so many seconds of the one before."""
        try:
            if seconds is not None:
                self._look(seconds)
            await self._ended
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _look(self, seconds: float) -> None:
        left = self._since + seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look, seconds)
        else:
            self._end(TimeoutError())

    def repeats(self, line: bytes) -> bool:
        """Whether this line is the next reply, with the text of the one before it to that command: then it is taken."""
        self._text = None
        if self.over or (ident := self.idents[len(self.results)].encode()) not in line:
            return False
        command = self._next
        text = blake2b(line.replace(ident, b"", 1), digest_size=16).digest()
        if command._text != text:
            self._text = text
            return False
        self._add(command._value)
        self._read_early()
        return True

    def take(self, ident: str, reply: Message) -> None:
        """A reply has come. Only the first one to each command counts."""
        if self.over or ident not in self.idents[len(self.results) :]:
            return
        if ident == self.idents[len(self.results)]:
            self._read(reply, self._text)
            self._read_early()
        else:
            self._early.setdefault(ident, reply)

    def put_nowait(self, loss: ExecInterruptedError) -> None:
        """The connection was lost (`QMPClient` calls this)."""
        self._end(loss)

    def _read_early(self) -> None:
        while not self.over and (reply := self._early.pop(self.idents[len(self.results)], None)) is not None:
            self._read(reply, None)

    @property
    def _next(self) -> Command:
        return self._commands[len(self.results)]

    def _read(self, reply: Message, text: bytes | None) -> None:
        command = self._next
        command.forget()
        if "return" not in reply or "error" in reply:
            failure = _failure(reply)
            if isinstance(failure, ExecuteError) and command.optional(failure):
                self._add(None)
            else:
                self._end(failure)
            return
        try:
            value = command.read(reply["return"])
        except Malformed as error:
            translate.strip(error)
            self._end(error)
        except Exception as error:  # noqa: BLE001 - a defect in reading one reply must not end the connection; `failure` keeps it, and the session raises it
            self._end(error)
        else:
            if text is not None:
                command._text, command._value = text, value
            self._add(value)

    def _add(self, value: object) -> None:
        self.results.append(value)
        self._note_time()
        if len(self.results) == len(self._commands) and not self.over:
            self._ended.set_result(None)

    def _end(self, failure: Exception) -> None:
        if not self.over:
            self.failure = failure
            self._note_time()
            self._ended.set_result(None)

    def _note_time(self) -> None:
        now = self._loop.time()
        self.seconds.append(now - self._since)
        self._since = now


def _failure(reply: Message) -> QMPError:
    """The error in a reply without a result, with only the beginning of its text."""
    match reply:
        case {"error": {"class": str(error_class), "desc": str(desc)}}:
            said = {"class": error_class[:_KEPT], "desc": desc[:_KEPT]}
            return ExecuteError(ErrorResponse({"error": said}), Message(), Message())
        case {"error": _}:
            return QMPError("QMP error reply is malformed")
        case _:
            return QMPError("QMP reply is missing a 'error' or 'return' member")
