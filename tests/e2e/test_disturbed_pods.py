"""What a cluster does to the operators' pods: it restarts one that hangs, and drains nodes one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from harness.container import WHY_NOT
from harness.controlplane import Answer, ControlPlane
from harness.kubelet import Nodes, cluster, install
from harness.pod import Pod
from harness.wait import until

__all__: list[str] = []

# The pods are played in the module's event loop.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
]

WAIT: Final = 120.0

IMPATIENT: Final = {
    "target": {"kind": "DaemonSet", "name": "vcpuset-agent"},
    "patch": (
        "- {op: replace, path: /spec/template/spec/terminationGracePeriodSeconds, value: 2}\n"
        "- {op: replace, path: /spec/template/spec/containers/0/livenessProbe/failureThreshold, value: 2}\n"
    ),
}
"""Two failed probes in place of six, and two seconds of grace: the rest would be waiting."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed() -> AsyncIterator[tuple[ControlPlane, Nodes]]:
    """Both shapes on two nodes."""
    async with cluster("node-a", "node-b") as (control_plane, nodes):
        await install(control_plane, nodes, IMPATIENT)
        yield control_plane, nodes


async def test_an_agent_that_stands_still_is_restarted_by_its_probe(installed: tuple[ControlPlane, Nodes]) -> None:
    _, nodes = installed
    hanging, other = (nodes.pod("vcpuset-agent", node) for node in ("node-a", "node-b"))
    pid = hanging.pid
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: hanging.restarts == 1 and hanging.pid != pid, WAIT, "the process to be started again")
    await nodes.rolled_out("vcpuset-agent", "daemonset/vcpuset-agent")
    assert other.restarts == 0


async def evict(control_plane: ControlPlane, pod: Pod) -> Answer:
    """Ask for a pod's end as `kubectl drain` does."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod.name}}
    path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/eviction"
    return await control_plane.request("POST", path, eviction)


async def test_a_drain_takes_the_second_replica_once_the_first_one_is_replaced(
    installed: tuple[ControlPlane, Nodes],
) -> None:
    control_plane, nodes = installed

    def replicas() -> list[Pod]:
        return [each for each in nodes.pods if each.namespace == "vcpuset-system"]

    async def allowed() -> bool:
        path = "/apis/policy/v1/namespaces/vcpuset-system/poddisruptionbudgets/vcpuset-controller"
        status = (await control_plane.request("GET", path)).body.get("status", {})
        return bool(status.get("disruptionsAllowed") == 1)

    async def leader() -> str:
        path = "/apis/coordination.k8s.io/v1/namespaces/vcpuset-system/leases/vcpuset-controller"
        return str((await control_plane.request("GET", path)).body["spec"].get("holderIdentity") or "")

    first, second = sorted(replicas(), key=lambda pod: pod.name)
    await until(allowed, WAIT, "a replica that may go")
    assert (await evict(control_plane, first)).status == 201
    refused = await evict(control_plane, second)
    assert refused.status == 429, refused.body
    assert "disruption budget" in refused.body["message"]

    await until(lambda: first.ended and len(replicas()) == 2, WAIT, "another replica")
    await nodes.rolled_out("vcpuset-system", "deployment/vcpuset-controller")
    await until(allowed, WAIT, "the second replica to be allowed to go")
    assert (await evict(control_plane, second)).status == 201
    await until(lambda: second.ended, WAIT, "its end")

    async def led_by_a_new_one() -> bool:
        holder = await leader()
        return any(holder.startswith(pod.name) for pod in replicas())

    await until(led_by_a_new_one, WAIT, "one of the new replicas to lead")
