"""Background tasks whose owner always notices their end.

A bare `asyncio.create_task` can end unnoticed, and then the process seems healthy while a part of it is gone. Here the
end of a task that should run permanently is an error of the whole process, so that it is restarted.

`asyncio.TaskGroup` is not enough: a task may return, and it waits without a deadline for tasks that ignore their
cancellation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, NoReturn, Self

__all__ = ["TaskEndedError", "TaskOwner"]

logger = logging.getLogger(__name__)


class TaskEndedError(Exception):
    """A background task has ended that should not; the cause is chained, if there was an exception."""


class TaskOwner:
    """Starts background tasks, reports their end, and cancels them.

        async with TaskOwner(close_seconds=10) as owner:
            owner.spawn(serve(), "server")
            owner.spawn(run_workers(queue, ...), "workers")
            await owner.wait()              # raises TaskEndedError if one fails or returns
            ...
            queue.shut_down()
            await owner.finish("workers")   # ends in good order; the rest is cancelled after the block

    Every failure is logged when it happens, whether or not `wait()` is called.
    """

    def __init__(self, *, close_seconds: float) -> None:
        """`close_seconds`: how long `aclose()` waits for cancelled tasks."""
        self._close_seconds = close_seconds
        self._running: dict[str, asyncio.Task[object]] = {}
        # Names of tasks that were requested to end.
        self._finishing: set[str] = set()
        self._closing = False
        # An event and the error rather than a future with it: a future warns if it is never awaited.
        self._ended = asyncio.Event()
        self._error: TaskEndedError | None = None

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> None:
        """Run `work` as a task; its return is as much an error as an exception.

        Raises `RuntimeError` once the owner is closing, `ValueError` if a task of that name is running.
        """
        if self._closing or name in self._running:
            work.close()  # otherwise Python warns that it was never awaited
            if self._closing:
                raise RuntimeError(f"background task {name!r} cannot start: its owner is closing")
            raise ValueError(f"background task {name!r} cannot start: a task with this name is running")
        task = asyncio.create_task(work, name=name)
        self._running[name] = task
        task.add_done_callback(self._see_end)

    async def wait(self) -> NoReturn:
        """Wait until a task has ended that should not have; raises `TaskEndedError` for the first one."""
        await self._ended.wait()
        assert self._error is not None, "set before the event"
        raise self._error

    async def finish(self, name: str) -> None:
        """Wait for the end of a task that was requested to end; from now on its return is no error.

        Returns at once if the task has ended already. Cancelling this does not cancel the task.
        """
        task = self._running.get(name)
        if task is not None:
            self._finishing.add(name)
            await asyncio.wait([task])

    async def aclose(self) -> None:
        """Cancel all tasks and wait for their end, for at most `close_seconds`.

        Tasks that have not ended by then are logged with the place where they wait, and left alone.
        Note that `asyncio.run` waits for them without a deadline.
        """
        self._closing = True
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._close_seconds)
        for task in late:
            frames = task.get_stack(limit=1)
            place = f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "an unknown location"
            logger.error(
                "background task %r has not ended %g s after it was cancelled; it is at %s",
                task.get_name(),
                self._close_seconds,
                place,
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _see_end(self, task: asyncio.Task[object]) -> None:
        name = task.get_name()
        del self._running[name]
        may_end = name in self._finishing or self._closing
        self._finishing.discard(name)
        cause = None if task.cancelled() else task.exception()
        if cause is not None:
            error = TaskEndedError(f"background task {name!r} failed: {cause!r}")
            error.__cause__ = cause
            logger.error("background task %r failed", name, exc_info=cause)
        elif may_end:
            return
        else:
            how = "was cancelled" if task.cancelled() else "returned"
            error = TaskEndedError(f"background task {name!r} {how}, but should run until it is closed")
            logger.error("%s", error)
        if self._error is None:
            self._error = error
            self._ended.set()
