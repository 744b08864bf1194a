"""How busy vCPUs were, from two samples."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from datetime import UTC, datetime, timedelta

import pytest

from vcpuset.domain.busy import SHORTEST_SECONDS, Activity, Halts, Meter, Sample, Source, Used

START = datetime(2026, 1, 1, tzinfo=UTC)


def halts(*cpus: Halts, at: float, machine: Hashable = "qemu", names: str = "abcdefgh") -> Sample:
    activities: Mapping[Hashable, Activity] = dict(zip(names, cpus, strict=False))
    return Sample(at, START + timedelta(seconds=at), Source.KVM, machine, len(cpus), activities)


def used(*seconds: float, at: float, machine: Hashable = "qemu") -> Sample:
    activities: Mapping[Hashable, Activity] = {number: Used(each) for number, each in enumerate(seconds)}
    return Sample(at, START + timedelta(seconds=at), Source.GUEST_AGENT, machine, len(seconds), activities)


def metered(*samples: Sample) -> Meter:
    meter = Meter()
    for sample in samples:
        meter.add(sample)
    return meter


def busy(meter: Meter) -> float:
    assert meter.last is not None
    return meter.last.busy


def test_one_sample_is_no_value() -> None:
    meter = metered(halts(Halts(1, 0, halted_now=False), at=0))
    assert (meter.last, meter.total, meter.sampled) == (None, 0, 0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Halts(1, 5, halted_now=False), Halts(9, 5, halted_now=False), 1),
        (Halts(1, 5, halted_now=False), Halts(9, 12.5, halted_now=False), 0.25),
        (Halts(1, 5, halted_now=True), Halts(1, 5, halted_now=True), 0),
        # Halted at both ends, but it ran between: what is known of it counts.
        (Halts(1, 5, halted_now=True), Halts(2, 14, halted_now=True), 0.1),
        (Halts(1, 5, halted_now=False), Halts(1, 5, halted_now=True), 1),
        # The halt that was going on at the first sample counts when it ends.
        (Halts(1, 5, halted_now=True), Halts(3, 60, halted_now=False), 0),
    ],
    ids=["never halted", "halted for a part", "halted all the time", "woken once", "not yet counted", "counted late"],
)
def test_a_vcpu_is_busy_while_kvm_does_not_keep_it_halted(before: Halts, after: Halts, expected: float) -> None:
    meter = metered(halts(before, at=0), halts(after, at=10))
    assert busy(meter) == pytest.approx(expected)
    assert meter.total == pytest.approx(expected * 10)


def test_busy_vcpus_are_added_and_the_value_says_what_it_is_about() -> None:
    meter = metered(
        halts(*[Halts(0, 0, halted_now=False)] * 3, at=2),
        halts(Halts(9, 0, halted_now=False), Halts(9, 4, halted_now=False), Halts(0, 0, halted_now=False), at=10),
    )
    assert meter.last is not None
    assert busy(meter) == pytest.approx(2.5)
    assert (meter.last.vcpus, meter.last.seconds) == (3, 8)
    assert (meter.last.source, meter.last.at) == (Source.KVM, 10)
    assert meter.last.time == START + timedelta(seconds=10)


def test_only_cpus_that_are_in_both_samples_count() -> None:
    idle, running = Halts(0, 0, halted_now=True), Halts(0, 0, halted_now=False)
    meter = metered(
        halts(running, idle, at=0, names="ab"), halts(Halts(9, 1, halted_now=False), running, at=10, names="ac")
    )
    assert busy(meter) == pytest.approx(0.9)


def test_a_new_cpu_at_an_old_path_is_another_one() -> None:
    meter = metered(
        halts(Halts(1, 1, halted_now=False), Halts(500, 9, halted_now=False), at=0),
        halts(Halts(2, 1, halted_now=False), Halts(3, 0, halted_now=False), at=10),
    )
    assert busy(meter) == pytest.approx(1)


def test_the_counters_of_another_qemu_are_not_compared_and_the_total_goes_on() -> None:
    running = Halts(5, 0, halted_now=False)
    meter = metered(halts(running, at=0), halts(running, at=10))
    assert meter.total == pytest.approx(10)
    last = meter.last
    meter.add(halts(running, at=20, machine="another"))
    assert meter.last == last
    assert meter.total == pytest.approx(10)
    meter.add(halts(running, at=25, machine="another"))
    assert meter.total == pytest.approx(15)


def test_the_total_only_grows_whatever_the_counters_say() -> None:
    meter = Meter()
    before = 0.0
    for at, sample in enumerate([Halts(9, 50, halted_now=True), Halts(9, 0, halted_now=False)] * 5):
        meter.add(halts(sample, at=at * 10))
        assert meter.total >= before
        before = meter.total


def test_a_sample_that_comes_soon_after_another_is_ignored() -> None:
    running = Halts(5, 0, halted_now=False)
    meter = metered(halts(running, at=0), halts(running, at=SHORTEST_SECONDS / 2))
    assert (meter.last, meter.sampled) == (None, 0)
    meter.add(halts(running, at=SHORTEST_SECONDS))
    assert busy(meter) == pytest.approx(1)


def test_the_guests_own_count_is_taken_as_it_is_within_the_time_that_has_passed() -> None:
    meter = metered(used(100, 100, 100, at=0), used(104, 100, 300, at=10))
    assert busy(meter) == pytest.approx(0.4 + 0 + 1)


def test_a_guest_that_was_booted_again_counts_from_its_next_sample() -> None:
    meter = metered(used(100, 100, at=0), used(1, 2, at=10), used(3, 2, at=20))
    assert busy(meter) == pytest.approx(0.2)


def test_the_counters_of_two_sources_are_not_compared() -> None:
    meter = metered(halts(Halts(5, 0, halted_now=False), at=0), used(5, at=10))
    assert meter.last is None
