"""docs/metrics-api.md on a node: the API server reaches the metrics API through its Service, and it the agents."""

from __future__ import annotations

from typing import Any, Final

import pytest

from cluster.node.conftest import ALLOW_PODS, IMPATIENT
from harness.cache import REPOSITORY
from harness.docpage import Page
from harness.kubelet import install
from harness.metricsapi import API, REGISTRATION, available
from harness.node import Cluster
from harness.nodevm import NodeVM
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

PAGE: Final = Page(REPOSITORY / "docs" / "metrics-api.md")
AGENT: Final = "GuestAgentConnected"
WAIT: Final = 180.0
COMPONENTS: Final = ("metrics-api", "metrics-api/agent", "metrics-api/controller")


async def test_an_autoscaler_gets_the_busy_vcpus_of_a_machine_in_a_pod(installed: Cluster, user: User) -> None:
    plane = installed.control_plane
    await install(plane, installed, *ALLOW_PODS, IMPATIENT, components=COMPONENTS)
    try:
        await available(plane)
        vm = NodeVM(installed, user.namespace, "web", "node-1")
        await vm.start(agent=True)
        await vm.wait_online(2)
        agent = {"unix": {"path": "web/ga.sock"}}
        await user.create("web", vcpus=2, monitor="web/qmp.sock", nodeName="node-1", guestAgent=agent)
        # An agent that starts after the first observation is queried at the next resync.
        await user.wait("web", lambda seen: seen.condition(AGENT).get("status") == "True", "the guest agent", WAIT)
        await user.wait_ready("web")
        hpa: dict[str, Any] = PAGE.manifest("HorizontalPodAutoscaler", "web")
        await installed.apply(hpa, "-n", user.namespace)
        path = f"/apis/autoscaling/v2/namespaces/{user.namespace}/horizontalpodautoscalers/web"
        await plane.until_condition(path, "ScalingActive", "True")
        await plane.ok("GET", f"{API}/namespaces/{user.namespace}/vcpusets.vcpuset.dev/web/busy_vcpus")
    finally:
        # While it is registered and gone, no namespace can be deleted.
        await plane.request("DELETE", REGISTRATION)
        await installed.kubectl("delete", "namespace", "vcpuset-metrics-api", "--timeout=90s", timeout=100)
