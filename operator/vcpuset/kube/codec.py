"""VCPUSet objects as the API server sends them, and their status as it is written back.

Reading is tolerant: the API server has validated what it stores, fields that this version does not know are skipped,
and what the schema gives a default may be missing. Only an object that cannot be understood is an error, so that a set
made for a newer version is left alone instead of half obeyed.

Writing gives the whole status as a JSON merge patch (RFC 7386): a field without a value is null there, which removes
it. What is written is read back as the same value, so comparing two `Status` says whether a write is due; the one loss
is deliberate: `lastTransitionTime` has whole seconds, as everywhere in Kubernetes.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec

from vcpuset.domain.errors import VCPUSetError
from vcpuset.domain.machine import Answer
from vcpuset.domain.resource import (
    TLS,
    UID,
    BootVCPUs,
    Condition,
    Connection,
    GuestAgent,
    Monitor,
    Request,
    Spec,
    Status,
    TCPMonitor,
    UnixMonitor,
    Unplug,
    UnplugPolicy,
    VCPUSet,
)

__all__ = ["API_VERSION", "GROUP", "KIND", "PLURAL", "VERSION", "InvalidObject", "decode", "describe", "encode_status"]

GROUP: Final = "vcpuset.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "VCPUSet"
PLURAL: Final = "vcpusets"

_Time = Annotated[datetime, msgspec.Meta(tz=True)]
_UNPLUG: Final = Unplug()


class InvalidObject(VCPUSetError):
    """An object that this version cannot understand; the message names the object and the field."""


class _Metadata(msgspec.Struct, rename="camel"):
    uid: str
    namespace: str
    name: str
    resource_version: str
    creation_timestamp: _Time
    generation: int
    deletion_timestamp: str | None = None


class _Unix(msgspec.Struct):
    path: str


class _TLS(msgspec.Struct, rename="camel"):
    secret_name: str
    server_name: str | None = None


class _TCP(msgspec.Struct):
    host: str
    port: int
    tls: _TLS | None = None
    insecure: bool = False


class _Monitor(msgspec.Struct):
    unix: _Unix | None = None
    tcp: _TCP | None = None
    connection: Connection = Connection.ON_DEMAND


class _GuestAgent(msgspec.Struct, rename="camel"):
    unix: _Unix
    bring_online: bool = False


class _Unplug(msgspec.Struct, rename="camel"):
    policy: UnplugPolicy = UnplugPolicy.ENABLED
    boot_vcpus: BootVCPUs = msgspec.field(default=BootVCPUs.UNPLUG, name="bootVCPUs")
    timeout_seconds: int = _UNPLUG.timeout_seconds
    retry_seconds: int = _UNPLUG.retry_seconds


class _Spec(msgspec.Struct):
    vcpus: int
    monitor: _Monitor
    guest_agent: _GuestAgent | None = msgspec.field(default=None, name="guestAgent")
    unplug: _Unplug = msgspec.field(default_factory=_Unplug)
    suspend: bool = False


class _Request(msgspec.Struct, rename="camel"):
    slot: int
    path: str
    thread_id: int = msgspec.field(name="threadID")
    requested_at: _Time
    attempts: int = 1
    answer: Answer | None = None


class _Condition(msgspec.Struct, rename="camel"):
    type: str
    status: str
    reason: str
    message: str
    last_transition_time: _Time
    observed_generation: int = -1


class _MachineStatus(msgspec.Struct):
    min_vcpus: int | None = msgspec.field(default=None, name="minVCPUs")
    max_vcpus: int | None = msgspec.field(default=None, name="maxVCPUs")
    uuid: str | None = None


class _UnplugStatus(msgspec.Struct, rename="camel"):
    started_at: _Time | None = None
    requests: tuple[_Request, ...] = ()


class _Status(msgspec.Struct, rename="camel"):
    observed_generation: int = -1
    vcpus: int | None = None
    online_vcpus: int | None = msgspec.field(default=None, name="onlineVCPUs")
    machine: _MachineStatus = msgspec.field(default_factory=_MachineStatus)
    selector: str | None = None
    unplug: _UnplugStatus = msgspec.field(default_factory=_UnplugStatus)
    conditions: tuple[_Condition, ...] = ()


class _Object(msgspec.Struct):
    metadata: _Metadata
    spec: _Spec
    status: _Status = msgspec.field(default_factory=_Status)


def decode(body: Mapping[str, Any]) -> VCPUSet:
    """The object as a value.

    Raises:
        InvalidObject: a field is missing, of another type, or holds what this version does not know or cannot express.
    """
    try:
        wire = msgspec.convert(dict(body), _Object)
        return VCPUSet(
            uid=UID(wire.metadata.uid),
            namespace=wire.metadata.namespace,
            name=wire.metadata.name,
            generation=wire.metadata.generation,
            resource_version=wire.metadata.resource_version,
            created_at=_utc(wire.metadata.creation_timestamp, "metadata.creationTimestamp"),
            spec=_spec(wire.spec),
            status=_status(wire.status),
            deleting=wire.metadata.deletion_timestamp is not None,
        )
    except ValueError as error:  # a `msgspec.ValidationError` is one
        # msgspec says where: "… - at `$.spec.monitor.tcp.port`".
        raise InvalidObject(
            f"VCPUSet {describe(body)} cannot be understood by this version of the operator, "
            f"which leaves its machine alone: {str(error).replace('`$.', '`')}"
        ) from error


def describe(body: Mapping[str, Any]) -> str:
    """`namespace/name` of an object that may be no VCPUSet at all."""
    metadata = body.get("metadata")
    if not isinstance(metadata, Mapping):
        return "without metadata"
    return f"{metadata.get('namespace', '?')}/{metadata.get('name', '?')}"


def encode_status(status: Status) -> dict[str, Any]:
    """The value of `status` in a merge patch that makes the stored status equal to `status`."""
    return {
        "observedGeneration": status.observed_generation,
        "vcpus": status.vcpus,
        "onlineVCPUs": status.online_vcpus,
        "machine": _unless_empty(
            {
                "minVCPUs": status.min_vcpus,
                "maxVCPUs": status.max_vcpus,
                "uuid": status.machine_uuid,
            }
        ),
        "selector": status.selector,
        "unplug": _unless_empty(
            {
                "startedAt": None if status.unplug_started_at is None else _microseconds(status.unplug_started_at),
                # A merge patch replaces lists as a whole. Nulls inside of them would be stored, so there are none.
                "requests": [_encode_request(request) for request in status.pending_unplugs] or None,
            }
        ),
        "conditions": [_encode_condition(condition) for condition in status.conditions] or None,
    }


def _utc(time: datetime, field: str) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError as error:
        # The API server's calendar goes on where this one ends: it stores 0001-01-01T00:00:00+23:00.
        raise ValueError(f"{time.isoformat()} is not within the years 1 to 9999 in UTC - at `$.{field}`") from error


def _spec(wire: _Spec) -> Spec:
    agent = wire.guest_agent
    return Spec(
        vcpus=wire.vcpus,
        monitor=_monitor(wire.monitor),
        connection=wire.monitor.connection,
        guest_agent=None if agent is None else GuestAgent(agent.unix.path, agent.bring_online),
        unplug=Unplug(
            policy=wire.unplug.policy,
            boot_vcpus=wire.unplug.boot_vcpus,
            timeout_seconds=wire.unplug.timeout_seconds,
            retry_seconds=wire.unplug.retry_seconds,
        ),
        suspend=wire.suspend,
    )


def _monitor(wire: _Monitor) -> Monitor:
    match wire:
        case _Monitor(unix=_Unix(path=path), tcp=None):
            return UnixMonitor(path)
        case _Monitor(unix=None, tcp=_TCP(host=host, port=port, tls=None, insecure=True)):
            return TCPMonitor(host, port)
        case _Monitor(unix=None, tcp=_TCP(host=host, port=port, tls=_TLS() as tls, insecure=False)):
            return TCPMonitor(host, port, TLS(tls.secret_name, tls.server_name))
        case _Monitor(unix=None, tcp=_TCP()):
            # The schema demands it too. Never speak plain text to a monitor whose author has not agreed to it.
            raise ValueError("Expected exactly one of `tls` and `insecure: true` - at `$.spec.monitor.tcp`")
        case _:
            raise ValueError("Expected exactly one of `unix` and `tcp` - at `$.spec.monitor`")


def _status(wire: _Status) -> Status:
    started = wire.unplug.started_at
    return Status(
        observed_generation=wire.observed_generation,
        vcpus=wire.vcpus,
        online_vcpus=wire.online_vcpus,
        min_vcpus=wire.machine.min_vcpus,
        max_vcpus=wire.machine.max_vcpus,
        selector=wire.selector,
        machine_uuid=wire.machine.uuid,
        unplug_started_at=None if started is None else _utc(started, "status.unplug.startedAt"),
        pending_unplugs=tuple(
            Request(
                slot=request.slot,
                path=request.path,
                thread_id=request.thread_id,
                requested_at=_utc(request.requested_at, "status.unplug.requests.requestedAt"),
                attempts=request.attempts,
                answer=request.answer,
            )
            for request in wire.unplug.requests
        ),
        conditions=tuple(
            Condition(
                type=condition.type,
                status=condition.status,
                reason=condition.reason,
                message=condition.message,
                last_transition_time=_utc(condition.last_transition_time, "status.conditions.lastTransitionTime"),
                observed_generation=condition.observed_generation,
            )
            for condition in wire.conditions
        ),
    )


def _unless_empty(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a merge patch; None, which removes the object that holds them, if none has a value."""
    return fields if any(value is not None for value in fields.values()) else None


def _encode_request(request: Request) -> dict[str, Any]:
    encoded: dict[str, Any] = {
        "slot": request.slot,
        "path": request.path,
        "threadID": request.thread_id,
        "requestedAt": _microseconds(request.requested_at),
        "attempts": request.attempts,
    }
    if request.answer is not None:
        encoded["answer"] = request.answer.value
    return encoded


def _encode_condition(condition: Condition) -> dict[str, Any]:
    return {
        "type": condition.type,
        "status": condition.status,
        "reason": condition.reason,
        "message": condition.message,
        "lastTransitionTime": _rfc3339(condition.last_transition_time, "seconds"),
        "observedGeneration": condition.observed_generation,
    }


def _microseconds(time: datetime) -> str:
    return _rfc3339(time, "microseconds")


def _rfc3339(time: datetime, timespec: str) -> str:
    return time.astimezone(UTC).isoformat(timespec=timespec).removesuffix("+00:00") + "Z"
