"""VCPUSet objects as the API server sends them, and their status as it is written.

Reading is tolerant: the API server has validated its objects, by the definition of this version, an older or a newer
one. Unknown fields are skipped, and fields with a default may be missing. Unreadable parts of a status are treated as
absent. A spec with a value that this version does not know is `Unsupported` as a whole, so that a set for a newer
version is left alone instead of half applied. Only an object without usable metadata is an error.

Writing gives the whole status as a JSON merge patch (RFC 7386): a field without a value is null there, which removes
it. Conditions of other owners keep their content and position. A written status is read back as the same value, so
comparing two `Status` shows whether a write is due; the one exception is deliberate: `lastTransitionTime` has whole
seconds, as everywhere in Kubernetes.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import msgspec

from vcpuset.domain.errors import VCPUSetError
from vcpuset.domain.machine import Answer
from vcpuset.domain.resource import (
    CONDITION_TYPES,
    TLS,
    UID,
    BootVCPUs,
    Condition,
    Connection,
    GuestAgent,
    Monitor,
    PodCPU,
    Request,
    Spec,
    Status,
    TCPMonitor,
    UnixMonitor,
    Unplug,
    UnplugPolicy,
    Unsupported,
    VCPUSet,
    VMPod,
)
from vcpuset.kube.quantity import millicores

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "PLURAL",
    "VERSION",
    "InvalidObject",
    "decode",
    "describe",
    "encode_conditions",
    "encode_status",
]

GROUP: Final = "vcpuset.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "VCPUSet"
PLURAL: Final = "vcpusets"

_T = TypeVar("_T")

_Time = Annotated[datetime, msgspec.Meta(tz=True)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_Seconds = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
"""Larger values would overflow a datetime."""

_UNPLUG: Final = Unplug()

_LATEST: Final = datetime(2999, 12, 31, tzinfo=UTC)
"""Instead of an unreadable time. A time in the future counts as now."""


class InvalidObject(VCPUSetError):
    """An object without usable metadata; the message names the object and the field."""


class _Metadata(msgspec.Struct, rename="camel"):
    uid: str
    namespace: str
    name: str
    resource_version: str
    creation_timestamp: str
    generation: int
    deletion_timestamp: str | None = None


class _Unix(msgspec.Struct):
    path: str


class _TLS(msgspec.Struct, rename="camel"):
    secret_name: str
    server_name: str | None = None


class _TCP(msgspec.Struct):
    host: str
    port: _Port
    tls: _TLS | None = None
    insecure: bool = False


class _Monitor(msgspec.Struct):
    unix: _Unix | None = None
    tcp: _TCP | None = None
    connection: Connection = Connection.PERSISTENT


class _GuestAgent(msgspec.Struct, rename="camel"):
    unix: _Unix
    bring_online: bool = False


class _Unplug(msgspec.Struct, rename="camel"):
    policy: UnplugPolicy = UnplugPolicy.ENABLED
    boot_vcpus: BootVCPUs = msgspec.field(default=BootVCPUs.UNPLUG, name="bootVCPUs")
    timeout_seconds: _Seconds = _UNPLUG.timeout_seconds
    retry_seconds: _Seconds = _UNPLUG.retry_seconds


class _Selector(msgspec.Struct, rename="camel"):
    match_labels: dict[str, str]


class _PodCPU(msgspec.Struct):
    per_vcpu: str | int = msgspec.field(name="perVCPU")
    overhead: str | int = 0


class _Pod(msgspec.Struct, rename="camel"):
    selector: _Selector
    container: str | None = None
    cpu: _PodCPU | None = None
    timeout_seconds: _Seconds = 60


class _Spec(msgspec.Struct):
    monitor: _Monitor
    vcpus: _Count | None = None
    min_vcpus: _Count = msgspec.field(default=1, name="minVCPUs")
    max_vcpus: _Count = msgspec.field(default=4096, name="maxVCPUs")
    guest_agent: _GuestAgent | None = msgspec.field(default=None, name="guestAgent")
    unplug: _Unplug = msgspec.field(default_factory=_Unplug)
    suspend: bool = False
    pod: _Pod | None = None


class _Request(msgspec.Struct, rename="camel"):
    slot: int
    path: str
    thread_id: int = msgspec.field(name="threadID")
    attempts: int = 1


class _Condition(msgspec.Struct, rename="camel"):
    type: str
    status: str
    reason: str
    message: str
    observed_generation: int = -1


def decode(body: Mapping[str, Any]) -> VCPUSet:
    """The object as a value.

    Raises:
        InvalidObject: the metadata is missing or cannot be used.
    """
    try:
        metadata = msgspec.convert(body.get("metadata"), _Metadata)
        created_at = _created_at(metadata.creation_timestamp)
    except ValueError as error:  # a `msgspec.ValidationError` is one
        raise InvalidObject(
            f"VCPUSet {describe(body)} cannot be read by this version of the operator, "
            f"which leaves its machine alone: {_words(error, 'metadata')}"
        ) from error
    return VCPUSet(
        uid=UID(metadata.uid),
        namespace=metadata.namespace,
        name=metadata.name,
        generation=metadata.generation,
        resource_version=metadata.resource_version,
        created_at=created_at,
        spec=_spec(body.get("spec")),
        status=_status(body.get("status")),
        deleting=metadata.deletion_timestamp is not None,
        node_name=_read(_fields(body.get("spec")).get("nodeName"), str),
    )


def describe(body: Mapping[str, Any]) -> str:
    """`namespace/name` of an object that may not be a VCPUSet."""
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
                # A merge patch replaces whole lists. Nulls in them would be stored, so there are none.
                "requests": [_encode_request(request) for request in status.pending_unplugs] or None,
            }
        ),
        "conditions": encode_conditions(status) or None,
    }


def _words(error: Exception, where: str) -> str:
    """The field and its error. msgspec says "… - at `$.monitor.tcp.port`", without the name of the whole."""
    words, _, path = str(error).partition(" - at `$")
    return f"{where}{path.removesuffix('`')}: {words}"


def _created_at(stamp: str) -> datetime:
    if (time := _time(stamp)) is None:
        raise ValueError(f"{stamp} is not a usable time - at `$.creationTimestamp`")
    return time


def _spec(raw: object) -> Spec:
    try:
        wire = msgspec.convert(raw, _Spec)
        monitor, pod = _monitor(wire.monitor), _pod(wire.pod)
    except ValueError as error:
        message = (
            f"{_words(error, 'spec')}. This version of the operator does not support it and leaves the machine alone: "
            "upgrade the operator, or correct the field."
        )
        return Spec(vcpus=_read(_fields(raw).get("vcpus"), int), monitor=Unsupported(message))
    agent = wire.guest_agent
    return Spec(
        vcpus=wire.vcpus,
        monitor=monitor,
        connection=wire.monitor.connection,
        guest_agent=None if agent is None else GuestAgent(agent.unix.path, agent.bring_online),
        unplug=Unplug(
            policy=wire.unplug.policy,
            boot_vcpus=wire.unplug.boot_vcpus,
            timeout_seconds=wire.unplug.timeout_seconds,
            retry_seconds=wire.unplug.retry_seconds,
        ),
        suspend=wire.suspend,
        pod=pod,
        min_vcpus=wire.min_vcpus,
        max_vcpus=wire.max_vcpus,
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
            # The schema requires this too. Never use plain text with a monitor whose author has not agreed to it.
            raise ValueError("Expected exactly one of `tls` and `insecure: true` - at `$.monitor.tcp`")
        case _:
            raise ValueError("Expected exactly one of `unix` and `tcp` - at `$.monitor`")


def _pod(wire: _Pod | None) -> VMPod | None:
    if wire is None:
        return None
    selector = ",".join(f"{name}={value}" for name, value in sorted(wire.selector.match_labels.items()))
    if not selector:
        # It would be all pods.
        raise ValueError("Expected at least one label - at `$.pod.selector.matchLabels`")
    cpu = None
    if wire.cpu is not None:
        if wire.container is None:
            raise ValueError("Expected the container of QEMU, because of `cpu` - at `$.pod.container`")
        cpu = PodCPU(_quantity(wire.cpu.per_vcpu, "perVCPU"), _quantity(wire.cpu.overhead, "overhead"))
        if cpu.per_vcpu < 1:
            raise ValueError("Expected at least 1m - at `$.pod.cpu.perVCPU`")
    return VMPod(selector, wire.container, cpu, wire.timeout_seconds)


def _quantity(raw: str | int, field: str) -> int:
    if (value := millicores(raw)) is None:
        raise ValueError(f"{raw!r} is no CPU quantity, such as 500m or 2 - at `$.pod.cpu.{field}`")
    return value


def _status(raw: object) -> Status:
    """The readable parts of a status."""
    status = _fields(raw)
    machine, unplug = _fields(status.get("machine")), _fields(status.get("unplug"))
    generation = _read(status.get("observedGeneration"), int)
    conditions: list[Condition | None] = []
    foreign: list[tuple[int, Mapping[str, Any]]] = []
    for place, entry in enumerate(_entries(status.get("conditions"))):
        if entry.get("type") in CONDITION_TYPES:
            conditions.append(_condition(entry))
        else:
            foreign.append((place, entry))
    requests = [_request(entry) for entry in _entries(unplug.get("requests"))]
    return Status(
        observed_generation=-1 if generation is None else generation,
        vcpus=_read(status.get("vcpus"), int),
        online_vcpus=_read(status.get("onlineVCPUs"), int),
        min_vcpus=_read(machine.get("minVCPUs"), int),
        max_vcpus=_read(machine.get("maxVCPUs"), int),
        selector=_read(status.get("selector"), str),
        machine_uuid=_read(machine.get("uuid"), str),
        unplug_started_at=_time(unplug.get("startedAt")),
        pending_unplugs=tuple(request for request in requests if request is not None),
        conditions=tuple(condition for condition in conditions if condition is not None),
        foreign_conditions=tuple(foreign),
    )


def _request(raw: Mapping[str, Any]) -> Request | None:
    """A request; None: its CPU is unknown. One with an unreadable answer or time is in flight."""
    wire = _read(raw, _Request)
    if wire is None:
        return None
    return Request(
        slot=wire.slot,
        path=wire.path,
        thread_id=wire.thread_id,
        requested_at=_time(raw.get("requestedAt")) or _LATEST,
        attempts=wire.attempts,
        answer=_read(raw.get("answer"), Answer),
    )


def _condition(raw: Mapping[str, Any]) -> Condition | None:
    wire, moved = _read(raw, _Condition), _time(raw.get("lastTransitionTime"))
    if wire is None or moved is None:
        return None
    return Condition(
        type=wire.type,
        status=wire.status,
        reason=wire.reason,
        message=wire.message,
        last_transition_time=moved,
        observed_generation=wire.observed_generation,
    )


def _read(raw: object, kind: type[_T]) -> _T | None:
    """The value; None: it is missing, or not of this kind."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError:
        return None


def _time(raw: object) -> datetime | None:
    """A time in UTC, within the years of the schema: Python's calendar ends before the API server's."""
    try:
        time: datetime = msgspec.convert(raw, _Time)
    except msgspec.ValidationError:
        return None
    return time.astimezone(UTC) if 1000 <= time.year < 3000 else None


def _fields(raw: object) -> Mapping[str, Any]:
    return raw if isinstance(raw, Mapping) else {}


def _entries(raw: object) -> list[Mapping[str, Any]]:
    return [_fields(entry) for entry in raw] if isinstance(raw, list) else []


def _unless_empty(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a merge patch; None, which removes their object, if none has a value."""
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


def encode_conditions(status: Status) -> list[dict[str, Any]]:
    """All conditions of a status, those of other owners in their places. A merge patch replaces whole lists."""
    encoded = [_encode_condition(condition) for condition in status.conditions]
    for place, condition in status.foreign_conditions:
        encoded.insert(place, dict(condition))
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
