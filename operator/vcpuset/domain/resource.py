"""A VCPUSet as a value: what the user declared and what the operator last reported."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NewType

from vcpuset.domain.machine import Answer

__all__ = [
    "CONDITION_TYPES",
    "TLS",
    "UID",
    "BootVCPUs",
    "Condition",
    "Connection",
    "GuestAgent",
    "Monitor",
    "PodCPU",
    "Request",
    "Spec",
    "Status",
    "TCPMonitor",
    "UnixMonitor",
    "Unplug",
    "UnplugPolicy",
    "Unsupported",
    "VCPUSet",
    "VMPod",
]

UID = NewType("UID", str)
"""`metadata.uid`: permanently one object, also if another of the same name replaces it."""


class UnplugPolicy(enum.Enum):
    """`spec.unplug.policy`."""

    ENABLED = "Enabled"
    DISABLED = "Disabled"


class Connection(enum.Enum):
    """`spec.monitor.connection`: how long a session with the monitor is kept."""

    ON_DEMAND = "OnDemand"
    PERSISTENT = "Persistent"


class BootVCPUs(enum.Enum):
    """`spec.unplug.bootVCPUs`."""

    UNPLUG = "Unplug"
    KEEP = "Keep"


@dataclass(frozen=True, slots=True)
class UnixMonitor:
    """A monitor on a unix socket; `path` is relative to the namespace's folder below the socket root."""

    path: str


@dataclass(frozen=True, slots=True)
class TLS:
    """`spec.monitor.tcp.tls`.

    secret_name  the Secret with the credentials, in the set's namespace
    server_name  what QEMU's certificate is for; None: the host
    """

    secret_name: str
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class TCPMonitor:
    """A monitor on TCP; without `tls` (`insecure: true`) it is neither encrypted nor authenticated."""

    host: str
    port: int
    tls: TLS | None = None

    @property
    def server_name(self) -> str:
        """What QEMU's certificate is for, if it has one."""
        given = None if self.tls is None else self.tls.server_name
        return given or self.host.rstrip(".")


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Instead of the monitor, for a spec that this version does not support.

    message  the field, what is wrong with it, and the remedy
    """

    message: str


Monitor = UnixMonitor | TCPMonitor | Unsupported


@dataclass(frozen=True, slots=True)
class GuestAgent:
    """`spec.guestAgent`; `path` is relative to the namespace's folder below the socket root.

    bring_online  set CPUs online that the guest left offline
    """

    path: str
    bring_online: bool = False


@dataclass(frozen=True, slots=True)
class Unplug:
    """`spec.unplug`; times in seconds."""

    policy: UnplugPolicy = UnplugPolicy.ENABLED
    boot_vcpus: BootVCPUs = BootVCPUs.UNPLUG
    timeout_seconds: int = 60
    retry_seconds: int = 300


@dataclass(frozen=True, slots=True)
class PodCPU:
    """`spec.pod.cpu`, in millicores (thousandths of a CPU)."""

    per_vcpu: int
    overhead: int = 0

    def needed(self, vcpus: int) -> int:
        """The CPU limit for so many vCPUs."""
        return self.per_vcpu * vcpus + self.overhead

    def sufficient_for(self, millicores: int) -> int:
        """The most vCPUs for this CPU limit."""
        return max(0, millicores - self.overhead) // self.per_vcpu


@dataclass(frozen=True, slots=True)
class VMPod:
    """`spec.pod`: the pod that QEMU runs in.

    selector         its labels, as `name=value,…`
    container        the container of QEMU; None: `cpu` is None too
    cpu              how the container's CPU follows the count; None: it is left alone
    timeout_seconds  how long a larger size may be pending
    """

    selector: str
    container: str | None = None
    cpu: PodCPU | None = None
    timeout_seconds: int = 60


@dataclass(frozen=True, slots=True)
class Spec:
    """`spec`, as far as the operator uses it (the API server checks the limits of `vcpus`).

    vcpus  None: no count stands; or it is not known, in a spec that this version does not support
    """

    vcpus: int | None
    monitor: Monitor
    connection: Connection = Connection.PERSISTENT
    guest_agent: GuestAgent | None = None
    unplug: Unplug = Unplug()
    suspend: bool = False
    pod: VMPod | None = None
    min_vcpus: int = 1
    max_vcpus: int = 4096

    def within_bounds(self, count: int) -> int:
        """The allowed count that is nearest to this one."""
        return min(max(count, self.min_vcpus), self.max_vcpus)


@dataclass(frozen=True, slots=True)
class Request:
    """One unplug request whose CPU is still there: an entry of `status.unplug.requests`.

    requested_at  when it was last sent, UTC; written before `device_del` is sent
    attempts      how often it was sent
    answer        None: none yet
    """

    slot: int
    path: str
    thread_id: int
    requested_at: datetime
    attempts: int = 1
    answer: Answer | None = None

    @property
    def in_flight(self) -> bool:
        """Whether the guest may still carry it out."""
        return self.answer is None or not self.answer.refused


CONDITION_TYPES: Final = ("Ready", "Reconciling", "Stalled", "GuestAgentConnected")
"""The operator's conditions. All others belong to other writers."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A `metav1.Condition`; `status` is "True", "False" or "Unknown"."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_time: datetime
    observed_generation: int


@dataclass(frozen=True, slots=True)
class Status:
    """`status`. The counts are observations; None: never made.

    online_vcpus       those that the guest uses
    machine_uuid       `query-uuid`; None: the machine has none
    unplug_started_at  when the first unplug request of this generation was sent; None: none is open
    conditions         the operator's own, in the order of `CONDITION_TYPES` when this version wrote them
    foreign_conditions those of other writers, as they are stored, each with its position in the list; ignored when
                       statuses are compared
    """

    observed_generation: int = -1
    vcpus: int | None = None
    online_vcpus: int | None = None
    min_vcpus: int | None = None
    max_vcpus: int | None = None
    selector: str | None = None
    machine_uuid: str | None = None
    unplug_started_at: datetime | None = None
    pending_unplugs: tuple[Request, ...] = ()
    conditions: tuple[Condition, ...] = ()
    foreign_conditions: tuple[tuple[int, Mapping[str, Any]], ...] = field(default=(), compare=False)

    def condition(self, kind: str) -> Condition | None:
        """The condition of this type; None before the first report of it."""
        return next((condition for condition in self.conditions if condition.type == kind), None)

    @property
    def ready(self) -> Condition | None:
        """The Ready condition."""
        return self.condition("Ready")

    def reason_for(self, generation: int) -> str | None:
        """The reported reason for this generation; None: there is none."""
        ready = self.ready
        return ready.reason if ready is not None and ready.observed_generation == generation else None


@dataclass(frozen=True, slots=True)
class VCPUSet:
    """One VCPUSet object.

    deleting   it was deleted, and a finalizer keeps the object
    node_name  the node whose agent manages it; None: the central controller does
    """

    uid: UID
    namespace: str
    name: str
    generation: int
    resource_version: str
    created_at: datetime
    spec: Spec
    status: Status = Status()
    deleting: bool = False
    node_name: str | None = None

    @property
    def seniority(self) -> tuple[datetime, str]:
        """Orders the sets that name one monitor: the first keeps it."""
        return (self.created_at, self.uid)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
