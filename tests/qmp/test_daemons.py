"""Calls that may hang: as many at once as there may be threads, and none that nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from harness.wait import until
from vcpuset.qmp import files
from vcpuset.qmp.daemons import DaemonThreads


async def test_no_more_threads_are_made_than_there_may_be_and_who_comes_later_gets_one_that_is_free() -> None:
    threads = DaemonThreads(2, "few")
    going, release = set[threading.Thread](), threading.Semaphore(0)

    def hang() -> threading.Thread:
        going.add(threading.current_thread())
        assert release.acquire(timeout=60)
        return threading.current_thread()

    calls = [asyncio.create_task(threads.run(hang)) for _ in range(5)]
    await until(lambda: len(going) == 2, 60, "two calls to hang")
    release.release(5)
    assert set(await asyncio.gather(*calls)) == going
    assert len(going) == 2
    assert all(each.daemon for each in going), "the end of the process does not wait for them"


async def test_a_call_that_is_given_up_while_it_waits_for_a_thread_is_never_made() -> None:
    threads = DaemonThreads(1, "one")
    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hang() -> bool:
        loop.call_soon_threadsafe(begun.set)
        return release.wait(60)

    first = asyncio.create_task(threads.run(hang))
    await begun.wait()
    made: list[str] = []
    given_up = asyncio.create_task(threads.run(lambda: made.append("given up")))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    release.set()
    assert await first
    await threads.run(lambda: made.append("wanted"))
    assert made == ["wanted"]


async def test_what_a_call_raises_is_raised_where_it_is_awaited_and_its_thread_goes_on() -> None:
    threads = DaemonThreads(1, "one")

    def fail() -> None:
        raise OSError("no such name")

    for _ in range(2):
        with pytest.raises(OSError, match="no such name"):
            await threads.run(fail)
    assert await threads.run(lambda: "answer") == "answer"


async def test_before_the_loop_ends_a_result_that_is_no_longer_awaited_can_be_discarded() -> None:
    discarded, started, release = list[str](), threading.Event(), threading.Event()

    def late(_: files.Place) -> str:
        started.set()
        assert release.wait(timeout=60)
        return "a socket"

    call = asyncio.create_task(files.call("/lane", "/lane/path", late, discarded.append))
    await until(started.is_set, 60, "the call")
    call.cancel()
    await asyncio.wait({call})
    await files.settle(0.01)
    assert discarded == [], "a call that hangs does not delay the end for longer"
    release.set()
    await files.settle(60)
    assert discarded == ["a socket"]
