"""A VCPUSet's status: an assessment as conditions, and the counts.

The conditions follow the kstatus rules (sigs.k8s.io/cli-utils, pkg/kstatus): Ready, Reconciling and Stalled are in this
order, always present, and Reconciling and Stalled are never both True. A set with a guest agent has
GuestAgentConnected after them.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from vcpuset.domain.assessment import Assessment, RequeuePolicy, sentence
from vcpuset.domain.findings import Findings
from vcpuset.domain.guest import AgentReason
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.resource import Condition, Status, VCPUSet

__all__ = ["AGENT", "UNREPORTED", "is_progress", "state_of", "status_of", "unserved_status"]

MESSAGE_LIMIT = 32768
"""The limit of the schema: with a longer message the API server rejects the whole status."""

AGENT = "GuestAgentConnected"
"""The type of the condition about the queries of the guest agent."""

UNREPORTED = "Unreported"
"""Instead of a reason: no process has reported on the current spec yet."""


def status_of(vcpuset: VCPUSet, assessment: Assessment, findings: Findings | None, now: datetime) -> Status:
    """The status that reports an assessment.

    findings  None: the machine was not observed, and the last observation is kept
    """
    status = replace(
        vcpuset.status,
        observed_generation=vcpuset.generation,
        selector=f"vcpuset.dev/name={vcpuset.name}" if vcpuset.spec.pod is None else vcpuset.spec.pod.selector,
        conditions=_conditions(vcpuset, assessment, findings, now),
    )
    if vcpuset.spec.guest_agent is None:
        status = replace(status, online_vcpus=None)
    if findings is None:
        # The start of another generation's requests is not this one's.
        same = vcpuset.status.observed_generation == vcpuset.generation
        return status if same else replace(status, unplug_started_at=None)
    machine, guest = findings.machine, findings.guest
    if guest is None:
        # The online count of other CPUs is void.
        old = vcpuset.status
        if old.machine_uuid != machine.uuid or (old.online_vcpus or 0) > machine.vcpus:
            status = replace(status, online_vcpus=None)
    else:
        known = guest.reason(machine.vcpus) is AgentReason.CONNECTED
        status = replace(status, online_vcpus=guest.cpus.online if known and guest.cpus is not None else None)
    return replace(
        status,
        vcpus=machine.vcpus,
        min_vcpus=machine.floor,
        max_vcpus=machine.ceiling,
        machine_uuid=machine.uuid,
        unplug_started_at=findings.started,
        pending_unplugs=tuple(findings.requests),
    )


def state_of(vcpuset: VCPUSet) -> tuple[State, str]:
    """The state and the reason in a status. A report about an earlier spec does not count."""
    ready = vcpuset.status.ready
    if ready is None or ready.observed_generation != vcpuset.generation:
        return State.RECONCILING, UNREPORTED
    if ready.status == "True":
        return State.READY, ready.reason
    if ready.status == "Unknown":
        return State.UNKNOWN, ready.reason
    for state in (State.RECONCILING, State.STALLED):
        if (condition := vcpuset.status.condition(state.value)) is not None and condition.status == "True":
            return state, ready.reason
    return State.HELD, ready.reason


def unserved_status(vcpuset: VCPUSet, now: datetime) -> Status:
    """The status of a set that no agent manages: as it was, except for Ready, Reconciling and Stalled.

    The counts remain the last observation, and the requests are for the agent when it is back. `observedGeneration`
    stays too: it says which spec was last acted on, and the writer of this acts on none. The conditions are about the
    present generation: it is this one that no agent manages.
    """
    message = (
        f"No agent is ready on node {vcpuset.node_name}: the machine is not observed and its vCPUs are not changed. "
        "The counts are those of the last observation, if there was one."
    )
    made = _main_conditions(vcpuset, State.UNKNOWN, Reason.AGENT_UNAVAILABLE, message, now)
    replaced = {condition.type for condition in made}
    others = tuple(condition for condition in vcpuset.status.conditions if condition.type not in replaced)
    return replace(vcpuset.status, conditions=(*made, *others))


def _conditions(
    vcpuset: VCPUSet, assessment: Assessment, findings: Findings | None, now: datetime
) -> tuple[Condition, ...]:
    """The conditions of an assessment."""
    found = _main_conditions(vcpuset, assessment.state, assessment.reason, assessment.message, now)
    if vcpuset.spec.guest_agent is None:
        return found
    if findings is None or findings.guest is None:
        old = vcpuset.status.condition(AGENT)
        if findings is not None and findings.machine.run_state == "running" and old is not None:
            # The guest is not queried while it unplugs CPUs; its last answer is kept, for the generation of that time.
            return (*found, old)
        reason, message = AgentReason.NOT_QUERIED, AgentReason.NOT_QUERIED.meaning
    else:
        reason = findings.guest.reason(findings.machine.vcpus)
        message = reason.meaning if findings.guest.error is None else sentence(str(findings.guest.error))
    return (*found, _condition(vcpuset, AGENT, reason.status, reason.value, message, now))


def _main_conditions(
    vcpuset: VCPUSet, state: State, reason: Reason, message: str, now: datetime
) -> tuple[Condition, Condition, Condition]:
    """Ready, Reconciling and Stalled."""

    def of(kind: State) -> Condition:
        status = "True" if state is kind else "False"
        if (kind, state) == (State.READY, State.UNKNOWN):
            status = "Unknown"
        return _condition(vcpuset, kind.value, status, reason.value, message, now)

    return of(State.READY), of(State.RECONCILING), of(State.STALLED)


def _condition(vcpuset: VCPUSet, kind: str, status: str, reason: str, message: str, now: datetime) -> Condition:
    """A condition for the present generation; `lastTransitionTime` moves only when its status does."""
    old = vcpuset.status.condition(kind)
    moved = now.replace(microsecond=0) if old is None or old.status != status else old.last_transition_time
    return Condition(kind, status, reason, message[:MESSAGE_LIMIT], moved, vcpuset.generation)


_WITH_THE_GUEST = frozenset({Reason.UNPLUGGING.value, Reason.UNPLUG_PENDING.value})


def is_progress(old: Status, new: Status, policy: RequeuePolicy) -> bool:
    """Whether the change is only progress of a plug or unplug, which may be reported later.

    Not progress: another generation, the end, a failure that is tried again.
    """
    before, after = old.ready, new.ready
    if (
        before is None
        or after is None
        or old.observed_generation != new.observed_generation
        or policy is RequeuePolicy.RETRY
    ):
        return False
    if before.reason == after.reason and after.reason in {Reason.CONTESTED, Reason.POD_RESIZE_DEFERRED}:
        return True
    return before.reason == after.reason == Reason.PLUGGING or {before.reason, after.reason} <= _WITH_THE_GUEST
