"""The pods of VMs, as the API server has them: read at each pass that needs one, and resized in place.

They are not watched: a pass confirms a size by reading it, and a socket that appears or goes triggers a pass sooner
than a watch would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

import msgspec

from vcpuset.domain.errors import APIError, Forbidden, NoAnswer, NotLeading, Rejected
from vcpuset.domain.findings import Findings
from vcpuset.domain.machine import Activity
from vcpuset.domain.pod import Attempt, Container, Pod, PodFindings, Resize, cores, decide, refused, shared, the_pod
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import UID, VCPUSet, VMPod
from vcpuset.kube.quantity import millicores

__all__ = ["ROLE", "Pods", "decode_pod", "encode_resize"]

ROLE: Final = "vcpuset-pods"
"""The ClusterRole that is shipped for this, without a binding."""


class _Metadata(msgspec.Struct, rename="camel"):
    name: str
    uid: str
    generation: int = 0
    deletion_timestamp: str | None = None


class _Resources(msgspec.Struct):
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}


class _ResizePolicy(msgspec.Struct, rename="camel"):
    resource_name: str
    restart_policy: str


class _Container(msgspec.Struct, rename="camel"):
    name: str
    resources: _Resources = msgspec.field(default_factory=_Resources)
    resize_policy: list[_ResizePolicy] = []


class _ContainerStatus(msgspec.Struct):
    name: str
    resources: _Resources | None = None


class _Condition(msgspec.Struct):
    type: str
    status: str
    reason: str = ""
    message: str = ""


class _Spec(msgspec.Struct):
    containers: list[_Container]


class _Status(msgspec.Struct, rename="camel"):
    phase: str = ""
    observed_generation: int | None = None
    conditions: list[_Condition] = []
    container_statuses: list[_ContainerStatus] = []


class _Pod(msgspec.Struct):
    metadata: _Metadata
    spec: _Spec
    status: _Status = msgspec.field(default_factory=_Status)


class _Cluster(Protocol):
    """The needed part of `Cluster`."""

    async def list_pods(self, namespace: str, selector: str) -> list[Mapping[str, Any]]:
        """The pods with these labels."""

    async def resize_pod(self, namespace: str, name: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Apply a strategic merge patch to `pods/resize`; returns the pod."""


class Pods:
    """What the pods of the sets allow, and their resizes. Times are from `now` of the findings."""

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster = cluster
        self._attempts: dict[UID, Attempt] = {}
        self._holders: dict[tuple[str, str | None], VCPUSet] = {}
        """By the pod's uid and the container's name: the oldest set that has named the container."""
        self._held: dict[UID, tuple[str, str | None]] = {}
        self._silence: str | None = None
        """Why the last read had no answer; None: it had one."""
        self._reading = False

    def forget(self, uid: UID) -> None:
        """The set has no pod, or is gone."""
        self._attempts.pop(uid, None)
        self._hold(uid, None)

    async def follow(self, vcpuset: VCPUSet, findings: Findings) -> PodFindings | None:
        """Bring the pod's CPU to what the machine needs, and say what it allows; None: the set names no pod.

        Raises NotLeading, and no other APIError, because vCPUs can be unplugged without the pod.
        """
        spec, machine = vcpuset.spec.pod, findings.machine
        if spec is None:
            self.forget(vcpuset.uid)
            return None
        try:
            meaning = await self._follow(vcpuset, spec, findings)
        except NotLeading:
            raise
        except Forbidden as error:
            why = f"pods may not be listed{_remedy(vcpuset.namespace)} ({error})"
            meaning = PodFindings(0, (Reason.POD_NOT_FOUND, why))
        except APIError as error:
            why = f"the pod could not be read or resized: {error}"
            meaning = PodFindings(machine.vcpus, (Reason.PLUGGING, why))
        if spec.cpu is None:
            # The pod is for autoscalers only, and does not limit the machine.
            return replace(meaning, sufficient_for=None)
        return replace(meaning, vcpus=machine.vcpus)

    async def _follow(self, vcpuset: VCPUSet, spec: VMPod, findings: Findings) -> PodFindings:
        machine = findings.machine
        found = the_pod(spec, await self._read(vcpuset.namespace, spec.selector))
        if isinstance(found, PodFindings):
            self._hold(vcpuset.uid, None)
            return found
        if spec.cpu is None:
            return PodFindings()
        if (holder := self._holder(vcpuset, (found.uid, spec.container))) is not vcpuset:
            return shared(found, str(holder))
        if vcpuset.spec.suspend or machine.activity is not Activity.CHANGEABLE:
            return PodFindings(machine.vcpus)
        while True:
            resize, attempt, meaning = decide(
                spec,
                found,
                present=machine.vcpus,
                target=findings.target.count,
                attempt=self._attempts.pop(vcpuset.uid, None),
                now=findings.now,
            )
            if attempt is None:
                return meaning
            self._attempts[vcpuset.uid] = attempt
            if resize is None:
                return meaning
            try:
                found = await self._resize(vcpuset.namespace, resize)
            except Rejected as error:
                words = _refusal(vcpuset.namespace, resize, error)
                self._attempts[vcpuset.uid], meaning = refused(spec, attempt, words, findings.now)
                return meaning
            except APIError:
                if attempt.failure is None:
                    # Its time starts when the API server has accepted it.
                    del self._attempts[vcpuset.uid]
                raise

    def _holder(self, vcpuset: VCPUSet, container: tuple[str, str | None]) -> VCPUSet:
        """The oldest of the sets that name a container."""
        holder = self._holders.get(container, vcpuset)
        if holder.seniority < vcpuset.seniority:
            self._hold(vcpuset.uid, None)
            return holder
        self._hold(vcpuset.uid, container)
        self._holders[container] = vcpuset
        return vcpuset

    def _hold(self, uid: UID, container: tuple[str, str | None] | None) -> None:
        held = self._held.pop(uid, None)
        if held is not None and held in self._holders and self._holders[held].uid == uid:
            del self._holders[held]
        if container is not None:
            self._held[uid] = container

    async def _read(self, namespace: str, selector: str) -> list[Pod]:
        if self._silence is not None and self._reading:
            # One pass waits for an API server that does not answer. The others would keep workers from other sets.
            raise NoAnswer(self._silence)
        self._reading = True
        try:
            bodies = await self._cluster.list_pods(namespace, selector)
        except NoAnswer as error:
            self._silence = str(error)
            raise
        finally:
            self._reading = False
        self._silence = None
        return [pod for body in bodies if (pod := decode_pod(body)) is not None]

    async def _resize(self, namespace: str, resize: Resize) -> Pod:
        answer = await self._cluster.resize_pod(namespace, resize.pod.name, encode_resize(resize))
        if (pod := decode_pod(answer)) is None:
            raise APIError(f"the pod {resize.pod.name} has ended")
        return pod


def decode_pod(body: Mapping[str, Any]) -> Pod | None:
    """A pod as a value; None: it does not run, or is being deleted. APIError: it is no pod."""
    try:
        wire = msgspec.convert(body, _Pod)
    except msgspec.ValidationError as error:
        raise APIError(f"a pod cannot be read: {error}") from error
    if wire.status.phase != "Running" or wire.metadata.deletion_timestamp is not None:
        return None
    conditions = {each.type: each for each in wire.status.conditions if each.status == "True"}
    pending, progress = conditions.get("PodResizePending"), conditions.get("PodResizeInProgress")
    observed = wire.status.observed_generation
    statuses = {each.name: each.resources for each in wire.status.container_statuses}
    return Pod(
        uid=wire.metadata.uid,
        name=wire.metadata.name,
        containers=tuple(_container(each, statuses.get(each.name)) for each in wire.spec.containers),
        seen=observed is None or observed >= wire.metadata.generation,
        pending=None if pending is None else (pending.reason, pending.message),
        error=progress.message if progress is not None and progress.reason == "Error" else None,
        busy=progress is not None,
    )


def _container(wire: _Container, actual: _Resources | None) -> Container:
    restarts = any(
        each.resource_name == "cpu" and each.restart_policy == "RestartContainer" for each in wire.resize_policy
    )
    request, limit = _cpu(wire.resources)
    used = None if actual is None else _cpu(actual)
    return Container(
        wire.name, request, limit, None if used is None else used[0] if limit is None else used[1], restarts
    )


def _cpu(resources: _Resources) -> tuple[int | None, int | None]:
    """Request and limit, in millicores."""
    return millicores(resources.requests.get("cpu")), millicores(resources.limits.get("cpu"))


def encode_resize(resize: Resize) -> dict[str, Any]:
    """The patch of `pods/resize`; the uid makes it fail with a conflict if another pod has taken the name."""
    resources = {
        kind: {"cpu": cores(value)}
        for kind, value in (("requests", resize.request), ("limits", resize.limit))
        if value is not None
    }
    return {
        "metadata": {"uid": resize.pod.uid},
        "spec": {"containers": [{"name": resize.container, "resources": resources}]},
    }


def _remedy(namespace: str) -> str:
    return (
        f" by this operator: an administrator must bind the ClusterRole {ROLE} to its service account, with a "
        f"RoleBinding in the namespace {namespace}"
    )


def _refusal(namespace: str, resize: Resize, error: Rejected) -> str:
    size = resize.request if resize.limit is None else resize.limit
    words = f"the CPU of the pod {resize.pod.name} cannot be set to {cores(size or 0)}: {error}"
    # Kubernetes' authorizers say it so; a quota or an admission policy is Forbidden too.
    lacks_right = isinstance(error, Forbidden) and "cannot patch resource" in str(error)
    return f"{words}. It may not be resized{_remedy(namespace)}" if lacks_right else words
