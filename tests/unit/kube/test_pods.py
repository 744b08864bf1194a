"""The pods of sets, between the API server's words and what a pass may do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from unit.domain.builders import NOW, a_machine, a_set, a_spec
from vcpuset.domain.errors import APIError, Conflict, Forbidden, NotLeading, ObjectGone, Unavailable
from vcpuset.domain.findings import Findings
from vcpuset.domain.pod import Container, Pod, PodFindings, Resize
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import PodCPU, VMPod
from vcpuset.kube.pods import Pods, decode_pod, encode_resize

POD = VMPod("vm=web", "qemu", PodCPU(1000))


def body(**changes: Any) -> dict[str, Any]:
    """A running pod of two CPUs, as the API server sends it."""
    resources = {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "2", "memory": "1Gi"}}
    return {
        "metadata": {"name": "web", "uid": "1", "generation": 3},
        "spec": {"containers": [{"name": "qemu", "resources": resources}]},
        "status": {
            "phase": "Running",
            "observedGeneration": 3,
            "containerStatuses": [{"name": "qemu", "resources": resources}],
            **changes,
        },
    }


def condition(kind: str, reason: str = "", *, status: str = "True") -> dict[str, Any]:
    """A condition of a pod."""
    return {"type": kind, "status": status, "reason": reason, "message": "words"}


def test_a_running_pod_is_read() -> None:
    assert decode_pod(body()) == Pod("1", "web", (Container("qemu", 2000, 2000, 2000),))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"observedGeneration": 2}, {"seen": False}),
        ({"observedGeneration": None}, {"seen": True}),
        ({"conditions": [condition("PodResizePending", "Deferred")]}, {"pending": ("Deferred", "words")}),
        ({"conditions": [condition("PodResizePending", "Deferred", status="False")]}, {"pending": None}),
        ({"conditions": [condition("PodResizeInProgress")]}, {"busy": True, "error": None}),
        ({"conditions": [condition("PodResizeInProgress", "Error")]}, {"busy": True, "error": "words"}),
    ],
)
def test_what_the_kubelet_says_of_a_resize_is_read(changes: dict[str, Any], expected: dict[str, object]) -> None:
    pod = decode_pod(body(**changes))
    assert {name: getattr(pod, name) for name in expected} == expected


@pytest.mark.parametrize("phase", ["Pending", "Succeeded", "Failed", "Unknown"])
def test_a_pod_that_does_not_run_is_none(phase: str) -> None:
    assert decode_pod(body(phase=phase)) is None


def test_a_pod_that_is_being_deleted_is_none() -> None:
    going = body()
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert decode_pod(going) is None


def test_what_is_no_pod_is_an_error_that_names_the_field() -> None:
    with pytest.raises(APIError, match=r"a pod cannot be read: .* `containers`"):
        decode_pod({"spec": {}})


def test_a_container_without_resources_in_its_status_has_none_in_force() -> None:
    pod = decode_pod(body(containerStatuses=[]))
    assert pod is not None
    assert pod.containers[0].actual is None


def test_the_patch_names_the_container_and_the_pods_uid() -> None:
    assert encode_resize(Resize(Pod("1", "web"), "qemu", 500, 2500)) == {
        "metadata": {"uid": "1"},
        "spec": {
            "containers": [{"name": "qemu", "resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "2500m"}}}]
        },
    }


class ApiServer:
    """Answers, or fails, as a test says."""

    def __init__(self, *, read: APIError | None = None, resize: APIError | None = None) -> None:
        self.read, self.resize = read, resize
        self.patches: list[Mapping[str, Any]] = []

    async def list_pods(self, namespace: str, selector: str) -> list[Mapping[str, Any]]:
        """See `Cluster`."""
        del namespace, selector
        if self.read is not None:
            raise self.read
        return [body()]

    async def resize_pod(self, namespace: str, name: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Cluster`."""
        del namespace, name
        self.patches.append(patch)
        if self.resize is not None:
            raise self.resize
        raise AssertionError("every test here has it fail")


async def follow(server: ApiServer, *, vcpus: int = 4) -> PodFindings | None:
    """One pass over a machine of two vCPUs, of which so many are declared."""
    spec = a_spec(vcpus, pod=POD)
    return await Pods(server).follow(a_set(spec), Findings(spec=spec, machine=a_machine(), now=NOW))


@pytest.mark.parametrize("error", [Unavailable("away"), APIError("no answer"), Conflict("another"), ObjectGone("gone")])
@pytest.mark.parametrize("where", ["read", "resize"])
async def test_while_the_pod_cannot_be_read_or_resized_nothing_is_plugged_and_the_cause_is_told(
    where: str, error: APIError
) -> None:
    assert await follow(ApiServer(**{where: error})) == PodFindings(
        2, (Reason.PLUGGING, f"the pod could not be read or resized: {error}")
    )


async def test_a_process_that_leads_no_more_does_not_go_on() -> None:
    with pytest.raises(NotLeading):
        await follow(ApiServer(resize=NotLeading("another replica")))


async def test_a_right_that_lacks_is_told_from_a_quota() -> None:
    words = 'pods "web" is forbidden: User "x" cannot patch resource "pods/resize" in API group "" in the namespace "a"'
    found = await follow(ApiServer(resize=Forbidden(words)))
    assert found is not None
    assert found.trouble is not None
    assert "must bind the ClusterRole vcpuset-pods" in found.trouble[1]
    found = await follow(ApiServer(resize=Forbidden("exceeded quota: compute")))
    assert found is not None
    assert found.trouble is not None
    assert found.trouble[1].endswith("the CPU of the pod web cannot be set to 4: exceeded quota: compute")


async def test_a_size_that_is_right_is_not_requested() -> None:
    server = ApiServer()
    assert await follow(server, vcpus=2) == PodFindings(2)
    assert server.patches == []
