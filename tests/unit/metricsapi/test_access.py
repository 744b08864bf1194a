"""How long an answer of the API server about a user's permission is used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from vcpuset.domain.errors import Unavailable
from vcpuset.kube.aggregation import AggregatedAPI
from vcpuset.metricsapi.access import KEPT_SECONDS, MOST_KEPT, Access
from vcpuset.metricsapi.frontproxy import User

__all__: list[str] = []

# Virtual time.
pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]

JO = User("jo", "", ("a",), ())


class Reviews:
    """Stands in for the API server, to count what it is asked."""

    def __init__(self) -> None:
        self.allowed = True
        self.fails = False
        self.asked: list[tuple[str, str]] = []

    async def may(self, user: Mapping[str, Any], attributes: Mapping[str, str]) -> bool:
        """The answer that is set."""
        self.asked.append((user["user"], attributes["name"]))
        if self.fails:
            raise Unavailable("away")
        return self.allowed


@pytest.fixture
def reviews() -> Reviews:
    """The API server."""
    return Reviews()


@pytest.fixture
def access(reviews: Reviews) -> Access:
    """With nothing kept."""
    return Access(cast(AggregatedAPI, reviews))


@pytest.mark.parametrize("allowed", [True, False])
async def test_an_answer_is_used_for_some_seconds(reviews: Reviews, access: Access, allowed: bool) -> None:
    reviews.allowed = allowed
    assert await access.allowed(JO, name="web") is allowed
    reviews.allowed = not allowed
    await asyncio.sleep(KEPT_SECONDS - 1)
    assert await access.allowed(JO, name="web") is allowed
    await asyncio.sleep(1)
    assert await access.allowed(JO, name="web") is not allowed
    assert len(reviews.asked) == 2


async def test_an_answer_is_for_one_user_and_one_object(reviews: Reviews, access: Access) -> None:
    await access.allowed(JO, name="web")
    reviews.allowed = False
    assert not await access.allowed(JO, name="db")
    for other in (User("al", "", ("a",), ()), User("jo", "", (), ()), User("jo", "", ("a",), (("scopes", ("x",)),))):
        assert not await access.allowed(other, name="web")
    assert await access.allowed(JO, name="web")


async def test_without_an_answer_nothing_is_kept(reviews: Reviews, access: Access) -> None:
    reviews.fails = True
    with pytest.raises(Unavailable):
        await access.allowed(JO, name="web")
    reviews.fails = False
    assert await access.allowed(JO, name="web")


async def test_the_oldest_answers_are_dropped_when_there_are_many(reviews: Reviews, access: Access) -> None:
    for number in range(MOST_KEPT + 1):
        await access.allowed(JO, name=str(number))
    before = len(reviews.asked)
    await access.allowed(JO, name="1")
    assert len(reviews.asked) == before
    await access.allowed(JO, name="0")
    assert len(reviews.asked) == before + 1
