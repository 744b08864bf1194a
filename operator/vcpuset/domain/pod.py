"""The pod of a VM: how its CPU follows the count.

The size is derived from the larger of the present and the target count at each pass. So it is raised before a plug and
lowered after an unplug, and a crash between the steps needs no repair. vCPUs are only plugged for a size that the
kubelet has confirmed (https://kubernetes.io/docs/tasks/configure-pod-container/resize-container-resources/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import VMPod

__all__ = [
    "Attempt",
    "Container",
    "Pod",
    "PodFindings",
    "Resize",
    "cores",
    "decide",
    "refused",
    "shared",
    "the_pod",
]

WAIT_INTERVAL = timedelta(seconds=0.5)
"""How often the pod is read until the kubelet has confirmed a size: 50 ms, up to a second on a busy node."""

PENDING_INTERVAL = timedelta(seconds=5)
"""The same while the node has no room."""

_MOST_NAMES = 5

_INFEASIBLE = "Infeasible"
"""The reason of PodResizePending if the node can never give the size."""


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a pod; CPU in millicores, None where there is none.

    request, limit    `spec.containers[].resources`: the desired size
    actual            `status.containerStatuses[].resources`: the limit that is in force, or the request without a limit
    restarts          its `resizePolicy` for CPU is RestartContainer, which would end the machine
    """

    name: str
    request: int | None = None
    limit: int | None = None
    actual: int | None = None
    restarts: bool = False

    @property
    def size(self) -> int | None:
        """The desired limit, or the request without a limit."""
        return self.request if self.limit is None else self.limit


@dataclass(frozen=True, slots=True)
class Pod:
    """A running pod.

    seen     the kubelet's status is about the present spec (`status.observedGeneration`)
    pending  reason and message of the condition PodResizePending; None: it is not True
    error    message of the condition PodResizeInProgress with the reason Error; None: there is none
    busy     PodResizeInProgress is True
    """

    uid: str
    name: str
    containers: tuple[Container, ...] = ()
    seen: bool = True
    pending: tuple[str, str] | None = None
    error: str | None = None
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Resize:
    """A new size of a pod's container, in millicores; None: there is none, and none is set."""

    pod: Pod
    container: str
    request: int | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """A larger size that was requested, and what became of it.

    size      in millicores
    since     when this process first waited for it
    failure   why it was taken back; None: it is being waited for
    again     when it is requested again after a failure
    reported  why the node did not give it before; reported until the kubelet has answered
    """

    pod: str
    size: int
    since: datetime
    failure: tuple[Reason, str] | None = None
    again: datetime | None = None
    reported: tuple[Reason, str] | None = None


@dataclass(frozen=True, slots=True)
class PodFindings:
    """What the pod means for a pass.

    sufficient_for  the most vCPUs that may be plugged; None: any number
    trouble         reason and message, if there is something to report
    due             when the pod is to be read again; None: at the next pass
    vcpus           the count of which this was derived; None: the pod's size does not depend on it
    """

    sufficient_for: int | None = None
    trouble: tuple[Reason, str] | None = None
    due: datetime | None = None
    vcpus: int | None = None


def the_pod(spec: VMPod, pods: Sequence[Pod]) -> Pod | PodFindings:
    """The one running pod that matches, or what is wrong."""
    if len(pods) == 1:
        return pods[0]
    if not pods:
        why = (
            f"no running pod in this namespace has the labels {spec.selector} (spec.pod.selector): start it, or "
            "correct the selector"
        )
        return PodFindings(0, (Reason.POD_NOT_FOUND, why))
    names = ", ".join(sorted(pod.name for pod in pods)[:_MOST_NAMES])
    more = f" and {len(pods) - _MOST_NAMES} more" if len(pods) > _MOST_NAMES else ""
    why = (
        f"{len(pods)} running pods have the labels {spec.selector} (spec.pod.selector): {names}{more}. Delete all but "
        "one, or give the pod of this machine a label of its own"
    )
    return PodFindings(0, (Reason.POD_AMBIGUOUS, why))


def shared(pod: Pod, holder: str) -> PodFindings:
    """An older set resizes the same container of this pod."""
    why = (
        f"the VCPUSet {holder} is older and names the pod {pod.name} too (spec.pod): delete one of the two, or correct "
        "the selector"
    )
    return PodFindings(0, (Reason.POD_AMBIGUOUS, why))


def decide(
    spec: VMPod, pod: Pod, *, present: int, target: int, attempt: Attempt | None, now: datetime
) -> tuple[Resize | None, Attempt | None, PodFindings]:
    """The resize to request now, what to remember, and what the pod means for this pass.

    After a request, decide again with the pod that the API server returned.
    """
    assert spec.cpu is not None
    container = _container(spec, pod)
    if isinstance(container, str):
        return None, None, PodFindings(present, (Reason.POD_RESIZE_REFUSED, container))
    enough, wanted = spec.cpu.needed(present), spec.cpu.needed(max(present, target))
    if attempt is None or (attempt.pod, attempt.size) != (pod.uid, wanted):
        attempt = Attempt(pod.uid, wanted, now)
    if attempt.again is not None and now >= attempt.again:
        failed = attempt.failure
        reported = None if failed is None or failed[0] is Reason.POD_RESIZE_REFUSED else failed
        attempt = Attempt(pod.uid, wanted, now, reported=reported)
    if attempt.failure is None and wanted > enough and container.size == wanted:
        attempt = _judged(spec, pod, container, attempt, now)
    size = wanted if attempt.failure is None else enough
    if container.size != size:
        return _resize(pod, container, size), attempt, PodFindings(present)
    if attempt.failure is not None:
        return None, attempt, PodFindings(present, attempt.failure, attempt.again)
    # Without anything that waits for the kubelet there is no attempt: the time of a later one starts then.
    if _confirmed(pod, container, size):
        return None, None, PodFindings(spec.cpu.sufficient_for(container.actual or 0))
    delayed = _delayed(pod, container, size)
    if wanted == enough:
        if delayed is None or (container.actual or 0) >= size:
            return None, None, PodFindings(present)
        never = pod.pending is not None and pod.pending[0] == _INFEASIBLE
        return (
            None,
            None,
            PodFindings(present, (Reason.POD_RESIZE_INFEASIBLE if never else Reason.POD_RESIZE_DEFERRED, delayed)),
        )
    if delayed is None:
        why = f"the CPU of the pod {pod.name} is being raised to {cores(size)}"
        trouble, interval = attempt.reported or (Reason.PLUGGING, why), WAIT_INTERVAL
    else:
        trouble, interval = (Reason.POD_RESIZE_DEFERRED, delayed), PENDING_INTERVAL
        if attempt.reported is not None and attempt.reported[0] is Reason.POD_RESIZE_DEFERRED:
            trouble = attempt.reported
    deadline = attempt.since + timedelta(seconds=spec.timeout_seconds)
    return None, attempt, PodFindings(present, trouble, min(now + interval, deadline))


def refused(spec: VMPod, attempt: Attempt, words: str, now: datetime) -> tuple[Attempt, PodFindings]:
    """The API server refused a resize, with these words."""
    failure = (Reason.POD_RESIZE_REFUSED, words)
    again = attempt.again or now + timedelta(seconds=spec.timeout_seconds)
    return replace(attempt, failure=failure, again=again), PodFindings(0, failure, again)


def _container(spec: VMPod, pod: Pod) -> Container | str:
    """The container of QEMU, or why its CPU cannot follow the count."""
    found = next((each for each in pod.containers if each.name == spec.container), None)
    if found is None:
        names = ", ".join(each.name for each in pod.containers)
        return f"the pod {pod.name} has no container {spec.container} (spec.pod.container), it has {names}"
    where = f"the container {found.name} of the pod {pod.name}"
    if found.restarts:
        return (
            f"{where} has the resizePolicy RestartContainer for cpu, so a resize would end the machine: recreate the "
            "pod with NotRequired, or remove spec.pod.cpu"
        )
    if found.size is None:
        return (
            f"{where} has neither a request nor a limit for cpu, and Kubernetes cannot add one to a running pod: "
            "recreate it with one, or remove spec.pod.cpu"
        )
    return found


def _judged(spec: VMPod, pod: Pod, container: Container, attempt: Attempt, now: datetime) -> Attempt:
    """The attempt, with its failure if it has failed now.

    A size that the node has no room for counts for the scheduler and for quotas, so it must not be left.
    """
    if _confirmed(pod, container, attempt.size):
        return attempt
    timeout = timedelta(seconds=spec.timeout_seconds)
    if pod.seen and pod.pending is not None and pod.pending[0] == _INFEASIBLE:
        why = f"the node of the pod {pod.name} can never give it {cores(attempt.size)} CPUs: {pod.pending[1]}"
        failure = (
            Reason.POD_RESIZE_INFEASIBLE,
            f"{why}. Declare fewer vCPUs, or move the machine to a larger node; {_again(timeout)}",
        )
    elif now >= attempt.since + timeout:
        why = _delayed(pod, container, attempt.size) or f"the kubelet has not resized the pod {pod.name}"
        failure = (Reason.POD_RESIZE_DEFERRED, f"{why} within {timeout.total_seconds():g} s; {_again(timeout)}")
    else:
        return attempt
    return replace(attempt, failure=failure, again=now + timeout)


def _again(timeout: timedelta) -> str:
    return f"the request is taken back, and repeated after {timeout.total_seconds():g} s"


def _delayed(pod: Pod, container: Container, size: int) -> str | None:
    """Why a size is not in force yet, in the kubelet's words; None: it has said nothing."""
    what = f"the pod {pod.name} does not get {cores(size)} CPUs"
    if pod.seen and pod.pending is not None:
        return f"{what} yet: {pod.pending[1]}"
    if pod.seen and pod.error is not None:
        return f"{what}: {pod.error}"
    return None


def _confirmed(pod: Pod, container: Container, size: int) -> bool:
    settled = pod.seen and pod.pending is None and not pod.busy
    return settled and container.actual is not None and container.actual >= size


def _resize(pod: Pod, container: Container, size: int) -> Resize:
    """Request and limit keep their relation, so the pod keeps its QoS class."""
    request, limit = container.request, container.limit
    if limit is None:
        return Resize(pod, container.name, size, None)
    if request is None or request == limit:
        return Resize(pod, container.name, None if request is None else size, size)
    scaled = max(1, min(size - 1, round(size * request / limit)))
    return Resize(pod, container.name, scaled, size)


def cores(millicores: int) -> str:
    """As a Kubernetes quantity: "2", "2500m"."""
    whole, rest = divmod(millicores, 1000)
    return f"{millicores}m" if rest else str(whole)
