"""What happened when, in a test that waits for one thing to follow from another; shown at the end of a run.

async with TimeLine(look) as line:
    line.note("load on")
    ...
record_property(TIME_LINE, str(line))
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Final, Self

__all__ = ["TIME_LINE", "TimeLine"]

TIME_LINE: Final = "time line"
"""The name of the property that pytest shows."""

LOOK_SECONDS: Final = 0.25


class TimeLine:
    """Looks at the world again and again, and keeps each change.

    look  what is to be shown, by name
    """

    def __init__(self, look: Callable[[], Awaitable[Mapping[str, object]]]) -> None:
        self._look = look
        self._began = time.monotonic()
        self._rows: list[str] = []
        self._last: Mapping[str, object] = {}
        self._task: asyncio.Task[None] | None = None

    def note(self, text: str) -> None:
        """Add what the test does."""
        self._add(f"-- {text}")

    def __str__(self) -> str:
        return "\n".join(self._rows)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        (failure,) = await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(failure, Exception):
            raise failure

    def _add(self, text: str) -> None:
        self._rows.append(f"{time.monotonic() - self._began:6.1f} s  {text}")

    async def _watch(self) -> None:
        while True:
            seen = await self._look()
            if seen != self._last:
                self._last = seen
                self._add("  ".join(f"{name} {value}" for name, value in seen.items()))
            await asyncio.sleep(LOOK_SECONDS)
