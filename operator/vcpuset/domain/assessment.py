"""What an observation means: one assessment for every situation that a set can be in.

Messages contain nothing that changes from one observation to the next without news (no elapsed times), because each
change of a status is a write. Each names the remedy, if there is one.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from vcpuset.domain.contest import CHANGES, Contest
from vcpuset.domain.errors import (
    CredentialsUnavailable,
    GuestNotReady,
    InvalidMonitor,
    Migrating,
    MonitorBusy,
    MonitorTimeout,
    PermanentError,
    Preconfig,
    UnsupportedSpec,
    VCPUSetError,
)
from vcpuset.domain.findings import Findings
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Activity, Answer
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.requests import FIRST_PAUSE
from vcpuset.domain.resource import GuestAgent, Request

__all__ = [
    "PENDING_AFTER",
    "TAKE_UP_TIME",
    "UDEV_RULE",
    "Assessment",
    "RequeuePolicy",
    "assess",
    "conflict",
    "conflict_over_machine",
    "contested",
    "failure",
    "plugging",
    "sentence",
    "slot_list",
    "terminating",
    "with_pod",
]

PENDING_AFTER = timedelta(seconds=3)
"""How long a request may be without an answer before the reason changes from Unplugging to UnplugPending.

A healthy Linux guest under load answers within two seconds; a shorter time would only cost a status write.
"""

TAKE_UP_TIME = timedelta(seconds=3)
"""How long a guest may take to use a plugged CPU before it is reported as left offline.

A Linux guest under TCG takes 0.2 to 0.6 s, and 1.8 s on a loaded host, if it has a rule that brings CPUs online.
"""

TAKE_UP_POLL = timedelta(seconds=0.25)
"""The interval of the guest's queries until then."""

UDEV_RULE = 'SUBSYSTEM=="cpu", ACTION=="add", TEST=="online", ATTR{online}=="0", ATTR{online}="1"'
"""Without it Linux on x86 leaves a hot-added CPU offline; RHEL and Ubuntu ship it, Debian does not."""


class RequeuePolicy(enum.Enum):
    """When a set is observed again, if nothing happens before."""

    HOLD = "hold"
    """Every second: the guest is working on requests. The session is kept for its events."""
    POLL = "poll"
    """Every second: the guest is slow. Between observations, the monitor is free for other clients."""
    RETRY = "retry"
    """After a growing back-off: the condition should pass by itself."""
    RESYNC = "resync"
    """At the next resync: nothing is expected."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """What one pass found.

    due  when an earlier pass than that of `policy` is due; None: none
    """

    reason: Reason
    message: str
    state: State
    policy: RequeuePolicy
    due: datetime | None = None

    @property
    def event_type(self) -> Literal["Normal", "Warning"]:
        """The type of the Kubernetes Event for a change to this assessment."""
        return "Warning" if self.state is State.STALLED or self.reason in _WORRYING else "Normal"


def assess(findings: Findings) -> Assessment:
    """What the last observation of a pass means, or, before requests are sent, what the pass is doing."""
    spec, machine, target = findings.spec, findings.machine, findings.target
    if machine.activity is Activity.OVER:
        return _assessment(
            Reason.MACHINE_NOT_RUNNING,
            f"The machine's run state is {machine.run_state!r}: its CPUs cannot be changed until it runs again."
            f"{_REMEDIES.get(machine.run_state, '')}",
            RequeuePolicy.RESYNC,
        )
    if spec.vcpus is None:
        return _without_count(findings)
    if machine.vcpus == spec.vcpus:
        return _count_matches(findings)
    if spec.suspend:
        return _assessment(
            Reason.SUSPENDED,
            f"{_counts(findings)}; nothing is changed while spec.suspend is set.{_may_leave(findings)}",
            _while_requested(findings),
        )
    if machine.activity is Activity.BUSY or isinstance(findings.blocked, Migrating):
        migrates = machine.migrating or isinstance(findings.blocked, Migrating)
        why = "a migration is in progress" if migrates else "retrying until the machine is running or paused"
        return _assessment(
            Reason.MACHINE_BUSY,
            f"{_counts(findings)}; CPUs cannot be changed in run state {machine.run_state!r}: {why}."
            f"{_REMEDIES.get(machine.run_state, '')}",
            RequeuePolicy.RETRY,
        )
    if findings.surplus < 0:
        return _plug_failed(findings)
    if findings.surplus > 0:
        return _unplug_unfinished(findings)
    assert target.reason is not None, "the target is met and is not the declared count"
    text = f"{_counts(findings)}; {target.message}.{_may_leave(findings)}"
    return _assessment(target.reason, text, _while_requested(findings))


def _without_count(findings: Findings) -> Assessment:
    spec, present = findings.spec, findings.machine.vcpus
    adopted, policy = spec.within_bounds(present), _while_requested(findings)
    text = f"{_vcpus(present)} present, and spec.vcpus is not set"
    what = f"{adopted}, the present count" + ("" if adopted == present else " brought within minVCPUs and maxVCPUs")
    if spec.suspend:
        text += f"; it is set to {what}, once spec.suspend is not set.{_may_leave(findings)}"
        return _assessment(Reason.SUSPENDED, text, policy)
    return _assessment(Reason.ADOPTING, f"{text}: it is being set to {what}.{_may_leave(findings)}", policy)


def _count_matches(findings: Findings) -> Assessment:
    spec, machine, guest, now = findings.spec, findings.machine, findings.guest, findings.now
    may_leave, policy = _may_leave(findings), _while_requested(findings)
    text = f"QEMU has {_vcpus(machine.vcpus)}, as declared"
    if spec.guest_agent is None:
        return _assessment(Reason.CONVERGED, f"{text}.{may_leave}", policy)
    unknown = f"{text}; it is unknown whether the guest uses them:"
    if guest is None:
        why = f"it cannot be queried while the machine's run state is {machine.run_state!r}"
        return _assessment(Reason.CONVERGED, f"{unknown} {why}.{may_leave}", policy)
    if guest.cpus is None:
        return _assessment(Reason.CONVERGED, f"{unknown} {guest.error}.{may_leave}", policy)
    online = guest.cpus.online
    if online > machine.vcpus:
        why = f"the agent reports {online} online CPUs, so spec.guestAgent names the socket of another machine"
        return _assessment(Reason.CONVERGED, f"{unknown} {why}.{may_leave}", policy)
    if online == machine.vcpus:
        return _assessment(Reason.CONVERGED, f"{text}, and the guest uses them all.{may_leave}", policy)
    text = f"{text}; the guest uses {online} of them"
    if findings.plugged is not None and now < findings.plugged + TAKE_UP_TIME:
        return _assessment(Reason.PLUGGING, f"{text} so far.", RequeuePolicy.HOLD, now + TAKE_UP_POLL)
    if spec.suspend and spec.guest_agent.bring_online:
        return _assessment(
            Reason.SUSPENDED, f"{text}; nothing is changed while spec.suspend is set.", RequeuePolicy.RESYNC
        )
    text += _offline(spec.guest_agent, guest, machine.vcpus)
    return _assessment(Reason.GUEST_CPUS_OFFLINE, text, RequeuePolicy.RETRY)


def _offline(agent: GuestAgent, guest: GuestReport, vcpus: int) -> str:
    """Why a guest does not use all of its CPUs, and the remedy."""
    assert guest.cpus is not None
    offline = guest.cpus.offline
    missing = vcpus - len(guest.cpus.cpus)
    text = ""
    if offline:
        text += f" and has left its {_listed('CPU', offline)} offline"
    if missing > 0:
        text += f"{', and' if offline else ' and'} does not know of {missing}"
    text += "."
    if guest.resisted:
        words = sentence(next(iter(guest.resisted.values())))
        text += f" It did not bring {_listed('CPU', guest.resisted)} online: {words} See the guest's log."
    elif offline and agent.bring_online:
        text += " They are being brought online, a few at a time."
    elif offline:
        text += f" Add the udev rule {UDEV_RULE} to the guest, or set spec.guestAgent.bringOnline."
    if missing > 0:
        text += (
            " Its kernel has not accepted all plugged vCPUs: check its log, and whether it was booted with maxcpus=, "
            "nr_cpus= or acpi=off."
        )
    return text


def _plug_failed(findings: Findings) -> Assessment:
    text, blocked = f"{_counts(findings)}; ", findings.blocked
    if isinstance(blocked, PermanentError):
        return _assessment(
            Reason.HOTPLUG_UNSUPPORTED,
            f"{text}QEMU rejects the change permanently: {blocked}.{_RESTART}",
            RequeuePolicy.RESYNC,
        )
    if blocked is not None:
        text += f"QEMU rejects the change at the moment: {blocked}."
    else:
        text += "a vCPU was unplugged while others were plugged."
    return _assessment(Reason.PLUGGING, text, RequeuePolicy.RETRY)


def _unplug_unfinished(findings: Findings) -> Assessment:
    requests, blocked, reported, now = findings.requests, findings.blocked, findings.reported, findings.now
    unplug, counts = findings.spec.unplug, _counts(findings)
    if not findings.machine.guest_accepts_unplugs or isinstance(blocked, GuestNotReady):
        words = "" if blocked is None else f" ({blocked})"
        return _assessment(
            Reason.WAITING_FOR_GUEST,
            f"{counts}; the guest does not accept unplug requests yet{words}: it is still booting, "
            "or was booted with acpi=off and cannot unplug CPUs.",
            RequeuePolicy.RETRY,
        )
    if not requests:
        # The machine has changed since the pass made its plan: the next one decides.
        return _assessment(Reason.UNPLUGGING, f"{counts}; unplug requests follow.", RequeuePolicy.RETRY)
    timeout = timedelta(seconds=unplug.timeout_seconds)
    deadline = now if findings.started is None else findings.started + timeout
    overdue = now >= deadline
    in_flight = findings.in_flight
    refused = [request for request in requests if not request.in_flight]
    # What is due already and was not requested is not wanted now: it needs no pass.
    due = min((at for at in (*map(findings.due_at, requests), deadline) if at > now), default=None)
    policy = _while_requested(findings)
    expected = policy is not RequeuePolicy.RESYNC
    longest = timedelta(seconds=unplug.retry_seconds)
    every = again = f"The request is repeated every {_seconds(longest)}"
    if longest > FIRST_PAUSE:
        again = (
            f"The request is repeated after {_seconds(FIRST_PAUSE)}, then with doubling delays "
            f"of up to {_seconds(longest)}"
        )
    rebooted = ""
    if findings.reset is not None and findings.reset >= deadline - 2 * timeout:
        # Without the time: a machine that resets repeatedly would cost a write for each reset.
        rebooted = " The machine was reset meanwhile: its guest may still be booting."

    # While a CPU that had been refused is requested again, the report is kept until the guest has answered.
    repeated = reported == Reason.UNPLUG_REFUSED and all(request.attempts > 1 for request in in_flight)
    still_refused = bool(refused) or (expected and reported == Reason.UNPLUG_REFUSED)

    # The same for one that QEMU had rejected, until QEMU answers again.
    rejected = [request for request in requests if request.answer is Answer.REJECTED]
    rejected_again = reported == Reason.UNPLUG_UNSUPPORTED and all(
        request.attempts > 1 and now < request.requested_at + PENDING_AFTER for request in in_flight
    )
    if len(rejected) == len(refused) and (not in_flight or rejected_again):
        words = "" if blocked is None else f": {blocked}"
        text = f"{counts}; QEMU refused to unplug {slot_list(requests)}{words}.{_RESTART} {every}."
        return _assessment(Reason.UNPLUG_UNSUPPORTED, text, policy, due)

    if in_flight and not overdue and not (repeated and still_refused):
        text = f"{counts}; unplug of {slot_list(in_flight)} requested at {_time(in_flight)}"
        if refused:
            text += f", after the guest had refused {_refusals(refused)}"
        # A repetition is no news: otherwise each would cost a second write if it is not answered either.
        if all(
            request.answer is None and (request.attempts > 1 or now - request.requested_at >= PENDING_AFTER)
            for request in in_flight
        ):
            text += f"; the guest has not answered yet.{rebooted}"
            return _assessment(Reason.UNPLUG_PENDING, text, policy, due)
        return _assessment(Reason.UNPLUGGING, f"{text}.", policy, due)

    if still_refused:
        what = f"refused to unplug {_refusals(refused)}" if refused else "refused"
        last = f", last sent for {slot_list(in_flight)} at {_time(in_flight)}" if in_flight else ""
        text = (
            f"{counts}; the guest {what}, and there is no other candidate. Check what uses the CPUs (pinned or "
            f"real-time tasks; see the guest's log), or declare more vCPUs. {again}{last}.{rebooted}"
        )
        return _assessment(Reason.UNPLUG_REFUSED, text, policy, due, stalled=overdue)

    text = (
        f"{counts}; the guest has not unplugged {slot_list(in_flight)}, last requested at {_time(in_flight)}: it may "
        f"hang, be paused, or not support CPU hot-unplug. A late answer is still accepted. {again}.{rebooted}"
    )
    return _assessment(Reason.UNPLUG_TIMED_OUT, text, policy, due)


def plugging(findings: Findings) -> Assessment:
    """What is reported while CPUs are plugged."""
    return _assessment(Reason.PLUGGING, f"{_counts(findings)}; plugging {-findings.surplus}.", RequeuePolicy.HOLD)


def failure(error: VCPUSetError) -> Assessment:
    """What is reported when the machine could not be observed."""
    # Each can pass without an event: what is at a path, what a name resolves to, a Secret, a restarted QEMU. But a spec
    # that this version does not support needs a new generation.
    policy = RequeuePolicy.RESYNC if isinstance(error, UnsupportedSpec) else RequeuePolicy.RETRY
    help_ = " End -preconfig (x-exit-preconfig)." if isinstance(error, Preconfig) else ""
    return _assessment(_failed(error), f"{sentence(str(error))}{help_}", policy)


def _failed(error: VCPUSetError) -> Reason:
    match error:
        case UnsupportedSpec():
            return Reason.UNSUPPORTED_SPEC
        case InvalidMonitor():
            return Reason.INVALID_MONITOR
        case CredentialsUnavailable():
            return Reason.CREDENTIALS_UNAVAILABLE
        case MonitorBusy():
            return Reason.MONITOR_BUSY
        case MonitorTimeout():
            return Reason.MONITOR_TIMEOUT
        case Preconfig():
            return Reason.MACHINE_BUSY
        case _:
            return Reason.MONITOR_UNREACHABLE


def conflict(holder: str) -> Assessment:
    """What is reported when an older set keeps the monitor."""
    return _assessment(
        Reason.MONITOR_CONFLICT,
        f"VCPUSet {holder} is older and names the same monitor: delete one of the two, or set another monitor "
        "for this one. This VCPUSet takes over as soon as the older one releases the monitor.",
        RequeuePolicy.RESYNC,
    )


def conflict_over_machine(holder: str, evidence: str) -> Assessment:
    """What is reported when an older set has another monitor of the same machine.

    evidence  how this is known
    """
    return _assessment(
        Reason.MONITOR_CONFLICT,
        f"VCPUSet {holder} is older and names another monitor of the same machine ({evidence}): delete one of the "
        "two, or set the monitor of another machine for this one. This VCPUSet takes over as soon as the older one "
        "releases the machine.",
        RequeuePolicy.RESYNC,
    )


_HIDDEN_BY_CONTEST = frozenset(
    {Reason.CONVERGED, Reason.PLUGGING, Reason.UNPLUGGING, Reason.UNPLUG_PENDING, Reason.WAITING_FOR_GUEST}
)
"""What would be reported alternately while another client undoes what the operator does."""


def contested(assessment: Assessment, findings: Findings, contest: Contest) -> Assessment:
    """What is reported of a machine that another client changes repeatedly; other problems come first."""
    if assessment.reason not in _HIDDEN_BY_CONTEST:
        return assessment
    return Assessment(
        Reason.CONTESTED,
        f"{_counts(findings)}; another client has changed them {CHANGES} times within {contest.window:g} s. "
        "Check which other client uses a monitor of this QEMU: another VCPUSet or operator, libvirt, a script. Until "
        f"there has been no such change for {contest.window:g} s, they are corrected at most every {contest.pause:g} "
        "s. A change of the spec is applied at once.",
        State.STALLED,
        RequeuePolicy.RESYNC if assessment.policy is RequeuePolicy.RETRY else assessment.policy,
        assessment.due,
    )


def with_pod(assessment: Assessment, findings: Findings) -> Assessment:
    """What is reported if the machine's pod allows no more vCPUs, or does not follow. Other problems come first."""
    pod = findings.pod
    if pod is not None and pod.vcpus is not None and findings.machine.vcpus < pod.vcpus:
        # They have left since the pod was read: the next pass lowers its size.
        assessment = replace(assessment, due=findings.now)
    if pod is None or pod.trouble is None or findings.blocked is not None:
        return assessment
    reason, message = pod.trouble
    waits = assessment.reason is Reason.PLUGGING and findings.plug_to <= findings.machine.vcpus < findings.target.count
    if not waits and (assessment.reason is not Reason.CONVERGED or reason is Reason.PLUGGING):
        return assessment
    policy = RequeuePolicy.RETRY if pod.due is None else RequeuePolicy.RESYNC
    return _assessment(reason, f"{_counts(findings)}; {message}.{_may_leave(findings)}", policy, pod.due)


def terminating() -> Assessment:
    """What is reported of a deleted set whose object is still there."""
    return _assessment(
        Reason.TERMINATING,
        "This VCPUSet has been deleted: its machine is no longer changed, and its monitor is released. The object "
        "remains until its finalizers (metadata.finalizers) are removed.",
        RequeuePolicy.RESYNC,
    )


_WORRYING = frozenset(
    {
        Reason.UNPLUG_REFUSED,
        Reason.GUEST_CPUS_OFFLINE,
        Reason.MONITOR_UNREACHABLE,
        Reason.MONITOR_BUSY,
        Reason.MONITOR_TIMEOUT,
        Reason.MACHINE_NOT_RUNNING,
        Reason.POD_NOT_FOUND,
        Reason.POD_AMBIGUOUS,
        Reason.POD_RESIZE_DEFERRED,
    }
)
"""Not failures (they may pass), but not normal operation either."""


def slot_list(requests: Iterable[Request]) -> str:
    """ "slot 5" or "slots 1-3, 5"."""
    return _listed("slot", (request.slot for request in requests))


_MOST_RANGES = 16


def _listed(noun: str, indexes: Iterable[int]) -> str:
    """As ranges, because there can be hundreds, and at most as many ranges as a person reads."""
    indexes = sorted(indexes)
    ranges: list[list[int]] = []
    for index in indexes:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    shown = ranges[:_MOST_RANGES]
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in shown)
    if len(ranges) > len(shown):
        text += f" and {sum(last - first + 1 for first, last in ranges[_MOST_RANGES:])} more"
    return f"{noun if len(indexes) == 1 else noun + 's'} {text}"


_REMEDIES = {
    "postmigrate": " Name the destination's monitor in spec.monitor.",
    "guest-panicked": " Reset or restart the VM.",
    "internal-error": " Reset or restart the VM, and see QEMU's log.",
    "shutdown": " Reset or restart the VM.",
    "watchdog": " Reset the VM, or resume it (cont).",
    "prelaunch": " QEMU was started with -S, or reset while it was stopped: start the machine (cont).",
    "io-error": " Fix the storage and resume the machine (cont).",
    "suspended": " Wake the guest (system_wakeup).",
}
"""The remedy for a run state, if it is not waiting."""

_RESTART = (
    " Declare the present count, or restart the VM with the declared count or with a machine type that supports this."
)


def _assessment(
    reason: Reason, message: str, policy: RequeuePolicy, due: datetime | None = None, *, stalled: bool = False
) -> Assessment:
    state = State.STALLED if stalled else reason.states[0]
    return Assessment(reason, message, state, policy, due)


def _while_requested(findings: Findings) -> RequeuePolicy:
    """How often the machine is observed while requests are in flight, whether they are still wanted or not.

    The events of a guest at work arrive at once. A slow guest must not keep other clients from the monitor, unless its
    answers come by event only. A guest that has neither answered nor unplugged a CPU for `timeoutSeconds` is no
    longer expected to.
    """
    made = [request.requested_at for request in findings.in_flight]
    if not made:
        return RequeuePolicy.RESYNC
    active = max(made) if findings.moved is None else max(*made, findings.moved)
    if findings.now >= active + timedelta(seconds=findings.spec.unplug.timeout_seconds):
        return RequeuePolicy.RESYNC
    by_event_only = findings.machine.ost is None
    return RequeuePolicy.HOLD if findings.now < active + PENDING_AFTER or by_event_only else RequeuePolicy.POLL


def _may_leave(findings: Findings) -> str:
    if not findings.in_flight:
        return ""
    then = "." if findings.spec.suspend else "; a vCPU that is unplugged this way is plugged again."
    return f" An earlier request may still unplug {slot_list(findings.in_flight)}{then}"


def sentence(words: str) -> str:
    """With a capital letter and a full stop; a path or a field at the beginning keeps its spelling."""
    end = "" if words.endswith(("?", ".")) else "."
    return f"{words[:1].upper()}{words[1:]}{end}" if words.split(" ", 1)[0].isalpha() else f"{words}{end}"


def _counts(findings: Findings) -> str:
    return f"{_vcpus(findings.machine.vcpus)} present, {findings.spec.vcpus} declared"


def _vcpus(count: int) -> str:
    return "1 vCPU" if count == 1 else f"{count} vCPUs"


def _refusals(refused: Sequence[Request]) -> str:
    by_answer: dict[Answer, list[Request]] = {}
    for request in refused:
        if request.answer is not None:
            by_answer.setdefault(request.answer, []).append(request)
    return ", ".join(f"{slot_list(group)}: {answer.words}" for answer, group in by_answer.items())


def _time(requests: Sequence[Request]) -> str:
    return _moment(max(request.requested_at for request in requests))


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _seconds(span: timedelta) -> str:
    return f"{span.total_seconds():.0f} s"
