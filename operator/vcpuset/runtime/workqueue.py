"""Keys that need work: the queue between all triggers and the workers.

The contract is that of client-go's work queue, which is proven with level-triggered controllers. A key names an object
and contains nothing else, so ten events about one object are one piece of work:

    queue.add(key)                # something happened: process it
    queue.add_after(key, 60)      # process it again, in 60 s at the latest
    queue.add_rate_limited(key)   # it failed: process it again after the back-off
    queue.forget(key)             # it succeeded: the back-off starts again from its base
    queue.renew(key)              # it means another task now: its history is void, and it comes first

    key = await queue.get()       # a worker takes a key ...
    queue.touch(key)              # ... may report progress ...
    queue.done(key)               # ... and is done with it, whatever the result

Four things differ from client-go. A pass supersedes the timers set before it: its own result decides about the next
pass, so a key has at most one timer, and none while it is due anyway. `done()` for a key that was not handed out is an
error. Slow keys have a queue of their own. And `renew()` is for a caller that knows that a key means another task than
before: its next turn comes before those of other keys, of which one in four is taken nevertheless. So when many keys
get new tasks at once, what follows from the first ones does not delay the start of the last ones.

A slow key is one whose last pass held its worker for `SLOW_SECONDS` or longer, whatever the result: a peer that hangs
and one that answers slowly cost the same. So that a thousand of them do not delay the others,

* the number of them in progress is limited: the other workers are soon free for the others;
* the others are taken first; but of four keys one is a slow one, if one may be taken, so that none starves.

This bounds the cost of a slow key only if a pass ends soon after `SLOW_SECONDS`: long work continues in later passes.
`add()` leaves a slow key slow, because slow keys can have events all the time.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from vcpuset.domain.backoff import ExponentialBackoff

__all__ = ["SLOW_SECONDS", "QueueObserver", "QueueShutDown", "QueueStatistics", "WorkQueue"]

K = TypeVar("K", bound=Hashable)

SLOW_SECONDS: Final = 1.0
"""A key is slow if its last pass took so long. Most passes take milliseconds, or until a deadline."""

_PASSED_OVER: Final = 3
"""So many others are taken before a slow key that may be taken too, and so many renewed keys before another one."""


class QueueShutDown(Exception):  # the name that asyncio's own queue gives this from Python 3.13 on
    """`get()`: the queue was shut down and nothing is ready any more."""


class QueueObserver(Protocol):
    """Called with durations, for metrics. It must not raise."""

    def waited(self, seconds: float) -> None:
        """A key was handed out so many seconds after it was added."""

    def worked(self, seconds: float) -> None:
        """A key was done so many seconds after it was handed out."""


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """The queue at one moment; for debugging when work does not progress. Without arguments: an idle one."""

    depth: int = 0
    """Keys that are ready and wait for a worker."""
    processing: int = 0
    """Keys that workers have taken."""
    delayed: int = 0
    """Keys that wait for their timer."""
    failing: int = 0
    """Keys whose last pass failed."""
    adds_total: int = 0
    """How often a key became due, by an event or a timer; an add of a key already due does not count."""
    retries_total: int = 0
    """How often a key was added after a failure."""
    longest_running_seconds: float = 0.0
    """How long the oldest of the keys in progress has been there; shows a stuck worker."""
    unfinished_seconds: float = 0.0
    """The same, summed over all keys in progress."""
    longest_still_seconds: float = 0.0
    """The longest time without progress (`touch()`) of a key in progress."""
    untaken_seconds: float = 0.0
    """How long there has been a key that may be taken, and none was taken. Time in which keys are taken one after the
    other does not count, nor do slow keys while the maximum number of them is in progress."""


class WorkQueue(Generic[K]):
    """Fair; stingy: a key is never handed out twice at once, and added several times before its turn it is handed out
    once; a key added while it is in progress is handed out again.

    It belongs to the running event loop: it cannot be created without one, and is used from that loop's thread only
    (from others by `loop.call_soon_threadsafe(queue.add, key)`). Keys may be added before there are workers. Only
    `get()` and `wait_shut_down()` wait.

    The sets are unbounded: they hold each key once, so they are bounded by the number of objects.

    slow_at_once  how many slow keys may be in progress at once; fewer than there are workers, if there are several
    """

    def __init__(
        self, backoff: ExponentialBackoff, observer: QueueObserver | None = None, *, slow_at_once: int
    ) -> None:
        if slow_at_once < 1:
            raise ValueError(f"slow_at_once {slow_at_once}: they would never be worked on")
        self._loop = asyncio.get_running_loop()
        self._backoff = backoff
        self._observer = observer
        self._slow_at_once = slow_at_once

        # Due, in order of work, with the loop time of the add. Not a plain dictionary: that becomes slow when its first
        # key is removed repeatedly.
        self._ready: OrderedDict[K, float] = OrderedDict()
        # The same for renewed keys, and for slow ones.
        self._renewed_ready: OrderedDict[K, float] = OrderedDict()
        self._slow_ready: OrderedDict[K, float] = OrderedDict()
        # How many others were taken since a slow key, or one that is not renewed, could have been.
        self._passed_over = 0
        self._renewed_taken = 0
        self._taken_at = -math.inf
        # Handed out and not yet done, with the loop time of the hand-out. None is ready.
        self._processing: dict[K, float] = {}
        # When each of those last made progress, in loop time, if it has since its hand-out.
        self._touched: dict[K, float] = {}
        # Added while in _processing, with the time of the add; done() makes them ready.
        self._again: dict[K, float] = {}
        # One timer for a key, none for a key that is due (ready or in _again). A loop handle for each,
        # because asyncio already keeps its handles in one heap, and removes cancelled ones; a heap of our own would do
        # the same again. It costs about 0.3 kB per key.
        self._timers: dict[K, asyncio.TimerHandle] = {}
        # Shared by all timers: a handle would otherwise keep a copy of its caller's context alive.
        self._timer_context = contextvars.Context()
        self._failures: dict[K, int] = {}
        # The slow ones, and those of them that were taken as such.
        self._slow: set[K] = set()
        self._slow_processing: set[K] = set()
        # Renewed since their last hand-out. If that pass goes on, its duration says nothing about the new task.
        self._renewed: set[K] = set()

        self._getters: deque[asyncio.Future[None]] = deque()
        self._shut_down = asyncio.Event()
        self._adds_total = 0
        self._retries_total = 0

    # Adding.

    def add(self, key: K) -> None:
        """Process the key as soon as a worker is free; ignored once shut down."""
        if self.shutting_down:
            return
        self._cancel_timer(key)
        if self._is_due(key):
            return
        self._adds_total += 1
        if key in self._processing:
            self._again[key] = self._loop.time()
        else:
            self._line_up(key, self._loop.time())

    def add_after(self, key: K, delay: float) -> None:
        """Add the key in `delay` seconds, unless it is due earlier anyway; ignored once shut down.

        The earliest of several deadlines counts. The next hand-out of the key ends them all: the pass that then starts
        decides again. A deadline set during a pass outlives `done()`.
        """
        if self.shutting_down or self._is_due(key):
            return
        if delay <= 0:
            self.add(key)
            return
        deadline = self._loop.time() + delay
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= deadline:
            return
        self._cancel_timer(key)
        self._timers[key] = self._loop.call_at(deadline, self.add, key, context=self._timer_context)

    def add_rate_limited(self, key: K, *, at_least: float = 0.0, at_most: float = math.inf) -> None:
        """Count a failure of the key and add it after the back-off; ignored once shut down.

        at_least  in seconds: another lower bound of the delay
        at_most   in seconds: another cap of the back-off

        A key that was added in the meantime does not wait: it has a new event.
        """
        if self.shutting_down:
            return
        self._retries_total += 1
        self._failures[key] = self.failures(key) + 1
        self.add_after(key, max(self._backoff.delay(self._failures[key], at_most), at_least))

    # Taking and done.

    async def get(self) -> K:
        """Wait for a key and take it; it is the caller's until `done(key)`.

        A cancelled `get()` has taken nothing. Await it directly: in a task of its own it may have taken a key before
        the task is cancelled.

        Raises `QueueShutDown` when the queue is shut down and no key may be taken.
        """
        while not self._is_takeable():
            if self.shutting_down:
                raise QueueShutDown
            getter = self._loop.create_future()
            self._getters.append(getter)
            try:
                await getter
            except asyncio.CancelledError:
                if not getter.cancelled():
                    # Woken for a key and cancelled before it could take it: another one has to.
                    if self._is_takeable():
                        self._wake_getter()
                elif getter in self._getters:  # an add in the meantime may have skipped it
                    self._getters.remove(getter)
                raise
        key, added_at = self._take()
        now = self._loop.time()
        self._taken_at = now
        self._processing[key] = now
        self._renewed.discard(key)
        if self._observer is not None:
            self._observer.waited(now - added_at)
        return key

    def done(self, key: K) -> None:
        """End the work on a key taken by `get()`; if it was added since, it is due again.

        Raises `ValueError` if the key is not in progress.
        """
        if key not in self._processing:
            raise ValueError(f"done({key!r}): get() has not handed out this key, or done() was called before")
        held = self._loop.time() - self._processing.pop(key)
        self._touched.pop(key, None)
        if held >= SLOW_SECONDS and key not in self._renewed:
            self._slow.add(key)
        else:
            self._slow.discard(key)
        if key in self._slow_processing:
            self._slow_processing.remove(key)
            if self._is_slow_takeable():
                self._wake_getter()
        if key in self._again:
            self._line_up(key, self._again.pop(key))
        if self._observer is not None:
            self._observer.worked(held)

    def touch(self, key: K) -> None:
        """Report progress on the key, which distinguishes long work from work that is stuck."""
        if key in self._processing:
            self._touched[key] = self._loop.time()

    def forget(self, key: K) -> None:
        """End the key's back-off, after a success. It replaces neither `done()` nor `add()`."""
        self._failures.pop(key, None)

    def renew(self, key: K) -> None:
        """The key means another task from now on: its back-off ends, it is no longer slow, and it comes first.

        It replaces neither `done()` nor `add()`.
        """
        self.forget(key)
        self._slow.discard(key)
        self._renewed.add(key)
        for line in (self._ready, self._slow_ready):
            if key in line:
                self._line_up(key, line.pop(key))

    # Ending.

    def shut_down(self) -> None:
        """Refuse new keys and end all timers. What is ready can still be taken; waiting `get()`s raise."""
        self._shut_down.set()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        while self._getters:
            self._wake_getter()

    @property
    def shutting_down(self) -> bool:
        """Whether `shut_down()` was called."""
        return self._shut_down.is_set()

    async def wait_shut_down(self) -> None:
        """Wait until `shut_down()` is called."""
        await self._shut_down.wait()

    # Statistics.

    def failures(self, key: K) -> int:
        """How often in a row the key has failed."""
        return self._failures.get(key, 0)

    @property
    def waiting(self) -> int:
        """The number of keys that are ready and not slow."""
        return len(self._renewed_ready) + len(self._ready)

    def __len__(self) -> int:
        """The number of keys that are ready."""
        return self.waiting + len(self._slow_ready)

    def statistics(self) -> QueueStatistics:
        """The state of the queue, and its totals so far."""
        now = self._loop.time()
        takeable = [next(iter(line.values())) for line in (self._renewed_ready, self._ready) if line]
        if self._is_slow_takeable():
            takeable.append(next(iter(self._slow_ready.values())))
        running = [now - started_at for started_at in self._processing.values()]
        still = [now - self._touched.get(key, started_at) for key, started_at in self._processing.items()]
        return QueueStatistics(
            depth=len(self),
            processing=len(self._processing),
            delayed=len(self._timers),
            failing=len(self._failures),
            adds_total=self._adds_total,
            retries_total=self._retries_total,
            longest_running_seconds=max(running, default=0.0),
            unfinished_seconds=sum(running),
            longest_still_seconds=max(still, default=0.0),
            untaken_seconds=max((now - max(since, self._taken_at) for since in takeable), default=0.0),
        )

    # Internals.

    def _is_due(self, key: K) -> bool:
        return any(key in line for line in (self._renewed_ready, self._ready, self._slow_ready, self._again))

    def _line_up(self, key: K, since: float) -> None:
        """Append a key that is due since then to its queue."""
        if key not in self._slow:
            (self._renewed_ready if key in self._renewed else self._ready)[key] = since
            self._wake_getter()
        else:
            self._slow_ready[key] = since
            if self._is_slow_takeable():  # otherwise done() wakes a getter
                self._wake_getter()

    def _is_takeable(self) -> bool:
        return self.waiting > 0 or self._is_slow_takeable()

    def _is_slow_takeable(self) -> bool:
        return bool(self._slow_ready) and len(self._slow_processing) < self._slow_at_once

    def _take(self) -> tuple[K, float]:
        """Take the next key; one must be takeable."""
        slow = self._is_slow_takeable()
        if slow and (not self.waiting or self._passed_over >= _PASSED_OVER):
            self._passed_over = 0
            key, since = self._slow_ready.popitem(last=False)
            self._slow_processing.add(key)
            return key, since
        self._passed_over = self._passed_over + 1 if slow else 0
        if self._ready and (not self._renewed_ready or self._renewed_taken >= _PASSED_OVER):
            self._renewed_taken = 0
            return self._ready.popitem(last=False)
        self._renewed_taken = self._renewed_taken + 1 if self._ready else 0
        return self._renewed_ready.popitem(last=False)

    def _cancel_timer(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def _wake_getter(self) -> None:
        """Wake the one that has waited longest; it takes a key when it runs."""
        while self._getters:
            getter = self._getters.popleft()
            if not getter.done():
                getter.set_result(None)
                return
