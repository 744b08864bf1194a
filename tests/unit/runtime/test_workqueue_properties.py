"""The work queue under random interleavings of everything that can be done to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.runtime.workqueue import SLOW_SECONDS, WorkQueue

__all__: list[str] = []

pytestmark = pytest.mark.looptime

LONGEST_DELAY = 50.0


@dataclass(frozen=True)
class Add:
    key: str


@dataclass(frozen=True)
class AddAfter:
    key: str
    delay: float


@dataclass(frozen=True)
class Fail:
    """add_rate_limited, by whomever: also while someone else has the key in work."""

    key: str


@dataclass(frozen=True)
class Forget:
    key: str


@dataclass(frozen=True)
class Renew:
    key: str


@dataclass(frozen=True)
class StartGet:
    pass


@dataclass(frozen=True)
class CancelGet:
    which: int


@dataclass(frozen=True)
class GiveBack:
    which: int


@dataclass(frozen=True)
class LetRun:
    """One round of the event loop, in which some of the woken tasks have run and others not."""


@dataclass(frozen=True)
class Wait:
    seconds: float


Step = Add | AddAfter | Fail | Forget | Renew | StartGet | CancelGet | GiveBack | LetRun | Wait

keys = st.sampled_from("abc")  # few, so that steps meet each other
delays = st.sampled_from([0.0, 1.0, 2.5, 10.0, LONGEST_DELAY])
steps = st.lists(
    st.one_of(
        st.builds(Add, keys),
        st.builds(AddAfter, keys, delays),
        st.builds(Fail, keys),
        st.builds(Forget, keys),
        st.builds(Renew, keys),
        st.builds(StartGet),
        st.builds(CancelGet, st.integers(0, 3)),
        st.builds(GiveBack, st.integers(0, 3)),
        st.builds(LetRun),
        st.builds(Wait, delays),
    ),
    min_size=15,
    max_size=60,
)


class Scenario:
    """Does the steps and checks each hand-out against what it knows to be owed."""

    def __init__(self) -> None:
        self.queue: WorkQueue[str] = WorkQueue(ExponentialBackoff(1, LONGEST_DELAY, jitter=0), slow_at_once=1)
        self.getters: list[asyncio.Task[None]] = []
        self.in_work: list[str] = []
        # Keys that must be handed out sooner or later, because they were added since the last time.
        self.owed: set[str] = set()
        # When each key in work was taken; keys whose pass counts, those that are slow, those taken as slow ones.
        self.taken_at: dict[str, float] = {}
        self.counts: set[str] = set()
        self.slow: set[str] = set()
        self.slow_in_work: set[str] = set()

    async def take(self) -> None:
        key = await self.queue.get()
        assert key not in self.in_work, f"{key} was handed out twice at once"
        assert key in self.owed, f"{key} was handed out, but nobody had added it"
        self.owed.discard(key)
        self.in_work.append(key)
        self.taken_at[key] = asyncio.get_running_loop().time()
        self.counts.add(key)
        if key in self.slow:
            self.slow_in_work.add(key)
            assert self.slow_in_work == {key}, "two slow keys are in work"

    def give_back(self, which: int) -> None:
        key = self.in_work.pop(which)
        self.slow_in_work.discard(key)
        self.slow.discard(key)
        if key in self.counts and asyncio.get_running_loop().time() - self.taken_at[key] >= SLOW_SECONDS:
            self.slow.add(key)
        self.queue.done(key)

    def fail(self, key: str) -> None:
        self.queue.add_rate_limited(key)
        self.owed.add(key)

    def renew(self, key: str) -> None:
        self.queue.renew(key)
        self.slow.discard(key)
        self.counts.discard(key)

    async def do(self, step: Step) -> None:
        match step:
            case Add(key):
                self.queue.add(key)
                self.owed.add(key)
            case AddAfter(key, delay):
                self.queue.add_after(key, delay)
                self.owed.add(key)
            case Fail(key):
                self.fail(key)
            case Forget(key):
                self.queue.forget(key)
            case Renew(key):
                self.renew(key)
            case StartGet():
                self.getters.append(asyncio.create_task(self.take()))
            case CancelGet(which):
                if which < len(self.getters):
                    self.getters[which].cancel()
            case GiveBack(which):
                if which < len(self.in_work):
                    self.give_back(which)
            case LetRun():
                await asyncio.sleep(0)
            case Wait(seconds):
                await asyncio.sleep(seconds)

    async def run_dry(self) -> None:
        """Take and give back keys until even the longest delay must have passed."""
        for getter in self.getters:
            getter.cancel()
        outcomes = await asyncio.gather(*self.getters, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):  # other than a cancellation
                raise outcome
        while self.in_work:
            self.give_back(0)
        try:
            async with asyncio.timeout(2 * LONGEST_DELAY):
                while True:
                    await self.take()
                    self.give_back(0)
        except TimeoutError:
            pass


@settings(deadline=None, max_examples=150)
@given(steps=steps)
async def test_no_key_is_lost_or_handed_out_twice_at_once_or_without_reason(steps: list[Step]) -> None:
    scenario = Scenario()
    for step in steps:
        await scenario.do(step)
    await scenario.run_dry()
    assert scenario.owed == set(), "added, but never handed out"
    statistics = scenario.queue.statistics()
    assert (statistics.depth, statistics.processing, statistics.delayed) == (0, 0, 0)


@settings(deadline=None, max_examples=100)
@given(steps=steps)
async def test_no_one_waits_while_a_key_may_be_taken(steps: list[Step]) -> None:
    scenario = Scenario()
    for step in [*steps, Wait(1)]:
        await scenario.do(step)
        if isinstance(step, Wait):
            # A timer may have fired at the very end of the wait: let the one it woke run. No timer ends
            # at an odd millisecond, so none fires at the end of this.
            await asyncio.sleep(0.001)
            waiting = [getter for getter in scenario.getters if not getter.done()]
            if waiting and len(scenario.queue):
                assert scenario.slow_in_work, "a get() sleeps beside a ready key"
                held = scenario.slow - set(scenario.in_work)
                assert len(scenario.queue) <= len(held), "a get() sleeps beside a ready key that is not slow"
    await scenario.run_dry()


class Lines:
    """The queue beside plain lists that show what each line has to be."""

    LIMIT = 3

    def __init__(self) -> None:
        self.queue: WorkQueue[int] = WorkQueue(ExponentialBackoff(1, 30, jitter=0), slow_at_once=self.LIMIT)
        self.first: list[int] = []
        self.fast: list[int] = []
        self.slow: list[int] = []
        self.renewed: set[int] = set()
        """Since their last hand-out."""
        self.in_work: dict[int, bool] = {}
        """Whether each was taken as a slow one."""
        self.long_since: set[int] = set()
        """Those that have been in work for long."""
        self.since_slow: list[bool] = []
        """For each key taken since the last slow one, whether a slow one might have been."""
        self.since_fast: list[bool] = []
        """For each renewed key taken since the last other one that is not slow, whether that might have been."""

    def add(self, key: int) -> None:
        self.queue.add(key)
        if not any(key in line for line in (self.in_work, self.first, self.fast, self.slow)):
            (self.first if key in self.renewed else self.fast).append(key)

    def renew(self, key: int) -> None:
        self.queue.renew(key)
        self.renewed.add(key)
        for line in (self.fast, self.slow):
            if key in line:
                line.remove(key)
                self.first.append(key)

    async def take(self) -> None:
        slow_may = bool(self.slow) and sum(self.in_work.values()) < self.LIMIT
        if not (self.first or self.fast or slow_may):
            return
        key = await self.queue.get()
        self.renewed.discard(key)
        if key in self.slow:
            assert slow_may, "more slow keys are in work than may be"
            assert self.slow.pop(0) == key, "a slow key was overtaken by another slow one"
            others = self.first or self.fast
            assert not others or self.since_slow[-3:] == [True] * 3, "a slow key came before its turn"
            self.since_slow.clear()
            self.in_work[key] = True
        else:
            if key in self.first:
                self.since_fast.append(bool(self.fast))
                assert self.since_fast[-4:] != [True] * 4, "a key was passed over a fourth time"
                line = self.first
            else:
                assert not self.first or self.since_fast[-3:] == [True] * 3, "a key came before a renewed one"
                self.since_fast.clear()
                line = self.fast
            assert line.pop(0) == key, "a key was overtaken by one of its own line"
            self.since_slow.append(slow_may)
            assert self.since_slow[-4:] != [True] * 4, "a slow key was passed over a fourth time"
            self.in_work[key] = False

    async def give_back(self, which: int, *, fails: bool, long: bool) -> None:
        """With news that came during the pass, so that the key is due at once and no timer plays a part."""
        if which >= len(self.in_work):
            return
        key = list(self.in_work)[which]
        self.queue.add(key)
        if long:
            await asyncio.sleep(SLOW_SECONDS)
            self.long_since.update(self.in_work)
        if fails:
            self.queue.add_rate_limited(key)
        else:
            self.queue.forget(key)
        (self.slow if key in self.long_since else self.fast).append(key)
        self.long_since.discard(key)
        self.queue.done(key)
        del self.in_work[key]


moves = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 15)),
    st.tuples(st.just("renew"), st.integers(0, 15)),
    st.tuples(st.just("take"), st.none()),
    st.tuples(st.just("take"), st.none()),
    st.tuples(st.just("fail slowly"), st.integers(0, 3)),
    st.tuples(st.just("succeed slowly"), st.integers(0, 3)),
    st.tuples(st.just("fail"), st.integers(0, 3)),
    st.tuples(st.just("succeed"), st.integers(0, 3)),
)


@settings(deadline=None, max_examples=150)
@given(script=st.lists(moves, min_size=30, max_size=150))
async def test_each_line_keeps_its_order_and_neither_is_passed_over_for_long(
    script: list[tuple[str, int | None]],
) -> None:
    lines = Lines()
    for key in range(8):
        lines.add(key)
    for move, number in script:
        if number is None:
            await lines.take()
        elif move == "add":
            lines.add(number)
        elif move == "renew":
            if number not in lines.in_work:
                lines.renew(number)
        else:
            await lines.give_back(number, fails=move.startswith("fail"), long=move.endswith("slowly"))
        assert len(lines.queue) == len(lines.first) + len(lines.fast) + len(lines.slow)
