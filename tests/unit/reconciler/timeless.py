"""An event loop whose clock stands still until somebody moves it."""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from typing_extensions import TypeVarTuple, Unpack, override

__all__ = ["TimelessLoop"]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class TimelessLoop(asyncio.SelectorEventLoop):
    """It does what is to be done at this moment and then stops, instead of waiting for the next."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[asyncio.TimerHandle] = []
        super().__init__(_NeverWaits(self.stop))

    @override
    def time(self) -> float:
        return self.now

    @override
    def call_at(
        self, when: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, context=context)
        heapq.heappush(self._timers, timer)
        return timer

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run something that needs no time. RuntimeError: it does."""
        return self.run_until_complete(coroutine)

    def settle(self) -> None:
        """Do everything that is to be done at this moment."""
        self.run_forever()

    @property
    def next_timer(self) -> float:
        """When something falls due next; infinity: nothing ever."""
        while self._timers and (self._timers[0].cancelled() or self._timers[0].when() <= self.now):
            heapq.heappop(self._timers)
        return self._timers[0].when() if self._timers else float("inf")


class _NeverWaits(selectors.SelectSelector):
    """Nobody outside of the process talks to the loop, so when it would wait, it is idle."""

    def __init__(self, idle: Callable[[], None]) -> None:
        super().__init__()
        self._idle = idle

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._idle()
        return []
