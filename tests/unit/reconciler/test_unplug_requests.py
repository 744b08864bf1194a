"""What becomes of an unplug request: answered, refused, ignored and repeated, timed out, carried out late."""

from __future__ import annotations

import pytest

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import AgentMode, Guest, Qemu
from unit.reconciler.world import ON_DEMAND
from vcpuset.domain.machine import Answer
from vcpuset.domain.requests import FIRST_PAUSE
from vcpuset.qmp.session import MANY_SECONDS, SETTLE_SECONDS

__all__: list[str] = []


def test_a_refused_cpu_is_replaced_by_the_next_and_leaves_no_trace(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=6)
    world.run_due()
    qemu.refused_slots = {5, 3}

    world.apply("web", vcpus=4)
    world.run_due()

    assert world.reason() == "Converged"
    assert qemu.vcpus == 4
    assert {5, 3} <= set(qemu.cpus)
    assert world.status().pending_unplugs == ()


def test_a_guest_that_refuses_all_is_asked_again_until_it_gives_in(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.refused_slots = {1}
    world.apply("web", vcpus=1)
    world.advance(5)
    assert world.reason() == "UnplugRefused"
    assert world.true_conditions() == ["Reconciling"]
    assert "slot 1: device in use (_OST 0x81)" in world.vcpuset().status.conditions[0].message

    world.advance(60)
    assert world.true_conditions() == ["Stalled"]
    writes, attempts = len(world.api.writes), world.status().pending_unplugs[0].attempts
    world.advance(200)
    # Each repetition costs two: its record, and the answer.
    repetitions = world.status().pending_unplugs[0].attempts - attempts
    assert (repetitions, len(world.api.writes) - writes) == (2, 4)
    assert "after 5 s" in world.vcpuset().status.conditions[0].message

    qemu.refused_slots = set()
    world.advance(60)
    assert world.true_conditions() == ["Ready"]
    assert qemu.vcpus == 1


@pytest.mark.parametrize(("connection", "held", "seconds"), [("Persistent", 1, 0), ("OnDemand", 0, 67)])
def test_a_silent_guest_times_out_and_a_late_answer_is_taken(
    world: LawfulWorld, qemu: Qemu, connection: str, held: int, seconds: int
) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1, monitor={**ON_DEMAND, "connection": connection})
    world.advance(10)
    assert world.reason() == "UnplugPending"
    world.advance(60)
    assert (world.reason(), world.true_conditions()) == ("UnplugTimedOut", ["Stalled"])
    assert world.sessions_held == held

    qemu.guest_works()
    world.advance(seconds)

    assert world.true_conditions() == ["Ready"]


def test_a_change_of_the_declaration_late_in_a_wait_delays_neither_time_out_nor_repetition(
    world: LawfulWorld, qemu: Qemu
) -> None:
    """The wait for the new one begins again, and both fall due long before the next regular look."""
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.advance(240)
    assert world.reason() == "UnplugTimedOut"

    world.apply("web", unplug={"timeoutSeconds": 40})
    world.advance(1)
    assert world.reason() == "UnplugPending"
    world.advance(40)

    assert (world.reason(), world.true_conditions()) == ("UnplugTimedOut", ["Stalled"])
    attempts = world.status().pending_unplugs[0].attempts
    world.advance(315 - 240 - 1 - 40)
    assert world.status().pending_unplugs[0].attempts == attempts + 1


@pytest.mark.parametrize(
    ("retry", "made_at"),
    [
        pytest.param(300, [0, 5, 15, 35, 75, 155, 315, 615, 915], id="twice as long each time, up to retrySeconds"),
        pytest.param(12, [0, 5, 15, 27, 39], id="up to retrySeconds"),
        pytest.param(3, [0, 3, 6, 9], id="a shorter retrySeconds is the only pause"),
    ],
)
@pytest.mark.parametrize("restarts", [False, True], ids=["one operator", "a new operator each second"])
def test_a_request_that_a_guest_ignores_is_made_again_after_growing_pauses_at_one_write_each(
    world: LawfulWorld, qemu: Qemu, retry: int, made_at: list[int], restarts: bool
) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1, unplug={"retrySeconds": retry})
    world.run_due()
    started = world.wall
    for _ in range(made_at[-1] + 1):
        if restarts:
            world.restart_operator()
        world.advance(1)

    made = {each.requested_at for write in world.api.writes for each in write.status.pending_unplugs}
    assert [round((at - started).total_seconds()) for at in sorted(made)] == made_at
    # Besides: Converged, that no answer has come, and the time-out.
    overdue = made_at[-1] >= 60
    assert world.reasons_written == [
        "Converged",
        "Unplugging",
        *["UnplugPending"] * (sum(0 < at < 60 for at in made_at) + (retry > 3)),
        *["UnplugTimedOut"] * overdue * (1 + sum(at > 60 for at in made_at)),
    ]


def test_a_guest_that_is_at_work_on_one_cpu_after_the_other_is_not_asked_again(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=8)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=2)
    for index in (7, 6, 5, 4):
        world.advance(4)
        qemu.take_away(index)
    world.advance(4.9)
    assert {request.attempts for request in world.status().pending_unplugs} == {1}

    # That a CPU has left is seen up to a second later.
    world.advance(1.2)
    assert [request.attempts for request in world.status().pending_unplugs] == [2, 2]


def test_a_guest_that_says_it_is_at_work_is_left_to_it_until_retry_seconds_are_over(
    world: LawfulWorld, qemu: Qemu
) -> None:
    qemu.guest = Guest.SLOW
    world.apply("web", vcpus=1)
    world.advance(150)
    world.restart_operator()
    world.advance(149)
    assert world.status().pending_unplugs[0].attempts == 1

    world.advance(2)
    assert world.status().pending_unplugs[0].attempts == 2


def test_a_reset_makes_requests_due_at_once_and_the_pauses_short_again_and_is_reported(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=1, deliver=False)
    qemu.guest = Guest.ASLEEP
    world.deliver()
    world.advance(90)
    assert (qemu.latched, world.status().pending_unplugs[0].attempts) == ({1}, 5)

    qemu.forget()
    world.run_due()
    assert (qemu.latched, world.status().pending_unplugs[0].attempts) == ({1}, 1)
    assert "The machine was reset meanwhile: its guest may still be booting." in world.status().conditions[0].message
    assert world.reason() == "UnplugTimedOut"


def test_a_machine_that_resets_again_and_again_costs_a_write_for_each_request_and_none_for_a_reset(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=1, deliver=False)
    qemu.guest = Guest.ASLEEP
    world.deliver()
    world.advance(90)
    writes = len(world.api.writes)
    for _ in range(60):
        qemu.forget()
        world.advance(1)

    assert world.reason() == "UnplugTimedOut"
    assert len(world.api.writes) - writes <= 60 / FIRST_PAUSE.total_seconds() + 1

    # It boots and never sees the request.
    qemu.latched.clear()
    qemu.guest = Guest.PROMPT
    world.advance(5.1)
    assert world.true_conditions() == ["Ready"]


def test_resets_one_after_the_other_do_not_make_requests_follow_faster_than_the_first_pause(
    world: LawfulWorld, qemu: Qemu
) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.run_due()
    writes = len(world.api.writes)
    for _ in range(50):
        world.advance(1)
        qemu.forget()
    world.advance(1)

    assert len(world.api.writes) - writes <= 2 * 50 / 5


def test_a_later_request_that_is_carried_out_shows_that_an_earlier_one_was_lost(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=6)
    world.run_due()
    qemu.loses_requests = True
    world.apply("web", vcpus=5)
    world.advance(100)
    assert [request.attempts for request in world.status().pending_unplugs] == [5]

    qemu.loses_requests = False
    world.apply("web", vcpus=4)
    world.advance(MANY_SECONDS + SETTLE_SECONDS)

    assert (qemu.vcpus, world.true_conditions()) == (4, ["Ready"])


def test_cpus_that_leave_one_after_the_other_cost_no_pass_each_and_the_last_one_is_seen_at_once(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=7)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=2)
    world.run_due()
    before = world.passes
    for slot in (6, 5, 4, 3, 2):
        world.advance(0.06)
        qemu.take_away(slot)
    world.advance(SETTLE_SECONDS)
    assert (world.reason(), world.passes - before) == ("Converged", 1)


def test_a_guest_whose_agent_speaks_again_is_asked_again_at_once(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", guestAgent={"unix": {"path": "a.agent"}})
    world.run_due()
    qemu.loses_requests, qemu.agent = True, AgentMode.MUTE
    world.apply("web", vcpus=1)
    world.advance(240)
    assert (world.reason(), world.status().pending_unplugs[0].attempts) == ("UnplugTimedOut", 6)

    qemu.loses_requests, qemu.agent = False, AgentMode.WORKS
    world.advance(61)

    assert (qemu.vcpus, world.true_conditions()) == (1, ["Ready", "GuestAgentConnected"])


def test_a_raised_target_does_not_overshoot_and_a_late_departure_is_plugged_again(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=6)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=2)
    world.advance(1)
    assert qemu.latched == {2, 3, 4, 5}

    world.apply("web", vcpus=6)
    world.advance(5)
    assert (qemu.vcpus, world.true_conditions()) == (6, ["Ready"])
    assert "may still unplug slots 2-5" in world.status().conditions[0].message

    qemu.guest = Guest.PROMPT
    qemu.guest_works()
    world.advance(2)
    assert (qemu.vcpus, world.true_conditions()) == (6, ["Ready"])
    assert world.status().pending_unplugs == ()


def test_a_target_between_the_old_and_the_new_one_asks_nobody_else_and_does_not_spin(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=6)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=4)
    world.advance(310)
    # Both are with the guest, made twice, and only one is wanted from here on.
    world.apply("web", vcpus=5)
    world.advance(370)
    attempts = {request.slot: request.attempts for request in world.status().pending_unplugs}
    assert attempts == {4: 6, 5: 8}

    passes = world.passes
    world.advance(200)

    assert world.passes - passes <= 5


def test_a_refusal_that_nobody_heard_is_found_in_the_reports_of_the_slots(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.guest = Guest.SLOW
    qemu.refused_slots = {1}
    world.apply("web", vcpus=1)
    world.run_due()
    qemu.disconnect()
    qemu.guest_works()
    world.advance(1)

    assert world.reason() == "UnplugRefused"
    assert [request.answer for request in world.status().pending_unplugs] == [Answer.IN_USE]


def test_a_refusal_of_an_earlier_request_is_no_answer_to_a_new_one(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.refused_slots = {1}
    world.apply("web", vcpus=1)
    world.advance(1)
    assert world.reason() == "UnplugRefused"
    world.apply("web", vcpus=2)
    world.run_due()
    qemu.guest = Guest.ASLEEP

    world.apply("web", vcpus=1)
    world.advance(5)
    world.restart_operator()
    world.advance(5)

    assert world.reason() == "UnplugPending"
    assert [request.answer for request in world.status().pending_unplugs] == [None]
