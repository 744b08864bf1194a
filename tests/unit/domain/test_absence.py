"""When a node has been without an agent for so long that its sets are reported. Times are in seconds."""

from __future__ import annotations

from vcpuset.domain.absence import LONGEST, Absences

__all__: list[str] = []

NODE = "node-1"
GRACE = 60.0


class Story:
    """One node, looked at every 15 s."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.absences = Absences(GRACE)

    def passes(self, seconds: float, *, ready: bool) -> list[float]:
        """Time goes by. Returns when the node was overdue, counted from the beginning of it."""
        began, overdue = self.now, []
        while self.now < began + seconds:
            self.absences.observe({NODE}, {NODE} if ready else set(), self.now)
            if NODE in self.absences.overdue(self.now):
                overdue.append(self.now - began)
                self.absences.reported(NODE)
            self.now += 15
        return overdue


def test_a_node_is_overdue_once_it_has_been_without_an_agent_for_the_grace_period() -> None:
    assert Story().passes(120, ready=False) == [60, 75, 90, 105]


def test_a_node_whose_agent_is_ready_is_never_overdue() -> None:
    assert Story().passes(3600, ready=True) == []


def test_an_agent_that_is_back_within_the_grace_period_begins_it_again() -> None:
    story = Story()
    for _ in range(20):
        assert story.passes(60, ready=False) == []
        assert story.passes(15, ready=True) == []


def test_the_period_begins_when_the_node_is_first_seen_without_an_agent() -> None:
    story = Story()
    story.now += 10_000
    assert story.passes(75, ready=False) == [60]


def test_an_agent_that_flaps_is_reported_less_and_less_often() -> None:
    story = Story()
    waits = []
    for _ in range(7):
        waits.append(story.passes(2000, ready=False)[0])
        assert story.passes(15, ready=True) == []
    assert waits == [60, 120, 240, 480, 960, 960, 960]
    assert waits[-1] == LONGEST * GRACE


def test_an_agent_that_has_been_ready_for_as_long_as_the_wait_has_the_plain_grace_period_again() -> None:
    story = Story()
    for _ in range(3):
        story.passes(2000, ready=False)
        story.passes(15, ready=True)
    story.passes(1000, ready=True)
    assert story.passes(75, ready=False) == [60]


def test_an_agent_that_answers_without_being_ready_is_reported_less_and_less_often() -> None:
    story = Story()
    waits = []
    for _ in range(6):
        began = story.now
        while not story.passes(15, ready=False):
            pass
        waits.append(story.now - 15 - began)
        story.absences.answered(NODE, story.now)
    assert waits == [60, 120, 240, 480, 960, 960]


def test_a_node_that_no_set_names_any_more_is_forgotten() -> None:
    story = Story()
    story.passes(75, ready=False)
    story.absences.observe(set(), set(), story.now)
    assert story.absences.overdue(story.now) == frozenset()
    assert story.passes(75, ready=False) == [60]


def test_nodes_do_not_share_their_periods() -> None:
    absences = Absences(GRACE)
    absences.observe({"a", "b"}, {"b"}, 0)
    absences.observe({"a", "b"}, set(), 60)
    assert absences.overdue(60) == {"a"}
    assert absences.overdue(120) == {"a", "b"}
