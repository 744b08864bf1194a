"""Everything that blocks a machine from its declared count, where an assessment names only the first.

No rule is repeated here. `assess` and `target_for` name the first blocker; then that one is assumed to be removed (the
set is not suspended, the machine runs, the policy allows it) and they are called again, until none is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

from vcpuset.domain.assessment import Assessment, assess, sentence, slot_list
from vcpuset.domain.findings import Findings
from vcpuset.domain.guest import AgentReason
from vcpuset.domain.machine import Activity, Answer
from vcpuset.domain.plan import plan
from vcpuset.domain.reasons import Reason
from vcpuset.domain.requests import cpu_of
from vcpuset.domain.resource import BootVCPUs, Request, Spec, UnplugPolicy

__all__ = ["Blocker", "blocker_of", "blockers"]


@dataclass(frozen=True, slots=True)
class Blocker:
    """One blocker.

    reason   CamelCase, as in the set's conditions
    message  what blocks, in sentences
    remedy   in sentences
    """

    reason: Reason | AgentReason
    message: str
    remedy: str


def blocker_of(assessment: Assessment) -> Blocker:
    """The blocker that an assessment reports."""
    return Blocker(assessment.reason, assessment.message, assessment.reason.remedy)


def blockers(findings: Findings) -> tuple[Blocker, ...]:
    """All that keeps a machine from its declared count, and its guest from using it; the most basic first."""
    found: list[Blocker] = []
    free = _unhindered(replace(findings, requests=(), started=None, reported=None, guest=None), found)
    free = _reachable(free, found)
    if free.surplus > 0:
        found += _unplug_blockers(findings, free)
    found += _guest_blockers(findings)
    return tuple(found)


def _unhindered(free: Findings, found: list[Blocker]) -> Findings:
    """The set and the machine without what keeps a pass from making any change."""
    while True:
        assessment = assess(free)
        match assessment.reason:
            case Reason.SUSPENDED:
                free = replace(free, spec=replace(free.spec, suspend=False))
            case Reason.MACHINE_NOT_RUNNING | Reason.MACHINE_BUSY:
                free = replace(free, machine=replace(free.machine, run_state="running", migrating=False))
            case _:
                return free
        found.append(blocker_of(assessment))


_RELAXED: Final[Mapping[Reason, Callable[[Spec], Spec]]] = MappingProxyType({
    Reason.UNPLUG_DISABLED: lambda spec: replace(spec, unplug=replace(spec.unplug, policy=UnplugPolicy.ENABLED)),
    Reason.BOOT_VCPUS_KEPT: lambda spec: replace(spec, unplug=replace(spec.unplug, boot_vcpus=BootVCPUs.UNPLUG)),
})  # fmt: skip
"""Limits that the author of a set chose; all others are the machine's."""


def _reachable(free: Findings, found: list[Blocker]) -> Findings:
    """The set without its own limits, at the target that the machine's limits allow."""
    while (reason := free.target.reason) is not None:
        found.append(Blocker(reason, sentence(free.target.message), reason.remedy))
        if (relaxed := _RELAXED.get(reason)) is None:
            break
        free = replace(free, spec=relaxed(free.spec))
    return free


def _unplug_blockers(real: Findings, free: Findings) -> Iterator[Blocker]:
    if not free.machine.guest_accepts_unplugs:
        yield blocker_of(assess(free))
    elif real.machine.activity is Activity.CHANGEABLE and real.machine.run_state != "running":
        yield Blocker(
            Reason.UNPLUG_PENDING,
            f"The machine's run state is {real.machine.run_state!r}: its guest accepts requests, and answers once it "
            "is resumed.",
            "Resume the machine (cont).",
        )
    free = replace(free, requests=real.requests)
    requested_now = {cpu_of(slot) for slot in plan(free).unplug}
    alike: dict[tuple[Answer | None, datetime], list[Request]] = {}
    for request in real.requests:
        if cpu_of(request) not in requested_now:
            alike.setdefault((request.answer, free.due_at(request)), []).append(request)
    for (answer, due), group in alike.items():
        yield _open_requests(free.spec, answer, due, group, free.now)


def _open_requests(
    spec: Spec, answer: Answer | None, due: datetime, group: Sequence[Request], now: datetime
) -> Blocker:
    requested_at = max(request.requested_at for request in group)
    since = f"Unplug of {slot_list(group)} was requested at {_moment(requested_at)}"
    # What is due and was not requested is not wanted now: others are enough.
    again = f" The request is repeated at {_moment(due)}." if due > now else ""
    if answer is None or not answer.refused:
        said = "has not answered" if answer is None else f"answered: {answer.words}"
        overdue = now >= requested_at + timedelta(seconds=spec.unplug.timeout_seconds)
        reason = Reason.UNPLUG_TIMED_OUT if overdue else Reason.UNPLUG_PENDING
        return Blocker(reason, f"{since}; the guest {said}.{again}", reason.remedy)
    reason = Reason.UNPLUG_UNSUPPORTED if answer is Answer.REJECTED else Reason.UNPLUG_REFUSED
    return Blocker(reason, f"{since}: {answer.words}.{again}", reason.remedy)


_AGENT_REMEDIES: Final[Mapping[AgentReason, str]] = MappingProxyType({
    AgentReason.NOT_QUERIED: "Wait until the machine is running, or resume it.",
    AgentReason.NO_ANSWER: "Start qemu-guest-agent in the guest, and use its socket only for the operator.",
    AgentReason.UNREACHABLE: "Start QEMU with the agent's channel at that path, or correct spec.guestAgent.",
    AgentReason.REFUSED: "Allow guest-get-vcpus and guest-set-vcpus in the agent's configuration.",
    AgentReason.OTHER_MACHINE: "Set spec.guestAgent to the socket of this machine's agent.",
})  # fmt: skip


def _guest_blockers(findings: Findings) -> Iterator[Blocker]:
    spec, machine, guest = findings.spec, findings.machine, findings.guest
    if spec.guest_agent is None:
        return
    if guest is None:
        if machine.activity is not Activity.OVER and machine.run_state != "running":
            yield _agent_blocker(AgentReason.NOT_QUERIED, AgentReason.NOT_QUERIED.meaning)
        return
    reason = guest.reason(machine.vcpus)
    if reason is not AgentReason.CONNECTED:
        yield _agent_blocker(reason, reason.meaning if guest.error is None else sentence(str(guest.error)))
    elif guest.cpus is not None and guest.cpus.online < machine.vcpus:
        offline = guest.cpus.offline
        if spec.guest_agent.bring_online and not spec.suspend and guest.cpus.online + len(offline) == machine.vcpus:
            return  # The operator sets them online: that is work to do, not a blocker.
        if machine.vcpus == spec.vcpus:
            yield blocker_of(assess(replace(findings, requests=(), started=None, reported=None)))
            return
        yield Blocker(
            Reason.GUEST_CPUS_OFFLINE,
            f"The guest uses {guest.cpus.online} of the {machine.vcpus} vCPUs that QEMU has.",
            Reason.GUEST_CPUS_OFFLINE.remedy,
        )


def _agent_blocker(reason: AgentReason, message: str) -> Blocker:
    return Blocker(reason, f"{message} Plug and unplug work without it.", _AGENT_REMEDIES[reason])


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
