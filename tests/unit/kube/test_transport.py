"""How the pauses between attempts to watch grow, and when they end."""

from __future__ import annotations

import asyncio
import ssl

import aiohttp
import kopf
import pytest
from aiohttp.client_reqrep import ConnectionKey

from vcpuset.domain.errors import APIError
from vcpuset.kube.cluster import LONGEST_RETRY_AFTER, refusal, unanswered
from vcpuset.kube.transport import (
    LONGEST_SECONDS,
    STEADY_SECONDS,
    UNTRIED_SECONDS,
    RetryBackoff,
    ThrottledTransport,
    remedy,
)

__all__: list[str] = []

KEY = ConnectionKey(host="api", port=6443, is_ssl=True, ssl=True, proxy=None, proxy_auth=None, proxy_headers_hash=None)

pytestmark = pytest.mark.looptime


async def pauses(pace: RetryBackoff, failures: int, error: APIError | None = None) -> list[float]:
    """How long each of so many failures has the next attempt wait; the waits are kept."""
    found = []
    for _ in range(failures):
        pace.failed(error)
        found.append(pace.wait_seconds())
        await asyncio.sleep(found[-1])
    return found


async def test_the_first_attempt_waits_for_nothing() -> None:
    assert RetryBackoff().wait_seconds() == 0


async def test_pauses_double_with_jitter_up_to_half_a_minute() -> None:
    found = await pauses(RetryBackoff(), 9)
    for number, pause in enumerate(found):
        longest = min(2.0**number, LONGEST_SECONDS)
        assert longest / 2 <= pause <= longest
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(
            unanswered("GET /", aiohttp.ClientConnectorError(KEY, ConnectionRefusedError())), id="connection refused"
        ),
        pytest.param(unanswered("GET /", aiohttp.ServerDisconnectedError()), id="connection cut"),
        pytest.param(refusal("GET /", 502, {}, b""), id="load balancer"),
        pytest.param(refusal("GET /", 503, {}, b""), id="503"),
        pytest.param(refusal("GET /", 429, {"Retry-After": "1"}, b"storage is (re)initializing"), id="starting"),
    ],
)
async def test_while_the_api_server_is_down_or_starts_no_pause_is_longer_than_ten_seconds(error: APIError) -> None:
    found = await pauses(RetryBackoff(), 12, error)
    assert all(min(2.0**number, 10) / 2 <= pause <= 10 for number, pause in enumerate(found))
    assert len(set(found[4:])) > 1, "with jitter"


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(unanswered("GET /", aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError())), id="TLS"),
        pytest.param(refusal("GET /", 429, {}, b"too many requests"), id="429"),
        pytest.param(refusal("GET /", 403, {}, b""), id="403"),
        pytest.param(refusal("GET /", 500, {}, b""), id="500"),
        pytest.param(APIError("no answer"), id="no answer"),
    ],
)
async def test_other_failures_of_a_request_have_pauses_of_up_to_half_a_minute(error: APIError) -> None:
    assert (await pauses(RetryBackoff(), 9, error))[-1] >= LONGEST_SECONDS / 2


async def test_when_the_api_server_answers_again_its_failures_are_a_new_row() -> None:
    for error in (refusal("GET /", 403, {}, b""), None):
        pace = RetryBackoff()
        await pauses(pace, 9, refusal("GET /", 503, {}, b""))
        assert (await pauses(pace, 1, error))[0] <= 1
        assert (await pauses(pace, 8, error))[-1] >= LONGEST_SECONDS / 2


async def test_the_server_may_ask_for_a_longer_pause_while_it_starts() -> None:
    assert RetryBackoff().failed(refusal("GET /", 503, {"Retry-After": "25"}, b"")) == 25


async def test_a_pause_that_is_over_is_not_waited_for_again() -> None:
    pace = RetryBackoff()
    pace.failed()
    await asyncio.sleep(LONGEST_SECONDS)
    assert pace.wait_seconds() == 0


@pytest.mark.parametrize(("code", "hints"), [(403, True), (400, False), (404, False), (422, False), (500, False)])
async def test_only_what_is_forbidden_is_put_down_to_missing_roles(code: int, hints: bool) -> None:
    assert ("the roles in deploy/" in remedy(refusal("GET /", code, {}, b""))) is hints


async def test_the_server_may_ask_for_a_longer_pause_up_to_the_longest() -> None:
    def asks_for(seconds: str) -> APIError:
        return refusal("GET /", 429, {"Retry-After": seconds}, b"")

    pace = RetryBackoff()
    pace.failed(asks_for("12"))
    assert pace.wait_seconds() == 12
    pace.failed(asks_for("3600"))
    assert pace.wait_seconds() == LONGEST_RETRY_AFTER <= LONGEST_SECONDS
    pace.failed(asks_for("9" * 400))
    assert pace.wait_seconds() == LONGEST_RETRY_AFTER
    assert RetryBackoff().failed(APIError("HTTP 500")) <= 1


async def test_what_ends_at_once_again_and_again_is_taken_up_more_and_more_slowly() -> None:
    pace, found = RetryBackoff(), []
    for _ in range(6):
        pace.began()
        assert pace.ended()
        found.append(pace.wait_seconds())
        await asyncio.sleep(found[-1])
    assert found[-1] >= LONGEST_SECONDS / 2
    assert not pace.ended(), "nothing had begun"


async def test_what_has_lasted_is_taken_up_at_once_and_earlier_failures_are_forgotten() -> None:
    pace = RetryBackoff()
    await pauses(pace, 5)
    pace.began()
    await asyncio.sleep(STEADY_SECONDS + 0.001)  # loop times are floats
    assert not pace.ended()
    assert pace.wait_seconds() == 0
    assert pace.failed() <= 1


async def test_one_success_is_enough_where_nothing_has_to_last() -> None:
    pace = RetryBackoff()
    await pauses(pace, 5)
    assert pace.is_failing()
    pace.succeeded()
    assert not pace.is_failing()
    assert pace.failed() <= 1


async def test_what_was_never_tried_or_goes_well_is_not_failing() -> None:
    pace = RetryBackoff()
    assert not pace.is_failing()
    pace.began()
    assert not pace.is_failing()


async def test_what_fails_and_is_tried_again_is_failing_until_it_has_lasted() -> None:
    pace = RetryBackoff()
    for _ in range(20):
        pace.failed()
        await asyncio.sleep(LONGEST_SECONDS)
        assert pace.is_failing()
    pace.began()
    assert pace.is_failing(), "it may end at once"
    await asyncio.sleep(STEADY_SECONDS)
    assert not pace.is_failing()
    assert not pace.ended()
    assert not pace.is_failing()


async def test_what_begins_and_ends_at_once_again_and_again_is_failing() -> None:
    pace = RetryBackoff()
    for _ in range(5):
        pace.began()
        await asyncio.sleep(STEADY_SECONDS / 2)
        assert pace.ended()
        assert pace.is_failing()


async def test_what_has_failed_and_is_not_tried_any_more_is_not_failing_but_stuck() -> None:
    pace = RetryBackoff()
    pace.failed()
    await asyncio.sleep(UNTRIED_SECONDS)
    assert not pace.is_failing()


async def test_what_earlier_logins_have_closed_is_not_kept() -> None:
    gate = ThrottledTransport(asyncio.Lock(), lambda _: None, lambda _method, _code: None)
    for _ in range(20):
        session = gate.session(kopf.ConnectionInfo(server="https://127.0.0.1:1", insecure=True))
        await session.close()
    assert gate._sessions == [session]
    await gate.close()
