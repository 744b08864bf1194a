"""Tasks that serve a work queue.

A handler processes one key and returns a result. `_settle` alone turns that into queue calls, a log line and a metric
label, so the rules of retrying are in one place:

    Done()                    nothing to do until the next event
    Done(requeue_after=60)    as above, and process it again in 60 s
    Retry(error)              an expected failure: process it again after the back-off
    Retry(error, at_least=5)  the same, but not within 5 s
    (an exception)            a defect: logged with its traceback, then as Retry
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, assert_never

from vcpuset.runtime.workqueue import QueueShutDown, WorkQueue

__all__ = ["Done", "Label", "Result", "Retry", "WorkerObserver", "run_workers"]

K = TypeVar("K", bound=Hashable)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """The pass succeeded, which ends the key's back-off."""

    requeue_after: float | None = None
    """Seconds until the key is processed again without an event; None: never."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The pass failed in an expected way, and a retry can help."""

    error: Exception
    """Why; its text is logged, without a traceback."""
    at_least: float = 0.0
    """For so many seconds a retry cannot help. The back-off may be longer; an event is processed nevertheless."""
    at_most: float = math.inf
    """The back-off is not longer."""


@dataclass(frozen=True, slots=True)
class _Crash:
    """The handler raised: a defect, not a result."""

    error: BaseException


Result = Done | Retry
"""What a handler returns."""

Label = Literal["done", "requeued", "retry", "crash", "cancelled"]
"""How a pass ended, for metrics."""


class WorkerObserver(Protocol):
    """Called for every pass, for metrics. It must not raise."""

    def started(self) -> None:
        """A worker has taken a key: one more is active."""

    def finished(self, label: Label, seconds: float) -> None:
        """A worker is done with its key: one less is active."""


async def run_workers(
    queue: WorkQueue[K],
    handler: Callable[[K], Awaitable[Result]],
    *,
    count: int,
    grace_seconds: float,
    observer: WorkerObserver | None = None,
) -> None:
    """Serve the queue with `count` workers until it is shut down.

    Then each worker finishes its key, but takes no other: a successor begins with a pass over each set anyway, the
    sooner the better. Passes that last longer than `grace_seconds` are cancelled. Cancelling this coroutine cancels all
    passes at once; their keys are due again.

    An exception in the handler never ends a worker. A defect in this module ends all of them, with an
    `ExceptionGroup` from here.
    """
    if count < 1:
        raise ValueError(f"{count} workers: at least 1 is needed")
    async with asyncio.TaskGroup() as group:
        workers = [
            group.create_task(_work(queue, handler, observer), name=f"worker-{number}") for number in range(count)
        ]
        await queue.wait_shut_down()
        _, late = await asyncio.wait(workers, timeout=grace_seconds)
        for worker in late:
            worker.cancel()


async def _work(
    queue: WorkQueue[K],
    handler: Callable[[K], Awaitable[Result]],
    observer: WorkerObserver | None,
) -> None:
    while not queue.shutting_down:
        try:
            key = await queue.get()
        except QueueShutDown:
            return
        await _serve(queue, key, handler, observer)
        # get() does not wait while keys are ready, and a handler need not wait either: without this, a full queue could
        # block the rest of the event loop.
        await asyncio.sleep(0)


async def _serve(
    queue: WorkQueue[K],
    key: K,
    handler: Callable[[K], Awaitable[Result]],
    observer: WorkerObserver | None,
) -> None:
    """One pass over one key; `done()` is called whatever happens."""
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    if observer is not None:
        observer.started()
    label: Label = "cancelled"
    try:
        outcome = await _run(handler, key)
        label = _settle(queue, key, outcome)
    except asyncio.CancelledError:
        logger.warning("%s: reconciliation cancelled after %.1f s", key, loop.time() - started_at)
        queue.add(key)  # The work is not done. Ignored when the queue is shut down.
        raise
    finally:
        queue.done(key)
        if observer is not None:
            observer.finished(label, loop.time() - started_at)


async def _run(handler: Callable[[K], Awaitable[Result]], key: K) -> Result | _Crash:
    """Call the handler; only the cancellation of this worker is raised."""
    try:
        return await handler(key)
    except asyncio.CancelledError as error:
        worker = asyncio.current_task()
        if worker is None or worker.cancelling():
            raise
        # The worker was not cancelled, but something that the handler awaited. Raised, it would end the worker without
        # a log line.
        return _Crash(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, _settle logs it and tries again
        return _Crash(error)


def _settle(queue: WorkQueue[K], key: K, outcome: Result | _Crash) -> Label:
    """Turn the outcome of a pass into queue calls, a log line and a label."""
    match outcome:
        case Done(requeue_after=delay):
            queue.forget(key)
            if delay is None:
                return "done"
            queue.add_after(key, delay)
            return "requeued"
        case Retry(error, at_least=at_least, at_most=at_most):
            queue.add_rate_limited(key, at_least=at_least, at_most=at_most)
            # For debugging only: the handler has reported the failure, and with many keys this would be a flood.
            logger.debug("%s: %s (failure %d in a row; will be retried)", key, error, queue.failures(key))
            return "retry"
        case _Crash(error):
            queue.add_rate_limited(key)
            logger.error(
                "%s: reconciliation ended with an unexpected exception (a bug); it will be retried", key, exc_info=error
            )
            return "crash"
        case _:
            assert_never(outcome)
