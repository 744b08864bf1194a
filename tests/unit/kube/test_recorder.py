"""Kubernetes Events on virtual time: what is counted together, and what one set may have.

`tests/api/test_events.py` has the same recorder before a real API server; here hours pass.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import pytest

from unit.kube.events import Server, a_set, record, running, stopped_after
from vcpuset.kube import recorder as recorder_module
from vcpuset.kube.recorder import BURST, REFILL_SECONDS, SERIES_SECONDS, WRITE_SECONDS, Recorder

__all__: list[str] = []

pytestmark = pytest.mark.looptime


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged as a warning so far."""
    caplog.set_level(logging.INFO, "vcpuset")
    return lambda: [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# --- repeats ----------------------------------------------------------------------------------------------------------


async def test_events_that_differ_in_their_note_alone_are_one_and_the_first_note_stays() -> None:
    server = Server()
    async with running(server) as recorder:
        for number in range(5):
            record(recorder, a_set(), note=f"tried again at 12:0{number}")
            await asyncio.sleep(20)
        await asyncio.sleep(2 * WRITE_SECONDS)

    assert server.counts() == {"tried again at 12:00": 5}


@pytest.mark.parametrize("other", ["set", "type", "reason", "action"])
async def test_events_of_another_set_type_reason_or_action_are_others(other: str) -> None:
    server = Server()
    async with running(server) as recorder:
        record(recorder, a_set(), note="one")
        recorder.record(
            a_set(1 if other == "set" else 0),
            type="Warning" if other == "type" else "Normal",
            reason="Unplugging" if other == "reason" else "Plugging",
            action="Connect" if other == "action" else "Reconcile",
            note="two",
        )
        await asyncio.sleep(SERIES_SECONDS)

    assert server.counts() == {"one": 1, "two": 1}


async def test_the_same_about_a_changed_spec_is_no_repeat() -> None:
    server = Server()
    async with running(server) as recorder:
        record(recorder, a_set(generation=1), note="2 vCPUs")
        record(recorder, a_set(generation=1), note="2 vCPUs again")
        await asyncio.sleep(1)
        record(recorder, a_set(generation=1), note="2 vCPUs once more")
        record(recorder, a_set(generation=2), note="4 vCPUs")
        await asyncio.sleep(SERIES_SECONDS)

    assert server.counts() == {"2 vCPUs": 3, "4 vCPUs": 1}, "the count of the one before is written all the same"


async def test_repeats_that_come_before_the_event_is_posted_are_in_it() -> None:
    server = Server()
    recorder = Recorder(server)
    for _ in range(7):
        record(recorder, a_set())
    await stopped_after(recorder, 1)

    assert server.counts() == {"2 of 4 vCPUs": 7}
    assert [method for _, method, _ in server.requests] == ["POST"]


async def test_what_happens_while_a_request_is_under_way_is_counted() -> None:
    class Slow(Server):
        async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
            await super().post_event(namespace, event)
            await asyncio.sleep(1)

        async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
            await super().patch_event(namespace, name, patch)
            await asyncio.sleep(1)

    server = Slow()
    async with running(server) as recorder:
        record(recorder, a_set())
        await asyncio.sleep(0.5)
        record(recorder, a_set())
        await asyncio.sleep(1 + WRITE_SECONDS)  # a second after posting it, its count is due
        assert server.counts() == {"2 of 4 vCPUs": 2}
        assert len(server.times("PATCH")) == 1
        record(recorder, a_set())
        await asyncio.sleep(2 * WRITE_SECONDS)

    assert server.counts() == {"2 of 4 vCPUs": 3}


async def test_a_pause_ends_a_series_and_its_last_count_is_written() -> None:
    server = Server()
    async with running(server) as recorder:
        record(recorder, a_set(), note="first")
        await asyncio.sleep(1)
        record(recorder, a_set(), note="repeat")
        await asyncio.sleep(SERIES_SECONDS + 1)
        record(recorder, a_set(), note="second")
        await asyncio.sleep(1)

    assert server.counts() == {"first": 2, "second": 1}


async def test_a_count_that_goes_on_to_grow_is_written_once_a_minute() -> None:
    server = Server()
    async with running(server) as recorder:
        for _ in range(3600):
            record(recorder, a_set())
            await asyncio.sleep(1)
        await asyncio.sleep(2 * WRITE_SECONDS)

    assert server.counts() == {"2 of 4 vCPUs": 3600}
    patches = server.times("PATCH")
    assert round(patches[0]) == 61, "a minute after the first repeat"
    assert all(after - before >= WRITE_SECONDS for before, after in itertools.pairwise(patches))
    assert len(patches) == pytest.approx(60, abs=1)


async def test_a_count_is_written_with_the_time_of_the_last_occurrence() -> None:
    server = Server()
    async with running(server) as recorder:
        for _ in range(3):
            record(recorder, a_set())
            await asyncio.sleep(1)
        await asyncio.sleep(2 * WRITE_SECONDS)

    (event,) = server.events.values()
    assert event["series"]["count"] == 3
    times = [datetime.fromisoformat(each) for each in (event["eventTime"], event["series"]["lastObservedTime"])]
    assert times == sorted(times)


async def test_a_series_whose_event_has_expired_begins_again() -> None:
    server = Server()
    async with running(server) as recorder:
        record(recorder, a_set(), note="first")
        await asyncio.sleep(1)
        server.events.clear()
        record(recorder, a_set(), note="repeat")
        await asyncio.sleep(2 * WRITE_SECONDS)
        record(recorder, a_set(), note="second")
        await asyncio.sleep(1)

    assert server.counts() == {"second": 1}


async def test_events_are_posted_in_the_order_in_which_they_were_recorded() -> None:
    server = Server()
    recorder = Recorder(server)
    for number in range(20):
        record(recorder, a_set(number), note=f"set {number}")
    await stopped_after(recorder, 10)

    assert list(server.counts()) == [f"set {number}" for number in range(20)]


# --- one set among many -----------------------------------------------------------------------------------------------


async def test_a_set_gets_a_burst_of_new_events_and_then_one_in_a_while(warnings: Callable[[], list[str]]) -> None:
    server = Server()
    async with running(server) as recorder:
        for number in range(100):
            record(recorder, a_set(), reason=f"Reason{number}", note=f"note {number}")
        await asyncio.sleep(10)
        assert len(server.events) == BURST
        assert recorder.throttled == 100 - BURST

        await asyncio.sleep(REFILL_SECONDS)
        for number in range(100, 110):
            record(recorder, a_set(), reason=f"Reason{number}", note=f"note {number}")
        await asyncio.sleep(10)

    assert len(server.events) == BURST + 1
    assert recorder.throttled == 100 - BURST + 9
    assert recorder.dropped == 0
    (warning,) = warnings()
    assert warning.startswith("default/web-0: dropping Events: rate limit exceeded (burst 25, then one every 300 s);")
    assert warning.endswith("first dropped: Reason25: note 25")


async def test_tokens_come_back_one_in_a_while_and_never_more_than_a_burst() -> None:
    server = Server()
    numbers = itertools.count()

    async def posted(recorder: Recorder, after: float, tries: int) -> int:
        """How many of so many new Events about one set are posted, if they come this much later."""
        await asyncio.sleep(after)
        before = len(server.events)
        for _ in range(tries):
            record(recorder, a_set(), reason=f"Reason{next(numbers)}")
        await asyncio.sleep(10)
        return len(server.events) - before

    async with running(server) as recorder:
        assert await posted(recorder, 0, 1) == 1
        assert await posted(recorder, 1_000_000, 100) == BURST
        assert await posted(recorder, REFILL_SECONDS - 20, 5) == 0
        assert await posted(recorder, 5, 5) == 1
        assert await posted(recorder, 2.5 * REFILL_SECONDS, 5) == 2


async def test_that_a_set_has_too_many_is_logged_once_for_each_set_and_episode(
    warnings: Callable[[], list[str]],
) -> None:
    server = Server()
    async with running(server) as recorder:
        for episode in range(2):
            for number in range(100):
                for each in range(2):
                    record(recorder, a_set(each), reason=f"Reason{episode}-{number}")
            await asyncio.sleep(BURST * REFILL_SECONDS)

    assert [each.partition(":")[0] for each in warnings()] == ["default/web-0", "default/web-1"] * 2
    assert recorder.throttled == 2 * 2 * (100 - BURST)


async def test_counting_needs_no_tokens_and_a_spec_that_never_rests_is_counted_in_the_end() -> None:
    server = Server()
    async with running(server) as recorder:
        for generation in range(100):
            record(recorder, a_set(generation=generation), note=f"generation {generation}")
        await asyncio.sleep(SERIES_SECONDS)

    assert recorder.throttled == 0
    assert len(server.events) == BURST
    assert sum(server.counts().values()) == 100


async def test_a_set_that_is_never_quiet_does_not_push_out_the_events_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder_module, "QUEUE_LIMIT", 40)
    server = Server()
    recorder = Recorder(server)  # nobody posts yet
    for number in range(1, 11):
        record(recorder, a_set(number), note=f"set {number}")
    for number in range(10_000):
        record(recorder, a_set(), reason=f"Reason{number}", note="noise")
    assert recorder.dropped == 0
    await stopped_after(recorder, 10)

    assert {f"set {number}" for number in range(1, 11)} <= server.counts().keys()
    assert len(server.events) == 10 + BURST


async def test_a_full_queue_drops_the_oldest_and_says_so_once_per_episode(
    monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(recorder_module, "QUEUE_LIMIT", 3)
    server = Server()
    recorder = Recorder(server)
    record(recorder, a_set(0), note="set 0")
    record(recorder, a_set(0), note="set 0 again")
    for number in range(1, 10):
        record(recorder, a_set(number), note=f"set {number}")
    assert recorder.dropped == 8, "the first one stood for two"
    assert len(warnings()) == 1
    await stopped_after(recorder, 3600)
    assert server.counts().keys() == {"set 7", "set 8", "set 9"}

    for number in range(10):
        record(recorder, a_set(number))
    assert len(warnings()) == 2


async def test_the_events_of_five_thousand_sets_that_fail_together_are_all_posted_and_counted() -> None:
    sets = [a_set(number) for number in range(5000)]
    server = Server()
    async with running(server) as recorder:
        for _ in range(3):
            for vcpuset in sets:
                record(recorder, vcpuset, note=vcpuset.name)
            await asyncio.sleep(200)
        await asyncio.sleep(600)
        assert set(server.counts().values()) == {3}
        assert len(server.events) == 5000
        assert (recorder.dropped, recorder.throttled) == (0, 0)
        times = [at for at, _, _ in server.requests]
        assert all(after - before >= 0.049 for before, after in itertools.pairwise(times))


async def test_a_series_that_is_forgotten_for_others_begins_again_and_its_count_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder_module, "REMEMBERED", 50)
    server = Server()
    async with running(server) as recorder:
        for number in range(500):
            for _ in range(2):
                record(recorder, a_set(number), note=f"set {number}")
                await asyncio.sleep(0.1)
        record(recorder, a_set(0), note="set 0 again")
        record(recorder, a_set(499))
        await asyncio.sleep(2 * WRITE_SECONDS)

    assert server.counts() == {f"set {number}": 2 for number in range(499)} | {"set 499": 3, "set 0 again": 1}


async def test_a_set_that_was_quiet_while_many_others_were_not_has_its_burst_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder_module, "REMEMBERED", 50)
    server = Server()
    async with running(server) as recorder:
        for reason in range(BURST):
            record(recorder, a_set(), reason=f"Reason{reason}")
        for number in range(1, 51):
            record(recorder, a_set(number))
        for reason in range(BURST):
            record(recorder, a_set(), reason=f"Other{reason}")
        await asyncio.sleep(30)

    assert len(server.events) == BURST + 50 + BURST
    assert recorder.throttled == 0


async def test_neither_new_events_nor_counts_wait_for_the_end_of_the_others() -> None:
    server = Server()
    async with running(server) as recorder:
        for number in range(100):
            record(recorder, a_set(number), note=f"old {number}")
        await asyncio.sleep(10)
        for number in range(100):
            record(recorder, a_set(number))
        await asyncio.sleep(WRITE_SECONDS)  # the counts are due about now
        for number in range(100, 300):
            record(recorder, a_set(number), note=f"new {number}")
        before = len(server.requests)
        await asyncio.sleep(5)

    methods = [method for _, method, _ in server.requests[before:]]
    assert methods.count("PATCH") == pytest.approx(methods.count("POST"), abs=5)
