"""A set without a count: the observed one is written into it, once, and a count that stands is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu

__all__: list[str] = []


@pytest.fixture
def world(qemu: Qemu) -> Iterator[LawfulWorld]:
    """The set "web" has no count, and no pass has run yet."""
    world = LawfulWorld(qemu, vcpus=None)
    yield world
    world.close()


def test_the_observed_count_is_reported_and_adopted_once(world: LawfulWorld) -> None:
    world.run_due()

    assert world.api.counts == [2]
    assert world.vcpuset().spec.vcpus == 2
    assert world.reasons_written == ["Adopting", "Converged"]
    assert world.recorder.events == [("Normal", "Adopting")]
    world.advance(600)
    assert world.api.counts == [2]
    assert world.reasons_written == ["Adopting", "Converged"]


@pytest.mark.parametrize(
    ("bounds", "adopted"),
    [({"minVCPUs": 4}, 4), ({"maxVCPUs": 1}, 1), ({"minVCPUs": 1, "maxVCPUs": 8}, 2)],
    ids=["too few", "too many", "within"],
)
def test_a_count_outside_the_bounds_is_brought_within_them(
    world: LawfulWorld, qemu: Qemu, bounds: dict[str, Any], adopted: int
) -> None:
    world.apply("web", **bounds)
    world.advance(5)

    assert world.api.counts == [adopted]
    assert (qemu.vcpus, world.reason()) == (adopted, "Converged")


def test_a_count_that_is_written_meanwhile_is_kept(world: LawfulWorld, qemu: Qemu) -> None:
    # Before the observation, after it, and after the report.
    for after in range(8):
        world.apply("web", vcpus=None)
        world.interrupt(after, lambda: world.apply("web", vcpus=5, deliver=False))
        world.run_due()
        world.heal()
        world.deliver()
        world.advance(10)
        if world.api.counts:
            break
        assert (world.vcpuset().spec.vcpus, qemu.vcpus) == (5, 5)
    # From some point on the operator was faster: it has adopted what it saw, and the later count stands all the same.
    assert after > 1
    assert (world.vcpuset().spec.vcpus, qemu.vcpus) == (5, 5)


def test_until_the_watch_brings_the_adopted_count_no_other_is_written(world: LawfulWorld) -> None:
    world.api.brings_counts = False
    world.run_due()
    world.wake()
    world.run_due()
    assert world.api.counts == [2]

    world.deliver()
    world.run_due()
    assert world.reason() == "Converged"
    assert world.api.counts == [2]


def test_a_write_that_fails_is_repeated(world: LawfulWorld) -> None:
    for after in range(8):
        world.apply("web", vcpus=None)
        world.interrupt(after, "fails")
        world.run_due()
        world.heal()
        world.deliver()
        world.advance(10)
        assert (world.vcpuset().spec.vcpus, world.reason()) == (2, "Converged")


def test_a_count_that_may_not_be_written_is_reported_once_with_the_api_servers_words(world: LawfulWorld) -> None:
    world.api.refuses_counts = "HTTP 403: no role"
    world.advance(600)
    ready = world.status().ready
    assert ready is not None
    assert ready.message == (
        "2 vCPUs present, and spec.vcpus is not set: it is being set to 2, the present count. It was refused: "
        "HTTP 403: no role"
    )
    assert world.reasons_written == ["Adopting", "Adopting"]
    assert world.recorder.events == [("Normal", "Adopting")]

    world.api.refuses_counts = ""
    world.advance(60)
    assert (world.api.counts, world.reason()) == ([2], "Converged")
    world.apply("web", vcpus=None)
    world.advance(5)
    assert (world.api.counts, world.reason()) == ([2, 2], "Converged")


def test_an_operator_that_dies_between_report_and_adoption_is_succeeded(world: LawfulWorld) -> None:
    for after in range(8):
        world.apply("web", vcpus=None)
        world.interrupt(after, "dies")
        world.advance(5)
        world.heal()
        assert (world.vcpuset().spec.vcpus, world.reason()) == (2, "Converged")


def test_a_suspended_set_reports_and_adopts_once_it_is_not(world: LawfulWorld) -> None:
    world.apply("web", suspend=True)
    world.advance(600)
    assert (world.reason(), world.status().vcpus, world.vcpuset().spec.vcpus) == ("Suspended", 2, None)

    world.apply("web", suspend=False)
    world.run_due()
    assert world.api.counts == [2]
    assert world.reason() == "Converged"


def test_a_machine_that_cannot_be_observed_has_its_usual_reason_and_is_adopted_later(
    world: LawfulWorld, qemu: Qemu
) -> None:
    qemu.reachable = False
    world.advance(100)
    assert world.reason() == "MonitorUnreachable"
    assert world.api.counts == []

    qemu.reachable = True
    world.advance(60)
    assert (world.api.counts, world.reason()) == ([2], "Converged")


def test_a_count_that_is_removed_is_replaced_by_the_present_one(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=6)
    world.advance(5)
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=3)
    world.run_due()
    assert qemu.vcpus == 6
    world.apply("web", vcpus=None)
    world.advance(5)
    assert world.vcpuset().spec.vcpus == 6

    # The guest may still carry out what it was asked for; then those CPUs come back.
    qemu.guest = Guest.PROMPT
    world.advance(600)
    assert (world.api.counts, qemu.vcpus, world.reason()) == ([6], 6, "Converged")


def test_a_guest_agent_does_not_delay_the_adoption(world: LawfulWorld) -> None:
    world.apply("web", guestAgent={"unix": {"path": "a.agent"}})
    world.advance(5)
    assert (world.api.counts, world.reason(), world.status().online_vcpus) == ([2], "Converged", 2)
