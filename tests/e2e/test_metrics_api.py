"""A HorizontalPodAutoscaler steers a Linux guest by its load: nothing is set by the tests but the load itself.

busy loops in the guest -> its agent -> the node agent -> `vcpuset metrics-api` -> the API server's aggregation -> the
autoscaler -> spec.vcpus -> the node agent -> QEMU -> the guest's CPUs, and back when the loops end. The pods are those
of `deploy/`, with their arguments, accounts and rights. Played are the nodes (see `harness.kubelet`) and kube-proxy.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from click.testing import CliRunner

from e2e.test_autoscaler import Scaled
from harness.cache import REPOSITORY
from harness.container import WHY_NOT
from harness.controllermanager import AUTOSCALER, HPA_USER, ControllerManager
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.guest import Guest
from harness.kubelet import Nodes, cluster, install
from harness.metricsapi import API, NAMESPACE, REGISTRATION, ServiceProxy, available, expose
from harness.saved import saved_guest
from harness.timeline import TIME_LINE, TimeLine
from harness.wait import until
from harness.world import User
from vcpuset.cli.kubectl.main import main as kubectl_vcpuset

# The pods are played in the module's event loop.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
]

PAGE: Final = Page(REPOSITORY / "docs" / "metrics-api.md")

WAIT: Final = 90.0
NODE: Final = "node-a"
GROUP: Final = 65532
"""The agents' group."""

LEAST, MOST = 2, 4
"""The autoscaler's bounds."""

TARGET: Final = "150m"
"""The busy vCPUs for each vCPU. A guest without KVM counts less than it uses while the host is busy, so it is low."""

FAST: Final = {
    direction: {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 64, "periodSeconds": 1}]}
    for direction in ("scaleUp", "scaleDown")
}
"""Without the pauses that a cluster has."""

Manifest = dict[str, Any]


def autoscaler(name: str) -> Manifest:
    """The page's, for a set with this name, with the bounds and the pace of these tests."""
    manifest: Manifest = PAGE.manifest("HorizontalPodAutoscaler", "web")
    manifest["metadata"]["name"] = name
    (metric,) = manifest["spec"]["metrics"]
    metric["object"]["target"]["averageValue"] = TARGET
    for reference in (manifest["spec"]["scaleTargetRef"], metric["object"]["describedObject"]):
        reference["name"] = name
    manifest["spec"].update(minReplicas=LEAST, maxReplicas=MOST, behavior=FAST)
    return manifest


@dataclass(frozen=True)
class World:
    """A cluster with an agent on its one node, two replicas of the metrics API, and an autoscaled guest."""

    control_plane: ControlPlane
    nodes: Nodes
    user: User
    folder: Path
    """Where the agent finds the monitors of the user's namespace."""
    web: Scaled
    guest: Guest

    async def busy(self, name: str = "web") -> str:
        """What the metrics API says."""
        path = f"{API}/namespaces/{self.user.namespace}/vcpusets.vcpuset.dev/{name}/busy_vcpus"
        answer = await self.control_plane.request("GET", path)
        return str(answer.body["items"][0]["value"]) if answer.status == 200 else f"HTTP {answer.status}"

    async def load(self, loops: int) -> None:
        """Have so many busy loops run in the guest, and no others."""
        await self.guest.shell("[ ! -f /run/load ] || kill $(cat /run/load); rm -f /run/load")
        for _ in range(loops):
            await self.guest.shell("(while :; do :; done) & echo $! >> /run/load")

    async def grows(self) -> None:
        """Wait until more vCPUs are declared than the least. How many depends on how busy the host is."""
        await self.user.wait(
            "web", lambda seen: seen.body["spec"]["vcpus"] > LEAST, f"more than {LEAST} vCPUs declared"
        )

    async def fails(self, words: str, name: str = "web") -> None:
        """Wait until the autoscaler shows that the metric fails, in these words."""
        await self.web.says(name, "ScalingActive", "False", "FailedGetObjectMetric", words)

    async def works(self) -> None:
        """Wait until the autoscaler has its metric."""
        await self.web.says("web", "ScalingActive", "True", "ValidMetricFound")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """All of it. The guest idles."""
    async with cluster(NODE) as (control_plane, nodes):
        await install(control_plane, nodes, overlay="agent", components=["metrics-api", "metrics-api/agent"])

        def replicas() -> list[tuple[str, int]]:
            return [(each.address, 8443) for each in nodes.pods if each.namespace == NAMESPACE]

        user = User(control_plane, await control_plane.namespace("tenant"))
        folder = nodes.node(NODE).path("/run/vcpuset") / user.namespace
        folder.mkdir()
        web = Scaled(user, folder)
        agent = web.monitor.with_name("ga.sock")
        async with (
            ServiceProxy(replicas) as proxy,
            saved_guest(smp="2,maxcpus=64", monitor_paths=[web.monitor], agent=True, agent_path=agent) as guest,
        ):
            shared(web.monitor, agent)
            web.control = guest.control
            await expose(control_plane, proxy.port)
            await available(control_plane)
            await user.create("web", LEAST, "web/qmp.sock", nodeName=NODE, guestAgent={"unix": {"path": "web/ga.sock"}})
            await user.wait_ready("web")
            running = World(control_plane, nodes, user, folder, web, guest)
            # The metric is there before the autoscaler: after a miss it looks for metrics again half a minute later.
            await until(is_number(running), WAIT, "the guest's load")
            async with ControllerManager(control_plane, AUTOSCALER):
                await web.apply(autoscaler("web"))
                yield running
                await control_plane.request("DELETE", REGISTRATION)


def is_number(world: World) -> Callable[[], Any]:
    """Whether the metric has a value."""

    async def found() -> bool:
        return (await world.busy()).endswith("m")

    return found


def shared(*sockets: Path) -> None:
    """Let the agents connect, as a setgid folder and QEMU's umask do."""
    for socket in sockets:
        os.chown(socket, -1, GROUP)
        socket.chmod(0o660)


async def test_load_in_a_guest_gets_it_more_cpus_and_the_end_of_the_load_takes_them_away(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    declared: set[int] = set()

    async def look() -> Mapping[str, object]:
        seen = (await world.user.get("web")).body
        declared.add(seen["spec"]["vcpus"])
        hpa = (await world.web.hpa("web")).get("status", {})
        return {
            "busy_vcpus": await world.busy(),
            "HPA wants": hpa.get("desiredReplicas"),
            "spec": seen["spec"]["vcpus"],
            "status": seen["status"].get("vcpus"),
            "guest": len(world.guest.online()),
        }

    line = TimeLine(look)
    async with line:
        await world.works()
        await world.web.settles(LEAST)
        line.note("load on")
        await world.load(MOST)
        await world.web.declared(MOST)
        await world.guest.wait_online(MOST)
        await world.web.settles(MOST)
        line.note("load off")
        await world.load(0)
        await world.web.declared(LEAST)
        await world.guest.wait_online(LEAST)
        await world.web.settles(LEAST)
        line.note("settled")
    record_property(TIME_LINE, str(line))
    assert {LEAST, MOST} <= declared <= set(range(LEAST, MOST + 1))
    writes = [
        each.code
        for each in world.control_plane.audit_events()
        if each.user == HPA_USER and each.subresource == "scale" and each.is_write
    ]
    assert set(writes) == {200}


async def test_kubectl_vcpuset_shows_how_busy_the_machine_is(world: World) -> None:
    arguments = ["--kubeconfig", str(world.control_plane.kubeconfig), "-n", world.user.namespace]

    async def shown(*command: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, kubectl_vcpuset, [*arguments, *command])
        assert result.exit_code == 0, result.output
        return result.stdout

    (found,) = json.loads(await shown("top", "-o", "json"))["items"]
    assert found["name"] == "web"
    assert found["busyVCPUs"] >= 0
    header, line = (await shown("top")).splitlines()
    assert header.split() == ["NAME", "BUSY", "CURRENT", "DESIRED", "BUSY%", "WINDOW"]
    assert re.fullmatch(r"web +\d+\.\d +\d+ +\d+ +\d+% +\d+s", line)
    (of_status,) = json.loads(await shown("status", "-o", "json"))["items"]
    assert of_status["busyVCPUs"] is not None
    assert "Busy: " in await shown("explain", "web")


async def test_while_the_agent_is_dead_the_metric_fails_and_the_count_stays_although_the_load_has_ended(
    world: World,
) -> None:
    await world.load(MOST)
    await world.grows()
    agent = world.nodes.pod("vcpuset-agent", NODE)
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        await world.load(0)
        await world.fails("unable to get metric busy_vcpus: VCPUSet on")
        declared = (await world.user.get("web")).body["spec"]["vcpus"]
        assert declared > LEAST
        await world.web.keeps(declared)
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    await world.works()
    await world.web.settles(LEAST)


async def test_one_replica_of_the_metrics_api_is_enough_and_without_any_the_metric_fails_and_the_count_stays(
    world: World,
) -> None:
    async def replicas(number: int) -> None:
        scale = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAMESPACE}/scale"
        answer = await world.control_plane.request("PATCH", scale, {"spec": {"replicas": number}})
        assert answer.status == 200, answer.body

    first, second = (each for each in world.nodes.pods if each.namespace == NAMESPACE)
    await replicas(1)
    await until(lambda: first.ended or second.ended, WAIT, "the end of a replica")
    await until(is_number(world), WAIT, "the other one to answer")
    await world.works()

    await replicas(0)
    await world.load(MOST)
    await world.fails("unable to get metric busy_vcpus: VCPUSet on")
    await world.web.keeps(LEAST)
    await replicas(2)
    await world.works()
    await world.grows()
    await world.load(0)
    await world.web.settles(LEAST)


async def test_of_a_set_that_nobody_serves_the_metric_fails_and_the_count_stays(world: World) -> None:
    await world.user.change("web", nodeName="node-b")
    await world.load(MOST)
    await world.fails("no pod of the operator is ready in namespace vcpuset-agent on node node-b")
    await world.web.keeps(LEAST)
    await world.load(0)
    await world.user.change("web", nodeName=NODE)
    await world.works()


async def test_of_a_machine_without_a_source_the_metric_fails_and_the_count_stays(world: World) -> None:
    bare = Scaled(world.user, world.folder, "bare")
    async with Guest(None, smp="3,maxcpus=64", monitor_paths=[bare.monitor]):
        shared(bare.monitor)
        await world.user.create("bare", 3, "bare/qmp.sock", nodeName=NODE)
        await world.user.wait_ready("bare")
        await bare.apply(autoscaler("bare"))
        await world.fails("neither QEMU (query-stats", "bare")
        await bare.keeps(3)
        await bare.kubectl("delete", "hpa/bare", "vcpuset/bare")


async def test_the_pods_were_refused_nothing(world: World) -> None:
    users = {f"system:serviceaccount:{each}:{each}" for each in (NAMESPACE, "vcpuset-agent")}
    refused = [each for each in world.control_plane.audit_events() if each.user in users and each.code in {401, 403}]
    assert refused == []
