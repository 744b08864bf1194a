"""Calls to file systems, which may hang: what is below one hung mount waits for it, and nothing else.

A file system whose server is gone (NFS, FUSE, Ceph) lets a call wait for as long as it is away, and nothing ends the
call. So each call is made in a thread that the end of the process does not wait for, and is given up after
`CALL_SECONDS`. Its thread is then lost until the call returns. Meanwhile

* what lies below the path at which it hangs fails at once, without another thread;
* the other calls of the same lane (a namespace's folder) go on, until `AT_ONCE` hang: then all of it fails at once;
* other lanes do not notice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from vcpuset.domain.errors import MonitorUnreachable
from vcpuset.qmp.daemons import DaemonThreads

__all__ = ["AT_ONCE", "CALL_SECONDS", "THREADS", "Place", "call", "hangs"]

CALL_SECONDS = 2.0
"""A local file system takes some microseconds. Less than a session takes to open: this message is the better one."""

AT_ONCE = 4
"""How many calls of one lane are made at the same time."""

THREADS = DaemonThreads(256, "file system")
"""Enough for 64 lanes that hang. A thread costs some 50 µs to hand a call to."""

_T = TypeVar("_T")


class Place:
    """Where a call is. It notes each path before it uses it, so that a call that hangs names the place.

    path  absolute
    due   loop time from which on the call counts as one that hangs
    """

    __slots__ = ("due", "path")

    def __init__(self, path: str, due: float = math.inf) -> None:
        self.path = path
        self.due = due


class _Lane:
    """What goes on in one lane.

    turns  for the calls to be made
    going  where the calls are that have not returned
    """

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(AT_ONCE)
        self.going: list[Place] = []

    def blocked_at(self, lane: str, path: str) -> str | None:
        """What does not answer, so that a call to this path would not return; None: nothing is known."""
        now = asyncio.get_running_loop().time()
        hung = [place.path for place in self.going if place.due <= now]
        above = (each for each in hung if f"{path}/".startswith(f"{each.rstrip('/')}/"))
        return next(above, lane if len(hung) >= AT_ONCE else None)


_lanes: WeakValueDictionary[str, _Lane] = WeakValueDictionary()
"""A lane lasts for as long as a call in it does."""


def hangs(lane: str, path: str) -> bool:
    """Whether a call to this path would fail at once."""
    known = _lanes.get(lane)
    return known is not None and known.blocked_at(lane, path) is not None


async def call(
    lane: str, path: str, function: Callable[[Place], _T], discard: Callable[[_T], object] = lambda _: None
) -> _T:
    """What the function returns or raises; it is called in a thread, with the place that it is to keep up to date.

    lane     which calls are to hang together: an absolute path at or above `path`
    path     what the function uses first
    discard  called with a result that nobody waits for any more, in the event loop

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

    def returned(_: asyncio.Future[_T]) -> None:
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
