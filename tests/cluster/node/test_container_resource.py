"""docs/autoscaling.md, "QEMU in a pod": metrics-server measures the container on a real kubelet; the HPA follows."""

from __future__ import annotations

from typing import Any, Final

import pytest

from harness.cache import REPOSITORY
from harness.docpage import Page
from harness.node import Cluster
from harness.nodevm import NodeVM
from harness.podmetrics import PodMetrics
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600), pytest.mark.usefixtures("rights")]

PAGE: Final = Page(REPOSITORY / "docs" / "autoscaling.md")
WAIT: Final = 120.0


async def test_the_cpu_usage_of_qemus_container_drives_the_count(installed: Cluster, user: User) -> None:
    async with PodMetrics(installed.control_plane) as metrics:
        vm = NodeVM(installed, user.namespace, "web", "node-1")
        # A guest that polls while it is idle keeps QEMU's threads busy, up to the limit of the container.
        await vm.start(cpu="800m", append="idle=poll")
        await vm.wait_online(2)
        selector = {"selector": {"matchLabels": {"vm": "web"}}}
        await user.create("web", vcpus=2, monitor="web/qmp.sock", nodeName="node-1", pod=selector)
        await user.wait_ready("web")
        await metrics.until_measured(user.namespace, (await vm.pod())["metadata"]["name"])

        hpa: dict[str, Any] = dict(PAGE.manifest("HorizontalPodAutoscaler", "web-by-pod"))
        hpa["spec"]["maxReplicas"] = 4
        target = hpa["spec"]["metrics"][0]["containerResource"]["target"]
        target["averageValue"] = "200m"
        await installed.apply(hpa, "-n", user.namespace, "--server-side")
        await user.wait("web", lambda seen: seen.body["spec"]["vcpus"] == 4, "4 vCPUs declared", WAIT)
        await user.wait_ready("web")
        await vm.wait_online(4)

        target["averageValue"] = "3"
        hpa["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] = 0
        await installed.apply(hpa, "-n", user.namespace, "--server-side")
        await user.wait("web", lambda seen: seen.body["spec"]["vcpus"] == 1, "1 vCPU declared", WAIT)
        await user.wait_ready("web")
        await vm.wait_online(1)
