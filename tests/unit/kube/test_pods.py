"""The pods of sets, between the API server's words and what a pass may do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from unit.domain.builders import NOW, a_machine, a_set, a_spec
from vcpuset.domain.errors import APIError, Conflict, Forbidden, NoAnswer, NotLeading, ObjectGone, Unavailable
from vcpuset.domain.findings import Findings
from vcpuset.domain.pod import Container, Pod, PodFindings, Resize
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import UID, PodCPU, VCPUSet, VMPod
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
        self.pods: list[Mapping[str, Any]] = [body()]
        self.patches: list[Mapping[str, Any]] = []
        self.resized: dict[str, Any] = {}
        self.reads = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def list_pods(self, namespace: str, selector: str) -> list[Mapping[str, Any]]:
        """See `Cluster`."""
        del namespace, selector
        self.reads += 1
        await self.answers.wait()
        if self.read is not None:
            raise self.read
        return self.pods

    async def resize_pod(self, namespace: str, name: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Cluster`."""
        del namespace, name
        self.patches.append(patch)
        if self.resize is not None:
            raise self.resize
        return self.resized


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
        2, (Reason.PLUGGING, f"the pod could not be read or resized: {error}"), vcpus=2
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
    assert await follow(server, vcpus=2) == PodFindings(2, vcpus=2)
    assert server.patches == []


async def test_of_sets_that_name_one_container_the_oldest_has_it_and_each_takes_over_from_the_one_before() -> None:
    spec = a_spec(2, pod=POD)
    server = ApiServer()
    pods, findings = Pods(server), Findings(spec=spec, machine=a_machine(), now=NOW)
    oldest, middle, youngest = (replace(a_set(spec), uid=UID(uid), name=uid) for uid in "abc")

    async def has_it(vcpuset: VCPUSet) -> bool:
        found = await pods.follow(vcpuset, findings)
        assert found is not None
        assert found == PodFindings(2, vcpus=2) or (
            found.trouble is not None and found.trouble[0] is Reason.POD_AMBIGUOUS
        )
        return found.trouble is None

    assert [await has_it(each) for each in (youngest, middle, oldest, middle, youngest)] == [
        *(True, True, True),
        *(False, False),
    ]
    pods.forget(middle.uid)
    assert not await has_it(youngest)
    pods.forget(oldest.uid)
    assert [await has_it(each) for each in (youngest, middle, youngest)] == [True, True, False]
    # One whose selector no longer matches the pod does not keep it from the others.
    server.pods = []
    await pods.follow(middle, findings)
    server.pods = [body()]
    assert await has_it(youngest)
    # Another container of the same pod is another one's.
    other = replace(spec, pod=VMPod("vm=web", "other", PodCPU(1000)))
    found = await pods.follow(replace(youngest, spec=other), findings)
    assert found is not None
    assert found.trouble is not None
    assert "has no container other" in found.trouble[1]
    assert await has_it(middle)
    await pods.follow(replace(middle, spec=replace(spec, pod=None)), findings)
    assert await has_it(youngest)


@pytest.mark.parametrize("error", [APIError("no answer"), Forbidden("no")])
async def test_without_cpu_the_pod_does_not_limit_the_machine(error: APIError) -> None:
    spec = a_spec(4, pod=VMPod("vm=web"))
    found = await Pods(ApiServer(read=error)).follow(a_set(spec), Findings(spec=spec, machine=a_machine(), now=NOW))
    assert found is not None
    assert found.sufficient_for is None
    assert found.trouble is not None


async def test_one_pass_at_a_time_waits_for_an_api_server_that_does_not_answer() -> None:
    spec, server, answers = a_spec(2, pod=POD), ApiServer(read=NoAnswer("silent")), asyncio.Event()
    server.answers = answers
    pods, findings = Pods(server), Findings(spec=spec, machine=a_machine(), now=NOW)
    silent = PodFindings(2, (Reason.PLUGGING, "the pod could not be read or resized: silent"), vcpus=2)
    first, second = (asyncio.create_task(pods.follow(a_set(spec), findings)) for _ in range(2))
    await asyncio.sleep(0)
    assert server.reads == 2, "it is not known yet"
    answers.set()
    assert (await first, await second) == (silent, silent)
    answers.clear()
    one = asyncio.create_task(pods.follow(a_set(spec), findings))
    await asyncio.sleep(0)
    assert await pods.follow(a_set(spec), findings) == silent
    assert server.reads == 3
    server.read = None
    answers.set()
    assert await one == PodFindings(2, vcpus=2)
    assert await pods.follow(a_set(spec), findings) == PodFindings(2, vcpus=2)


async def test_the_timeout_does_not_run_while_the_api_server_takes_no_request() -> None:
    spec, server = a_spec(4, pod=POD), ApiServer(resize=APIError("HTTP 500"))
    pods = Pods(server)
    for hour in range(3):
        now = NOW + timedelta(hours=hour)
        await pods.follow(a_set(spec), Findings(spec=spec, machine=a_machine(), now=now))
    server.resize, server.resized = None, body(observedGeneration=2)
    server.resized["spec"]["containers"][0]["resources"] = {"limits": {"cpu": "4"}, "requests": {"cpu": "4"}}
    found = await pods.follow(a_set(spec), Findings(spec=spec, machine=a_machine(), now=NOW + timedelta(hours=4)))
    assert found is not None
    assert found.trouble == (Reason.PLUGGING, "the CPU of the pod web is being raised to 4")
    assert len(server.patches) == 4
