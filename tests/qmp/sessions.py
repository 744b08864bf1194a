"""Types of the fixtures of these tests, importable by the tests: `from qmp.sessions import Connect, Wakes`."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Protocol

from vcpuset.qmp.session import Session

__all__ = ["Connect", "Wakes"]


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
