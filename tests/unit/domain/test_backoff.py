"""Delays after failures and between regular looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcpuset.domain.backoff import ExponentialBackoff, jittered

__all__: list[str] = []


def exactly(base: float = 1, cap: float = 30) -> ExponentialBackoff:
    return ExponentialBackoff(base_seconds=base, cap_seconds=cap, jitter=0)


def test_the_delay_doubles_until_it_meets_the_cap() -> None:
    backoff = exactly(base=0.5, cap=3)
    assert [backoff.delay(failures) for failures in range(1, 6)] == [0.5, 1, 2, 3, 3]


def test_a_key_that_fails_for_years_is_still_retried_at_the_cap() -> None:
    assert exactly(cap=30).delay(10**7) == 30


@pytest.mark.parametrize(("random", "seconds"), [(0.0, 8.0), (0.5, 7.0), (0.999999, 6.0)])
def test_jitter_takes_off_at_most_its_fraction(random: float, seconds: float) -> None:
    backoff = ExponentialBackoff(1, cap_seconds=30, jitter=0.25, random=lambda: random)
    assert backoff.delay(4) == pytest.approx(seconds, rel=1e-5)


@given(failures=st.integers(1, 5000), jitter=st.floats(0, 1), random=st.floats(0, 1, exclude_max=True))
def test_no_delay_is_negative_or_above_the_cap(failures: int, jitter: float, random: float) -> None:
    backoff = ExponentialBackoff(0.5, cap_seconds=30, jitter=jitter, random=lambda: random)
    assert 0 <= backoff.delay(failures) <= 30


def test_keys_that_reached_the_cap_together_do_not_stay_together() -> None:
    backoff = ExponentialBackoff(1, cap_seconds=30)
    assert len({backoff.delay(100) for _ in range(100)}) > 90


def test_there_is_no_delay_before_the_first_failure() -> None:
    with pytest.raises(ValueError, match="before the first"):
        exactly().delay(0)


@pytest.mark.parametrize(
    ("base", "cap", "jitter", "message"),
    [
        pytest.param(0, 30, 0.1, "base", id="no base"),
        pytest.param(31, 30, 0.1, "base", id="base above the cap"),
        pytest.param(1, 30, 1.1, "fraction", id="jitter above all"),
        pytest.param(1, 30, -0.1, "fraction", id="negative jitter"),
    ],
)
def test_a_senseless_backoff_is_refused(base: float, cap: float, jitter: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExponentialBackoff(base, cap, jitter)


@pytest.mark.parametrize(("random", "seconds"), [(0.0, 54.0), (0.5, 60.0), (0.999999, 66.0)])
def test_a_jittered_interval_lies_around_what_was_asked_for(random: float, seconds: float) -> None:
    assert jittered(60, 0.1, lambda: random) == pytest.approx(seconds, rel=1e-5)


def test_a_jittered_interval_differs_from_call_to_call() -> None:
    intervals = [jittered(60, 0.1) for _ in range(100)]
    assert len(set(intervals)) > 90
    assert all(54 <= interval <= 66 for interval in intervals)


def test_a_jitter_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match="fraction"):
        jittered(60, 10)
