"""VCPUSets as GitOps controllers see them: an object for each reason and state, and the expected verdicts.

docs/gitops.md shows these verdicts, and the tests compare them with those of the real engines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from harness.examples import GENERATION, NOW, examples
from harness.world import manifest
from unit.domain.builders import a_set
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import unserved_status
from vcpuset.domain.resource import Status
from vcpuset.kube.codec import encode_status

__all__ = ["Verdicts", "cases", "verdicts"]


@dataclass(frozen=True)
class Verdicts:
    """The verdicts about a VCPUSet.

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
    """The verdicts about a VCPUSet with this reason."""
    return _BY_REASON[reason] if reason in _BY_REASON else _BY_STATE[state]


def cases() -> dict[str, tuple[dict[str, Any], Verdicts]]:
    """Objects as the API server returns them, each with its verdicts, by names.

    One for each reason in each of its states, and those whose present spec has not been observed.
    """
    found = {}
    reported = examples()
    for reason in Reason:
        for state in reason.states:
            body = _body(reported[reason, state].status)
            if reason is Reason.TERMINATING:
                body["metadata"] |= {"deletionTimestamp": "2026-01-02T12:00:00Z", "finalizers": ["example.com/kept"]}
            found[f"{reason}-{state.value}"] = (body, verdicts(reason, state))
    (in_progress, unknown) = (_BY_STATE[State.RECONCILING], _BY_STATE[State.UNKNOWN])
    new = replace(a_set(generation=GENERATION), node_name="node-1")
    found["new"] = (_body(new.status), in_progress)
    found["new-without-agent"] = (_body(unserved_status(new, NOW)), unknown)
    for name, (before, _) in {
        "changed": found["Converged-Ready"],
        "changed-after-stalled": found["InvalidMonitor-Stalled"],
    }.items():
        changed = {**before["metadata"], "generation": GENERATION + 1}
        found[name] = ({**before, "metadata": changed}, in_progress)
    return found


def _body(status: Status) -> dict[str, Any]:
    body = manifest("default", "web")
    body["metadata"]["generation"] = GENERATION
    # It is encoded as a merge patch, which deletes what is null.
    body["status"] = {name: value for name, value in encode_status(status).items() if value is not None}
    return body
