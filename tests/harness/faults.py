"""The faults that a `FaultyMonitor` can have, one class each.

A fault belongs to one command (or to the greeting) and gets hold of the finished answer: it decides what of it reaches
the client, and how. `times` limits it; `struck` counts how often it has happened.

    Hang()                            no answer to this command; later ones are answered
    Deaf()                            no answer, and nothing is read any more
    Delay(0.5)                        the answer comes late
    Held()                            the answer comes when the test lets it go
    Close(after_bytes=20)             the connection is closed in the middle of the answer
    Bytes(b"garbage\\r\\n")             these bytes instead of the answer; see GARBAGE, NOT_UTF8, NOT_AN_OBJECT
    Huge(11 << 20)                    an answer of that many bytes
    Storm(before=5000, after=5000)    events around the answer
    WrongId(), NoId(), Twice()        the answer with an id that nobody asked with, without, two times
    Error("GenericError", "no")       an error in place of the answer
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

from typing_extensions import override

__all__ = [
    "GARBAGE",
    "NOT_AN_OBJECT",
    "NOT_UTF8",
    "Bytes",
    "Close",
    "Deaf",
    "Delay",
    "Error",
    "Fault",
    "Hang",
    "Held",
    "Huge",
    "Link",
    "NoId",
    "Storm",
    "Twice",
    "WrongId",
]

GARBAGE = b"this is not JSON {\r\n"
NOT_UTF8 = b'{"return": "\xff\xfe"}\r\n'
NOT_AN_OBJECT = b'["a", "list"]\r\n'

Answer = dict[str, Any]
"""A QMP message to the client: a greeting, a return or an error."""


class Link(Protocol):
    """What a fault can do with the connection."""

    async def send(self, message: Answer) -> None:
        """Send one message."""

    async def send_bytes(self, chunk: bytes) -> None:
        """Send these bytes as they are."""

    def close(self) -> None:
        """Close the connection; bytes sent so far arrive."""

    async def left(self) -> None:
        """Read nothing any more, and return when the client has closed the connection."""


@dataclass(kw_only=True)
class Fault(ABC):
    """What goes wrong with one command."""

    times: int | None = None
    """How often it happens before the command works again; None: always."""
    executes: bool = True
    """Whether the command is carried out all the same: a lost answer does not mean that nothing was done."""
    struck: int = field(default=0, init=False)
    """How often it has happened."""

    @abstractmethod
    async def deliver(self, link: Link, answer: Answer) -> None:
        """Deal with the answer that a healthy monitor would send now."""


@dataclass
class Hang(Fault):
    """Nothing is said to this command."""

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        pass


@dataclass
class Deaf(Fault):
    """Nothing is said, and nothing is read from the connection any more: the client's buffers fill up."""

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.left()


@dataclass
class Held(Fault):
    """The answer waits until the test lets it go."""

    let_go: asyncio.Event = field(default_factory=asyncio.Event)

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await self.let_go.wait()
        await link.send(answer)


@dataclass
class Delay(Fault):
    """The answer comes this many seconds late, and so does everything after it."""

    seconds: float

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await asyncio.sleep(self.seconds)
        await link.send(answer)


@dataclass
class Close(Fault):
    """The connection is closed after so many bytes of the answer."""

    after_bytes: int = 0

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.send_bytes(json.dumps(answer).encode()[: self.after_bytes])
        link.close()


@dataclass
class Bytes(Fault):
    """These bytes are sent instead of the answer."""

    chunk: bytes

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.send_bytes(self.chunk)


@dataclass
class Huge(Fault):
    """The answer is a list of more than so many bytes, in one line as always."""

    size: int

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.send({**answer, "return": ["x" * 1000] * (self.size // 1000 + 1)})


@dataclass
class Storm(Fault):
    """So many events stand before and after the answer."""

    before: int = 0
    after: int = 0

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        for number in range(self.before):
            await link.send(_event(number))
        await link.send(answer)
        for number in range(self.after):
            await link.send(_event(number))


def _event(number: int) -> Answer:
    timestamp = {"seconds": number, "microseconds": 0}
    return {"event": "RTC_CHANGE", "data": {"offset": number, "qom-path": "/machine/rtc"}, "timestamp": timestamp}


@dataclass
class WrongId(Fault):
    """The answer carries an id that nobody has used."""

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.send({**answer, "id": "nobody-asked"})


@dataclass
class NoId(Fault):
    """The answer carries no id."""

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.send({key: value for key, value in answer.items() if key != "id"})


@dataclass
class Twice(Fault):
    """The answer comes two times."""

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        await link.send(answer)
        await link.send(answer)


@dataclass
class Error(Fault):
    """The command fails, and nothing is carried out."""

    error_class: str
    desc: str
    executes: bool = field(default=False, kw_only=True)

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        failed = {key: value for key, value in answer.items() if key not in {"return", "error"}}
        await link.send({**failed, "error": {"class": self.error_class, "desc": self.desc}})
