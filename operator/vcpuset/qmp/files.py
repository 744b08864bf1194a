"""Calls to file systems, which may hang: only what is below a hung mount waits for it.

A file system whose server is away (NFS, FUSE, Ceph) blocks a call for as long as that lasts, and nothing can end the
call. So each call is made in a thread that does not block the exit of the process, and is abandoned after
`CALL_SECONDS`. Its thread is lost until the call returns. Meanwhile

* calls below the path that hangs fail at once, without another thread;
* the other calls of the same lane (a namespace's folder) continue, until `AT_ONCE` hang: then all of it fails at once;
* other lanes are not affected.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet, WeakValueDictionary

from vcpuset.domain.errors import MonitorUnreachable
from vcpuset.qmp.daemons import DaemonThreads

__all__ = ["AT_ONCE", "CALL_SECONDS", "THREADS", "Place", "call", "hangs", "settle"]

CALL_SECONDS = 2.0
"""A local file system takes some microseconds. Less than the timeout of a session: this message is the better one."""

AT_ONCE = 4
"""How many calls of one lane run at the same time."""

THREADS = DaemonThreads(256, "file system")
"""Enough for 64 lanes that hang. Passing a call to a thread costs about 50 µs."""

_T = TypeVar("_T")


class Place:
    """The position of a call. It is updated before each path is used, so that a call that hangs names the path.

    path  absolute
    due   loop time after which the call counts as hung
    """

    __slots__ = ("due", "path")

    def __init__(self, path: str, due: float = math.inf) -> None:
        self.path = path
        self.due = due


class _Lane:
    """The calls of one lane.

    turns  limits the calls that run
    going  the positions of the calls that have not returned
    """

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(AT_ONCE)
        self.going: list[Place] = []

    def blocked_at(self, lane: str, path: str) -> str | None:
        """The path that does not answer, so that a call to this one would not return; None: none known."""
        now = asyncio.get_running_loop().time()
        hung = [place.path for place in self.going if place.due <= now]
        above = (each for each in hung if f"{path}/".startswith(f"{each.rstrip('/')}/"))
        return next(above, lane if len(hung) >= AT_ONCE else None)


_lanes: WeakValueDictionary[str, _Lane] = WeakValueDictionary()
"""A lane exists for as long as a call in it."""


_answers: WeakSet[asyncio.Future[Any]] = WeakSet()
"""Of the calls that have not returned, of all event loops."""


async def settle(seconds: float) -> None:
    """Wait until this event loop's calls have returned, for at most so many seconds.

    For a process that ends its event loop: a result that comes later would never be discarded.
    """
    loop = asyncio.get_running_loop()
    if own := {answer for answer in _answers if answer.get_loop() is loop}:
        await asyncio.wait(own, timeout=seconds)


def hangs(lane: str, path: str) -> bool:
    """Whether a call to this path would fail at once."""
    known = _lanes.get(lane)
    return known is not None and known.blocked_at(lane, path) is not None


async def call(
    lane: str, path: str, function: Callable[[Place], _T], discard: Callable[[_T], object] = lambda _: None
) -> _T:
    """What the function returns or raises; it is called in a thread, with the `Place` that it has to update.

    lane     the calls that hang together: an absolute path at or above `path`
    path     what the function uses first
    discard  called with a result that is no longer awaited, in the event loop

    Raises MonitorUnreachable if the file system does not answer in time.
    """
    here = _lanes.get(lane)
    if here is None:
        here = _lanes[lane] = _Lane()
    if (blocked := here.blocked_at(lane, path)) is not None:
        raise _unanswered(blocked)
    try:
        async with asyncio.timeout(CALL_SECONDS):
            await here.turns.acquire()
    except TimeoutError as error:
        raise _unanswered(here.blocked_at(lane, path) or lane) from error

    place = Place(path, asyncio.get_running_loop().time() + CALL_SECONDS)
    here.going.append(place)
    answer = THREADS.start(lambda: function(place))
    _answers.add(answer)

    def returned(_: asyncio.Future[_T]) -> None:
        _answers.discard(answer)
        here.going.remove(place)
        here.turns.release()

    answer.add_done_callback(returned)
    taken = False
    try:
        await asyncio.wait({answer}, timeout=CALL_SECONDS)
        if not answer.done():
            place.due = -math.inf  # timers may be early by a nanosecond
            raise _unanswered(place.path)
        taken = True
        return answer.result()
    finally:
        if not taken:
            answer.add_done_callback(lambda late: _discard(late, discard))


def _discard(late: asyncio.Future[_T], discard: Callable[[_T], object]) -> None:
    if not late.cancelled() and late.exception() is None:
        discard(late.result())


def _unanswered(path: str) -> MonitorUnreachable:
    return MonitorUnreachable(f"the file system at {path} does not answer within {CALL_SECONDS:g} s: check the mount")
