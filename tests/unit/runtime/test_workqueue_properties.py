"""The work queue under random interleavings of everything that can be done to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.runtime.workqueue import WorkQueue

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


Step = Add | AddAfter | Fail | StartGet | CancelGet | GiveBack | LetRun | Wait

keys = st.sampled_from("ab")  # few, so that steps meet each other
delays = st.sampled_from([0.0, 1.0, 2.5, 10.0, LONGEST_DELAY])
steps = st.lists(
    st.one_of(
        st.builds(Add, keys),
        st.builds(AddAfter, keys, delays),
        st.builds(Fail, keys),
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
        self.queue: WorkQueue[str] = WorkQueue(ExponentialBackoff(1, LONGEST_DELAY, jitter=0))
        self.getters: list[asyncio.Task[None]] = []
        self.in_work: list[str] = []
        # Keys that must be handed out sooner or later, because they were added since the last time.
        self.owed: set[str] = set()

    async def take(self) -> None:
        key = await self.queue.get()
        assert key not in self.in_work, f"{key} was handed out twice at once"
        assert key in self.owed, f"{key} was handed out, but nobody had added it"
        self.owed.discard(key)
        self.in_work.append(key)

    def give_back(self, which: int) -> None:
        self.queue.done(self.in_work.pop(which))

    async def do(self, step: Step) -> None:
        match step:
            case Add(key):
                self.queue.add(key)
                self.owed.add(key)
            case AddAfter(key, delay):
                self.queue.add_after(key, delay)
                self.owed.add(key)
            case Fail(key):
                self.queue.add_rate_limited(key)
                self.owed.add(key)
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
async def test_no_one_waits_while_a_key_is_ready(steps: list[Step]) -> None:
    scenario = Scenario()
    for step in [*steps, Wait(1)]:
        await scenario.do(step)
        if isinstance(step, Wait):
            # A timer may have fired at the very end of the wait: let the one it woke run. No timer ends
            # at an odd millisecond, so none fires at the end of this.
            await asyncio.sleep(0.001)
            waiting = [getter for getter in scenario.getters if not getter.done()]
            assert not (waiting and len(scenario.queue)), "a get() sleeps beside a ready key"
    await scenario.run_dry()
