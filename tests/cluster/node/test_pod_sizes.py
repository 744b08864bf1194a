"""Pods that grow and shrink with the machine in them, on a real kubelet."""

from __future__ import annotations

import pytest

from harness.node import Cluster
from harness.nodevm import NodeVM
from harness.wait import until
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600), pytest.mark.usefixtures("rights")]

WAIT = 60.0
PERIOD = 100_000
"""Microseconds, of the kernel's scheduler."""


def pod_of(vm: NodeVM) -> dict[str, object]:
    """`spec.pod`: 100m for each vCPU, and 50m of overhead."""
    return {
        "selector": {"matchLabels": {"vm": vm.name}},
        "container": "qemu",
        "cpu": {"perVCPU": "100m", "overhead": "50m"},
        "timeoutSeconds": 10,
    }


async def quota(cluster: Cluster, vm: NodeVM) -> int:
    """The thousandths of a CPU that the kernel gives the container."""
    files = cluster.nodes["node-1"].cgroup("cpu", await vm.pod()).glob("*/cpu.cfs_quota_us")
    return max(int(file.read_text()) for file in files) * 1000 // PERIOD


async def test_the_containers_limit_follows_the_count_and_nothing_is_restarted(installed: Cluster, user: User) -> None:
    vm = NodeVM(installed, user.namespace, "grows", "node-1")
    await vm.start(cpu="250m")
    await vm.wait_online(2)
    assert await quota(installed, vm) == 250
    before = (await vm.pod())["status"]["containerStatuses"][0]["containerID"]
    await user.create("grows", vcpus=4, monitor="grows/qmp.sock", nodeName="node-1", pod=pod_of(vm))
    await user.wait_ready("grows")
    assert await quota(installed, vm) == 450
    await vm.wait_online(4)
    await user.scale("grows", 1)
    await user.wait_ready("grows")

    async def is_lowered() -> bool:
        return await quota(installed, vm) == 150

    await until(is_lowered, WAIT, "the limit to be lowered")
    status = (await vm.pod())["status"]["containerStatuses"][0]
    assert (status["containerID"], status["restartCount"]) == (before, 0)


async def test_a_size_for_which_the_node_has_no_room_is_deferred_until_it_has(installed: Cluster, user: User) -> None:
    vm, other = (NodeVM(installed, user.namespace, name, "node-1") for name in ("waits", "other"))
    await other.start(cpu="800m")
    await vm.start(cpu="250m")
    await vm.wait_online(2)
    await user.create("waits", vcpus=12, monitor="waits/qmp.sock", nodeName="node-1", pod=pod_of(vm))
    await user.wait_reason("waits", "PodResizeDeferred")
    assert await vm.online() == 2
    await installed.kubectl("delete", "deployment", "-n", user.namespace, "other")
    await user.wait_ready("waits")
    await vm.wait_online(12)


async def test_the_message_quotes_the_resource_quota_that_refuses_the_size(installed: Cluster, user: User) -> None:
    # The quota counts all machines of the namespace.
    await installed.kubectl("delete", "deployments", "-n", user.namespace, "--all", "--timeout=60s", timeout=70)
    vm = NodeVM(installed, user.namespace, "bound", "node-1")
    await vm.start(cpu="250m")
    await vm.wait_online(2)
    await installed.kubectl("create", "quota", "small", "-n", user.namespace, "--hard=limits.cpu=300m")

    async def is_counted() -> bool:
        path = f"/api/v1/namespaces/{user.namespace}/resourcequotas/small"
        used = (await installed.control_plane.ok("GET", path)).get("status", {}).get("used", {})
        return bool(used.get("limits.cpu") == "250m")

    await until(is_counted, WAIT, "the quota to be counted")
    await user.create("bound", vcpus=4, monitor="bound/qmp.sock", nodeName="node-1", pod=pod_of(vm))
    seen = await user.wait_reason("bound", "PodResizeRefused")
    assert "exceeded quota: small" in seen.message
    assert await vm.online() == 2
