"""Each thing that stands between a machine and its declared count, where a verdict names only the first.

No rule is stated here twice. `judge` and `goal` say what is in the way; then that one thing is thought away (the set is
not suspended, the machine runs, the policy allows it) and they are asked again, until nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

from vcpuset.domain.guest import AgentReason, GuestReport
from vcpuset.domain.machine import Activity, Answer, Machine
from vcpuset.domain.plan import Goal, goal, plan
from vcpuset.domain.reasons import Reason
from vcpuset.domain.requests import cpu_of, due_at
from vcpuset.domain.resource import BootVCPUs, Request, Spec, UnplugPolicy
from vcpuset.domain.verdict import Verdict, judge, sentence, slot_list

__all__ = ["Obstacle", "obstacle_of", "obstacles"]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing in the way.

    reason   CamelCase, as in the set's conditions
    message  what is the case, in sentences
    remedy   what helps, in sentences
    """

    reason: Reason | AgentReason
    message: str
    remedy: str


def obstacle_of(verdict: Verdict) -> Obstacle:
    """What a verdict complains of."""
    return Obstacle(verdict.reason, verdict.message, verdict.reason.remedy)


def obstacles(
    spec: Spec,
    machine: Machine,
    requests: Sequence[Request],
    guest: GuestReport | None,
    *,
    now: datetime,
) -> tuple[Obstacle, ...]:
    """All that keeps this machine from its declared count, and its guest from using it; the most basic first.

    requests  those still open, before the next pass makes any
    guest     what the guest says of its CPUs; None: it was not asked
    """
    found: list[Obstacle] = []
    free_spec, free_machine = _unhindered(spec, machine, found, now)
    free_spec, aim = _reachable(free_spec, free_machine, found)
    if free_machine.vcpus > aim.count:
        found += _unplug_obstacles(free_spec, machine, free_machine, aim, requests, now)
    found += _guest_obstacles(spec, machine, guest, now)
    return tuple(found)


def _verdict(spec: Spec, machine: Machine, aim: Goal, now: datetime, guest: GuestReport | None = None) -> Verdict:
    """What is said of this machine when nobody was asked for anything yet."""
    return judge(
        spec,
        machine,
        aim,
        (),
        started=None,
        blocked=None,
        reported=None,
        now=now,
        guest=guest,
    )


def _unhindered(spec: Spec, machine: Machine, found: list[Obstacle], now: datetime) -> tuple[Spec, Machine]:
    """The set and the machine without what keeps a pass from changing anything at all."""
    while True:
        verdict = _verdict(spec, machine, goal(spec, machine), now)
        match verdict.reason:
            case Reason.SUSPENDED:
                spec = replace(spec, suspend=False)
            case Reason.MACHINE_NOT_RUNNING | Reason.MACHINE_BUSY:
                machine = replace(machine, run_state="running", migrating=False)
            case _:
                return spec, machine
        found.append(obstacle_of(verdict))


_RELAXED: Final[Mapping[Reason, Callable[[Spec], Spec]]] = MappingProxyType({
    Reason.UNPLUG_DISABLED: lambda spec: replace(spec, unplug=replace(spec.unplug, policy=UnplugPolicy.ENABLED)),
    Reason.BOOT_VCPUS_KEPT: lambda spec: replace(spec, unplug=replace(spec.unplug, boot_vcpus=BootVCPUs.UNPLUG)),
})  # fmt: skip
"""What the author of a set could have meant otherwise; any other limit is the machine's."""


def _reachable(spec: Spec, machine: Machine, found: list[Obstacle]) -> tuple[Spec, Goal]:
    """The set without its own limits, and the count that the machine's own leave."""
    while (aim := goal(spec, machine)).reason is not None:
        found.append(Obstacle(aim.reason, sentence(aim.message), aim.reason.remedy))
        if (relaxed := _RELAXED.get(aim.reason)) is None:
            break
        spec = relaxed(spec)
    return spec, aim


def _unplug_obstacles(
    spec: Spec,
    real: Machine,
    machine: Machine,
    aim: Goal,
    requests: Sequence[Request],
    now: datetime,
) -> Iterator[Obstacle]:
    if not machine.guest_takes_unplugs:
        yield obstacle_of(_verdict(spec, machine, aim, now))
    elif real.activity is Activity.CHANGEABLE and real.run_state != "running":
        yield Obstacle(
            Reason.UNPLUG_PENDING,
            f"The machine's run state is {real.run_state!r}: its guest accepts requests, and answers once it is "
            "resumed.",
            "Resume the machine (cont).",
        )
    asked_now = {cpu_of(slot) for slot in plan(spec, machine, requests, now=now).ask}
    alike: dict[tuple[Answer | None, datetime], list[Request]] = {}
    for request in requests:
        if cpu_of(request) not in asked_now:
            alike.setdefault((request.answer, due_at(request, spec.unplug)), []).append(request)
    for (answer, due), group in alike.items():
        yield _open_requests(spec, answer, due, group, now)


def _open_requests(
    spec: Spec, answer: Answer | None, due: datetime, group: Sequence[Request], now: datetime
) -> Obstacle:
    asked_at = max(request.requested_at for request in group)
    since = f"Unplug of {slot_list(group)} was requested at {_moment(asked_at)}"
    # What is due and yet not asked for is not wanted now: others are enough.
    again = f" The request is repeated at {_moment(due)}." if due > now else ""
    if answer is None or not answer.refused:
        said = "has not answered" if answer is None else f"answered: {answer.words}"
        overdue = now >= asked_at + timedelta(seconds=spec.unplug.timeout_seconds)
        reason = Reason.UNPLUG_TIMED_OUT if overdue else Reason.UNPLUG_PENDING
        return Obstacle(reason, f"{since}; the guest {said}.{again}", reason.remedy)
    reason = Reason.UNPLUG_UNSUPPORTED if answer is Answer.REJECTED else Reason.UNPLUG_REFUSED
    return Obstacle(reason, f"{since}: {answer.words}.{again}", reason.remedy)


_AGENT_REMEDIES: Final[Mapping[AgentReason, str]] = MappingProxyType({
    AgentReason.NOT_ASKED: "Wait until the machine is running, or resume it.",
    AgentReason.NO_ANSWER: "Start qemu-guest-agent in the guest, and use its socket only for the operator.",
    AgentReason.UNREACHABLE: "Start QEMU with the agent's channel at that path, or correct spec.guestAgent.",
    AgentReason.REFUSED: "Allow guest-get-vcpus and guest-set-vcpus in the agent's configuration.",
    AgentReason.OTHER_MACHINE: "Set spec.guestAgent to the socket of this machine's agent.",
})  # fmt: skip


def _guest_obstacles(spec: Spec, machine: Machine, guest: GuestReport | None, now: datetime) -> Iterator[Obstacle]:
    if spec.guest_agent is None:
        return
    if guest is None:
        if machine.activity is not Activity.OVER and machine.run_state != "running":
            yield _agent_obstacle(AgentReason.NOT_ASKED, AgentReason.NOT_ASKED.meaning)
        return
    reason = guest.reason(machine.vcpus)
    if reason is not AgentReason.CONNECTED:
        yield _agent_obstacle(reason, reason.meaning if guest.error is None else sentence(str(guest.error)))
    elif guest.cpus is not None and guest.cpus.online < machine.vcpus:
        offline = guest.cpus.offline
        if spec.guest_agent.bring_online and not spec.suspend and guest.cpus.online + len(offline) == machine.vcpus:
            return  # The operator has them set online: that is work to do, and nothing in its way.
        if machine.vcpus == spec.vcpus:
            yield obstacle_of(_verdict(spec, machine, goal(spec, machine), now, guest))
            return
        yield Obstacle(
            Reason.GUEST_CPUS_OFFLINE,
            f"The guest uses {guest.cpus.online} of the {machine.vcpus} vCPUs that QEMU has.",
            Reason.GUEST_CPUS_OFFLINE.remedy,
        )


def _agent_obstacle(reason: AgentReason, message: str) -> Obstacle:
    return Obstacle(reason, f"{message} Plug and unplug work without it.", _AGENT_REMEDIES[reason])


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
