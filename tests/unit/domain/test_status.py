"""From an assessment to a status: conditions, transitions, and what may be written later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from unit.domain.builders import NOW, a_machine, a_request, a_set, a_spec, ago, assessment_on, findings_of
from vcpuset.domain.assessment import Assessment, RequeuePolicy, slot_list
from vcpuset.domain.errors import AgentRefused, AgentTimeout, AgentUnreachable
from vcpuset.domain.guest import GuestCPU, GuestCPUs, GuestReport
from vcpuset.domain.machine import Answer, Machine
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import is_progress, status_of, unserved_status
from vcpuset.domain.resource import Condition, GuestAgent, Request, Status, VCPUSet
from vcpuset.domain.target import target_for

__all__: list[str] = []

READY = Assessment(Reason.CONVERGED, "QEMU has 2 vCPUs, as declared.", State.READY, RequeuePolicy.RESYNC)
WORKING = Assessment(Reason.PLUGGING, "plugging 2.", State.RECONCILING, RequeuePolicy.HOLD)
STUCK = Assessment(Reason.INSUFFICIENT_SLOTS, "slots for 8.", State.STALLED, RequeuePolicy.RESYNC)
IDLE = Assessment(Reason.SUSPENDED, "nothing is changed.", State.HELD, RequeuePolicy.RESYNC)


@pytest.mark.parametrize(
    ("assessment", "true"),
    [(READY, ["Ready"]), (WORKING, ["Reconciling"]), (STUCK, ["Stalled"]), (IDLE, [])],
    ids=lambda value: value.reason.value if isinstance(value, Assessment) else None,
)
def test_the_three_conditions_stand_in_order_and_at_most_one_is_true(assessment: Assessment, true: list[str]) -> None:
    made = made_from((), assessment, 3, NOW)

    assert [condition.type for condition in made] == ["Ready", "Reconciling", "Stalled"]
    assert [condition.type for condition in made if condition.status == "True"] == true
    assert {condition.status for condition in made} <= {"True", "False"}
    assert {(each.reason, each.message, each.observed_generation) for each in made} == {
        (assessment.reason.value, assessment.message, 3)
    }


def made_from(
    before: tuple[Condition, ...], assessment: Assessment, generation: int, now: datetime
) -> tuple[Condition, ...]:
    """The conditions of a set without a guest agent."""
    vcpuset = a_set(generation=generation, status=Status(conditions=before))
    return status_of(vcpuset, assessment, findings_of(vcpuset.spec, a_machine()), now).conditions


def _since(made: tuple[Condition, ...]) -> dict[str, datetime]:
    return {condition.type: condition.last_transition_time for condition in made}


def test_only_a_condition_whose_status_changes_gets_a_new_transition_time() -> None:
    before = made_from((), WORKING, 1, ago(60))

    after = made_from(before, STUCK, 1, NOW)

    assert _since(after) == {"Ready": ago(60), "Reconciling": NOW, "Stalled": NOW}


def test_another_reason_message_or_generation_is_no_transition() -> None:
    before = made_from((), WORKING, 1, ago(60))

    after = made_from(before, replace(WORKING, reason=Reason.UNPLUGGING, message="other."), 2, NOW)

    assert set(_since(after).values()) == {ago(60)}
    assert {condition.observed_generation for condition in after} == {2}


def test_transition_times_have_whole_seconds_as_everywhere_in_kubernetes() -> None:
    made = made_from((), READY, 1, NOW + timedelta(microseconds=999_999))

    assert set(_since(made).values()) == {NOW}


def test_a_condition_that_is_missing_in_the_status_begins_now() -> None:
    before = made_from((), READY, 1, ago(60))[:1]

    assert _since(made_from(before, READY, 1, NOW)) == {"Ready": ago(60), "Reconciling": NOW, "Stalled": NOW}


# --- the guest's own word -------------------------------------------------------------------------------------------

AGENT_SET = a_set(a_spec(2, agent=GuestAgent("ga.sock")))
BOTH_ONLINE = GuestReport(GuestCPUs((GuestCPU(0, True, False), GuestCPU(1, True, True))))
SILENT = GuestReport(None, AgentTimeout("web/ga.sock has not answered"))


def observed(
    vcpuset: VCPUSet, machine: Machine | None, guest: GuestReport | None = None, requests: Iterable[Request] = ()
) -> Status:
    """The status once this was found."""
    found = None if machine is None else findings_of(vcpuset.spec, machine, requests, guest=guest)
    return status_of(vcpuset, READY, found, NOW)


def agent_condition(
    machine: Machine | None, guest: GuestReport | None, before: tuple[Condition, ...] = ()
) -> tuple[str, str, str]:
    """Status, reason and message of GuestAgentConnected, the fourth condition."""
    vcpuset = replace(AGENT_SET, status=Status(conditions=before))
    made = observed(vcpuset, machine, guest).conditions
    assert [each.type for each in made] == ["Ready", "Reconciling", "Stalled", "GuestAgentConnected"]
    return made[3].status, made[3].reason, made[3].message


@pytest.mark.parametrize(
    ("guest", "status", "reason"),
    [
        (BOTH_ONLINE, "True", "Connected"),
        (SILENT, "False", "NoAnswer"),
        (GuestReport(None, AgentUnreachable("nobody listens")), "False", "Unreachable"),
        (GuestReport(None, AgentRefused("guest-get-vcpus", "CommandNotFound", "disabled")), "False", "Refused"),
        (GuestReport(GuestCPUs(tuple(GuestCPU(i, True, True) for i in range(5)))), "False", "OtherMachine"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_fourth_condition_says_whether_the_guest_agent_answers(guest: GuestReport, status: str, reason: str) -> None:
    found = agent_condition(a_machine(), guest)
    assert found[:2] == (status, reason)
    assert found[2].endswith(".")
    if guest.error is not None:
        assert str(guest.error)[1:] in found[2]


def test_an_agent_that_was_not_asked_is_unknown_unless_the_running_guest_gives_cpus_back() -> None:
    known = observed(AGENT_SET, a_machine(), BOTH_ONLINE).conditions
    assert agent_condition(a_machine(), None)[:2] == ("Unknown", "NotQueried")
    assert agent_condition(a_machine(), None, known)[:2] == ("True", "Connected")
    assert agent_condition(a_machine(run_state="paused"), None, known)[:2] == ("Unknown", "NotQueried")
    assert agent_condition(None, None, known)[:2] == ("Unknown", "NotQueried")


def test_what_the_guest_said_of_other_cpus_is_no_online_count_of_these() -> None:
    known = observed(AGENT_SET, a_machine(), BOTH_ONLINE)
    after = replace(AGENT_SET, status=known)
    assert observed(after, a_machine(boot=[0])).online_vcpus is None, "more than there are"
    assert observed(after, replace(a_machine(), uuid="other")).online_vcpus is None


def test_no_message_is_longer_than_the_schema_allows() -> None:
    long = replace(READY, message="x" * 100_000)
    assert {len(each.message) for each in made_from((), long, 1, NOW)} == {32768}


def test_the_online_count_is_the_guests_or_absent() -> None:
    known = observed(AGENT_SET, a_machine(), BOTH_ONLINE)
    assert known.online_vcpus == 2
    after = replace(AGENT_SET, status=known)
    assert observed(after, a_machine(), SILENT).online_vcpus is None, "it is not known any more"
    assert observed(after, a_machine()).online_vcpus == 2, "it was not asked"
    assert observed(after, None).online_vcpus == 2, "nothing was looked at"
    assert observed(replace(after, spec=a_spec(2)), a_machine()).online_vcpus is None, "no agent"


# --- observed -----------------------------------------------------------------------------------------------------


def test_the_status_has_what_was_seen_not_what_was_declared() -> None:
    machine = a_machine(plugged=[4])

    status = observed(a_set(a_spec(2), generation=5), machine, None, [a_request(4, at=ago(3))])

    assert (status.vcpus, status.min_vcpus, status.max_vcpus) == (3, 1, 8)
    assert status.observed_generation == 5
    assert status.selector == "vcpuset.dev/name=web"
    assert status.pending_unplugs == (a_request(4, at=ago(3)),)
    assert status.unplug_started_at == ago(3)


def test_without_an_observation_the_last_one_stands() -> None:
    last = Status(
        observed_generation=1,
        vcpus=3,
        min_vcpus=1,
        max_vcpus=8,
        selector="vcpuset.dev/name=web",
        machine_uuid="a9e0cd9c-8b8a-4a92-9a4b-0e6c3c3a8b5c",
        unplug_started_at=ago(3),
        pending_unplugs=(a_request(4),),
    )

    status = observed(a_set(a_spec(7), generation=6, status=last), None)

    other = replace(last, observed_generation=6, unplug_started_at=None, conditions=status.conditions)
    assert status == other, "that time was another generation's"
    status = observed(a_set(a_spec(7), generation=1, status=last), None)
    assert status == replace(last, conditions=status.conditions)


def test_a_set_whose_machine_was_never_seen_has_a_generation_and_no_count() -> None:
    status = observed(a_set(), None)

    assert (status.observed_generation, status.vcpus, status.max_vcpus) == (1, None, None)


# --- is_progress --------------------------------------------------------------------------------------------------


def _status(reason: Reason, *, generation: int = 1, vcpus: int = 4) -> Status:
    assessment = Assessment(reason, f"{vcpus} present.", reason.states[0], RequeuePolicy.HOLD)
    return Status(generation, vcpus, conditions=made_from((), assessment, generation, NOW))


@pytest.mark.parametrize(
    ("old", "new", "progress"),
    [
        pytest.param(_status(Reason.PLUGGING), _status(Reason.PLUGGING, vcpus=5), True, id="taken up one by one"),
        pytest.param(_status(Reason.UNPLUGGING), _status(Reason.UNPLUGGING, vcpus=3), True, id="one more gone"),
        pytest.param(_status(Reason.UNPLUG_PENDING), _status(Reason.UNPLUG_PENDING, vcpus=3), True, id="still waiting"),
        pytest.param(_status(Reason.UNPLUGGING), _status(Reason.UNPLUG_PENDING), True, id="no answer so far"),
        pytest.param(_status(Reason.UNPLUG_PENDING), _status(Reason.UNPLUGGING), True, id="a first answer"),
        pytest.param(_status(Reason.UNPLUGGING), _status(Reason.UNPLUG_REFUSED), False, id="bad news"),
        pytest.param(_status(Reason.UNPLUGGING), _status(Reason.CONVERGED), False, id="the end"),
        pytest.param(_status(Reason.UNPLUG_REFUSED), _status(Reason.UNPLUG_REFUSED, vcpus=3), False, id="no change"),
        pytest.param(_status(Reason.CONVERGED), _status(Reason.CONVERGED, vcpus=5), False, id="ready all the time"),
        pytest.param(_status(Reason.UNPLUGGING), _status(Reason.UNPLUGGING, generation=2), False, id="other spec"),
        pytest.param(Status(), _status(Reason.PLUGGING), False, id="the first report"),
    ],
)
def test_progress_is_a_plug_or_an_unplug_that_goes_on(old: Status, new: Status, progress: bool) -> None:
    assert is_progress(old, new, RequeuePolicy.HOLD) is progress


def test_a_plug_that_failed_and_is_tried_again_is_no_progress() -> None:
    assert not is_progress(_status(Reason.PLUGGING), _status(Reason.PLUGGING, vcpus=5), RequeuePolicy.RETRY)


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ([5], "slot 5"),
        ([1, 2, 3], "slots 1-3"),
        ([7, 1, 3, 2, 5], "slots 1-3, 5, 7"),
        ([1, 3], "slots 1, 3"),
        (list(range(1, 4096)), "slots 1-4095"),
        (list(range(0, 100, 2)), "slots 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30 and 34 more"),
    ],
)
def test_slots_are_named_as_ranges(slots: list[int], text: str) -> None:
    assert slot_list(a_request(slot) for slot in slots) == text


def test_a_change_for_the_worse_is_a_warning_also_when_it_is_no_stall() -> None:
    refused = assessment_on(
        a_spec(1), a_machine(boot=[0], plugged=[1]), [a_request(1, at=ago(1), answer=Answer.IN_USE)]
    )

    assert refused.state is State.RECONCILING
    assert refused.event_type == "Warning"
    assert READY.event_type == WORKING.event_type == IDLE.event_type == "Normal"
    assert STUCK.event_type == "Warning"


def test_the_declared_count_is_the_goal_when_nothing_stands_in_its_way() -> None:
    assert target_for(a_spec(4), a_machine()).message == ""


def test_without_an_agent_ready_is_unknown_and_all_that_it_has_reported_stays() -> None:
    connected = Condition("GuestAgentConnected", "True", "Connected", "fine.", ago(90), 2)
    foreign = ((0, {"type": "Backup", "status": "True"}),)
    served = made_from((), WORKING, 2, ago(90))
    before = Status(
        2, 4, 4, 1, 8, "vcpuset.dev/name=web", "uuid", ago(60), (a_request(3),), (*served, connected), foreign
    )
    vcpuset = replace(a_set(generation=3, status=before), node_name="node-1")

    after = unserved_status(vcpuset, NOW)

    assert replace(after, conditions=()) == replace(before, conditions=())
    assert after.foreign_conditions == foreign
    assert [(each.type, each.status) for each in after.conditions] == [
        ("Ready", "Unknown"),
        ("Reconciling", "False"),
        ("Stalled", "False"),
        ("GuestAgentConnected", "True"),
    ]
    *told, kept = after.conditions
    assert kept == connected
    assert {(each.reason, each.observed_generation) for each in told} == {("AgentUnavailable", 3)}
    assert all("node node-1" in each.message for each in told)
    # Stalled was False before.
    assert _since(after.conditions)["Stalled"] == _since(served)["Stalled"]
    assert _since(after.conditions)["Ready"] == NOW
    assert unserved_status(replace(vcpuset, status=after), NOW + timedelta(hours=1)) == after


def test_a_set_that_was_never_observed_stays_unobserved_without_an_agent() -> None:
    after = unserved_status(replace(a_set(generation=1), node_name="node-1"), NOW)
    assert (after.observed_generation, after.vcpus) == (-1, None)


def test_an_agent_replaces_the_report_of_its_absence() -> None:
    told = unserved_status(replace(a_set(generation=3), node_name="node-1"), ago(60)).conditions

    after = made_from(told, READY, 3, NOW)

    assert [each.status for each in after] == ["True", "False", "False"]
    assert {each.reason for each in after} == {"Converged"}
    assert _since(after) == {"Ready": NOW, "Reconciling": ago(60), "Stalled": ago(60)}
