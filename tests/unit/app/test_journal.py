"""What is kept of a set's last hour, and how it is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unit.domain.builders import NOW, a_request, a_set, a_spec
from vcpuset.app.page.drawing import Chart, ranges
from vcpuset.app.page.journal import ENTRIES, KEPT_SECONDS, MESSAGE_LIMIT, Entry, Journal
from vcpuset.app.page.views import count, duration
from vcpuset.domain.reasons import State
from vcpuset.domain.resource import UID, Condition, Status, VCPUSet

__all__: list[str] = []

WEB = UID("uid-web")

START = NOW.timestamp()


class Story:
    """A journal, and a clock that a test sets."""

    def __init__(self) -> None:
        self.now = START
        self.changed: list[UID] = []
        self.journal = Journal(self.changed.append, lambda: self.now)
        self._last: VCPUSet | None = None

    def tell(self, vcpus: int, message: str = "", *, later: float = 0.0, **status: object) -> None:
        """So much later, the cache has the set with this count."""
        self.now += later
        ready = Condition("Ready", "True", "Converged", message, NOW, 1)
        known = replace(Status(1, vcpus, conditions=(ready,)), **status)  # type: ignore[arg-type]
        vcpuset = a_set(a_spec(2), status=known)
        self.journal.moved(self._last, vcpuset)
        self._last = vcpuset

    def kept(self) -> list[tuple[float, int | None]]:
        """The times since the start, and the counts."""
        return [(entry.at - START, entry.current) for entry in self.journal.of(WEB)]


def test_changes_are_kept_and_repetitions_are_not() -> None:
    story = Story()
    story.tell(2)
    story.tell(2, later=10)
    story.tell(4, later=10)
    assert story.kept() == [(0, 2), (20, 4)]
    assert story.changed == [WEB, WEB]


def test_a_change_of_the_requests_alone_is_told_to_the_page_but_is_no_transition() -> None:
    story = Story()
    story.tell(2)
    story.tell(2, pending_unplugs=(a_request(1),))
    assert story.changed == [WEB, WEB]
    assert story.kept() == [(0, 2)]


def test_of_what_is_older_than_an_hour_only_the_state_at_its_beginning_is_kept() -> None:
    story = Story()
    for vcpus in (2, 3, 4):
        story.tell(vcpus, later=100)
    story.tell(5, later=KEPT_SECONDS)
    assert story.kept() == [(300, 4), (KEPT_SECONDS + 300, 5)]


def test_a_set_that_changes_all_the_time_keeps_a_limited_number_of_limited_messages() -> None:
    story = Story()
    for vcpus in range(10 * ENTRIES):
        story.tell(vcpus, "x" * 5000, later=0.1)
    entries = story.journal.of(WEB)
    assert len(entries) == ENTRIES
    assert {len(entry.message) for entry in entries} == {MESSAGE_LIMIT}
    assert entries[-1].current == 10 * ENTRIES - 1
    assert entries[-1].message.endswith("x\N{HORIZONTAL ELLIPSIS}")


def test_the_entries_stay_in_order_when_the_clock_is_set_back() -> None:
    story = Story()
    story.tell(2)
    story.tell(3, later=-500)
    assert story.kept() == [(0, 2), (0, 3)]


def test_a_set_that_is_gone_is_forgotten() -> None:
    story = Story()
    story.tell(2)
    story.journal.moved(a_set(), None)
    assert story.journal.of(WEB) == ()
    assert story.changed == [WEB, WEB]


def entry(before: float, desired: int | None, current: int | None) -> Entry:
    """An entry so many seconds before now."""
    return Entry(START - before, desired, current, State.READY, "Converged", "")


def test_the_chart_is_a_step_line_from_the_state_an_hour_ago_until_now() -> None:
    chart = Chart.of([entry(9000, 1, 1), entry(5000, 2, 2), entry(1800, 4, 2), entry(900, 4, 4)], START)
    # Four units in steps of one and a quarter of a unit above: 100 / 4.25 = 23.53 for each vCPU.
    assert chart.desired == "M0 52.94 H1800 V5.88 H2700 V5.88 H3600"
    assert chart.current == "M0 52.94 H1800 V52.94 H2700 V5.88 H3600"
    assert chart.since is None
    assert [label for _, label in chart.counts] == ["0", "1", "2", "3", "4"]
    assert [label for _, label in chart.times] == ["11:10", "11:20", "11:30", "11:40", "11:50"]


def test_the_chart_has_gaps_where_a_count_is_not_known_and_begins_with_the_first_entry() -> None:
    chart = Chart.of([entry(3000, None, 2), entry(2000, 4, None), entry(1000, None, 4)], START)
    assert chart.desired == "M1600 5.88 H2600"
    assert chart.current == "M600 52.94 H1600 M2600 5.88 H3600"
    assert chart.since is not None
    assert chart.since.timestamp() == START - 3000


@pytest.mark.parametrize(
    ("most", "labels"),
    [
        (0, ["0", "1"]),
        (1, ["0", "1"]),
        (5, ["0", "2", "4", "6"]),
        (64, ["0", "20", "40", "60", "80"]),
        (4096, ["0", "2000", "4000", "6000"]),
    ],
)
def test_the_chart_has_few_round_labels(most: int, labels: list[str]) -> None:
    assert [label for _, label in Chart.of([entry(10, most, most)], START).counts] == labels


def test_a_chart_without_entries_is_empty() -> None:
    chart = Chart.of([], START)
    assert (chart.desired, chart.current, chart.since) == ("", "", None)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], "none"), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0\N{EN DASH}2, 5, 7\N{EN DASH}8")],
)
def test_consecutive_slots_are_shown_as_ranges(numbers: list[int], words: str) -> None:
    assert ranges(numbers) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3600, "1 h 00 min"),
        (86_399, "23 h 59 min"),
        (86_400 * 3 + 7200, "3 d 2 h"),
    ],
)
def test_times_have_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(("number", "words"), [(None, "\N{EN DASH}"), (6, "6"), (6.0, "6.0"), (0.04, "0.0")])
def test_counts_are_whole_and_what_is_busy_has_one_decimal(number: float | None, words: str) -> None:
    assert count(number) == words
