"""Threads for calls that may hang, such as name resolution: the process exits without waiting for them.

At exit, the interpreter waits for the threads of `ThreadPoolExecutor`, which asyncio uses too, whatever they do. A
resolver without an answer of a DNS server takes 10 s and more for one name, most of a pod's grace period.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["DaemonThreads"]

_T = TypeVar("_T")


class DaemonThreads:
    """Up to `most` threads. One is created when it is needed, and kept; if all are busy a call waits for one."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._made = 0
        self._idle = threading.Semaphore(0)
        self._todo: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    async def run(self, function: Callable[[], _T]) -> _T:
        """What the function returns or raises. If cancelled, it is not started, or its result is dropped."""
        return await self.start(function)

    def start(self, function: Callable[[], _T]) -> asyncio.Future[_T]:
        """The same, started now: the result is in the future."""
        answer: Future[_T] = Future()
        self._todo.put((answer, function))
        if not self._idle.acquire(blocking=False) and self._made < self._most:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._made += 1
        return asyncio.wrap_future(answer)

    def _work(self) -> None:
        """One thread."""
        while True:
            answer, function = self._todo.get()
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(function())
                except BaseException as error:  # noqa: BLE001 - raised again where it is awaited, as by concurrent.futures; otherwise that would hang
                    answer.set_exception(error)
            # Do not keep these objects until the next call.
            del answer, function
            self._idle.release()
