"""The work queue's contract, on virtual time: a wait of 100 s takes no time here."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace

import pytest

from unit.runtime.queues import Recorded, everything_runs, make_queue, nothing_comes, now, slow_keys
from vcpuset.runtime.workqueue import QueueShutDown, QueueStatistics

__all__: list[str] = []

pytestmark = pytest.mark.looptime

IDLE = QueueStatistics()


async def test_keys_come_in_the_order_in_which_they_were_added() -> None:
    queue = make_queue()
    for key in "cab":
        queue.add(key)
    assert [await queue.get() for _ in range(3)] == ["c", "a", "b"]


async def test_keys_can_be_added_before_anyone_waits_for_them() -> None:
    queue = make_queue()
    queue.add("a")
    assert len(queue) == 1
    assert await queue.get() == "a"
    assert len(queue) == 0


async def test_a_waiting_get_is_woken_by_an_add() -> None:
    queue = make_queue()
    getter = asyncio.create_task(queue.get())
    await everything_runs()
    assert not getter.done()
    queue.add("a")
    assert await getter == "a"


async def test_a_key_added_several_times_before_its_turn_comes_once_and_keeps_its_place() -> None:
    queue = make_queue()
    for key in ("a", "b", "a", "a"):
        queue.add(key)
    assert [await queue.get(), await queue.get()] == ["a", "b"]
    queue.done("a")
    queue.done("b")
    assert await nothing_comes(queue, 100)


async def test_a_key_in_work_is_not_handed_out_to_another_worker() -> None:
    queue = make_queue()
    queue.add("a")
    await queue.get()
    queue.add("a")
    assert await nothing_comes(queue, 100)


async def test_a_key_added_while_in_work_comes_again_once_given_back() -> None:
    queue = make_queue()
    queue.add("a")
    await queue.get()
    queue.add("a")
    queue.add("a")
    getter = asyncio.create_task(queue.get())
    await everything_runs()
    queue.done("a")
    assert await getter == "a"
    queue.done("a")
    assert await nothing_comes(queue, 100)


async def test_a_busy_key_queues_up_behind_the_others() -> None:
    queue = make_queue()
    queue.add("busy")
    await queue.get()
    queue.add("busy")
    queue.add("other")
    queue.done("busy")
    assert [await queue.get(), await queue.get()] == ["other", "busy"]


async def test_each_of_many_waiting_gets_receives_one_key() -> None:
    queue = make_queue()
    getters = [asyncio.create_task(queue.get()) for _ in range(3)]
    await everything_runs()
    for key in "abc":
        queue.add(key)
    assert await asyncio.gather(*getters) == ["a", "b", "c"]


@pytest.mark.parametrize("taken", [False, True], ids=["never taken", "done before"])
async def test_giving_back_a_key_that_is_not_in_work_is_an_error(taken: bool) -> None:
    queue = make_queue()
    queue.add("a")
    if taken:
        queue.done(await queue.get())
    with pytest.raises(ValueError, match="'a'"):
        queue.done("a")


def test_a_queue_cannot_be_made_without_an_event_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        make_queue()


# Cancelled gets.


async def test_a_cancelled_get_takes_nothing() -> None:
    queue = make_queue()
    getter = asyncio.create_task(queue.get())
    await everything_runs()
    getter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await getter
    queue.add("a")
    async with asyncio.timeout(100):
        assert await queue.get() == "a"


async def test_a_get_cancelled_after_it_was_woken_passes_the_key_on() -> None:
    queue = make_queue()
    first = asyncio.create_task(queue.get())
    second = asyncio.create_task(queue.get())
    await everything_runs()
    queue.add("a")  # wakes the first, which has not run yet
    first.cancel()
    async with asyncio.timeout(100):
        assert await second == "a"
    assert first.cancelled()


async def test_a_key_whose_woken_get_is_cancelled_stays_for_a_later_get() -> None:
    queue = make_queue()
    getter = asyncio.create_task(queue.get())
    await everything_runs()
    queue.add("a")
    getter.cancel()
    await everything_runs()
    assert len(queue) == 1
    assert await queue.get() == "a"


async def test_a_key_added_between_a_cancellation_and_its_effect_goes_to_another() -> None:
    queue = make_queue()
    first = asyncio.create_task(queue.get())
    second = asyncio.create_task(queue.get())
    await everything_runs()
    first.cancel()  # it will learn of this when it runs, which is after the add
    queue.add("a")
    async with asyncio.timeout(100):
        assert await second == "a"
    assert first.cancelled()


async def test_cancelled_gets_leave_nothing_behind() -> None:
    def futures() -> int:
        gc.collect()
        return sum(isinstance(thing, asyncio.Future) for thing in gc.get_objects())

    queue = make_queue()
    before = futures()
    for _ in range(100):
        getter = asyncio.create_task(queue.get())
        await everything_runs()
        getter.cancel()
        await everything_runs()
    del getter
    assert futures() < before + 10


# Delays.


async def test_a_delayed_key_comes_when_its_time_has_come() -> None:
    queue = make_queue()
    queue.add_after("a", 100)
    assert len(queue) == 0
    assert await queue.get() == "a"
    assert now() == 100


@pytest.mark.parametrize("delay", [0, -1])
async def test_a_delay_of_nothing_adds_at_once(delay: float) -> None:
    queue = make_queue()
    queue.add_after("a", delay)
    assert len(queue) == 1


@pytest.mark.parametrize("delays", [(10, 100), (100, 10)], ids=["earlier first", "later first"])
async def test_of_two_deadlines_the_earlier_wins_and_the_later_is_dropped(
    delays: tuple[float, float],
) -> None:
    queue = make_queue()
    for delay in delays:
        queue.add_after("a", delay)
    queue.done(await queue.get())
    assert now() == 10
    assert await nothing_comes(queue, 1000)


async def test_delayed_keys_come_in_the_order_of_their_deadlines() -> None:
    queue = make_queue()
    for key, delay in {"late": 30, "early": 10, "middle": 20}.items():
        queue.add_after(key, delay)
    assert [(await queue.get(), now()) for _ in range(3)] == [("early", 10), ("middle", 20), ("late", 30)]


async def test_an_add_makes_a_pending_deadline_void() -> None:
    queue = make_queue()
    queue.add_after("a", 100)
    queue.add("a")
    queue.done(await queue.get())
    assert now() == 0
    assert await nothing_comes(queue, 1000)


async def test_a_ready_key_gets_no_deadline() -> None:
    queue = make_queue()
    queue.add("a")
    queue.add_after("a", 100)
    assert queue.statistics().delayed == 0
    queue.done(await queue.get())
    assert await nothing_comes(queue, 1000)


async def test_a_deadline_set_during_a_pass_outlives_the_pass() -> None:
    queue = make_queue()
    queue.add("a")
    key = await queue.get()
    queue.add_after(key, 100)
    queue.done(key)
    assert await queue.get() == "a"
    assert now() == 100


async def test_a_deadline_that_passes_while_the_key_is_in_work_brings_it_again_afterwards() -> None:
    queue = make_queue()
    queue.add("a")
    key = await queue.get()
    queue.add_after(key, 10)
    await asyncio.sleep(20)
    assert len(queue) == 0
    queue.done(key)
    assert await queue.get() == "a"
    assert now() == 20


async def test_the_newest_pass_alone_decides_when_the_key_is_looked_at_again() -> None:
    queue = make_queue()
    queue.add("a")
    key = await queue.get()
    queue.add_after(key, 10)
    queue.add(key)  # an event during the pass
    queue.done(key)
    key = await queue.get()
    queue.add_after(key, 60)
    queue.done(key)
    await queue.get()
    assert now() == 60


# Failures.


async def test_failures_in_a_row_are_retried_after_growing_delays() -> None:
    queue = make_queue()
    queue.add("a")
    times = []
    for _ in range(7):
        key = await queue.get()
        times.append(now())
        queue.add_rate_limited(key)
        queue.done(key)
    assert times == [0, 1, 3, 7, 15, 31, 61]
    assert queue.failures("a") == 7


async def test_a_success_ends_the_backoff() -> None:
    queue = make_queue()
    for _ in range(5):
        queue.add_rate_limited("a")
    await queue.get()
    queue.forget("a")
    queue.done("a")
    assert queue.failures("a") == 0
    since = now()
    queue.add_rate_limited("a")
    await queue.get()
    assert now() - since == pytest.approx(1)


async def test_one_keys_failures_do_not_delay_another() -> None:
    queue = make_queue()
    for _ in range(5):
        queue.add_rate_limited("bad")
    assert queue.failures("good") == 0
    queue.add_rate_limited("good")
    assert await queue.get() == "bad"  # its first deadline, 1 s, was the earliest
    assert await queue.get() == "good"
    assert now() == 1


async def test_an_event_during_a_failing_pass_brings_the_key_at_once() -> None:
    queue = make_queue()
    queue.add("a")
    key = await queue.get()
    queue.add(key)
    queue.add_rate_limited(key)
    queue.done(key)
    await queue.get()
    assert now() == 0
    assert queue.failures("a") == 1


# Slow keys.


async def test_a_queue_that_is_shut_down_hands_out_what_is_ready_and_then_raises() -> None:
    queue = make_queue()
    queue.add("a")
    queue.shut_down()
    assert await queue.get() == "a"
    with pytest.raises(QueueShutDown):
        await queue.get()


async def test_shutting_down_wakes_all_waiting_gets() -> None:
    queue = make_queue()
    getters = [asyncio.create_task(queue.get()) for _ in range(3)]
    await everything_runs()
    queue.shut_down()
    async with asyncio.timeout(100):
        results = await asyncio.gather(*getters, return_exceptions=True)
    assert all(isinstance(result, QueueShutDown) for result in results)


async def test_a_queue_that_is_shut_down_refuses_keys_and_ends_timers() -> None:
    queue = make_queue()
    queue.add_after("delayed", 10)
    queue.shut_down()
    queue.add("a")
    queue.add_after("b", 10)
    queue.add_rate_limited("c")
    await asyncio.sleep(100)
    assert queue.statistics() == IDLE


async def test_a_key_added_while_in_work_is_not_lost_by_shutting_down() -> None:
    queue = make_queue()
    queue.add("a")
    key = await queue.get()
    queue.add(key)
    queue.shut_down()
    queue.done(key)
    assert await queue.get() == "a"


async def test_shutting_down_can_be_waited_for_and_repeated() -> None:
    queue = make_queue()
    waiter = asyncio.create_task(queue.wait_shut_down())
    await everything_runs()
    assert not waiter.done()
    assert not queue.shutting_down
    queue.shut_down()
    queue.shut_down()
    async with asyncio.timeout(100):
        await waiter
    assert queue.shutting_down


# Statistics and the observer.


async def test_statistics_tell_what_the_queue_holds() -> None:
    queue = make_queue()
    for key in ("a", "b", "c", "c"):
        queue.add(key)
    queue.add_after("delayed", 100)
    queue.add_rate_limited("failing")
    await queue.get()
    await asyncio.sleep(0.25)
    await queue.get()
    await asyncio.sleep(0.5)
    assert queue.statistics() == QueueStatistics(
        depth=1,
        processing=2,
        delayed=2,
        failing=1,
        adds_total=3,
        retries_total=1,
        longest_running_seconds=0.75,
        unfinished_seconds=1.25,
        longest_still_seconds=0.75,
        untaken_seconds=0.5,
    )


async def test_keys_that_are_taken_one_after_the_other_are_not_untaken_however_long_the_last_of_them_waits() -> None:
    queue = make_queue()
    for number in range(10):
        queue.add(f"key-{number}")
    for _ in range(9):
        await asyncio.sleep(100)
        assert queue.statistics().untaken_seconds == 100
        queue.done(await queue.get())
        assert queue.statistics().untaken_seconds == 0
    queue.done(await queue.get())
    await asyncio.sleep(100)
    assert queue.statistics().untaken_seconds == 0
    queue.add("a")
    await asyncio.sleep(1)
    assert queue.statistics().untaken_seconds == 1


async def test_slow_keys_are_untaken_only_while_one_may_be_taken() -> None:
    queue = make_queue(slow_at_once=1)
    await slow_keys(queue, "AB")
    queue.add("A")
    queue.add("B")
    assert queue.statistics() == replace(IDLE, depth=2, failing=2, adds_total=4, retries_total=2, untaken_seconds=0)
    await asyncio.sleep(10)
    assert queue.statistics().untaken_seconds == 10
    await queue.get()
    await asyncio.sleep(1000)
    assert queue.statistics().depth == 1
    assert queue.statistics().untaken_seconds == 0
    queue.done("A")
    await asyncio.sleep(10)
    assert queue.statistics().untaken_seconds == 1010


async def test_work_that_moves_on_is_long_but_not_still() -> None:
    queue = make_queue()
    queue.add("a")
    queue.add("b")
    await queue.get()
    await queue.get()
    await asyncio.sleep(100)
    queue.touch("a")
    queue.touch("not in work")
    await asyncio.sleep(20)
    assert queue.statistics().longest_running_seconds == 120
    assert queue.statistics().longest_still_seconds == 120

    queue.done("b")

    assert queue.statistics().longest_running_seconds == 120
    assert queue.statistics().longest_still_seconds == 20


async def test_a_key_that_is_taken_again_has_not_moved_yet() -> None:
    queue = make_queue()
    queue.add("a")
    await queue.get()
    await asyncio.sleep(10)
    queue.touch("a")
    queue.done("a")
    queue.add("a")
    await queue.get()
    await asyncio.sleep(30)
    assert queue.statistics().longest_still_seconds == 30


async def test_the_observer_learns_how_long_keys_waited_and_were_worked_on() -> None:
    observer = Recorded()
    queue = make_queue(observer)
    queue.add("a")
    await asyncio.sleep(2)
    key = await queue.get()
    await asyncio.sleep(3)
    queue.add(key)
    await asyncio.sleep(4)
    queue.done(key)
    queue.done(await queue.get())
    assert observer.waits == [2, 4]
    assert observer.works == [7, 0]


async def test_the_time_before_a_deadline_does_not_count_as_waiting() -> None:
    observer = Recorded()
    queue = make_queue(observer)
    queue.add_after("a", 100)
    await queue.get()
    assert observer.waits == [0]


async def test_a_key_that_came_and_went_leaves_nothing_behind() -> None:
    queue = make_queue()
    for number in range(1000):
        queue.add(f"key-{number}")
        key = await queue.get()
        queue.add_rate_limited(key)
        queue.done(key)
        assert await queue.get() == key
        queue.forget(key)
        queue.done(key)
    statistics = queue.statistics()
    assert (statistics.depth, statistics.processing, statistics.delayed, statistics.failing) == (0, 0, 0, 0)
