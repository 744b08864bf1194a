"""Whether the watch is behind, on a clock that the test sets."""

from __future__ import annotations

import pytest

from vcpuset.domain.resource import UID
from vcpuset.kube.freshness import BEHIND_SECONDS, CHECK_SECONDS, Freshness

__all__: list[str] = []

WEB, DB = UID("web"), UID("db")


class Story:
    """A Freshness and its clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.failing: set[str] = set()
        self.freshness = Freshness(self.failing.__contains__, lambda: self.now)
        self.present = {WEB: "front", DB: "back"}

    def lists(self, times: int, **news: str) -> None:
        """List so often, `CHECK_SECONDS` apart; the first one has the news."""
        for number in range(times):
            self.now += CHECK_SECONDS
            self.freshness.listed(
                self.present, {UID(name): version for name, version in news.items()} if not number else {}
            )

    @property
    def behind(self) -> float:
        """What the test asks about."""
        return self.freshness.behind_seconds


@pytest.fixture
def story() -> Story:
    return Story()


ENOUGH = int(BEHIND_SECONDS / CHECK_SECONDS) + 2


def test_lists_without_news_say_nothing_of_the_watch_however_long_it_is_silent(story: Story) -> None:
    story.lists(1000)
    assert story.behind == 0


def test_news_that_the_watch_does_not_bring_while_lists_succeed_make_it_behind(story: Story) -> None:
    story.lists(1, web="7")
    assert story.behind == 0
    story.lists(ENOUGH)
    assert story.behind > BEHIND_SECONDS


@pytest.mark.parametrize("version", ["7", "8", "1000", None], ids=["the same", "newer", "newer still", "it is gone"])
def test_news_that_the_watch_brings_after_all_are_forgotten(story: Story, version: str | None) -> None:
    story.lists(ENOUGH, web="7")
    story.freshness.brought(WEB, version)
    assert story.behind == 0
    assert not story.freshness.missing


@pytest.mark.parametrize(("uid", "version"), [(WEB, "6"), (DB, "9")], ids=["an older version", "another set"])
def test_what_else_the_watch_brings_does_not_count(story: Story, uid: UID, version: str) -> None:
    story.lists(ENOUGH, web="7")
    story.freshness.brought(uid, version)
    assert story.behind > BEHIND_SECONDS


def test_the_watch_is_not_behind_while_the_api_server_is_away(story: Story) -> None:
    story.lists(1, web="7")
    story.now += 3600
    assert story.behind == 0


def test_a_list_that_fails_restarts_the_count(story: Story) -> None:
    story.lists(ENOUGH - 3, web="7")
    story.freshness.failed()
    assert story.behind == 0
    story.lists(1)
    assert story.behind == 0, "the time before that list was not seen to be well"
    story.lists(ENOUGH)
    assert story.behind > BEHIND_SECONDS


def test_an_api_server_that_comes_and_goes_never_makes_the_watch_behind(story: Story) -> None:
    story.lists(1, web="7")
    for _ in range(100):
        story.lists(ENOUGH - 4)
        story.freshness.failed()
        assert story.behind < BEHIND_SECONDS


def test_time_in_which_nobody_listed_hardly_counts(story: Story) -> None:
    story.lists(1, web="7")
    story.now += 24 * 3600  # the process was stopped, or the host slept
    story.lists(1)
    assert story.behind <= 2 * CHECK_SECONDS


def test_only_the_time_in_which_the_watch_on_its_namespace_does_not_fail_is_silence(story: Story) -> None:
    story.failing.add("front")
    story.lists(10 * ENOUGH, web="7")
    assert story.behind > BEHIND_SECONDS
    assert story.freshness.silent_seconds == 0

    story.failing.clear()
    story.failing.add("back")
    story.lists(2)
    assert story.freshness.silent_seconds == 2 * CHECK_SECONDS, "what it said before does not count"
    story.lists(ENOUGH)
    assert story.freshness.silent_seconds > BEHIND_SECONDS


def test_a_set_that_is_gone_from_the_list_is_not_missed(story: Story) -> None:
    story.lists(ENOUGH, web="7")
    del story.present[WEB]
    story.lists(1)
    assert story.behind == 0


def test_news_after_news_is_owed_since_the_first(story: Story) -> None:
    story.lists(ENOUGH, web="7")
    story.lists(1, web="8")
    story.freshness.brought(WEB, "7")
    assert story.behind > BEHIND_SECONDS
    story.freshness.brought(WEB, "8")
    assert story.behind == 0


def test_a_version_that_the_watch_has_brought_is_not_owed_though_a_list_tells_it_otherwise(story: Story) -> None:
    """While the definition is upgraded: the watch tells a set without a new field, the list with it."""
    story.freshness.brought(WEB, "7")
    story.freshness.brought(DB, "9")
    story.lists(ENOUGH, web="7", db="8")
    assert story.behind == 0
    assert not story.freshness.missing
    story.lists(ENOUGH, web="8")
    assert story.behind > BEHIND_SECONDS


def test_what_the_watch_brought_of_sets_that_are_gone_is_not_kept(story: Story) -> None:
    for number in range(100):
        story.present = {UID(f"missed-{number}"): "front", UID(f"told-{number}"): "front"}
        for uid in story.present:
            story.freshness.brought(uid, "7")
        story.freshness.brought(UID(f"told-{number}"), None)
        story.lists(1)
    assert list(story.freshness._brought) == ["missed-99"]


def test_what_was_brought_and_listed_is_counted(story: Story) -> None:
    story.lists(3)
    story.freshness.failed()
    story.freshness.brought(WEB, "7")
    assert (story.freshness.events, story.freshness.lists, story.freshness.failures) == (1, 3, 1)
    assert story.freshness.listed_at > 0
