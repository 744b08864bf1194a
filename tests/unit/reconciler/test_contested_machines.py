"""A machine that something else changes again and again is reported, and not fought over."""

from __future__ import annotations

import pytest

from unit.reconciler.model import Guest, Qemu
from unit.reconciler.world import RESYNC_SECONDS, World
from vcpuset.domain.contest import CHANGES, PAUSE_RESYNCS, WINDOW_RESYNCS

__all__: list[str] = []

WINDOW, PAUSE = WINDOW_RESYNCS * RESYNC_SECONDS, PAUSE_RESYNCS * RESYNC_SECONDS
CONTESTED = ("Contested", ["Stalled"])


@pytest.fixture(params=["OnDemand", "Persistent"])
def world(empty_world: World, qemu: Qemu, request: pytest.FixtureRequest) -> World:
    """A set that has brought its machine from 2 to 4."""
    world = empty_world
    world.machines["a.sock"] = qemu
    world.apply("web", vcpus=4, monitor={"unix": {"path": "a.sock"}, "connection": request.param})
    world.run_due()
    return world


def takes(world: World, qemu: Qemu) -> None:
    """Something else takes a CPU away, and the operator gets to see it."""
    qemu.take_away(max(qemu.cpus))
    world.wake()
    world.run_due()


def plugs(world: World, qemu: Qemu) -> None:
    """Something else plugs a CPU, and the operator gets to see it."""
    free = next(index for index in range(8) if index not in qemu.cpus)
    qemu.come_by_another_hand(free, f"foreign{qemu.changes}")
    world.wake()
    world.run_due()


def shown(world: World) -> tuple[str | None, list[str]]:
    return world.reason(), world.true_conditions()


@pytest.mark.parametrize("act", [takes, plugs])
def test_a_machine_that_is_changed_again_and_again_is_reported_and_left_as_it_is_for_a_while(
    world: World, qemu: Qemu, act: object
) -> None:
    assert callable(act)
    for number in range(1, CHANGES):
        act(world, qemu)
        assert qemu.vcpus == 4, f"change {number} is undone at once"
        assert shown(world) == ("Converged", ["Ready"])
    act(world, qemu)

    assert qemu.vcpus != 4
    assert shown(world) == CONTESTED
    assert world.status().vcpus == qemu.vcpus
    assert world.recorder.events[-1] == ("Warning", "Contested")
    message = world.status().conditions[0].message
    assert f"{qemu.vcpus} vCPUs present, 4 declared; another client has changed them" in message


def test_a_fight_goes_on_at_a_slow_pace_and_costs_few_writes_and_one_event(world: World, qemu: Qemu) -> None:
    for _ in range(CHANGES):
        takes(world, qemu)
    events, writes = len(world.recorder.events), len(world.api.writes)
    corrections = 0
    for _ in range(600):
        if qemu.vcpus == 4:
            corrections += 1
            qemu.take_away(3)
        world.advance(10)
        assert shown(world) == CONTESTED

    assert corrections <= 6000 / PAUSE
    assert corrections >= 6000 / (PAUSE + 2 * RESYNC_SECONDS)
    assert len(world.recorder.events) == events
    assert len(world.api.writes) - writes <= 3 * corrections


def test_once_nothing_else_changes_it_the_machine_is_brought_to_its_count_and_a_window_later_it_is_ready(
    world: World, qemu: Qemu
) -> None:
    for _ in range(CHANGES):
        takes(world, qemu)
    world.advance(PAUSE + 2 * RESYNC_SECONDS)
    assert qemu.vcpus == 4
    assert shown(world) == CONTESTED

    world.advance(WINDOW + 2 * RESYNC_SECONDS)
    assert shown(world) == ("Converged", ["Ready"])
    assert world.recorder.events[-1] == ("Normal", "Converged")
    takes(world, qemu)
    assert qemu.vcpus == 4


def test_a_changed_spec_is_followed_at_once(world: World, qemu: Qemu) -> None:
    for _ in range(CHANGES):
        takes(world, qemu)
    world.apply("web", vcpus=5)
    world.run_due()

    assert qemu.vcpus == 5
    assert shown(world) == ("Converged", ["Ready"])


def test_the_next_operator_goes_on_at_the_same_pace(world: World, qemu: Qemu) -> None:
    for _ in range(CHANGES):
        takes(world, qemu)
    writes = len(world.api.writes)
    world.restart_operator()
    world.advance(PAUSE - RESYNC_SECONDS)
    assert (qemu.vcpus, len(world.api.writes)) == (3, writes)

    world.advance(WINDOW + PAUSE)
    assert qemu.vcpus == 4
    assert shown(world) == ("Converged", ["Ready"])


def test_changes_far_apart_are_corrected_each(world: World, qemu: Qemu) -> None:
    for _ in range(4 * CHANGES):
        takes(world, qemu)
        assert shown(world) == ("Converged", ["Ready"])
        world.advance(WINDOW / (CHANGES - 1) + RESYNC_SECONDS)


@pytest.mark.parametrize("known_by", ["its process", "its socket's age", "nothing"])
def test_a_qemu_that_crashes_again_and_again_is_not_contested(empty_world: World, known_by: str) -> None:
    world = empty_world
    qemu = Qemu(
        repeats_ids=True,
        shows_process=known_by == "its process",
        dated=known_by == "its socket's age",
        has_uuid=known_by == "nothing",
    )
    qemu.clock = lambda: world.wall
    world.machines["a.sock"] = qemu
    world.apply("web", vcpus=4)
    world.run_due()
    for _ in range(3 * CHANGES):
        world.advance(5)
        qemu.power_on()
        world.wake()
        world.run_due()
        assert qemu.vcpus == 4
        assert shown(world) == ("Converged", ["Ready"])


def test_what_a_guest_gives_back_late_or_refuses_is_no_change_by_something_else(world: World, qemu: Qemu) -> None:
    for _ in range(2 * CHANGES):
        qemu.guest = Guest.ASLEEP
        world.apply("web", vcpus=3, unplug={"retrySeconds": 1, "timeoutSeconds": 1})
        world.advance(10)
        world.apply("web", vcpus=4)
        world.run_due()
        qemu.guest_works()
        world.advance(2)
        qemu.guest = Guest.PROMPT
        world.advance(2)
        assert qemu.vcpus == 4
        assert shown(world) == ("Converged", ["Ready"])


def test_a_suspended_set_reports_what_is_changed_and_that_is_all(world: World, qemu: Qemu) -> None:
    world.apply("web", suspend=True)
    for _ in range(2):
        takes(world, qemu)
    for _ in range(2 * CHANGES):
        plugs(world, qemu)
        takes(world, qemu)

    assert shown(world) == ("Suspended", [])


def test_two_sets_of_one_machine_that_nothing_tells_do_not_fight_for_ever(empty_world: World) -> None:
    """On TCP, without a uuid."""
    world = empty_world
    qemu = Qemu(shows_process=False, has_uuid=False, dated=False, slots=64)
    world.machines |= {"a.sock": qemu, "b.sock": qemu}
    world.second_monitors.add("b.sock")
    for name, vcpus in (("a", 4), ("b", 3)):
        world.apply(name, vcpus=vcpus, monitor={"unix": {"path": f"{name}.sock"}, "connection": "Persistent"})
    for _ in range(300):
        world.advance(1)
    before = qemu.changes
    world.advance(10 * PAUSE)

    assert qemu.changes - before <= 20
    assert "Contested" in {world.reason("a"), world.reason("b")}


def test_a_correction_that_takes_long_is_carried_through_in_later_passes(world: World, qemu: Qemu) -> None:
    for _ in range(CHANGES):
        takes(world, qemu)
    qemu.take_away(2)
    qemu.take_away(1)
    qemu.seconds["device_add"] = 1.5
    events = len(world.recorder.events)
    world.advance(PAUSE + 2 * RESYNC_SECONDS)

    assert qemu.vcpus == 4
    assert shown(world) == CONTESTED
    assert world.recorder.events[events:] == []


def test_unplug_requests_that_take_long_are_all_sent_in_one_correction(world: World, qemu: Qemu) -> None:
    for _ in range(CHANGES):
        plugs(world, qemu)
    plugs(world, qemu)
    plugs(world, qemu)
    qemu.seconds["device_del"] = 1.5
    world.advance(PAUSE + 2 * RESYNC_SECONDS)

    assert qemu.vcpus == 4
    assert shown(world) == CONTESTED


def test_a_correction_that_takes_long_is_not_carried_through_against_further_changes(world: World, qemu: Qemu) -> None:
    for _ in range(CHANGES):
        takes(world, qemu)
    qemu.take_away(2)
    qemu.take_away(1)
    qemu.seconds["device_add"] = 1.5
    plugged = qemu.changes
    for _ in range(int(PAUSE + 2 * RESYNC_SECONDS)):
        world.advance(1)
        if qemu.vcpus > 1:
            qemu.take_away(max(qemu.cpus))

    assert 2 <= qemu.changes - plugged <= 4


def test_another_qemu_starts_from_nothing(world: World, qemu: Qemu) -> None:
    for _ in range(CHANGES):
        takes(world, qemu)
    assert shown(world) == CONTESTED
    qemu.power_on()
    world.wake()
    world.run_due()

    assert qemu.vcpus == 4
    assert shown(world) == ("Converged", ["Ready"])
