"""Kubernetes Events while the API server is away, overloaded, or refuses them, on virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from unit.kube.events import Fault, Server, a_set, now, record, running
from vcpuset.domain.errors import APIError, ObjectGone, Rejected
from vcpuset.kube.recorder import GIVE_UP_SECONDS, SERIES_SECONDS, WRITE_SECONDS

__all__: list[str] = []

pytestmark = pytest.mark.looptime


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged as a warning so far."""
    caplog.set_level(logging.INFO, "vcpuset")
    return lambda: [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def away(until: float) -> Fault:
    return lambda _: APIError("POST …: HTTP 503: etcd is away") if now() < until else None


async def test_events_outlast_an_api_server_that_is_away_for_minutes_and_the_log_says_so_once(
    warnings: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    server.fault = away(until=420)
    async with running(server) as recorder:
        for number in range(20):
            record(recorder, a_set(number), note=f"set {number}")
        await asyncio.sleep(300)
        record(recorder, a_set(0), note="a repeat")
        assert server.events == {}
        await asyncio.sleep(300)

    assert len(server.events) == 20
    assert server.counts()["set 0"] == 2
    assert recorder.dropped == 0
    assert warnings() == [
        "posting Events failed, retrying: POST …: HTTP 503: etcd is away",
    ]
    assert caplog.text.count("posting Events succeeds again; lost so far: 0") == 1
    during = [at for at in server.times("POST") if at < 420]
    assert len(during) < 90, "not a flood of requests"


async def test_an_event_outlasts_any_outage_that_is_shorter_than_the_time_to_give_up() -> None:
    server = Server()
    server.fault = away(until=GIVE_UP_SECONDS - 30)
    async with running(server) as recorder:
        record(recorder, a_set())
        await asyncio.sleep(GIVE_UP_SECONDS)

    assert server.counts() == {"2 of 4 vCPUs": 1}
    assert recorder.dropped == 0


async def test_two_outages_that_follow_one_another_are_one_episode(warnings: Callable[[], list[str]]) -> None:
    server = Server()
    server.fault = lambda _: APIError("HTTP 500") if now() % 20 < 10 else None
    async with running(server) as recorder:
        for number in range(600):
            record(recorder, a_set(number))
            await asyncio.sleep(2)
        assert len(warnings()) == 1
        server.fault = lambda _: None
        await asyncio.sleep(3600)
        server.fault = lambda _: APIError("HTTP 500")
        record(recorder, a_set(1))
        await asyncio.sleep(60)

    assert len(warnings()) == 2


async def test_an_event_that_is_refused_for_ever_is_given_up_and_holds_up_no_other(
    warnings: Callable[[], list[str]],
) -> None:
    bad = replace(a_set(1), namespace="bad")

    class Picky(Server):
        async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
            if namespace == "bad":
                self.requests.append((now(), "BAD", ""))
                raise APIError("HTTP 403: forbidden")
            await super().post_event(namespace, event)

    server = Picky()
    async with running(server) as recorder:
        record(recorder, bad)
        for number in range(2, 60):
            record(recorder, a_set(number))
            asked_at = now()
            await asyncio.sleep(15.1)
            assert len(server.times("POST")) == number - 1
            assert server.times("POST")[-1] - asked_at <= 15
        await asyncio.sleep(GIVE_UP_SECONDS)

    assert recorder.dropped == 1
    assert "an Event was lost, because it could not be posted: HTTP 403: forbidden" in warnings()
    assert max(server.times("BAD")) <= GIVE_UP_SECONDS + 60


async def test_an_attempt_without_an_answer_that_succeeded_makes_no_second_event() -> None:
    server = Server()
    server.late = True
    server.fault = lambda method: APIError("no answer within 10 s") if now() < 5 else None
    async with running(server) as recorder:
        record(recorder, a_set())
        await asyncio.sleep(0.1)  # it was made, and is tried again with a count of 2
        record(recorder, a_set())
        await asyncio.sleep(SERIES_SECONDS)

    assert server.counts() == {"2 of 4 vCPUs": 2}
    assert len(server.times("POST")) >= 2
    assert recorder.dropped == 0


async def test_a_count_that_could_not_be_written_is_written_later() -> None:
    server = Server()
    async with running(server) as recorder:
        record(recorder, a_set())
        await asyncio.sleep(1)
        record(recorder, a_set())
        server.fault = away(until=2 * GIVE_UP_SECONDS)
        await asyncio.sleep(2 * GIVE_UP_SECONDS + 100)

    assert server.counts() == {"2 of 4 vCPUs": 2}
    assert len(server.times("PATCH")) <= 2 * GIVE_UP_SECONDS / WRITE_SECONDS + 1
    assert recorder.dropped == 0


async def test_an_overloaded_api_server_is_given_the_time_it_asks_for() -> None:
    server = Server()
    server.fault = lambda _: APIError("HTTP 429", retry_after=12) if now() < 1 else None
    async with running(server) as recorder:
        record(recorder, a_set())
        await asyncio.sleep(60)

    assert len(server.events) == 1
    first, second = server.times("POST")
    assert second - first >= 12


@pytest.mark.parametrize(
    "error", [ObjectGone("HTTP 404: namespace gone"), Rejected("HTTP 403: events may not be created")], ids=repr
)
async def test_what_will_be_refused_again_is_not_tried_again(
    error: APIError, warnings: Callable[[], list[str]]
) -> None:
    server = Server()
    server.fault = lambda _: error
    async with running(server) as recorder:
        for number in range(50):
            record(recorder, a_set(number))
        await asyncio.sleep(10)

    assert len(server.requests) == 50
    assert recorder.dropped == 50
    assert warnings() == [f"an Event was lost, because it could not be posted: {error}"]
