"""Each thing that stands in the way is told, also what is hidden behind another."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from unit.domain.builders import a_machine, a_request, a_spec, ago, findings_of
from vcpuset.domain.blockers import Blocker, blockers
from vcpuset.domain.errors import AgentRefused, AgentTimeout, AgentUnreachable
from vcpuset.domain.guest import AgentReason, GuestCPU, GuestCPUs, GuestReport
from vcpuset.domain.machine import Answer, Machine
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import BootVCPUs, GuestAgent, Request, Spec, UnplugPolicy

__all__: list[str] = []

FOUR = a_machine(plugged=[2, 3])
AGENT = GuestAgent("agent.sock")


def in_the_way(
    spec: Spec, machine: Machine, requests: Iterable[Request] = (), guest: GuestReport | None = None
) -> list[Blocker]:
    return list(blockers(findings_of(spec, machine, requests, guest=guest)))


def reasons(found: Iterable[Blocker]) -> list[str]:
    return [each.reason.value for each in found]


def guest(*online: bool) -> GuestReport:
    return GuestReport(GuestCPUs(tuple(GuestCPU(number, each, True) for number, each in enumerate(online))))


@pytest.mark.parametrize("vcpus", [1, 3, 4, 5, 8])
def test_nothing_is_in_the_way_of_a_count_that_a_running_machine_can_reach(vcpus: int) -> None:
    assert in_the_way(a_spec(vcpus), FOUR) == []


@pytest.mark.parametrize(
    ("spec", "machine", "expected"),
    [
        pytest.param(a_spec(9), FOUR, ["InsufficientSlots"], id="ceiling"),
        pytest.param(a_spec(2), a_machine(slots=None, vcpus=4), ["HotplugUnsupported"], id="no-hotplug"),
        pytest.param(a_spec(3, policy=UnplugPolicy.DISABLED), FOUR, ["UnplugDisabled"], id="policy"),
        pytest.param(a_spec(1, boot_vcpus=BootVCPUs.KEEP), FOUR, ["BootVCPUsKept"], id="kept"),
        pytest.param(a_spec(3, boot_vcpus=BootVCPUs.KEEP), FOUR, [], id="kept-and-enough-others"),
        pytest.param(
            a_spec(1, policy=UnplugPolicy.DISABLED, boot_vcpus=BootVCPUs.KEEP),
            FOUR,
            ["UnplugDisabled", "BootVCPUsKept"],
            id="kept-behind-the-policy",
        ),
        pytest.param(a_spec(2), a_machine(arch="s390x", plugged=[2], ost=None), ["UnplugUnsupported"], id="s390x"),
        pytest.param(
            a_spec(3, policy=UnplugPolicy.DISABLED),
            a_machine(arch="ppc64", boot=[0], plugged=[1], threads=4, ost=None),
            ["UnplugDisabled", "UnplugUnsupported"],
            id="floor-behind-the-policy",
        ),
        pytest.param(
            a_spec(6), a_machine(arch="ppc64", boot=[0], threads=4, ost=None), ["UnsupportedVCPUCount"], id="cores"
        ),
        pytest.param(a_spec(2, suspend=True), FOUR, ["Suspended"], id="suspended"),
        pytest.param(a_spec(4, suspend=True), FOUR, [], id="suspended-and-as-declared"),
        pytest.param(a_spec(5), a_machine(run_state="save-vm"), ["MachineBusy"], id="run-state"),
        pytest.param(a_spec(5), a_machine(migrating=True), ["MachineBusy"], id="migration"),
        pytest.param(a_spec(2), a_machine(run_state="shutdown"), ["MachineNotRunning"], id="over-is-always-told"),
        pytest.param(a_spec(3), a_machine(plugged=[2, 3], ost={}), ["WaitingForGuest"], id="legacy"),
        pytest.param(a_spec(5), a_machine(plugged=[2, 3], ost={}), [], id="legacy-plugs"),
        pytest.param(a_spec(3), a_machine(plugged=[2, 3], run_state="paused"), ["UnplugPending"], id="paused"),
        pytest.param(a_spec(5), a_machine(plugged=[2, 3], run_state="paused"), [], id="paused-plugs"),
    ],
)
def test_each_limit_is_told(spec: Spec, machine: Machine, expected: list[str]) -> None:
    found = in_the_way(spec, machine)

    assert reasons(found) == expected
    for each in found:
        assert each.message.endswith(".")
        assert each.remedy.endswith(".")


def test_everything_at_once_is_told_with_the_most_basic_first() -> None:
    spec = a_spec(1, suspend=True, policy=UnplugPolicy.DISABLED, boot_vcpus=BootVCPUs.KEEP)
    machine = a_machine(plugged=[2, 3], run_state="guest-panicked", migrating=True, ost={})

    assert reasons(in_the_way(spec, machine)) == [
        "MachineNotRunning",
        "Suspended",
        "UnplugDisabled",
        "BootVCPUsKept",
        "WaitingForGuest",
    ]


def test_a_request_that_is_asked_again_now_is_not_in_the_way() -> None:
    assert in_the_way(a_spec(3), FOUR, [a_request(3, at=ago(300))]) == []


@pytest.mark.parametrize(
    ("request_", "reason", "words"),
    [
        pytest.param(a_request(3, at=ago(4)), Reason.UNPLUG_PENDING, "has not answered", id="no-answer"),
        pytest.param(
            a_request(3, at=ago(70), attempts=6), Reason.UNPLUG_TIMED_OUT, "has not answered", id="no-answer-for-long"
        ),
        pytest.param(
            a_request(3, at=ago(5), answer=Answer.IN_PROGRESS), Reason.UNPLUG_PENDING, "_OST 0x84", id="in-progress"
        ),
        pytest.param(a_request(3, at=ago(4), answer=Answer.IN_USE), Reason.UNPLUG_REFUSED, "_OST 0x81", id="refused"),
        pytest.param(
            a_request(3, at=ago(5), answer=Answer.REJECTED), Reason.UNPLUG_UNSUPPORTED, "by QEMU", id="rejected"
        ),
    ],
)
def test_a_request_says_what_came_of_it_and_when_it_falls_due(request_: Request, reason: Reason, words: str) -> None:
    (found,) = in_the_way(a_spec(3, timeout=60, retry=600), FOUR, [request_])

    assert found.reason is reason
    assert "slot 3" in found.message
    assert words in found.message
    assert "The request is repeated at 2026-01-02T12:0" in found.message or "12:1" in found.message


def test_requests_of_one_moment_with_one_answer_are_told_together() -> None:
    requests = [
        a_request(1, boot=True, at=ago(4)),
        a_request(2, at=ago(4), answer=Answer.BUSY),
        a_request(3, at=ago(4), answer=Answer.BUSY),
    ]
    found = in_the_way(a_spec(1), FOUR, requests)

    assert reasons(found) == ["UnplugPending", "UnplugRefused"]
    assert "slots 2-3" in found[1].message


def test_requests_are_in_nobodys_way_while_nothing_is_to_be_given_back() -> None:
    assert in_the_way(a_spec(6), FOUR, [a_request(3, at=ago(5), answer=Answer.BUSY)]) == []


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (GuestReport(None, AgentTimeout("agent.sock is silent")), AgentReason.NO_ANSWER),
        (GuestReport(None, AgentUnreachable("nobody listens at agent.sock")), AgentReason.UNREACHABLE),
        (GuestReport(None, AgentRefused("guest-get-vcpus", "GenericError", "no")), AgentReason.REFUSED),
        (guest(*[True] * 9), AgentReason.OTHER_MACHINE),
    ],
)
def test_an_agent_that_cannot_be_asked_is_told(report: GuestReport, reason: AgentReason) -> None:
    (found,) = in_the_way(a_spec(4, agent=AGENT), FOUR, guest=report)

    assert found.reason is reason
    assert found.message.endswith("Plug and unplug work without it.")
    assert found.remedy


def test_an_agent_that_is_not_asked_because_its_guest_stands_still_is_told() -> None:
    assert reasons(in_the_way(a_spec(2, agent=AGENT), a_machine(run_state="paused"))) == ["NotQueried"]


@pytest.mark.parametrize("vcpus", [4, 6])
def test_cpus_that_the_guest_left_offline_are_told_whatever_the_count(vcpus: int) -> None:
    (found,) = in_the_way(a_spec(vcpus, agent=AGENT), FOUR, guest=guest(True, True, False, False))

    assert found.reason is Reason.GUEST_CPUS_OFFLINE
    assert "uses 2 of" in found.message
    assert ("as declared" in found.message) is (vcpus == 4)


def test_cpus_that_the_operator_brings_online_itself_are_in_nobodys_way_unless_it_is_suspended() -> None:
    agent = GuestAgent("agent.sock", bring_online=True)
    report = guest(True, True, False, False)

    assert in_the_way(a_spec(4, agent=agent), FOUR, guest=report) == []
    assert reasons(in_the_way(a_spec(4, agent=agent, suspend=True), FOUR, guest=report)) == ["Suspended"]
    assert reasons(in_the_way(a_spec(4, agent=agent), FOUR, guest=guest(True, True, False))) == ["GuestCPUsOffline"]
