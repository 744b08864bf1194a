"""What is done about a difference, and what is not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from unit.domain.builders import a_machine, a_request, a_spec, ago, findings_of
from vcpuset.domain.machine import Answer, Machine
from vcpuset.domain.plan import plan
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import BootVCPUs, Request, Spec, UnplugPolicy
from vcpuset.domain.target import target_for

__all__: list[str] = []

DISABLED, KEEP = UnplugPolicy.DISABLED, BootVCPUs.KEEP
NO = Answer.IN_USE

FOUR_PLUGGED = a_machine(boot=[0, 1], plugged=[2, 3, 4, 5])
CORES_OF_2 = a_machine(boot=[0], plugged=[1, 2, 3], threads=2, arch="ppc64", ost=None)
CORES_OF_4 = a_machine(boot=[0], plugged=[1, 2], threads=4, arch="ppc64", ost=None)


@dataclass
class Goals:
    """machine and spec → the count to reach, and why it is not the declared one."""

    spec: Spec
    machine: Machine
    count: int
    reason: Reason | None = None
    says: str = ""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Goals(a_spec(5), a_machine(), 5), id="more, and slots are free"),
        pytest.param(Goals(a_spec(2), a_machine(), 2), id="as many as there are"),
        pytest.param(Goals(a_spec(1), a_machine(), 1), id="down to slot 0, boot CPUs included"),
        pytest.param(
            Goals(a_spec(9), a_machine(), 8, Reason.INSUFFICIENT_SLOTS, "slots for 8 vCPUs"),
            id="above the ceiling",
        ),
        pytest.param(
            Goals(a_spec(9, policy=DISABLED), a_machine(), 8, Reason.INSUFFICIENT_SLOTS, "8"),
            id="above the ceiling, grow only",
        ),
        pytest.param(
            Goals(a_spec(2), a_machine(plugged=[2, 3], arch="s390x"), 4, Reason.UNPLUG_UNSUPPORTED, "cannot unplug"),
            id="s390x gives nothing back",
        ),
        pytest.param(
            Goals(a_spec(1), a_machine(boot=[0], threads=2, slots=4), 2, Reason.UNPLUG_UNSUPPORTED, "slot 0"),
            id="below slot 0, which holds two threads",
        ),
        pytest.param(
            Goals(a_spec(1), a_machine(boot=[0], plugged=[1], threads=2), 2, Reason.UNPLUG_UNSUPPORTED, "slot 0"),
            id="below slot 0 with a plugged core beside it",
        ),
        pytest.param(
            Goals(a_spec(2, policy=DISABLED), a_machine(plugged=[2]), 3, Reason.UNPLUG_DISABLED, "Disabled"),
            id="grow only",
        ),
        pytest.param(Goals(a_spec(4, policy=DISABLED), a_machine(), 4), id="grow only does grow"),
        pytest.param(
            Goals(a_spec(1, boot_vcpus=KEEP), a_machine(plugged=[4]), 2, Reason.BOOT_VCPUS_KEPT, "Keep"),
            id="boot CPUs kept: only the plugged one goes",
        ),
        pytest.param(Goals(a_spec(2, boot_vcpus=KEEP), a_machine(plugged=[4]), 2), id="boot CPUs kept, and enough so"),
        pytest.param(
            Goals(a_spec(1, boot_vcpus=KEEP), a_machine(boot=[0], plugged=[4]), 1),
            id="boot CPUs kept, and there is but slot 0",
        ),
        pytest.param(
            Goals(a_spec(7), a_machine(boot=[0], threads=2), 6, Reason.UNSUPPORTED_VCPU_COUNT, "declare 6 or 8"),
            id="cores of 2: up to an odd count",
        ),
        pytest.param(
            Goals(a_spec(5), CORES_OF_2, 4, Reason.UNSUPPORTED_VCPU_COUNT, "declare 4 or 6"),
            id="cores of 2: down to an odd count",
        ),
        pytest.param(
            Goals(a_spec(11), a_machine(boot=[0], threads=4), 8, Reason.UNSUPPORTED_VCPU_COUNT, "declare 8 or 12"),
            id="cores of 4: up to no multiple",
        ),
        pytest.param(Goals(a_spec(12), a_machine(boot=[0], threads=4), 12), id="cores of 4: a multiple"),
        pytest.param(
            Goals(a_spec(4), a_machine(slots=None, vcpus=2), 2, Reason.HOTPLUG_UNSUPPORTED, "machine type"),
            id="no hotplug: more",
        ),
        pytest.param(
            Goals(a_spec(1), a_machine(slots=None, vcpus=2), 2, Reason.HOTPLUG_UNSUPPORTED, "machine type"),
            id="no hotplug: fewer",
        ),
        pytest.param(Goals(a_spec(2), a_machine(slots=None, vcpus=2), 2), id="no hotplug and none needed"),
        pytest.param(Goals(a_spec(None), a_machine(plugged=[2]), 3), id="no count: as it is"),
        pytest.param(Goals(a_spec(None, bounds=(4, 4)), a_machine(), 2), id="no count: as it is, also out of bounds"),
        pytest.param(Goals(a_spec(None), a_machine(slots=None, vcpus=2), 2), id="no count and no hotplug"),
    ],
)
def test_the_goal_is_the_reachable_count_nearest_to_the_declared_one(case: Goals) -> None:
    target = target_for(case.spec, case.machine)

    assert (target.count, target.reason) == (case.count, case.reason)
    assert case.says in target.message


@dataclass
class Steps:
    """machine, spec and the requests on the book → slots to plug, slots to ask for."""

    spec: Spec
    machine: Machine
    requests: list[Request] = field(default_factory=list)
    plug: list[int] = field(default_factory=list)
    ask: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Steps(a_spec(6), FOUR_PLUGGED), id="as declared: nothing"),
        pytest.param(Steps(a_spec(4), a_machine(), plug=[2, 3, 4, 5, 6, 7]), id="free slots, lowest first"),
        pytest.param(
            Steps(a_spec(4), a_machine(plugged=[3]), plug=[2, 4, 5, 6, 7]), id="a hole is filled before the end"
        ),
        pytest.param(Steps(a_spec(4), FOUR_PLUGGED, ask=[5, 4]), id="plugged ones, highest first"),
        pytest.param(Steps(a_spec(1), FOUR_PLUGGED, ask=[5, 4, 3, 2, 1]), id="boot CPUs last, never slot 0"),
        pytest.param(
            Steps(a_spec(1), a_machine(boot=[0, 1, 6], plugged=[2, 3]), ask=[3, 2, 6, 1]),
            id="a boot CPU in a high slot comes after the plugged ones",
        ),
        pytest.param(Steps(a_spec(1, boot_vcpus=KEEP), FOUR_PLUGGED, ask=[5, 4, 3, 2]), id="boot CPUs kept"),
        pytest.param(Steps(a_spec(1, policy=DISABLED), FOUR_PLUGGED), id="grow only"),
        pytest.param(Steps(a_spec(1), a_machine(plugged=[2], arch="s390x")), id="s390x"),
        pytest.param(Steps(a_spec(1), a_machine(slots=None)), id="no hotplug"),
        pytest.param(Steps(a_spec(8, suspend=True), a_machine()), id="suspended: no plug"),
        pytest.param(Steps(a_spec(1, suspend=True), a_machine()), id="suspended: no unplug"),
        pytest.param(Steps(a_spec(8), a_machine(migrating=True)), id="migrating: no plug"),
        pytest.param(Steps(a_spec(1), a_machine(run_state="save-vm")), id="saving: no unplug"),
        pytest.param(Steps(a_spec(8), a_machine(run_state="shutdown")), id="shut down: no plug"),
        pytest.param(Steps(a_spec(8), a_machine(run_state="watchdog")), id="stopped by its watchdog: no plug"),
        pytest.param(
            Steps(a_spec(3), a_machine(run_state="paused"), plug=[2, 3, 4, 5, 6, 7]), id="paused: plugged all the same"
        ),
        pytest.param(Steps(a_spec(1), a_machine(ost={})), id="firmware not up: nobody is asked"),
        pytest.param(Steps(a_spec(3), a_machine(ost={}), plug=[2, 3, 4, 5, 6, 7]), id="firmware not up: plugs go"),
        # Requests in flight
        pytest.param(Steps(a_spec(5), FOUR_PLUGGED, [a_request(5)]), id="in flight: no other is asked instead"),
        pytest.param(Steps(a_spec(4), FOUR_PLUGGED, [a_request(5)], ask=[4]), id="in flight: only the rest is asked"),
        pytest.param(
            Steps(a_spec(4), FOUR_PLUGGED, [a_request(2)], ask=[5]), id="in flight: whichever, it counts as leaving"
        ),
        pytest.param(
            Steps(a_spec(5), FOUR_PLUGGED, [a_request(5, answer=Answer.IN_PROGRESS)]), id="in progress: it is leaving"
        ),
        pytest.param(
            Steps(a_spec(8), FOUR_PLUGGED, [a_request(5)], plug=[6, 7]), id="in flight: plugs do not wait for it"
        ),
        pytest.param(Steps(a_spec(6), FOUR_PLUGGED, [a_request(5)]), id="in flight at the target: nothing"),
        pytest.param(Steps(a_spec(5), FOUR_PLUGGED, [a_request(5, at=ago(4.9))]), id="in flight: not due after 4.9 s"),
        pytest.param(Steps(a_spec(5), FOUR_PLUGGED, [a_request(5, at=ago(5))], ask=[5]), id="in flight: due after 5 s"),
        pytest.param(
            Steps(a_spec(6), FOUR_PLUGGED, [a_request(5, at=ago(300))]), id="due, but not wanted any more: not asked"
        ),
        pytest.param(
            Steps(a_spec(5), FOUR_PLUGGED, [a_request(4, at=ago(400)), a_request(5, at=ago(400))], ask=[5]),
            id="two due, one wanted: one is asked again",
        ),
        pytest.param(
            Steps(a_spec(5), FOUR_PLUGGED, [a_request(4, at=ago(400)), a_request(5)]),
            id="one due, but another that is not due leaves already",
        ),
        pytest.param(
            Steps(a_spec(4), FOUR_PLUGGED, [a_request(5, at=ago(300))], ask=[4, 5]),
            id="one due and one fresh, both wanted",
        ),
        pytest.param(
            Steps(a_spec(1, boot_vcpus=KEEP), FOUR_PLUGGED, [a_request(1, boot=True, at=ago(4))], ask=[5, 4, 3]),
            id="kept since it was asked for: still leaving",
        ),
        pytest.param(
            Steps(a_spec(1, boot_vcpus=KEEP), FOUR_PLUGGED, [a_request(1, boot=True, at=ago(300))], ask=[5, 4, 3, 2]),
            id="kept since it was asked for, and due: neither asked again nor waited for",
        ),
        pytest.param(
            Steps(a_spec(5, timeout=300, retry=10), FOUR_PLUGGED, [a_request(5, at=ago(10))], ask=[5]),
            id="retrySeconds below timeoutSeconds",
        ),
        # Refusals
        pytest.param(
            Steps(a_spec(5), FOUR_PLUGGED, [a_request(5, answer=NO)], ask=[4]), id="refused: the next one is asked"
        ),
        pytest.param(
            Steps(a_spec(5), FOUR_PLUGGED, [a_request(5, at=ago(400), answer=NO)], ask=[4]),
            id="refused and due: after all others",
        ),
        pytest.param(
            Steps(
                a_spec(4),
                a_machine(plugged=[2, 3, 4], boot=[0]),
                [a_request(4, at=ago(400), answer=NO), a_request(3, at=ago(4), answer=NO)],
            ),
            id="as declared with refusals on the book",
        ),
        pytest.param(
            Steps(
                a_spec(1),
                a_machine(plugged=[2, 3], boot=[0]),
                [a_request(3, at=ago(400), answer=NO), a_request(2, at=ago(4), answer=NO)],
                ask=[3],
            ),
            id="all refused: only the due one is asked",
        ),
        pytest.param(
            Steps(
                a_spec(2),
                a_machine(plugged=[2, 3], boot=[0]),
                [a_request(3, at=ago(4), answer=NO), a_request(2, at=ago(4))],
            ),
            id="a refused one is not due while another leaves",
        ),
        pytest.param(
            Steps(a_spec(5), FOUR_PLUGGED, [a_request(5, at=ago(4), answer=Answer.REJECTED)], ask=[4]),
            id="rejected by QEMU: the next one",
        ),
        # Whole cores
        pytest.param(Steps(a_spec(4), CORES_OF_2, ask=[3, 2]), id="cores of 2: two cores for four vCPUs"),
        pytest.param(Steps(a_spec(5), CORES_OF_2, ask=[3, 2]), id="cores of 2: odd goes to the even below"),
        pytest.param(Steps(a_spec(4), CORES_OF_2, [a_request(3)], ask=[2]), id="cores of 2: one in flight counts 2"),
        pytest.param(Steps(a_spec(8), CORES_OF_4, ask=[2]), id="cores of 4: one core"),
        pytest.param(Steps(a_spec(9), CORES_OF_4, ask=[2]), id="cores of 4: a misfit goes to the multiple below"),
        pytest.param(Steps(a_spec(13), CORES_OF_4), id="cores of 4: a misfit above stays below"),
        pytest.param(Steps(a_spec(16), CORES_OF_4, plug=[3, 4, 5, 6, 7]), id="cores of 4: up"),
    ],
)
def test_a_plan_names_the_slots_to_plug_and_to_ask_for(case: Steps) -> None:
    step = plan(findings_of(case.spec, case.machine, case.requests))

    assert [slot.index for slot in step.plug] == case.plug
    assert [slot.index for slot in step.unplug] == case.ask
