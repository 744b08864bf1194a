"""Which keys of a work queue come first: renewed ones, then the others, and slow ones last, so that none starves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from unit.runtime.queues import everything_runs, failed, make_queue, nothing_comes, slow_keys, succeeded
from vcpuset.runtime.workqueue import SLOW_SECONDS, WorkQueue

__all__: list[str] = []

pytestmark = pytest.mark.looptime


@pytest.mark.parametrize("outcome", [failed, succeeded, lambda *_: None], ids=["failed", "succeeded", "cut off"])
async def test_keys_whose_passes_took_long_let_three_others_pass_and_then_one_of_them_is_taken(
    outcome: Callable[[WorkQueue[str], str], None],
) -> None:
    queue = make_queue(slow_at_once=9)
    await slow_keys(queue, "ABC", outcome)
    for key in "ABCabcdefg":
        queue.add(key)
    assert [await queue.get() for _ in range(10)] == list("abcAdefBgC")


async def test_only_so_many_slow_keys_are_in_work_at_once_and_the_next_one_comes_when_one_is_given_back() -> None:
    queue = make_queue(slow_at_once=2)
    await slow_keys(queue, "ABC")
    for key in "ABC":
        queue.add(key)
    assert [await queue.get(), await queue.get()] == ["A", "B"]
    getter = asyncio.create_task(queue.get())
    await everything_runs()
    assert not getter.done()
    assert len(queue) == 1
    queue.done("A")
    async with asyncio.timeout(100):
        assert await getter == "C"


async def test_a_slow_key_added_several_times_before_its_turn_comes_once_and_gets_no_deadline() -> None:
    queue = make_queue()
    await slow_keys(queue, "A")
    before = queue.statistics().adds_total
    queue.add("A")
    queue.add("A")
    queue.add_after("A", 100)
    assert queue.statistics().adds_total == before + 1
    assert queue.statistics().delayed == 0
    queue.done(await queue.get())
    assert await nothing_comes(queue, 1000)


async def test_a_get_cancelled_after_it_was_woken_passes_a_slow_key_on() -> None:
    queue = make_queue()
    await slow_keys(queue, "A")
    first = asyncio.create_task(queue.get())
    second = asyncio.create_task(queue.get())
    await everything_runs()
    queue.add("A")  # wakes the first, which has not run yet
    first.cancel()
    async with asyncio.timeout(0.5):  # before its back-off would bring it once more
        assert await second == "A"


async def test_other_keys_come_while_slow_ones_have_to_wait() -> None:
    queue = make_queue(slow_at_once=1)
    await slow_keys(queue, "AB")
    for key in "AB":
        queue.add(key)
    assert await queue.get() == "A"
    getter = asyncio.create_task(queue.get())
    await everything_runs()
    queue.add("a")
    async with asyncio.timeout(100):
        assert await getter == "a"


async def test_news_of_a_slow_key_do_not_make_it_fast() -> None:
    queue = make_queue()
    await slow_keys(queue, "A")
    for key in "Aab":
        queue.add(key)
    queue.add("A")
    assert [await queue.get() for _ in range(3)] == ["a", "b", "A"]
    queue.add("A")  # while it is in work
    await asyncio.sleep(SLOW_SECONDS)
    queue.done("A")
    queue.add("c")
    assert [await queue.get(), await queue.get()] == ["c", "A"]


@pytest.mark.parametrize("outcome", [failed, succeeded], ids=["fails", "succeeds"])
async def test_a_slow_key_whose_pass_soon_ends_waits_with_the_others_again(
    outcome: Callable[[WorkQueue[str], str], None],
) -> None:
    queue = make_queue()
    await slow_keys(queue, "A")
    queue.add("A")
    assert await queue.get() == "A"
    outcome(queue, "A")
    queue.done("A")
    for key in "Aab":
        queue.add(key)
    assert await queue.get() == "A"


async def test_a_key_that_is_added_in_a_pass_that_takes_long_goes_on_behind_the_others() -> None:
    queue = make_queue()
    queue.add("A")
    assert await queue.get() == "A"
    await asyncio.sleep(SLOW_SECONDS)
    queue.add_after("A", 0)
    queue.forget("A")
    queue.done("A")
    for key in "ab":
        queue.add(key)
    assert [await queue.get() for _ in range(3)] == ["a", "b", "A"]
    assert queue.failures("A") == 0


async def test_a_success_does_not_make_a_key_that_waits_fast() -> None:
    queue = make_queue()
    await slow_keys(queue, "A")
    queue.add("A")
    queue.forget("A")
    queue.add("a")
    assert [await queue.get(), await queue.get()] == ["a", "A"]


async def test_a_slow_key_that_is_renewed_comes_before_all_others() -> None:
    queue = make_queue(slow_at_once=1)
    await slow_keys(queue, "ABC")
    for key in "ABCa":
        queue.add(key)
    queue.renew("C")
    queue.add("b")
    assert [await queue.get() for _ in range(4)] == ["C", "a", "b", "A"]
    assert queue.failures("C") == 0


async def test_renewed_keys_come_first_but_of_four_keys_one_is_another() -> None:
    queue = make_queue()
    for key in "abABCDEFG":
        if key.isupper():
            queue.renew(key)
        queue.add(key)
    assert "".join([await queue.get() for _ in range(9)]) == "ABCaDEFbG"


async def test_slow_keys_do_not_count_as_waiting() -> None:
    queue = make_queue()
    await slow_keys(queue, "AB")
    for key in "ABabC":
        if key == "C":
            queue.renew(key)
        queue.add(key)
    assert (queue.waiting, len(queue)) == (3, 5)


async def test_a_key_comes_first_once_for_each_time_that_it_was_renewed() -> None:
    queue = make_queue()
    queue.renew("A")
    for key in "aA":
        queue.add(key)
    assert await queue.get() == "A"
    queue.done("A")
    queue.add("A")
    assert [await queue.get(), await queue.get()] == ["a", "A"]


async def test_a_key_that_is_renewed_while_it_is_in_work_comes_first_after_that() -> None:
    queue = make_queue()
    queue.add("A")
    await queue.get()
    queue.add("a")
    queue.renew("A")
    queue.add("A")
    queue.done("A")
    assert [await queue.get(), await queue.get()] == ["A", "a"]


async def test_a_slow_key_that_is_renewed_wakes_a_get_that_could_not_take_it() -> None:
    queue = make_queue(slow_at_once=1)
    await slow_keys(queue, "AB")
    for key in "AB":
        queue.add(key)
    await queue.get()
    getter = asyncio.create_task(queue.get())
    await everything_runs()
    queue.renew("B")
    async with asyncio.timeout(100):
        assert await getter == "B"


async def test_a_long_pass_of_what_was_renewed_meanwhile_leaves_the_key_with_the_others() -> None:
    queue = make_queue()
    await slow_keys(queue, "A")
    queue.add("A")
    assert await queue.get() == "A"
    await asyncio.sleep(SLOW_SECONDS)
    queue.renew("A")  # its author has mended it
    queue.add("A")
    queue.add_rate_limited("A")
    queue.done("A")
    queue.add("a")
    assert [await queue.get(), await queue.get()] == ["A", "a"]
    # The next pass is one of the new task.
    await asyncio.sleep(SLOW_SECONDS)
    queue.add_rate_limited("A")
    queue.done("A")
    for key in "Ab":
        queue.add(key)
    assert [await queue.get(), await queue.get()] == ["b", "A"]


async def test_a_queue_without_room_for_slow_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="slow_at_once 0"):
        make_queue(slow_at_once=0)


# Shutting down.
