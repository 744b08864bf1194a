"""Somebody who looks at a machine's CPU count all the time, through a monitor of its own, QEMU dead or alive."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qemu.qmp import QMPError

from harness.qmp import raw

__all__ = ["Witness"]

POLL_SECONDS = 0.02
REMEMBERED = 100


@dataclass
class Witness:
    """`watching()` looks; `bounds` is what it accepts.

    count       the last count seen; None: none of the QEMU that runs now
    bounds      the fewest and the most vCPUs that are right; None: any count is
    violations  counts outside of the bounds that were in force
    """

    count: int | None = None
    bounds: tuple[int, int] | None = None
    violations: list[str] = field(default_factory=list)
    _history: deque[tuple[float, int | None]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _began: float = field(default_factory=time.monotonic)

    @contextlib.asynccontextmanager
    async def watching(self, monitor: Path) -> AsyncIterator[None]:
        """Look at this monitor, again after each restart of QEMU, until the context ends."""
        task = asyncio.create_task(self._watch(monitor), name="witness")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @contextlib.contextmanager
    def expecting(self, bounds: tuple[int, int]) -> Iterator[None]:
        """From now on accept these counts only; fails at the end of the context if others were seen."""
        self.bounds = bounds
        yield
        assert not self.violations, f"{self.violations}; {self}"

    async def _watch(self, monitor: Path) -> None:
        while True:
            # Refused, cut off, or no QEMU there for a while.
            with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                async with raw(monitor) as client:
                    while True:
                        self._note(await client.count())
                        await asyncio.sleep(POLL_SECONDS)
            self._note(None)

    def _note(self, count: int | None) -> None:
        if count != self.count:
            self.count = count
            self._history.append((time.monotonic() - self._began, count))
            if count is not None and self.bounds is not None and not self.bounds[0] <= count <= self.bounds[1]:
                self.violations.append(f"{count} vCPUs where {self.bounds[0]} to {self.bounds[1]} were right")

    def __str__(self) -> str:
        return "counts seen: " + ", ".join(f"{at:.2f} s: {count}" for at, count in self._history)
