"""What a VCPUSet's status says: from an observation to a verdict, from a verdict to conditions.

The conditions follow the kstatus rules (sigs.k8s.io/cli-utils, pkg/kstatus): Ready, Reconciling and Stalled stand in
this order, are always all three present, and Reconciling and Stalled are never both True. Messages hold nothing that
changes from one look to the next without news (no elapsed times), since each change of a status is a write.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from vcpuset.domain.errors import (
    CommandError,
    InvalidMonitor,
    Migrating,
    MonitorBusy,
    MonitorTimeout,
    PermanentError,
    VCPUSetError,
)
from vcpuset.domain.machine import Activity, Answer, Machine
from vcpuset.domain.plan import Goal
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.requests import CPU, due_at
from vcpuset.domain.resource import Condition, Request, Spec, Status, VCPUSet

__all__ = [
    "PENDING_AFTER",
    "Pace",
    "Verdict",
    "conditions",
    "conflict",
    "failure",
    "is_progress",
    "judge",
    "observed",
    "opened_at",
    "plugging",
    "slot_list",
]

PENDING_AFTER = timedelta(seconds=3)
"""How long a request may go without an answer before the report changes from Unplugging to UnplugPending.

A healthy Linux guest under load answers within two seconds; a shorter time would only cost a status write.
"""


class Pace(enum.Enum):
    """How soon the machine is looked at again."""

    HELD = "held"
    """The guest works on requests: the session is kept for its events, and a look is taken every second."""
    RETRY = "retry"
    """Something should pass: with a growing back-off."""
    STEADY = "steady"
    """Nothing is expected: at the next resync."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one pass found.

    due  when something falls due before the next look at `pace` would be taken; None: nothing
    """

    reason: Reason
    message: str
    state: State
    pace: Pace
    due: datetime | None = None

    @property
    def event_type(self) -> Literal["Normal", "Warning"]:
        """The type of the Kubernetes Event for a change to this verdict."""
        return "Warning" if self.state is State.STALLED or self.reason in _WORRYING else "Normal"


def judge(
    spec: Spec,
    machine: Machine,
    goal: Goal,
    requests: Sequence[Request],
    *,
    started: datetime | None,
    inherited: Collection[CPU],
    blocked: CommandError | None,
    reported: str | None,
    now: datetime,
) -> Verdict:
    """What the last observation of a pass means, or, with the requests about to be made, what a pass is doing.

    started   when the first request of this generation was made
    inherited the CPUs of requests that an earlier process wrote down
    reported  the reason that stands in the status for this generation; None: none does
    blocked   why QEMU did not do what this pass wanted; None: it did, or nothing was wanted
    """
    if machine.activity is Activity.OVER:
        return _verdict(
            Reason.MACHINE_NOT_RUNNING,
            f"The machine's run state is {machine.run_state!r}: its CPUs cannot be changed until it runs again.",
            Pace.STEADY,
        )
    if machine.vcpus == spec.vcpus:
        text = f"QEMU has {_vcpus(machine.vcpus)}, as declared.{_may_leave(requests)}"
        return _verdict(Reason.CONVERGED, text, _pace_of_leaving(spec, requests, now))
    if spec.suspend:
        return _verdict(
            Reason.SUSPENDED,
            f"{_counts(spec, machine)}; nothing is changed while spec.suspend is set.",
            Pace.STEADY,
        )
    if machine.activity is Activity.BUSY or isinstance(blocked, Migrating):
        migrates = machine.migrating or isinstance(blocked, Migrating)
        why = "a migration runs" if migrates else "tried again until the machine runs (or is paused)"
        return _verdict(
            Reason.MACHINE_BUSY,
            f"{_counts(spec, machine)}; CPUs cannot be changed in run state {machine.run_state!r}: {why}.",
            Pace.RETRY,
        )
    if machine.vcpus < goal.count:
        return _plug_failed(spec, machine, blocked)
    if machine.vcpus > goal.count:
        return _unplug_unfinished(spec, machine, requests, started, inherited, blocked, reported, now)
    assert goal.reason is not None, "the goal is met and is not the declared count"
    text = f"{_counts(spec, machine)}; {goal.message}.{_may_leave(requests)}"
    return _verdict(goal.reason, text, _pace_of_leaving(spec, requests, now))


def _plug_failed(spec: Spec, machine: Machine, blocked: CommandError | None) -> Verdict:
    text = f"{_counts(spec, machine)}; "
    if isinstance(blocked, PermanentError):
        return _verdict(Reason.HOTPLUG_UNSUPPORTED, f"{text}QEMU refuses for good: {blocked}.", Pace.STEADY)
    if blocked is not None:
        return _verdict(Reason.PLUGGING, f"{text}QEMU refuses for now: {blocked}.", Pace.RETRY)
    return _verdict(Reason.PLUGGING, f"{text}a vCPU left again while others were plugged.", Pace.RETRY)


def _unplug_unfinished(
    spec: Spec,
    machine: Machine,
    requests: Sequence[Request],
    started: datetime | None,
    inherited: Collection[CPU],
    blocked: CommandError | None,
    reported: str | None,
    now: datetime,
) -> Verdict:
    counts = _counts(spec, machine)
    if not requests:
        # Nothing could be asked for: QEMU's legacy mode was seen, or device_del told.
        words = "" if blocked is None else f" ({blocked})"
        return _verdict(
            Reason.WAITING_FOR_GUEST,
            f"{counts}; the guest's ACPI does not take unplug requests yet{words}: it is still booting, "
            "or was booted with acpi=off and cannot give CPUs back.",
            Pace.RETRY,
        )
    timeout = timedelta(seconds=spec.unplug.timeout_seconds)
    deadline = now if started is None else started + timeout
    overdue = now >= deadline
    in_flight = [request for request in requests if request.in_flight]
    refused = [request for request in requests if not request.in_flight]
    # What is due already and was not asked for is not wanted now: nothing to come back for.
    dues = [at for request in requests if (at := due_at(request, spec.unplug, inherited)) > now]
    due = min(dues, default=None)
    expected = any(now < request.requested_at + timeout for request in in_flight)
    pace = Pace.HELD if expected else Pace.STEADY
    again = f"Asked again every {spec.unplug.retry_seconds} s"

    # While a CPU that had been refused is asked for anew, the report stands until the guest has answered.
    repeated = reported == Reason.UNPLUG_REFUSED and all(request.attempts > 1 for request in in_flight)
    still_refused = bool(refused) or (expected and reported == Reason.UNPLUG_REFUSED)

    # The same for one that QEMU had rejected, for the moment that its own answer takes.
    rejected = [request for request in requests if request.answer is Answer.REJECTED]
    rejected_again = reported == Reason.UNPLUG_UNSUPPORTED and all(
        request.attempts > 1 and now < request.requested_at + PENDING_AFTER for request in in_flight
    )
    if len(rejected) == len(refused) and (not in_flight or rejected_again):
        words = "" if blocked is None else f": {blocked}"
        text = f"{counts}; QEMU refused to unplug {slot_list(requests)}{words}. {again}."
        return _verdict(Reason.UNPLUG_UNSUPPORTED, text, pace, due)

    if in_flight and not overdue and not (repeated and still_refused):
        text = f"{counts}; the guest was asked to give back {slot_list(in_flight)} at {_time(in_flight)}"
        if refused:
            text += f", after it had refused {_refusals(refused)}"
        if all(request.answer is None and now - request.requested_at >= PENDING_AFTER for request in in_flight):
            return _verdict(Reason.UNPLUG_PENDING, f"{text}, and has not answered yet.", Pace.HELD)
        return _verdict(Reason.UNPLUGGING, f"{text}.", Pace.HELD)

    if still_refused:
        what = f"refused to give back {_refusals(refused)}" if refused else "refused"
        asked = f", last for {slot_list(in_flight)} at {_time(in_flight)}" if in_flight else ""
        text = (
            f"{counts}; the guest {what}, and there is no other candidate. Find out what holds the CPUs (pinned or "
            f"real-time tasks; the guest's log tells), or declare more vCPUs. {again}{asked}."
        )
        until = due if overdue else min([*dues, deadline])
        return _verdict(Reason.UNPLUG_REFUSED, text, pace, until, stalled=overdue)

    text = (
        f"{counts}; the guest has not given back {slot_list(in_flight)}, last asked at {_time(in_flight)}: it may "
        f"hang, be paused, or not support CPU hot-unplug. A late answer is still taken. {again}."
    )
    return _verdict(Reason.UNPLUG_TIMED_OUT, text, pace, due)


def plugging(spec: Spec, machine: Machine, goal: Goal) -> Verdict:
    """What is reported while CPUs are plugged."""
    return _verdict(Reason.PLUGGING, f"{_counts(spec, machine)}; plugging {goal.count - machine.vcpus}.", Pace.HELD)


def failure(error: VCPUSetError) -> Verdict:
    """What is reported when the machine could not be looked at."""
    words = str(error)
    # A path or a field keeps its spelling.
    text = f"{words[:1].upper()}{words[1:]}." if words.split(" ", 1)[0].isalpha() else f"{words}."
    match error:
        case InvalidMonitor():
            return _verdict(Reason.INVALID_MONITOR, text, Pace.STEADY)
        case MonitorBusy():
            return _verdict(Reason.MONITOR_BUSY, text, Pace.RETRY)
        case MonitorTimeout():
            return _verdict(Reason.MONITOR_TIMEOUT, text, Pace.RETRY)
        case _:
            return _verdict(Reason.MONITOR_UNREACHABLE, text, Pace.RETRY)


def conflict(holder: str) -> Verdict:
    """What is reported when an older set keeps the monitor."""
    return _verdict(
        Reason.MONITOR_CONFLICT,
        f"VCPUSet {holder} is older and names the same monitor: delete one of the two, or give this one another "
        "monitor. It takes over as soon as the older one lets go.",
        Pace.STEADY,
    )


def opened_at(
    status: Status, generation: int, requests: Sequence[Request], surplus: int, now: datetime
) -> datetime | None:
    """When the first unplug request of this generation was made; None while nothing is to be given back.

    Requests left over from an earlier generation count from the first look at this one.
    """
    if surplus <= 0 or not requests:
        return None
    if status.observed_generation == generation and status.unplug_started_at is not None:
        return min(status.unplug_started_at, now)
    return now


def observed(
    vcpuset: VCPUSet, machine: Machine | None, requests: Sequence[Request], started: datetime | None
) -> Status:
    """The status without new conditions; without a machine, the last observation stands."""
    status = replace(
        vcpuset.status, observed_generation=vcpuset.generation, selector=f"vcpuset.dev/name={vcpuset.name}"
    )
    if machine is None:
        # The clock of another generation's requests is not this one's.
        same = vcpuset.status.observed_generation == vcpuset.generation
        return status if same else replace(status, unplug_started_at=None)
    return replace(
        status,
        vcpus=machine.vcpus,
        min_vcpus=machine.floor,
        max_vcpus=machine.ceiling,
        unplug_started_at=started,
        pending_unplugs=tuple(requests),
    )


def conditions(
    previous: Iterable[Condition], verdict: Verdict, generation: int, now: datetime
) -> tuple[Condition, ...]:
    """The three conditions of a verdict; `lastTransitionTime` moves only when a condition's status does."""
    since = {condition.type: condition for condition in previous}

    def condition(kind: str, true: bool) -> Condition:
        status = "True" if true else "False"
        old = since.get(kind)
        moved = now.replace(microsecond=0) if old is None or old.status != status else old.last_transition_time
        return Condition(kind, status, verdict.reason.value, verdict.message, moved, generation)

    return (
        condition("Ready", verdict.state is State.READY),
        condition("Reconciling", verdict.state is State.RECONCILING),
        condition("Stalled", verdict.state is State.STALLED),
    )


_WORRYING = frozenset(
    {
        Reason.UNPLUG_REFUSED,
        Reason.MONITOR_UNREACHABLE,
        Reason.MONITOR_BUSY,
        Reason.MONITOR_TIMEOUT,
        Reason.MACHINE_NOT_RUNNING,
    }
)
"""Not failures (they may pass), but nothing that happens on a good day."""

_WITH_THE_GUEST = frozenset({Reason.UNPLUGGING.value, Reason.UNPLUG_PENDING.value})


def is_progress(old: Status, new: Status) -> bool:
    """Whether the change is mere progress of an unplug under way, which may be reported later.

    Not progress: another generation, the end, bad news.
    """
    before, after = old.ready, new.ready
    if before is None or after is None or old.observed_generation != new.observed_generation:
        return False
    return {before.reason, after.reason} <= _WITH_THE_GUEST


def slot_list(requests: Iterable[Request]) -> str:
    """ "slot 5" or "slots 1-3, 5": ranges, since there can be hundreds."""
    indexes = sorted(request.slot for request in requests)
    ranges: list[list[int]] = []
    for index in indexes:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"{'slot' if len(indexes) == 1 else 'slots'} {text}"


def _verdict(
    reason: Reason, message: str, pace: Pace, due: datetime | None = None, *, stalled: bool = False
) -> Verdict:
    state = State.STALLED if stalled else reason.states[0]
    return Verdict(reason, message, state, pace, due)


def _pace_of_leaving(spec: Spec, requests: Sequence[Request], now: datetime) -> Pace:
    """At the target, requests may still be with the guest: expected for a time-out, thereafter at any time."""
    asked = [request.requested_at for request in requests if request.in_flight]
    if asked and now < max(asked) + timedelta(seconds=spec.unplug.timeout_seconds):
        return Pace.HELD
    return Pace.STEADY


def _may_leave(requests: Sequence[Request]) -> str:
    in_flight = [request for request in requests if request.in_flight]
    if not in_flight:
        return ""
    return f" An earlier request may still take {slot_list(in_flight)} away; what leaves is plugged again."


def _counts(spec: Spec, machine: Machine) -> str:
    return f"{_vcpus(machine.vcpus)} present, {spec.vcpus} declared"


def _vcpus(count: int) -> str:
    return "1 vCPU" if count == 1 else f"{count} vCPUs"


def _refusals(refused: Sequence[Request]) -> str:
    by_answer: dict[Answer, list[Request]] = {}
    for request in refused:
        if request.answer is not None:
            by_answer.setdefault(request.answer, []).append(request)
    return ", ".join(f"{slot_list(group)}: {answer.words}" for answer, group in by_answer.items())


def _time(requests: Sequence[Request]) -> str:
    return max(request.requested_at for request in requests).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
