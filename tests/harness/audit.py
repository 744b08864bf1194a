"""What clients asked of the API server, from its audit log: how tests and benchmarks count requests and writes.

Recorded are all requests of service accounts, and everyone's requests to this project's resources and to Events.
Each is one record, made when its response is complete: for a watch that is its end.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

__all__ = ["AUDIT_POLICY", "STATUS_IN_AUDIT", "AuditEvent", "audit_log_end", "read_audit_log"]

_NODE: Final = "authentication.kubernetes.io/node-name"

AUDIT_POLICY: Final[Mapping[str, Any]] = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "Metadata", "resources": [{"group": "vcpuset.dev"}, {"group": "events.k8s.io"}]},
        {"level": "None"},
    ],
}

STATUS_IN_AUDIT: Final[Mapping[str, Any]] = {
    "level": "RequestResponse",
    "verbs": ["patch", "update"],
    "resources": [{"group": "vcpuset.dev", "resources": ["vcpusets/status"]}],
}
"""A rule to put before the others: with status writes, the object that came of them."""


@dataclass(frozen=True)
class AuditEvent:
    """One request; strings that do not apply are empty."""

    user: str
    verb: str  # get, list, watch, create, update, patch, delete, deletecollection
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int  # the HTTP status
    request_uri: str
    user_agent: str = ""
    node: str = ""
    """The node of the pod whose token it was."""
    result: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The object that was answered, where the policy has it recorded."""
    allowed_by: str = ""
    """What RBAC let it pass for, such as `RBAC: allowed by ClusterRoleBinding "b" of ClusterRole "r" to Group "g"`."""

    @property
    def is_write(self) -> bool:
        """Whether the request was to change something (it may have been refused: see `code`)."""
        return self.verb not in ("get", "list", "watch")

    @classmethod
    def parse(cls, line: str | bytes) -> Self:
        """One line of the log."""
        record = json.loads(line)
        target = record.get("objectRef", {})
        return cls(
            user=record.get("user", {}).get("username", ""),
            verb=record["verb"],
            group=target.get("apiGroup", ""),
            resource=target.get("resource", ""),
            subresource=target.get("subresource", ""),
            namespace=target.get("namespace", ""),
            name=target.get("name", ""),
            code=record.get("responseStatus", {}).get("code", 0),
            request_uri=record["requestURI"],
            user_agent=record.get("userAgent", ""),
            node=next(iter(record.get("user", {}).get("extra", {}).get(_NODE, ())), ""),
            result=record.get("responseObject", {}),
            allowed_by=record.get("annotations", {}).get("authorization.k8s.io/reason", ""),
        )


def audit_log_end(log: Path) -> int:
    """Where the last record ends, in bytes: one that is only half written as yet begins there."""
    if not log.stat().st_size:  # which cannot be mapped
        return 0
    with log.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as lines:
        return lines.rfind(b"\n") + 1


def read_audit_log(log: Path, since: int = 0) -> list[AuditEvent]:
    """The records from `since` on, an `audit_log_end`, but not one that is only half written."""
    with log.open("rb") as stream:
        stream.seek(since)
        whole_lines, _, _ = stream.read().rpartition(b"\n")
    return [AuditEvent.parse(line) for line in whole_lines.splitlines()]
