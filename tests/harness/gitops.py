"""VCPUSets as GitOps controllers see them: an object for each row of the reasons, and what is to be made of it.

The verdicts are written down here once: docs/gitops.md shows them, and the tests hear them from the engines themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from harness.world import manifest
from vcpuset.domain.assessment import Assessment, RequeuePolicy
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import status_of, unserved_status
from vcpuset.domain.resource import UID, Spec, Status, UnixMonitor, VCPUSet
from vcpuset.kube.codec import encode_status

__all__ = ["Verdicts", "cases", "verdicts"]

GENERATION: Final = 3
NOW: Final = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Verdicts:
    """What is made of a VCPUSet.

    kstatus      by kstatus, and so by Flux as it is
    expressions  by Flux with the expressions of deploy/gitops/flux
    argocd       by Argo CD with the script of deploy/gitops/argocd
    """

    kstatus: str
    expressions: str
    argocd: str


_BY_STATE: Final = {
    State.READY: Verdicts("Current", "Current", "Healthy"),
    State.RECONCILING: Verdicts("InProgress", "InProgress", "Progressing"),
    State.STALLED: Verdicts("Failed", "Failed", "Degraded"),
    State.UNKNOWN: Verdicts("InProgress", "InProgress", "Unknown"),
}

_BY_REASON: Final = {
    Reason.SUSPENDED: Verdicts("InProgress", "Current", "Suspended"),
    Reason.TERMINATING: Verdicts("Terminating", "InProgress", "Progressing"),
}


def verdicts(reason: Reason, state: State) -> Verdicts:
    """What is to be made of a VCPUSet with this reason."""
    return _BY_REASON[reason] if reason in _BY_REASON else _BY_STATE[state]


def cases() -> dict[str, tuple[dict[str, Any], Verdicts]]:
    """Objects as the API server returns them, each with what is to be made of it, by words that tell them apart.

    One for each reason in each of its states, and those whose present spec has not been observed.
    """
    found = {
        f"{reason}-{state.value}": (_reported(reason, state), verdicts(reason, state))
        for reason in Reason
        for state in reason.states
    }
    (in_progress, unknown) = (_BY_STATE[State.RECONCILING], _BY_STATE[State.UNKNOWN])
    found["new"] = (_body(Status()), in_progress)
    found["new-without-agent"] = (_body(unserved_status(_vcpuset(), NOW)), unknown)
    found["changed"] = (_reported(Reason.CONVERGED, State.READY), in_progress)
    found["changed"][0]["metadata"]["generation"] += 1
    found["changed-after-stalled"] = (_reported(Reason.INVALID_MONITOR, State.STALLED), in_progress)
    found["changed-after-stalled"][0]["metadata"]["generation"] += 1
    return found


def _vcpuset(observed: int = -1) -> VCPUSet:
    spec, status = Spec(2, UnixMonitor("web.sock")), Status(observed_generation=observed)
    return VCPUSet(UID("1"), "default", "web", GENERATION, "1", NOW, spec, status, node_name="node-1")


def _body(status: Status) -> dict[str, Any]:
    body = manifest("default", "web")
    body["metadata"]["generation"] = GENERATION
    # It is encoded as a merge patch, which deletes what is null.
    body["status"] = {name: value for name, value in encode_status(status).items() if value is not None}
    return body


def _reported(reason: Reason, state: State) -> dict[str, Any]:
    """The object after this reason was reported for its present spec."""
    if state is State.UNKNOWN:  # all was well until the agent was gone
        return _body(unserved_status(_vcpuset(observed=GENERATION), NOW))
    assessment = Assessment(reason, reason.meaning, state, RequeuePolicy.RESYNC)
    body = _body(status_of(_vcpuset(), assessment, None, NOW))
    if reason is Reason.TERMINATING:
        body["metadata"] |= {"deletionTimestamp": "2026-01-02T12:00:00Z", "finalizers": ["example.com/kept"]}
    return body
