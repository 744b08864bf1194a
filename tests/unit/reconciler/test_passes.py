"""What passes come to: counts, status, writes, and who holds the monitor when."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu
from unit.reconciler.world import ON_DEMAND, RESYNC_SECONDS, World
from vcpuset.domain.errors import APIError, ObjectGone
from vcpuset.domain.machine import Answer
from vcpuset.domain.resource import Connection

__all__: list[str] = []


def test_a_set_that_is_right_from_the_start_costs_one_write(world: LawfulWorld, qemu: Qemu) -> None:
    status = world.status()

    assert world.reasons_written == ["Converged"]
    assert world.true_conditions() == ["Ready"]
    assert (status.vcpus, status.min_vcpus, status.max_vcpus) == (2, 1, 8)
    assert status.selector == "vcpuset.dev/name=web"
    assert world.sessions_held == 1


def test_the_first_resyncs_of_many_sets_are_spread(empty_world: World) -> None:
    for number in range(100):
        # Of a set that it cannot obey, the operator expects nothing before its next resync.
        empty_world.apply(f"web-{number}", vcpus=2, unplug={"policy": "Sometimes"})
        empty_world.run_due()
    due = [at - empty_world.loop.now for at in empty_world.due_at]
    assert len(due) == 100
    quarters = Counter(int(4 * seconds / RESYNC_SECONDS) for seconds in due)
    assert min(quarters[quarter] for quarter in range(4)) >= 5, quarters


def test_a_steady_state_costs_no_write_and_an_observation_a_minute(world: LawfulWorld) -> None:
    world.advance(3600)

    assert world.reasons_written == ["Converged"]
    assert 1 + (3600 - RESYNC_SECONDS) / 66 <= world.passes <= 2 + 3600 / 54


def test_a_status_write_that_the_watch_brings_before_its_answer_causes_no_pass(world: LawfulWorld) -> None:
    before = world.passes
    world.api.brings_at_once = True
    world.apply("web", unplug={"timeoutSeconds": 40})
    world.run_due()

    assert world.reasons_written[1:] == ["Converged"]
    assert world.passes == before + 1


def test_a_field_that_only_the_answer_to_a_status_write_shows_is_obeyed(world: LawfulWorld) -> None:
    """The watch began before the definition was upgraded, and leaves out what is new."""
    world.apply("web", deliver=False, vcpus=3, monitor=ON_DEMAND)
    told = world.vcpuset()
    world.cache.put(replace(told, spec=replace(told.spec, connection=Connection.PERSISTENT)))
    world.controller.changed(told.uid)
    world.run_due()

    assert world.true_conditions() == ["Ready"]
    assert world.sessions_held == 0


def test_a_status_that_somebody_else_changes_is_put_right_at_once(world: LawfulWorld) -> None:
    body = world.api.objects["web"]
    world.api.store({**body, "status": {**body["status"], "vcpus": 99}})
    world.deliver()
    world.run_due()

    assert world.status().vcpus == 2


def test_conditions_of_others_stay_and_their_changes_cause_neither_a_pass_nor_a_write(
    world: LawfulWorld, qemu: Qemu
) -> None:
    def theirs(message: str) -> dict[str, object]:
        return {"type": "Audited", "status": "True", "reason": "Fine", "message": message, "shade": "blue"}

    passes, writes = world.passes, len(world.api.writes)
    for message in ("one", "two"):
        body = world.api.objects["web"]
        ours = [each for each in body["status"]["conditions"] if each["type"] != "Audited"]
        world.api.store({**body, "status": {**body["status"], "conditions": [ours[0], theirs(message), *ours[1:]]}})
        world.deliver()
        world.run_due()
    assert (world.passes, len(world.api.writes)) == (passes, writes)

    world.apply("web", vcpus=6)
    world.run_due()
    stored = world.api.objects["web"]["status"]["conditions"]
    assert [each["type"] for each in stored] == ["Ready", "Audited", "Reconciling", "Stalled"]
    assert stored[1] == theirs("two")
    assert world.status().vcpus == qemu.vcpus == 6


def test_plugging_fills_the_lowest_slots_in_one_pass_and_one_write(world: LawfulWorld, qemu: Qemu) -> None:
    told = len(world.recorder.events)
    world.apply("web", vcpus=6)
    world.run_due()

    assert sorted(qemu.cpus) == [0, 1, 2, 3, 4, 5]
    assert world.reasons_written[1:] == ["Converged"]
    assert world.recorder.events[told:] == [("Normal", "Converged")]
    assert qemu.cpus[5][0] == "/machine/peripheral/vcpu5"


def test_a_plug_is_reported_in_the_next_pass_while_other_sets_wait(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=4)
    world.run_due()
    writes = len(world.api.writes)
    world.others_wait = True
    passes = world.passes

    world.apply("web", vcpus=6)
    world.advance(0)

    assert (qemu.vcpus, world.passes - passes, len(world.api.writes) - writes) == (6, 2, 1)
    assert world.true_conditions() == ["Ready"]


@pytest.mark.parametrize(("connection", "held"), [("Persistent", 1), ("OnDemand", 0)])
def test_unplugging_asks_the_highest_first_and_takes_three_writes_at_most(
    world: LawfulWorld, qemu: Qemu, connection: str, held: int
) -> None:
    world.apply("web", vcpus=8, monitor={**ON_DEMAND, "connection": connection})
    world.run_due()
    qemu.guest = Guest.SLOW
    world.apply("web", vcpus=3)
    world.run_due()
    assert qemu.latched == {3, 4, 5, 6, 7}
    assert world.sessions_held == 1

    qemu.guest_works()
    world.run_due()

    assert sorted(qemu.cpus) == [0, 1, 2]
    assert world.reasons_written[2:] == ["Unplugging", "Converged"]
    assert world.status().pending_unplugs == ()
    assert world.sessions_held == held


def test_down_to_one_gives_boot_cpus_back(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=1)
    world.run_due()

    assert sorted(qemu.cpus) == [0]
    assert world.true_conditions() == ["Ready"]


@pytest.mark.parametrize(("connection", "seconds"), [("Persistent", 0), ("OnDemand", 67)])
def test_drift_is_undone_at_its_event_or_at_the_next_resync(
    world: LawfulWorld, qemu: Qemu, connection: str, seconds: int
) -> None:
    world.apply("web", monitor={**ON_DEMAND, "connection": connection})
    world.run_due()
    qemu.come_by_another_hand(5, "somebody-elses")
    assert qemu.vcpus == 3

    world.advance(seconds)

    assert sorted(qemu.cpus) == [0, 1]


def test_a_set_that_says_ready_and_is_not_says_so_before_it_is(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=3)
    world.run_due()
    before = len(world.api.writes)
    qemu.take_away(2)
    world.advance(67)

    assert sorted(qemu.cpus) == [0, 1, 2]
    assert world.reasons_written[before:] == ["Plugging", "Converged"]


def test_a_change_of_many_seconds_is_reported_now_and_then(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=8)
    world.run_due()
    before = len(world.api.writes)
    qemu.guest = Guest.SLOW
    world.apply("web", vcpus=2)
    world.advance(0.1)
    for index in (7, 6, 5, 4, 3, 2):
        qemu.take_away(index)
        world.advance(2)

    assert world.reason() == "Converged"
    # asked, progress after 3 s and 10 s more, done
    assert 3 <= len(world.api.writes) - before <= 4


def test_a_slot_whose_id_another_cpu_has_is_filled_with_another_id(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.come_by_another_hand(6, "vcpu2")
    world.apply("web", vcpus=5)
    world.run_due()

    assert sorted(qemu.cpus) == [0, 1, 2, 3, 6]
    assert qemu.cpus[2][0].startswith("/machine/peripheral/vcpu2-")
    assert world.true_conditions() == ["Ready"]


def test_an_early_boot_is_waited_for(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.power_on(legacy=True)
    world.apply("web", vcpus=1)
    world.advance(3)
    assert (world.reason(), world.true_conditions()) == ("WaitingForGuest", ["Reconciling"])
    assert world.status().pending_unplugs == ()

    qemu.legacy = False
    world.advance(31)

    assert world.true_conditions() == ["Ready"]


def test_a_request_that_qemu_did_not_take_is_not_on_the_book(world: LawfulWorld, qemu: Qemu) -> None:
    """The migration begins after the look and before the request."""
    world.apply("web", vcpus=4)
    world.run_due()
    world.apply("web", vcpus=2)

    def migrate() -> None:
        qemu.migrating = True

    # look (2), write (2): the next point is that of the first request.
    world.interrupt(4, migrate)
    world.run_due()
    assert (world.reason(), world.status().pending_unplugs) == ("MachineBusy", ())

    qemu.migrating = False
    world.advance(1)
    assert world.true_conditions() == ["Ready"]


def test_a_cpu_that_qemu_rejects_is_replaced_and_named(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.rejected_slots = {1}
    world.apply("web", vcpus=1)
    world.run_due()

    assert (world.reason(), world.true_conditions()) == ("UnplugUnsupported", ["Stalled"])
    assert [request.answer for request in world.status().pending_unplugs] == [Answer.REJECTED]
    ready = world.status().ready
    assert ready is not None
    assert "device_del: not this one" in ready.message
    world.advance(120)
    assert world.status().ready == ready

    qemu.rejected_slots = set()
    world.advance(301)
    assert world.true_conditions() == ["Ready"]


def test_a_repetition_that_qemu_rejects_does_not_end_the_request_that_the_guest_has(
    world: LawfulWorld, qemu: Qemu
) -> None:
    """Otherwise another CPU would be asked for beside it, and both could leave."""
    world.apply("web", vcpus=4)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=3)
    world.run_due()
    qemu.rejected_slots = {3}

    world.advance(5.1)

    assert qemu.latched == {3}
    assert [(request.slot, request.answer) for request in world.status().pending_unplugs] == [(3, None)]
    assert world.status().pending_unplugs[0].attempts == 2
    qemu.guest_works()
    world.advance(67)
    assert (sorted(qemu.cpus), world.true_conditions()) == ([0, 1, 2], ["Ready"])


def test_a_machine_that_is_replaced_takes_its_requests_with_it(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.advance(5)
    (old,) = world.status().pending_unplugs

    qemu.power_on()
    world.advance(1)

    (new,) = world.status().pending_unplugs
    assert (new.slot, new.path, new.attempts) == (old.slot, old.path, 1)
    assert new.thread_id != old.thread_id


def test_a_clock_that_is_set_back_an_hour_delays_a_retry_by_one_interval_only(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.advance(100)
    world.set_clock(-3600)

    # The next one is due after 80 s, from the first look after the clock was set.
    world.advance(67 + 81)

    assert world.status().pending_unplugs[0].attempts == 6


def test_a_monitor_that_cannot_be_reached_keeps_the_last_counts(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.reachable = False
    qemu.disconnect()
    world.run_due()

    assert (world.reason(), world.true_conditions()) == ("MonitorUnreachable", ["Reconciling"])
    assert world.status().vcpus == 2
    writes = len(world.api.writes)
    world.advance(600)
    assert len(world.api.writes) == writes

    qemu.reachable = True
    world.advance(31)
    assert world.true_conditions() == ["Ready"]


def test_a_command_without_an_answer_may_have_run_and_is_not_repeated(world: LawfulWorld, qemu: Qemu) -> None:
    """The reply to the second of two plugs is lost: the look that follows finds both."""
    world.apply("web", vcpus=4)
    world.interrupt(7, "fails")
    world.run_due()
    world.advance(5)

    assert sorted(qemu.cpus) == [0, 1, 2, 3]
    assert world.true_conditions() == ["Ready"]


def test_of_requests_that_were_recorded_the_one_without_a_reply_waits_and_the_unsent_are_sent_at_once(
    world: LawfulWorld, qemu: Qemu
) -> None:
    """The reply to the first of two requests is lost; until the machine is seen again, the record of both stays."""
    world.apply("web", vcpus=4)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=2)
    world.interrupt(5, "fails")
    world.run_due()

    assert qemu.latched == {3}
    assert world.reason() == "MonitorTimeout"
    assert world.slots_pending == [2, 3]

    world.advance(1)
    assert qemu.latched == {2, 3}
    assert [request.attempts for request in world.status().pending_unplugs] == [1, 1]


def test_a_record_whose_write_got_no_answer_is_no_request(world: LawfulWorld, qemu: Qemu) -> None:
    """The write is stored, so the watch brings a record of requests of which none was sent."""
    world.apply("web", vcpus=4)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=2)
    world.interrupt(3, "fails")
    world.run_due()
    assert (qemu.latched, world.slots_pending) == (set(), [2, 3])
    started = world.status().unplug_started_at

    world.advance(1)
    world.deliver()
    world.advance(1)

    assert qemu.latched == {2, 3}
    assert [request.attempts for request in world.status().pending_unplugs] == [1, 1]
    assert started is not None
    assert world.status().unplug_started_at == world.status().pending_unplugs[0].requested_at > started


def test_a_repetition_whose_record_got_no_answer_is_made_as_soon_as_the_record_is_known(
    world: LawfulWorld, qemu: Qemu
) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1, unplug={"retrySeconds": 4})
    world.run_due()
    world.advance(3.9)
    qemu.latched.clear()
    # After look (2) and write (1): its answer.
    world.interrupt(3, "fails")
    world.advance(0.2)
    assert (qemu.latched, world.status().pending_unplugs[0].attempts) == (set(), 2)
    assert world.status().unplug_started_at is not None

    world.deliver()
    world.advance(1)

    assert (qemu.latched, world.status().pending_unplugs[0].attempts) == ({1}, 2)


def test_requests_that_were_not_sent_are_off_the_record_once_nothing_is_too_many(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=4)
    world.run_due()
    world.apply("web", vcpus=2)
    world.interrupt(3, "fails")
    world.run_due()
    assert world.slots_pending == [2, 3]

    world.apply("web", vcpus=4)
    world.advance(1)

    assert (world.slots_pending, world.true_conditions()) == ([], ["Ready"])
    assert "may still" not in world.status().conditions[0].message


def test_requests_end_when_the_set_goes_or_declares_something_else(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=8)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    # look (2), write (2), first request (1): when its reply comes.
    world.interrupt(5, lambda: world.apply("web", vcpus=8))
    world.apply("web", vcpus=2)
    world.advance(1)

    assert (qemu.latched, world.slots_pending) == ({7}, [7])
    assert world.true_conditions() == ["Ready"]

    world.interrupt(5, lambda: world.delete("web"))
    world.apply("web", vcpus=2)
    world.advance(1)
    assert qemu.latched == {7, 6}


def test_a_conflict_ends_the_pass_before_anybody_is_asked(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.interrupt(2, lambda: world.apply("web", vcpus=2, deliver=False))
    world.run_due()
    assert qemu.latched == set()

    world.deliver()
    world.advance(1)

    assert qemu.latched == set()
    assert world.true_conditions() == ["Ready"]


def test_without_the_api_server_nobody_is_asked(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.interrupt(2, "fails")
    world.run_due()
    assert qemu.latched == set()

    world.advance(1)
    assert qemu.latched == {1}


def test_an_overloaded_api_server_and_the_machine_are_left_alone_for_as_long_as_it_asks(
    world: LawfulWorld, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = world.api._request

    async def request(*_: object, **__: object) -> Any:  # noqa: ANN401 - as the one that it stands for
        raise APIError("HTTP 429: too many requests", retry_after=12)

    monkeypatch.setattr(world.api, "_request", request)
    world.apply("web", vcpus=1, monitor=ON_DEMAND)
    world.run_due()
    monkeypatch.setattr(world.api, "_request", working)
    looks = qemu.looks
    world.advance(11)
    assert (qemu.looks, world.sessions_held) == (looks, 0)

    world.advance(2)
    assert world.true_conditions() == ["Ready"]
    assert qemu.vcpus == 1


def test_suspend_reports_and_changes_nothing(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=5, suspend=True)
    world.advance(200)

    assert qemu.vcpus == 2
    assert (world.reason(), world.true_conditions()) == ("Suspended", [])

    world.apply("web", suspend=False)
    world.run_due()
    assert (qemu.vcpus, world.true_conditions()) == (5, ["Ready"])


def test_a_deleted_set_leaves_the_machine_as_it_is(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.guest = Guest.SLOW
    world.apply("web", vcpus=1)
    world.run_due()
    assert world.sessions_held == 1

    world.delete("web")
    world.advance(100)

    assert world.sessions_held == 0
    assert qemu.vcpus == 2


def test_a_plug_under_way_ends_when_the_set_goes_or_declares_something_else(world: LawfulWorld, qemu: Qemu) -> None:
    world.interrupt(5, lambda: world.apply("web", vcpus=5))
    world.apply("web", vcpus=8)
    world.run_due()
    assert (qemu.vcpus, world.true_conditions()) == (5, ["Ready"])

    world.interrupt(5, lambda: world.delete("web"))
    world.apply("web", vcpus=8)
    world.run_due()
    assert qemu.vcpus < 8


@pytest.mark.parametrize("point", range(10))
def test_a_set_that_goes_anywhere_in_a_pass_stays_gone(world: LawfulWorld, qemu: Qemu, point: int) -> None:
    world.interrupt(point, lambda: world.delete("web"))
    world.apply("web", vcpus=4)
    world.run_due()
    assert list(world.cache) == []

    vcpus = qemu.vcpus
    qemu.take_away(1)
    world.advance(200)

    assert qemu.vcpus == vcpus - 1
    assert world.sessions_held == 0


@pytest.mark.parametrize("point", range(12))
def test_an_operator_that_dies_anywhere_in_a_shrink_is_succeeded_without_a_second_request(
    world: LawfulWorld, qemu: Qemu, point: int
) -> None:
    """The laws of `world` judge each request; here only the end is looked at."""
    world.apply("web", vcpus=5)
    world.run_due()
    qemu.guest = Guest.SLOW
    world.apply("web", vcpus=2)
    world.interrupt(point, "dies")
    world.advance(30)
    assert world.operator_number == 2
    qemu.guest_works()
    qemu.guest = Guest.PROMPT

    world.advance(61)

    assert sorted(qemu.cpus) == [0, 1]
    assert world.true_conditions() == ["Ready"]


@pytest.mark.parametrize("point", range(8))
def test_an_operator_that_dies_anywhere_in_a_growth_is_succeeded(world: LawfulWorld, qemu: Qemu, point: int) -> None:
    world.apply("web", vcpus=4)
    world.interrupt(point, "dies")
    world.advance(1)

    assert world.operator_number == 2
    assert sorted(qemu.cpus) == [0, 1, 2, 3]
    assert world.true_conditions() == ["Ready"]


def test_a_rejection_is_not_forgotten_while_the_guest_works_on_others(world: LawfulWorld, qemu: Qemu) -> None:
    world.apply("web", vcpus=6)
    world.run_due()
    qemu.guest = Guest.SLOW
    qemu.rejected_slots = {1}
    world.apply("web", vcpus=1)
    world.advance(3)
    qemu.guest_works()
    world.advance(5)

    assert (world.reason(), sorted(qemu.cpus)) == ("UnplugUnsupported", [0, 1])
    assert [request.answer for request in world.status().pending_unplugs] == [Answer.REJECTED]


def test_a_cpu_that_qemu_rejects_time_and_again_is_reported_once(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.rejected_slots = {1}
    world.apply("web", vcpus=1)
    world.run_due()
    reported = len(world.recorder.events)

    world.advance(950)

    assert world.status().pending_unplugs[0].attempts > 2
    assert len(world.recorder.events) == reported


def test_a_time_out_of_an_earlier_generation_is_not_inherited_although_the_first_look_fails(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=6)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=5)
    world.advance(70)
    assert world.reason() == "UnplugTimedOut"

    qemu.reachable = False
    qemu.disconnect()
    world.apply("web", vcpus=3)
    world.run_due()
    assert world.reason() == "MonitorUnreachable"
    qemu.reachable = True
    world.advance(2)

    assert (world.reason(), world.true_conditions()) == ("Unplugging", ["Reconciling"])


def test_an_object_that_seems_to_be_gone_for_a_moment_is_looked_at_again(
    world: LawfulWorld, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.apply("web", vcpus=2)
    world.run_due()
    qemu.take_away(1)
    working = world.api._request
    answers = iter([ObjectGone("404 page not found")])

    async def request(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as the one that it stands for
        for error in answers:
            raise error
        return await working(*arguments, **options)

    monkeypatch.setattr(world.api, "_request", request)
    world.advance(140)
    qemu.take_away(1)
    world.advance(70)

    assert (sorted(qemu.cpus), world.true_conditions()) == ([0, 1], ["Ready"])
