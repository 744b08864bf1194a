"""Waiting for a state of the world, which is what tests do instead of sleeping."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast, overload

__all__ = ["until"]

T = TypeVar("T")


@overload
async def until(
    predicate: Callable[[], Awaitable[T | None]],
    timeout: float,
    what: str | Callable[[], str],
    interval: float = 0.05,
) -> T: ...


@overload
async def until(
    predicate: Callable[[], T | None],
    timeout: float,
    what: str | Callable[[], str],
    interval: float = 0.05,
) -> T: ...


async def until(
    predicate: Callable[[], Awaitable[T | None] | T | None],
    timeout: float,
    what: str | Callable[[], str],
    interval: float = 0.05,
) -> T:
    """Ask `predicate` (sync or async) every `interval` seconds until it answers something truthy, and return that.

    `what` completes the sentence "timed out after N s waiting for …"; as a function it is called only then, so it may
    collect evidence such as the end of a log.

    Raises:
        TimeoutError: not within `timeout` seconds; names `what` and the last answer. A predicate that hangs is
            interrupted then.

    What the predicate raises is passed on: swallow in the predicate what is to be expected.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    seen: object = "no answer"
    try:
        async with asyncio.timeout_at(deadline) as limit:
            while True:
                answer = predicate()
                value = cast(T | None, await answer if inspect.isawaitable(answer) else answer)
                if value:
                    return value
                seen = value
                await asyncio.sleep(interval)
    except TimeoutError as error:
        if not limit.expired():
            raise  # the predicate's own, not ours
        name = what if isinstance(what, str) else what()
        raise TimeoutError(f"timed out after {timeout:g} s waiting for {name} (last seen: {seen!r})") from error
