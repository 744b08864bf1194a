"""A monitor that does what no QEMU does costs the operator and the API server little, and others no turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu
from unit.reconciler.world import ON_DEMAND
from vcpuset.controller import NEXT_TURN_SECONDS
from vcpuset.domain.errors import SlotTaken
from vcpuset.qmp.monitors import TURN_SECONDS
from vcpuset.runtime.workqueue import SLOW_SECONDS

__all__: list[str] = []

MANY = 40
"""Slots of a machine that is larger than what one pass asks for, if it has to ask for one after the other."""


@pytest.fixture
def large() -> Qemu:
    """A machine that boots with all its CPUs."""
    return Qemu(boot=MANY, slots=MANY)


@pytest.fixture
def large_world(large: Qemu) -> Iterator[LawfulWorld]:
    """The set "web" declares all CPUs of `large` and is Ready."""
    world = LawfulWorld(large, vcpus=MANY)
    world.run_due()
    yield world
    world.close()


@pytest.fixture
def empty_machine() -> Qemu:
    """A machine that boots with one CPU, and has as many slots as `large`."""
    return Qemu(boot=1, slots=MANY)


@pytest.fixture
def empty_machine_world(empty_machine: Qemu) -> Iterator[LawfulWorld]:
    """The set "web" declares the one CPU of `empty_machine` and is Ready."""
    world = LawfulWorld(empty_machine, vcpus=1)
    world.run_due()
    yield world
    world.close()


def test_a_monitor_that_shows_other_cpus_at_each_look_is_left_alone_more_and_more(
    world: LawfulWorld, qemu: Qemu
) -> None:
    """The laws of `world` hold a pass to a few looks and writes; here it is an hour."""
    qemu.guest, qemu.restless = Guest.ASLEEP, True
    world.apply("web", vcpus=1)
    world.advance(60)
    looks, writes = qemu.looks, len(world.api.writes)

    world.advance(3600)

    assert qemu.looks - looks <= 3600 / 15 * 6
    assert len(world.api.writes) - writes <= 3600 / 15 * 6

    qemu.guest, qemu.restless = Guest.PROMPT, False
    world.advance(67)
    assert (sorted(qemu.cpus), world.true_conditions()) == ([0], ["Ready"])


def test_cpus_that_qemu_rejects_one_after_the_other_are_asked_for_in_several_passes(
    large_world: LawfulWorld, large: Qemu
) -> None:
    large.rejected_slots = set(range(1, MANY))
    large_world.apply("web", vcpus=MANY - 1)
    large_world.run_due()
    assert large_world.reason() == "Unplugging"
    reported = len(large_world.recorder.events)

    large_world.advance(30)

    assert (large_world.reason(), large_world.true_conditions()) == ("UnplugUnsupported", ["Stalled"])
    assert [each.slot for each in large_world.status().pending_unplugs] == list(range(1, MANY))
    assert [reason for _, reason in large_world.recorder.events[reported:]] == ["UnplugUnsupported"]


def test_many_cpus_that_qemu_rejects_are_told_as_that_before_the_first_ones_turn_comes_again(
    large_world: LawfulWorld, large: Qemu
) -> None:
    large.rejected_slots = set(range(1, MANY))
    large_world.apply("web", vcpus=MANY - 1, unplug={"retrySeconds": 5})
    large_world.advance(4)

    assert (large_world.reason(), large_world.true_conditions()) == ("UnplugUnsupported", ["Stalled"])


def test_the_last_cpu_that_qemu_does_not_reject_is_found(large_world: LawfulWorld, large: Qemu) -> None:
    large.rejected_slots = set(range(2, MANY))
    large_world.apply("web", vcpus=MANY - 1)
    large_world.advance(30)

    assert 1 not in large.cpus
    assert large_world.true_conditions() == ["Ready"]


def test_a_monitor_whose_cpus_can_hardly_ever_be_counted_is_looked_at_once_a_second(
    world: LawfulWorld, qemu: Qemu
) -> None:
    """Besides at its events. That some looks succeed does not have it looked at more often."""
    qemu.settles_each = 4
    looks = qemu.looks

    for _ in range(30):
        qemu.forget()
        world.advance(1)

    assert qemu.looks - looks <= 2 * 30 + 2


def test_a_monitor_whose_cpus_can_never_be_counted_is_reported(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.settles_each = 0
    world.wake()
    world.advance(3)
    assert world.reason() == "Converged"

    world.advance(4)
    ready = world.status().ready
    assert ready is not None
    assert (ready.reason, world.sessions_held) == ("MonitorUnreachable", 0)
    assert "CPUs were plugged or unplugged during the observation" in ready.message

    qemu.settles_each = 1
    world.advance(31)
    assert world.true_conditions() == ["Ready"]


def test_a_monitor_that_was_away_has_its_time_to_settle_again(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.settles_each = 0
    world.wake()
    world.run_due()
    qemu.reachable = False
    qemu.disconnect()
    world.advance(600)
    assert world.reason() == "MonitorUnreachable"
    qemu.reachable, qemu.settles_each, qemu.looks = True, 2, 0
    writes = len(world.api.writes)
    world.advance(40)

    assert world.true_conditions() == ["Ready"]
    told = [each.status.ready.message for each in world.api.writes[writes:] if each.status.ready is not None]
    assert not [words for words in told if "during the observation" in words]


def test_a_cpu_that_is_just_leaving_is_waited_for_without_a_word(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=4, monitor=ON_DEMAND)
    world.run_due()
    writes = len(world.api.writes)
    qemu.settles_each = 2
    qemu.looks = 0

    world.wake()
    world.advance(2)

    assert (len(world.api.writes), world.reason(), world.sessions_held) == (writes, "Converged", 0)


def test_a_fill_that_takes_long_goes_on_in_later_passes_and_gives_the_worker_back_after_each_slow_command(
    empty_machine_world: LawfulWorld, empty_machine: Qemu
) -> None:
    world, qemu = empty_machine_world, empty_machine
    qemu.seconds["device_add"] = 9.9
    world.apply("web", vcpus=MANY, monitor=ON_DEMAND)
    began, passes = world.loop.now, world.passes

    while len(qemu.cpus) < MANY:
        before = world.loop.now
        world.run_pass(world.vcpuset().uid)
        assert world.loop.now - before < 2 * 9.9, "a pass that went on"
        world.advance(NEXT_TURN_SECONDS)

    assert world.true_conditions() == ["Ready"]
    assert world.passes - passes == MANY - 1
    # Nobody else waited, so there was no pause.
    assert world.loop.now - began < (MANY - 1) * (9.9 + 2 * NEXT_TURN_SECONDS)


def test_a_fill_in_many_passes_writes_progress_now_and_then_only(
    empty_machine_world: LawfulWorld, empty_machine: Qemu
) -> None:
    world, qemu = empty_machine_world, empty_machine
    qemu.seconds["device_add"] = 1.0
    writes, told = len(world.api.writes), len(world.recorder.events)
    world.apply("web", vcpus=MANY)
    world.advance(MANY)

    written = [each.status.ready.message for each in world.api.writes[writes:] if each.status.ready is not None]
    assert written == [
        "1 vCPU present, 40 declared; plugging 39.",
        "5 vCPUs present, 40 declared; plugging 35.",
        "15 vCPUs present, 40 declared; plugging 25.",
        "QEMU has 40 vCPUs, as declared.",
    ]
    assert world.recorder.events[told:] == [("Normal", "Converged")]


def test_slots_that_turn_out_to_be_taken_are_reported_and_tried_less_and_less_often_also_if_that_takes_long(
    empty_machine_world: LawfulWorld, empty_machine: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = empty_machine_world

    def taken(slot: int, device_id: str, **_: bool) -> None:
        world.spend(1.5)
        raise SlotTaken("device_add", "GenericError", f"CPU {slot} exists")

    monkeypatch.setattr(empty_machine, "device_add", taken)
    world.apply("web", vcpus=MANY)
    passes = world.passes
    world.advance(600)

    assert "CPU 1 exists" in world.status().conditions[0].message
    assert world.passes - passes <= 600 / 15 + 10


def test_a_fill_that_is_quick_takes_one_pass_and_one_write_however_many_cpus_it_plugs(
    empty_machine_world: LawfulWorld, empty_machine: Qemu
) -> None:
    world, qemu = empty_machine_world, empty_machine
    qemu.seconds["device_add"] = 0.01
    writes = len(world.api.writes)
    world.apply("web", vcpus=MANY)
    world.run_pass(world.vcpuset().uid)

    assert (len(qemu.cpus), world.true_conditions()) == (MANY, ["Ready"])
    assert len(world.api.writes) == writes + 1


def test_another_count_that_is_declared_during_a_long_fill_is_what_the_next_pass_works_towards(
    empty_machine_world: LawfulWorld, empty_machine: Qemu
) -> None:
    world, qemu = empty_machine_world, empty_machine
    qemu.seconds["device_add"] = 1.0
    world.apply("web", vcpus=MANY)
    uid = world.vcpuset().uid
    for _ in range(3):
        world.run_pass(uid)
    world.apply("web", vcpus=6)
    world.advance(10)

    assert (len(qemu.cpus), world.true_conditions()) == (6, ["Ready"])


def test_other_clients_of_the_monitor_have_their_turn_during_a_long_fill(
    empty_machine_world: LawfulWorld, empty_machine: Qemu
) -> None:
    world, qemu = empty_machine_world, empty_machine
    qemu.seconds["device_add"] = 1.0
    world.apply("web", vcpus=MANY, monitor=ON_DEMAND)
    world.run_pass(world.vcpuset().uid)
    qemu.other_client_comes()
    world.advance(TURN_SECONDS + 2)

    assert qemu.other_has_it
    assert len(qemu.cpus) < MANY
    qemu.other_client_goes()
    world.advance(MANY + 31)
    assert (len(qemu.cpus), world.true_conditions()) == (MANY, ["Ready"])


def test_unplug_requests_that_take_long_are_sent_in_several_passes_each_once(
    large_world: LawfulWorld, large: Qemu
) -> None:
    large.guest = Guest.ASLEEP
    large.seconds["device_del"] = 9.9
    large_world.apply("web", vcpus=1)
    uid = large_world.vcpuset().uid
    for _ in range(MANY - 1):
        before, known = large_world.loop.now, set(large.latched)
        large_world.run_pass(uid)
        assert large_world.loop.now - before < 2 * 9.9, "a pass that went on"
        assert len(large.latched - known) == 1, "one was asked for again before the others were asked for once"
        if len(large.latched) < MANY - 1:
            assert large_world.next_pass <= large_world.loop.now + NEXT_TURN_SECONDS

    assert large.latched == set(range(1, MANY))


def test_unplug_requests_that_a_pass_had_no_time_for_are_withdrawn_when_they_are_not_wanted_any_more(
    large_world: LawfulWorld, large: Qemu
) -> None:
    large.guest = Guest.ASLEEP
    large.seconds["device_del"] = 0.4
    large_world.apply("web", vcpus=1)
    large_world.run_pass(large_world.vcpuset().uid)
    assert large.latched == {MANY - 1, MANY - 2, MANY - 3}

    large_world.apply("web", vcpus=MANY - 3)
    large_world.advance(2)

    assert large.latched == {MANY - 1, MANY - 2, MANY - 3}
    assert [each.slot for each in large_world.status().pending_unplugs] == [MANY - 3, MANY - 2, MANY - 1]


def test_unplug_requests_that_take_long_are_sent_without_pauses_to_a_guest_that_grants_each_at_once(
    large_world: LawfulWorld, large: Qemu
) -> None:
    large.seconds["device_del"] = 1.5
    large_world.apply("web", vcpus=1)
    large_world.advance((MANY - 1) * 1.5 + MANY * 2 * NEXT_TURN_SECONDS)

    assert (len(large.cpus), large_world.true_conditions()) == (1, ["Ready"])


@pytest.mark.parametrize("connection", ["OnDemand", "Persistent"])
@pytest.mark.parametrize("guest", [Guest.PROMPT, Guest.SLOW])
@pytest.mark.parametrize(
    "slow",
    [
        each
        for number in range(1, 5)
        for each in itertools.combinations(("api", "observe", "device_add", "device_del"), number)
    ],
)
def test_a_machine_gets_its_count_whatever_takes_longer_than_a_pass_may_change_cpus(
    world: LawfulWorld, qemu: Qemu, slow: tuple[str, ...], guest: Guest, connection: str
) -> None:
    qemu.guest = guest
    qemu.seconds.update(dict.fromkeys(slow, SLOW_SECONDS + 0.5))
    world.api.seconds = qemu.seconds.get("api", 0.0)
    world.apply("web", monitor={"unix": {"path": "a.sock"}, "connection": connection})
    for vcpus in (6, 1):
        world.apply("web", vcpus=vcpus)
        writes = len(world.api.writes)
        for _ in range(20):
            world.advance(3)
            qemu.guest_works()
        world.advance(20)
        assert (qemu.vcpus, world.reason()) == (vcpus, "Converged")
        assert len(world.api.writes) - writes <= 12
