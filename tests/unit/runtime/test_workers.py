"""Workers: what becomes of a key after each outcome, and how workers end."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.runtime.workers import Done, Label, Result, Retry, run_workers
from vcpuset.runtime.workqueue import WorkQueue

__all__: list[str] = []

pytestmark = pytest.mark.looptime

Handler = Callable[[str], Awaitable[Result]]


class Recorded:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.active = 0
        self.most_active = 0
        self.passes: list[tuple[Label, float]] = []

    def started(self) -> None:
        self.active += 1
        self.most_active = max(self.most_active, self.active)

    def finished(self, label: Label, seconds: float) -> None:
        self.active -= 1
        self.passes.append((label, seconds))


class Script:
    """A handler that gives or raises one outcome after the other, and keeps when it was called."""

    def __init__(self, *outcomes: Result | BaseException) -> None:
        self.outcomes = list(outcomes)
        self.calls: list[tuple[str, float]] = []

    async def __call__(self, key: str) -> Result:
        self.calls.append((key, now()))
        outcome = self.outcomes.pop(0) if self.outcomes else Done()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    @property
    def times(self) -> list[float]:
        return [time for _, time in self.calls]


def now() -> float:
    return asyncio.get_running_loop().time()


def make_queue() -> WorkQueue[str]:
    """A queue whose failures are retried after 1, 2, 4, ... 30 s."""
    return WorkQueue(ExponentialBackoff(base_seconds=1, cap_seconds=30, jitter=0), slow_at_once=1)


@asynccontextmanager
async def working(
    queue: WorkQueue[str],
    handler: Handler,
    *,
    count: int = 1,
    grace_seconds: float = 10,
    observer: Recorded | None = None,
) -> AsyncIterator[asyncio.Task[None]]:
    """Workers that serve the queue inside the block, and are shut down at its end."""
    workers = asyncio.create_task(
        run_workers(queue, handler, count=count, grace_seconds=grace_seconds, observer=observer)
    )
    try:
        yield workers
    finally:
        queue.shut_down()
        await asyncio.wait([workers])
    if not workers.cancelled():
        await workers


# Outcomes.


async def test_a_key_that_is_done_is_not_looked_at_again_without_an_event() -> None:
    queue, handler = make_queue(), Script(Done())
    async with working(queue, handler):
        queue.add("a")
        await asyncio.sleep(1000)
    assert handler.calls == [("a", 0)]


async def test_a_key_that_is_done_for_now_is_looked_at_again_after_the_interval() -> None:
    queue, handler = make_queue(), Script(Done(requeue_after=60), Done(requeue_after=20), Done())
    async with working(queue, handler):
        queue.add("a")
        await asyncio.sleep(1000)
    assert handler.times == [0, 60, 80]


async def test_a_key_that_failed_is_retried_with_a_backoff_that_a_success_ends() -> None:
    fail = Retry(OSError("monitor away"))
    queue, handler = make_queue(), Script(fail, fail, fail, Done(requeue_after=60), fail, Done())
    async with working(queue, handler):
        queue.add("a")
        await asyncio.sleep(1000)
    assert handler.times == [0, 1, 3, 7, 67, 68]
    assert queue.failures("a") == 0


async def test_a_key_whose_retry_cannot_help_before_a_time_waits_for_it_or_for_the_backoff_or_for_news() -> None:
    fail = Retry(OSError("API server overloaded"), at_least=3)
    queue, handler = make_queue(), Script(fail, fail, fail, fail, Done())
    async with working(queue, handler):
        queue.add("a")
        await asyncio.sleep(11)
        queue.add("a")
        await asyncio.sleep(1000)
    assert handler.times == [0, 3, 6, 10, 11]


async def test_a_key_that_can_soon_succeed_has_a_backoff_with_a_lower_cap() -> None:
    fail = Retry(OSError("API server starts"), at_most=3)
    queue, handler = make_queue(), Script(fail, fail, fail, fail, Done())
    async with working(queue, handler):
        queue.add("a")
        await asyncio.sleep(1000)
    assert handler.times == [0, 1, 3, 6, 9]


async def test_a_retry_logs_the_key_and_the_error_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="vcpuset")
    queue = make_queue()
    async with working(queue, Script(Retry(OSError("monitor away")))):
        queue.add("ns/a")
        await asyncio.sleep(0.5)
    (record,) = [each for each in caplog.records if each.name.startswith("vcpuset")]
    assert "ns/a" in record.getMessage()
    assert "monitor away" in record.getMessage()
    assert record.exc_info is None


async def test_a_handler_that_raises_is_retried_with_a_backoff_and_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue, handler = make_queue(), Script(ZeroDivisionError("a defect"), ZeroDivisionError("again"))
    async with working(queue, handler):
        queue.add("ns/a")
        await asyncio.sleep(100)
    assert handler.times == [0, 1, 3]
    first = caplog.records[0]
    assert first.levelno == logging.ERROR
    assert "ns/a" in first.getMessage()
    assert "ZeroDivisionError: a defect" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_cancelled_call_inside_the_handler_does_not_end_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue, observer = make_queue(), Recorded()
    calls = 0

    async def handler(_: str) -> Result:
        nonlocal calls
        calls += 1
        if calls == 1:
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            answer.cancel()
            await answer
        return Done()

    async with working(queue, handler, observer=observer):
        queue.add("a")
        await asyncio.sleep(100)
    assert [label for label, _ in observer.passes] == ["crash", "done"]
    assert "CancelledError" in caplog.text


async def test_one_key_that_always_crashes_leaves_the_others_served() -> None:
    queue = make_queue()
    served = []

    async def handler(key: str) -> Result:
        if key == "bad":
            raise ValueError("a defect")
        served.append(key)
        return Done()

    async with working(queue, handler):
        for key in ("bad", "a", "bad", "b"):
            queue.add(key)
            await asyncio.sleep(10)
    assert served == ["a", "b"]


# Concurrency.


async def test_as_many_keys_are_worked_on_at_once_as_there_are_workers() -> None:
    queue, observer = make_queue(), Recorded()

    async def handler(_: str) -> Result:
        await asyncio.sleep(10)
        return Done()

    async with working(queue, handler, count=3, observer=observer):
        for key in "abcdefg":
            queue.add(key)
        await asyncio.sleep(25)
        assert observer.active == 1
        assert len(observer.passes) == 6
    assert observer.most_active == 3
    assert observer.active == 0


async def test_one_key_is_worked_on_by_one_worker_at_a_time() -> None:
    queue, observer = make_queue(), Recorded()

    async def handler(_: str) -> Result:
        await asyncio.sleep(1)
        return Done()

    async with working(queue, handler, count=4, observer=observer):
        for _ in range(100):
            queue.add("a")
            await asyncio.sleep(0.1)
        await asyncio.sleep(10)
    assert observer.most_active == 1
    assert len(observer.passes) == 11  # one each second, and one for what was added during the last


async def test_a_handler_that_never_waits_does_not_keep_the_loop_from_others() -> None:
    queue = make_queue()

    async def handler(_: str) -> Result:
        return Done(requeue_after=0)

    async with working(queue, handler):
        queue.add("a")
        for _ in range(100):
            await asyncio.sleep(0)


async def test_the_observer_learns_label_and_duration_of_each_pass() -> None:
    queue, observer = make_queue(), Recorded()
    script = Script(Retry(OSError("away")), ValueError("a defect"), Done(requeue_after=1), Done())

    async def handler(key: str) -> Result:
        await asyncio.sleep(2)
        return await script(key)

    async with working(queue, handler, observer=observer):
        queue.add("a")
        await asyncio.sleep(100)
    assert [label for label, _ in observer.passes] == ["retry", "crash", "requeued", "done"]
    assert [seconds for _, seconds in observer.passes] == pytest.approx([2, 2, 2, 2])


@pytest.mark.parametrize(
    "outcome", [Retry(OSError("no answer")), Done(requeue_after=0)], ids=["and fail", "and have more to do"]
)
async def test_a_thousand_keys_that_take_long_hold_up_neither_a_sound_one_nor_a_mended_one_and_have_their_turns(
    outcome: Result,
) -> None:
    queue = WorkQueue[str](ExponentialBackoff(base_seconds=0.25, cap_seconds=30), slow_at_once=48)
    slow = {f"slow-{number}" for number in range(1000)}
    taken: list[str] = []
    tries: dict[str, list[float]] = {}
    served = asyncio.Event()

    async def handler(key: str) -> Result:
        taken.append(key)
        tries.setdefault(key, []).append(now())
        if key in slow:
            await asyncio.sleep(10)
            return outcome
        served.set()
        return Done()

    async def picks_before(key: str) -> int:
        queue.add(key)
        position = len(taken)
        served.clear()
        await served.wait()
        return taken.index(key, position) - position

    async with working(queue, handler, count=64):
        for key in slow:
            queue.add(key)
        await asyncio.sleep(250)  # 64 at once for 10 s each: by now it is known of each that it is slow
        assert tries.keys() == slow
        for _ in range(100):
            queue.add("slow-0")  # it has news all the time
            since = now()
            assert await picks_before("sound") <= 4
            assert now() == since
            await asyncio.sleep(7)
        for number in range(1, 20):
            key = f"slow-{number}"
            slow.remove(key)
            queue.renew(key)
            since = now()
            assert await picks_before(key) <= 4
            # Unless it is just being tried, when the news wait for the end of that.
            assert now() - since <= 10
            await asyncio.sleep(7)

    # 48 at once for 10 s each: a round takes 210 s, and no pause of the back-off is longer than 30 s.
    for key in slow:
        times = tries[key]
        assert max(after - before for before, after in itertools.pairwise(times)) < 250
    assert len(tries["slow-0"]) <= max(len(tries[key]) for key in slow - {"slow-0"}) + 1


# Ending.


async def test_idle_workers_end_at_once_when_the_queue_is_shut_down() -> None:
    queue = make_queue()
    async with working(queue, Script(), count=4, grace_seconds=100) as workers:
        await asyncio.sleep(1)
        queue.shut_down()
        await workers
    assert now() == 1


async def test_a_worker_finishes_its_key_within_the_grace_period_and_takes_no_other() -> None:
    queue, observer = make_queue(), Recorded()

    async def handler(_: str) -> Result:
        await asyncio.sleep(5)
        return Done(requeue_after=60)

    async with working(queue, handler, grace_seconds=10, observer=observer) as workers:
        queue.add("a")
        queue.add("b")
        await asyncio.sleep(1)
        queue.shut_down()
        await workers
    assert now() == 5
    assert observer.passes == [("requeued", 5)]
    assert len(queue) == 1


async def test_a_pass_that_outlasts_the_grace_period_is_cut_off_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue, observer = make_queue(), Recorded()

    async def handler(_: str) -> Result:
        await asyncio.sleep(1000)
        return Done()

    async with working(queue, handler, grace_seconds=10, observer=observer) as workers:
        queue.add("ns/slow")
        await asyncio.sleep(1)
        queue.shut_down()
        await workers
    assert now() == 11
    assert observer.passes == [("cancelled", 11)]
    assert queue.statistics().processing == 0
    assert "ns/slow: reconciliation cancelled after 11.0 s" in caplog.text


async def test_cancelled_workers_leave_their_key_to_their_successors() -> None:
    queue, handler = make_queue(), Script()

    async def forever(_: str) -> Result:
        await asyncio.sleep(10_000)
        return Done()

    workers = asyncio.create_task(run_workers(queue, forever, count=2, grace_seconds=10))
    queue.add("a")
    await asyncio.sleep(1)
    workers.cancel()
    with pytest.raises(asyncio.CancelledError):
        await workers
    assert now() == 1
    async with working(queue, handler):
        await asyncio.sleep(1)
    assert [key for key, _ in handler.calls] == ["a"]


async def test_a_worker_that_dies_of_a_defect_of_its_own_is_heard_of() -> None:
    class Broken(Recorded):
        def started(self) -> None:
            raise ZeroDivisionError("a broken observer")

    queue = make_queue()
    queue.add("a")
    with pytest.raises(ExceptionGroup) as caught:
        await run_workers(queue, Script(), count=2, grace_seconds=10, observer=Broken())
    assert caught.group_contains(ZeroDivisionError, match="a broken observer")


async def test_no_workers_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        await run_workers(make_queue(), Script(), count=0, grace_seconds=10)
