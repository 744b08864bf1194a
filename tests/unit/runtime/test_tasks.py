"""Background tasks: their end is always seen."""

from __future__ import annotations

import asyncio

import pytest

from vcpuset.runtime.tasks import TaskEndedError, TaskOwner

__all__: list[str] = []

pytestmark = pytest.mark.looptime


def now() -> float:
    return asyncio.get_running_loop().time()


async def returns_after(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def fails_after(seconds: float) -> None:
    await asyncio.sleep(seconds)
    raise OSError("watch broke")


async def test_a_failing_task_is_reported_with_its_name_and_cause(caplog: pytest.LogCaptureFixture) -> None:
    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(fails_after(100), "watch")
        with pytest.raises(TaskEndedError, match=r"'watch' failed.*watch broke") as caught:
            await owner.wait()
    assert now() == 100
    assert isinstance(caught.value.__cause__, OSError)
    assert "Traceback" in caplog.text


async def test_a_task_that_should_run_for_ever_must_not_return() -> None:
    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(returns_after(100), "watch")
        with pytest.raises(TaskEndedError, match="'watch' returned"):
            await owner.wait()
    assert now() == 100


async def test_a_task_that_ends_by_a_cancellation_from_elsewhere_is_reported() -> None:
    async def awaits_something_cancelled() -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer.cancel()
        await answer

    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(awaits_something_cancelled(), "watch")
        with pytest.raises(TaskEndedError, match="'watch' was cancelled"):
            await owner.wait()


async def test_an_end_before_anyone_waits_is_not_missed() -> None:
    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(fails_after(1), "watch")
        await asyncio.sleep(10)
        with pytest.raises(TaskEndedError, match="watch"):
            await owner.wait()


async def test_of_several_ends_the_first_is_raised_and_all_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(fails_after(2), "second")
        owner.spawn(fails_after(1), "first")
        await asyncio.sleep(10)
        with pytest.raises(TaskEndedError, match="'first'"):
            await owner.wait()
    assert "'first'" in caplog.text
    assert "'second'" in caplog.text


async def test_a_task_that_is_told_to_end_can_be_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    stop = asyncio.Event()

    async def winds_up() -> None:
        await stop.wait()
        await asyncio.sleep(5)

    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(winds_up(), "workers")
        await asyncio.sleep(1)
        stop.set()
        await owner.finish("workers")
        assert now() == 6
        await owner.finish("workers")  # over already
    assert now() == 6
    assert not caplog.records


async def test_a_task_that_fails_when_told_to_end_is_reported() -> None:
    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(fails_after(5), "workers")
        await owner.finish("workers")
        with pytest.raises(TaskEndedError, match="'workers' failed"):
            await owner.wait()


async def test_a_name_can_be_used_again_once_its_task_is_over() -> None:
    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(returns_after(1), "watch")
        with pytest.raises(ValueError, match="'watch' cannot start"):
            owner.spawn(returns_after(1), "watch")
        await owner.finish("watch")
        owner.spawn(returns_after(1), "watch")
        with pytest.raises(TaskEndedError, match="'watch' returned"):
            await owner.wait()


async def test_closing_cancels_all_tasks_and_waits_for_them(caplog: pytest.LogCaptureFixture) -> None:
    cleaned_up = []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(10_000)
        finally:
            await asyncio.sleep(2)
            cleaned_up.append(name)

    async with TaskOwner(close_seconds=10) as owner:
        for name in ("a", "b"):
            owner.spawn(work(name), name)
        await asyncio.sleep(1)
    assert sorted(cleaned_up) == ["a", "b"]
    assert now() == 3
    assert not caplog.records


async def test_a_task_that_fails_while_it_is_closed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(10_000)
        finally:
            raise OSError("clean-up broke")

    async with TaskOwner(close_seconds=10) as owner:
        owner.spawn(work(), "watch")
        await asyncio.sleep(1)
    assert "'watch' failed" in caplog.text
    assert "clean-up broke" in caplog.text


async def test_closing_does_not_wait_for_ever_and_names_the_task_that_does_not_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    owner = TaskOwner(close_seconds=10)
    owner.spawn(stubborn(), "stubborn")
    owner.spawn(returns_after(1000), "obedient")
    await asyncio.sleep(1)
    await owner.aclose()
    assert now() == 11
    (record,) = caplog.records
    assert "'stubborn' has not ended 10 s after it was cancelled" in record.getMessage()
    assert "test_tasks.py" in record.getMessage()
    release.set()
    await owner.finish("stubborn")


async def test_a_closing_owner_refuses_new_tasks() -> None:
    owner = TaskOwner(close_seconds=10)
    await owner.aclose()
    with pytest.raises(RuntimeError, match="'late' cannot start"):
        owner.spawn(returns_after(1), "late")


async def test_tasks_are_closed_when_the_block_fails() -> None:
    cleaned_up = False

    async def work() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.sleep(10_000)
        finally:
            cleaned_up = True

    async def block() -> None:
        async with TaskOwner(close_seconds=10) as owner:
            owner.spawn(work(), "watch")
            await asyncio.sleep(1)
            raise ValueError("the block")

    with pytest.raises(ValueError, match="the block"):
        await block()
    assert cleaned_up
