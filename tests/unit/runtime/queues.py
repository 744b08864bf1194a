"""Work queues for tests, and what is done with their keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.runtime.workqueue import SLOW_SECONDS, WorkQueue

__all__ = ["Recorded", "everything_runs", "failed", "make_queue", "nothing_comes", "now", "slow_keys", "succeeded"]


class Recorded:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.works: list[float] = []

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def worked(self, seconds: float) -> None:
        self.works.append(seconds)


def make_queue(observer: Recorded | None = None, *, slow_at_once: int = 2) -> WorkQueue[str]:
    """A queue whose failures are retried after 1, 2, 4, ... 30 s."""
    backoff = ExponentialBackoff(base_seconds=1, cap_seconds=30, jitter=0)
    return WorkQueue(backoff, observer, slow_at_once=slow_at_once)


def now() -> float:
    return asyncio.get_running_loop().time()


async def everything_runs() -> None:
    """Let all that is not waiting for a timer run: virtual time moves only when nothing else can."""
    await asyncio.sleep(0.001)


async def nothing_comes(queue: WorkQueue[str], seconds: float) -> bool:
    """Whether no key is handed out for so long."""
    try:
        async with asyncio.timeout(seconds):
            key = await queue.get()
    except TimeoutError:
        return True
    queue.done(key)
    return False


# Adding and taking.


def failed(queue: WorkQueue[str], key: str) -> None:
    queue.add_rate_limited(key)


def succeeded(queue: WorkQueue[str], key: str) -> None:
    queue.forget(key)


async def slow_keys(queue: WorkQueue[str], keys: str, outcome: Callable[[WorkQueue[str], str], None] = failed) -> None:
    """Have one pass over each of these keys take long."""
    for key in keys:
        queue.add(key)
        assert await queue.get() == key
    await asyncio.sleep(SLOW_SECONDS)
    for key in keys:
        outcome(queue, key)
        queue.done(key)
