"""What the next pass would do, without doing it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from unit.domain.builders import NOW, a_machine, a_request, a_set, a_spec, ago, findings_of
from vcpuset.domain.guest import GuestCPU, GuestCPUs, GuestReport
from vcpuset.domain.machine import Answer, Slot
from vcpuset.domain.plan import plan
from vcpuset.domain.preview import PlanPreview, preview
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.requests import Ledger
from vcpuset.domain.resource import GuestAgent, Spec, Status

__all__: list[str] = []

FOUR = a_machine(plugged=[2, 3])


def ahead(spec: Spec, status: Status | None = None, guest: GuestReport | None = None) -> PlanPreview:
    return preview(a_set(spec, status=status or Status()), FOUR, guest, NOW)


def indexes(slots: tuple[Slot, ...]) -> list[int]:
    return [slot.index for slot in slots]


def test_a_plug_fills_the_lowest_free_slots_and_ends_converged() -> None:
    found = ahead(a_spec(6))

    assert indexes(found.plug) == [4, 5]
    assert indexes(found.standby) == [6, 7]
    assert found.assessment.reason is Reason.PLUGGING
    assert found.expected is not None
    assert found.expected.reason is Reason.CONVERGED
    assert found.blockers == ()


def test_an_unplug_asks_the_highest_plugged_first_and_ends_converged() -> None:
    found = ahead(a_spec(3))

    assert indexes(found.unplug) == [3]
    assert indexes(found.standby) == [2, 1]
    assert found.assessment.reason is Reason.UNPLUGGING
    assert found.expected is not None
    assert found.expected.reason is Reason.CONVERGED


def test_more_than_the_slots_is_filled_to_the_ceiling_and_ends_stalled() -> None:
    found = ahead(a_spec(100))

    assert found.findings.target.count == 8
    assert indexes(found.plug) == [4, 5, 6, 7]
    assert found.expected is not None
    assert found.expected.state is State.STALLED
    assert [each.reason for each in found.blockers] == [Reason.INSUFFICIENT_SLOTS]


def test_a_machine_as_declared_has_nothing_done_to_it() -> None:
    found = ahead(a_spec(4))

    assert (found.plug, found.unplug, found.standby, found.expected) == ((), (), (), None)
    assert found.assessment.reason is Reason.CONVERGED


def test_without_a_count_the_present_one_is_adopted_and_ends_converged() -> None:
    found = ahead(a_spec(None))

    assert (found.adopt, found.plug, found.unplug, found.standby, found.blockers) == (4, (), (), (), ())
    assert found.assessment.reason is Reason.ADOPTING
    assert found.expected is not None
    assert found.expected.reason is Reason.CONVERGED


def test_what_follows_a_count_that_is_brought_within_the_bounds_is_foreseen() -> None:
    found = ahead(a_spec(None, bounds=(6, 8)))

    assert (found.adopt, found.plug) == (6, ())
    assert found.expected is not None
    assert found.expected.reason is Reason.PLUGGING


def test_a_suspended_set_adopts_nothing() -> None:
    found = ahead(a_spec(None, suspend=True))

    assert (found.adopt, found.expected) == (None, None)
    assert [each.reason for each in found.blockers] == [Reason.SUSPENDED]


def test_requests_in_the_status_are_not_made_twice_and_those_of_another_qemu_are_void() -> None:
    status = Status(pending_unplugs=(a_request(3, at=ago(4)), a_request(2, at=ago(4), thread_id=99)))
    found = ahead(a_spec(3), status)

    assert [request.slot for request in found.findings.requests] == [3]
    assert found.unplug == ()
    assert found.assessment.reason is Reason.UNPLUG_PENDING
    assert [each.reason for each in found.blockers] == [Reason.UNPLUG_PENDING]


def test_a_refused_cpu_is_replaced_by_the_next() -> None:
    status = Status(pending_unplugs=(a_request(3, at=ago(5), answer=Answer.IN_USE),))
    found = ahead(a_spec(3), status)

    assert indexes(found.unplug) == [2]
    assert [each.reason for each in found.blockers] == [Reason.UNPLUG_REFUSED]


def test_cpus_that_the_guest_left_offline_are_brought_online_if_the_set_says_so() -> None:
    report = GuestReport(GuestCPUs(tuple(GuestCPU(number, number < 3, True) for number in range(4))))
    willing = a_spec(4, agent=GuestAgent("agent.sock", bring_online=True))

    found = ahead(willing, guest=report)
    assert found.bring_online == (3,)
    assert found.assessment.reason is Reason.GUEST_CPUS_OFFLINE
    assert found.expected is not None
    assert found.expected.reason is Reason.CONVERGED
    assert ahead(a_spec(4, agent=GuestAgent("agent.sock")), guest=report).bring_online == ()
    assert ahead(replace(willing, suspend=True), guest=report).bring_online == ()
    assert ahead(replace(willing, vcpus=3), guest=report).bring_online == ()


@given(
    vcpus=st.integers(1, 10),
    suspend=st.booleans(),
    run_state=st.sampled_from(["running", "paused", "save-vm", "shutdown"]),
    asked=st.sets(st.integers(1, 3)),
    answer=st.sampled_from([None, Answer.IN_PROGRESS, Answer.BUSY]),
    age=st.integers(0, 1000),
)
def test_what_is_foreseen_is_what_the_operators_own_plan_does(
    vcpus: int, suspend: bool, run_state: str, asked: set[int], answer: Answer | None, age: int
) -> None:
    spec = a_spec(vcpus, suspend=suspend)
    machine = a_machine(plugged=[2, 3], run_state=run_state)
    requests = tuple(a_request(slot, boot=slot == 1, at=ago(age), answer=answer) for slot in sorted(asked))
    status = Status(pending_unplugs=requests)

    found = preview(a_set(spec, status=status), machine, None, NOW)

    step = plan(findings_of(spec, machine, Ledger.of(status, machine, NOW).requests))
    assert found.unplug == step.unplug
    assert found.plug == step.plug[: len(found.plug)]
    assert bool(found.plug) == bool(step.plug)
    assert not {slot.index for slot in found.standby} & {slot.index for slot in (*found.plug, *found.unplug)}
    if not (found.plug or found.unplug) and machine.vcpus != vcpus:
        assert found.blockers, "if a pass would not act, something is in the way"
