"""Types of the fixtures of these tests, and a fault that several files need."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.faults import Fault, Link
from vcpuset.qmp.session import Session

__all__ = ["Connect", "Preceded", "Wakes"]


class Wakes:
    """Counts the calls of a session's `wake`."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


class Connect(Protocol):
    """Opens a session with a monitor in a namespace's folder, or on TCP; it is closed when the test ends."""

    def __call__(
        self,
        monitor: Path | tuple[str, int],
        wake: Callable[[], None] = ...,
        *,
        open_seconds: float = ...,
        command_seconds: float = ...,
    ) -> Coroutine[None, None, Session]: ...


@dataclass
class Preceded(Fault):
    """These bytes, then the answer."""

    chunk: bytes

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send_bytes(self.chunk)
        await link.send(answer)
