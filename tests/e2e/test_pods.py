"""`spec.pod`: the CPU of a VM's pod follows the count, on a real API server; the kubelet's part is played.

A size that the kubelet has not confirmed plugs nothing, whatever becomes of it, and wherever the operator dies.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.faulty import FaultyMonitor, Silent
from harness.operator import OperatorProcess
from harness.vmpod import CONTAINER, VMPod, of_pod
from harness.wait import until
from harness.world import User

WAIT = 90.0
ROLE = REPOSITORY / "deploy" / "base" / "pods.yaml"


@contextlib.asynccontextmanager
async def a_vm(user: User, folder: Path, pod: VMPod, *, timeout: int = 60, **cpu: Any) -> AsyncIterator[FaultyMonitor]:
    """A Ready set of two vCPUs with this pod."""
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as machine:
        await user.create("vm", 2, "vm.sock", pod=of_pod("vm", timeout=timeout, **cpu))
        await user.wait_ready("vm")
        yield machine


async def test_a_pod_grows_before_its_machine_and_shrinks_after_it(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with VMPod(user, "vm", limit="2200m") as pod, a_vm(user, folder, pod, overhead="200m") as machine:
        assert (await user.get("vm")).status["selector"] == "vm=vm"
        await user.change("vm", vcpus=4)
        await pod.wait_size("4200m")
        waiting = await user.wait("vm", lambda seen: "is being raised" in seen.message, "the wait for the kubelet")
        assert waiting.reason == "Plugging"
        assert "the CPU of the pod vm is being raised to 4200m" in waiting.message
        assert not machine.received("device_add"), "plugged before the kubelet has confirmed"
        await pod.obey()
        assert (await user.wait_ready("vm")).vcpus == 4

        machine.cpus.unplug = {2: Silent()}
        await user.change("vm", vcpus=2)
        await until(lambda: machine.cpus.occupied() == [0, 1, 2], WAIT, "slot 3 to be unplugged")
        await user.wait_reason("vm", "UnplugPending")
        await pod.wait_size("3200m")  # slot 2 has not been unplugged
        machine.cpus.eject(2)
        await user.wait_ready("vm")
        await pod.wait_size("2200m")


async def test_a_pod_shrinks_at_once_if_nothing_of_the_monitor_follows(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User
) -> None:
    flags = (f"--namespace={user.namespace}", "--resync-seconds=3600")
    async with (
        VMPod(user, "vm", limit="4") as pod,
        FaultyMonitor(folder / "vm.sock", cpus=4),
        OperatorProcess(control_plane, *flags, socket_root=socket_root),
    ):
        await user.create("vm", 4, "vm.sock", connection="OnDemand", pod=of_pod("vm"))
        await user.wait_ready("vm")
        await user.change("vm", vcpus=2)
        await user.wait_ready("vm")
        await pod.wait_size("2")


async def test_request_and_limit_keep_their_relation_and_a_request_alone_follows(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with VMPod(user, "vm", limit="2", request="500m") as pod, a_vm(user, folder, pod), pod.obeying():
        await user.change("vm", vcpus=6)
        await user.wait_ready("vm")
        assert await pod.resources() == {"limits": "6", "requests": "1500m"}
    await user.delete("vm")
    async with VMPod(user, "vm", limit=None, request="2") as pod, a_vm(user, folder, pod), pod.obeying():
        await user.change("vm", vcpus=3)
        await user.wait_ready("vm")
        assert await pod.resources() == {"requests": "3"}


async def test_a_deferred_size_is_reported_taken_back_and_requested_again(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with VMPod(user, "vm") as pod, a_vm(user, folder, pod, timeout=2) as machine:
        await user.change("vm", vcpus=4)
        await pod.wait_size("4")
        await pod.delay("PodResizePending", "Deferred", "Node didn't have enough resource: cpu, requested: 4000")
        seen = await user.wait_reason("vm", "PodResizeDeferred")
        assert seen.states == ("False", "True", "False")
        assert "Node didn't have enough resource: cpu" in seen.message
        await pod.wait_size("2")
        await user.wait("vm", lambda seen: "is taken back" in seen.message, "the size to be taken back")
        await pod.obey()
        assert not machine.received("device_add")
        await pod.wait_size("4")
        await pod.obey()
        assert (await user.wait_ready("vm")).vcpus == 4


async def test_a_kubelet_that_does_nothing_is_reported_and_the_size_taken_back(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with VMPod(user, "vm") as pod, a_vm(user, folder, pod, timeout=2) as machine:
        await user.change("vm", vcpus=4)
        await pod.wait_size("4")
        await pod.wait_size("2")
        seen = await user.wait_reason("vm", "PodResizeDeferred")
        assert "the kubelet has not resized the pod vm within 2 s" in seen.message
        assert not machine.received("device_add")


async def test_a_size_that_the_node_can_never_give_is_taken_back_at_once(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with VMPod(user, "vm") as pod, a_vm(user, folder, pod, timeout=3600) as machine:
        await user.change("vm", vcpus=4)
        await pod.wait_size("4")
        await pod.delay("PodResizePending", "Infeasible", "Node didn't have enough capacity: cpu, capacity: 3000")
        seen = await user.wait_reason("vm", "PodResizeInfeasible", stalled=True)
        assert "Node didn't have enough capacity: cpu" in seen.message
        assert await pod.resources() == {"limits": "2", "requests": "2"}
        await user.change("vm", vcpus=3)
        await pod.wait_size("3")
        await pod.obey()
        await user.wait_ready("vm")
        assert len(machine.received("device_add")) == 1


async def test_a_size_that_the_api_server_refuses_is_reported_in_its_words(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    path = f"/api/v1/namespaces/{user.namespace}/limitranges"
    limit = {"metadata": {"name": "most"}, "spec": {"limits": [{"type": "Container", "max": {"cpu": "3"}}]}}
    async with VMPod(user, "vm") as pod, a_vm(user, folder, pod, timeout=2) as machine:
        assert (await user.control_plane.request("POST", path, limit)).status == 201
        await user.change("vm", vcpus=4)
        seen = await user.wait_reason("vm", "PodResizeRefused", stalled=True)
        assert "the CPU of the pod vm cannot be set to 4" in seen.message
        assert "maximum cpu usage per Container is 3" in seen.message
        assert not machine.received("device_add")
        assert (await user.control_plane.request("DELETE", f"{path}/most")).status == 200
        async with pod.obeying():
            assert (await user.wait_ready("vm")).vcpus == 4


async def test_a_container_that_a_resize_would_restart_is_not_touched(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with (
        VMPod(user, "vm", resize_policy="RestartContainer") as pod,
        FaultyMonitor(folder / "vm.sock", cpus=2) as machine,
    ):
        await user.create("vm", 4, "vm.sock", pod=of_pod("vm"))
        seen = await user.wait_reason("vm", "PodResizeRefused", stalled=True)
        assert "has the resizePolicy RestartContainer for cpu" in seen.message
        assert await pod.resources() == {"limits": "2", "requests": "2"}
        assert not machine.received("device_add")


@pytest.mark.parametrize(
    ("limit", "container", "words"),
    [(None, CONTAINER, "neither a request nor a limit"), ("2", "vm", "has no container vm")],
    ids=["no-size", "another-name"],
)
async def test_a_container_without_a_size_or_of_another_name_is_refused(
    folder: Path, operator: OperatorProcess, user: User, limit: str | None, container: str, words: str
) -> None:
    del operator
    async with VMPod(user, "vm", limit=limit), FaultyMonitor(folder / "vm.sock", cpus=2) as machine:
        await user.create("vm", 4, "vm.sock", pod={**of_pod("vm"), "container": container})
        seen = await user.wait_reason("vm", "PodResizeRefused", stalled=True)
        assert words in seen.message
        assert not machine.received("device_add")


async def test_exactly_one_running_pod_must_match(folder: Path, operator: OperatorProcess, user: User) -> None:
    del operator
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as machine:
        await user.create("vm", 2, "vm.sock", pod={"selector": {"matchLabels": {"app": "web"}}})
        seen = await user.wait_reason("vm", "PodNotFound")
        assert (seen.states, seen.vcpus) == (("False", "True", "False"), 2)
        async with VMPod(user, "one", labels={"app": "web"}) as one, VMPod(user, "two", labels={"app": "web"}):
            seen = await user.wait_reason("vm", "PodAmbiguous")
            assert "one, two" in seen.message
            await one.obey(phase="Succeeded")
            seen = await user.wait_ready("vm")
            assert seen.status["selector"] == "app=web"
            await user.change("vm", vcpus=3)
            await user.wait_ready("vm")
            assert await one.resources() == {"limits": "2", "requests": "2"}, "without cpu, a pod is left alone"
        assert len(machine.received("device_add")) == 1


async def test_of_two_sets_that_name_one_pod_the_older_one_has_it(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with (
        VMPod(user, "vm", labels={"also": "it"}) as pod,
        a_vm(user, folder, pod),
        FaultyMonitor(folder / "other.sock", cpus=3) as machine,
    ):
        created = (await user.get("vm")).body["metadata"]["creationTimestamp"]
        await until(lambda: f"{datetime.now(UTC):%FT%TZ}" > created, WAIT, "another second")
        await user.create("other", 4, "other.sock", pod={**of_pod("vm"), "selector": {"matchLabels": {"also": "it"}}})
        seen = await user.wait_reason("other", "PodAmbiguous")
        assert f"the VCPUSet {user.namespace}/vm is older and names the pod vm too" in seen.message
        assert await pod.resources() == {"limits": "2", "requests": "2"}
        assert not machine.received("device_add")
        await user.delete("vm")
        async with pod.obeying():
            assert (await user.wait_ready("other")).vcpus == 4


async def test_without_cpu_a_set_is_scaled_whatever_becomes_of_its_pod(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    del operator
    async with FaultyMonitor(folder / "vm.sock", cpus=2):
        await user.create("vm", 3, "vm.sock", pod={"selector": {"matchLabels": {"vm": "vm"}}})
        await user.wait("vm", lambda seen: seen.vcpus == 3, "the vCPU to be plugged")
        assert (await user.wait_reason("vm", "PodNotFound")).vcpus == 3
        async with VMPod(user, "vm"):
            await user.wait_ready("vm")


async def test_a_set_cannot_name_a_pod_of_another_namespace(
    folder: Path, operator: OperatorProcess, user: User, control_plane: ControlPlane
) -> None:
    del operator
    other = User(control_plane, await control_plane.namespace())
    async with VMPod(other, "vm") as pod, FaultyMonitor(folder / "vm.sock", cpus=2):
        selector = {"matchLabels": {"vm": "vm"}, "namespace": other.namespace}
        await user.create("vm", 4, "vm.sock", pod={**of_pod("vm"), "namespace": other.namespace, "selector": selector})
        await user.wait_reason("vm", "PodNotFound")
        assert await pod.resources() == {"limits": "2", "requests": "2"}
    refused = await control_plane.kubectl(
        *("create", "--validate=strict", "--filename=-"),
        input=f"""
apiVersion: vcpuset.dev/v1alpha1
kind: VCPUSet
metadata: {{name: stranger, namespace: {user.namespace}}}
spec:
  vcpus: 4
  monitor: {{unix: {{path: vm.sock}}}}
  pod: {{namespace: {other.namespace}, selector: {{matchLabels: {{vm: vm}}}}}}
""",
        check=False,
    )
    assert 'unknown field "spec.pod.namespace"' in refused.stderr
