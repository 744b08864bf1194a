"""KEDA drives sets by the manifests of docs/autoscaling.md.

KEDA's operator, metrics adapter and webhook, the autoscaler's controller, Prometheus, the agents of two nodes and QEMU
are real. Where the load of a guest does not matter, a third agent is simulated, and the test sets its answers. As pods
do, the agents have addresses of their own, on the loopback interface of the sandbox (`harness.sandbox`); they are in
the EndpointSlice of the shipped Service.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from aiohttp import web

from cluster.driven import (
    AGENT,
    BY_AGENT,
    BY_PROMETHEUS,
    GONE,
    OTHER,
    PAGE,
    PORT,
    SIMULATED,
    USUAL,
    WAIT,
    Agents,
    Driven,
    Manifest,
    load,
    machine,
    without_none,
)
from harness.aggregation import registration
from harness.controllermanager import AUTOSCALER, ControllerManager
from harness.controlplane import ControlPlane
from harness.guest import Guest
from harness.keda import EXTERNAL_METRICS, USER, Keda
from harness.operator import OperatorProcess
from harness.processes import CommandFailed, run
from harness.prometheus import PrometheusServer
from harness.wait import until
from harness.world import User

# The simulated agent answers in the module's event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control_plane() -> AsyncIterator[ControlPlane]:
    """An API server of this module's own: metrics APIs are cluster-wide."""
    async with ControlPlane() as running:
        await running.install_crd()
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agents(control_plane: ControlPlane) -> AsyncIterator[Agents]:
    """The agents' Service, and the simulated agent."""
    agents = Agents(control_plane)
    for address in (AGENT, OTHER, SIMULATED, GONE):
        await run(["ip", "address", "add", f"{address}/32", "dev", "lo"])
    application = web.Application()
    application.add_routes([web.get("/v1/namespaces/{namespace}/vcpusets/{name}/busy", agents.busy)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, SIMULATED, PORT).start()
    await agents.install()
    # The kernel takes connections, and nothing ever answers.
    with socket.create_server((GONE, PORT), backlog=4096):
        yield agents
    await runner.cleanup()
    for address in (AGENT, OTHER, SIMULATED, GONE):
        await run(["ip", "address", "delete", f"{address}/32", "dev", "lo"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(control_plane: ControlPlane, agents: Agents, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """The agent of the node that the page's set names, beside one of another node."""
    node = PAGE.manifest("VCPUSet", "web")["spec"]["nodeName"]

    def operator(node: str, address: str) -> OperatorProcess:
        # Observed often: Prometheus sees what was measured at the last observation.
        flags = (f"--node-name={node}", "--resync-seconds=2")
        return OperatorProcess(control_plane, *flags, address=f"{address}:{PORT}", socket_root=socket_root)

    async with operator(node, AGENT) as running, operator("node-2", OTHER):
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keda(control_plane: ControlPlane, agents: Agents) -> AsyncIterator[Keda]:
    """KEDA, and the controllers that it relies on."""
    controllers = (*AUTOSCALER, "garbage-collector-controller")
    async with Keda(control_plane) as running, ControllerManager(control_plane, controllers):
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def driven(keda: Keda, agent: OperatorProcess, agents: Agents, folder: Path, user: User) -> AsyncIterator[Driven]:
    """The page's set, still without a machine."""
    driven = Driven(user, folder, agents)
    yield driven
    driven.busy = None
    await driven.kubectl("delete", "scaledobjects", "--all")


# --- by a guest's load --------------------------------------------------------------------------------------------


SENSITIVE: Final = "0.3"
"""Busy vCPUs for each vCPU: half of the page's. A guest without KVM counts less than it uses while the host is busy."""


async def test_the_load_of_a_guest_drives_its_machine_through_the_answers_of_its_agent(
    agent: OperatorProcess, driven: Driven
) -> None:
    async with machine(driven, agent=True) as running:
        await driven.drive(trigger={"targetValue": SENSITIVE})
        await driven.settles(1)
        await running.wait_online(1)
        await load(running, 2)
        await driven.at_least(2)
        await until(lambda: len(running.online()) >= 2, WAIT, "more CPUs in the guest")

        agent.kill()
        await driven.fails()
        await driven.reports("Ready", "False", "TriggerError")
        before = (await driven.user.get("web")).body["spec"]["vcpus"]
        await driven.keeps(before)
        await load(running, 0)
        await driven.keeps(before)
        await agent.start()
        await driven.settles(1)
        await running.wait_online(1)
        await driven.reports("Ready", "True")


async def test_prometheus_drives_the_machine_and_without_data_the_count_stays(
    agent: OperatorProcess, driven: Driven
) -> None:
    # As the shipped PodMonitor: `namespace` is the set's.
    job = {"job_name": "vcpuset", "honor_labels": True, "static_configs": [{"targets": [f"{AGENT}:{PORT}"]}]}
    scraping = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]}
    async with machine(driven, agent=True) as running, PrometheusServer(scraping, {}) as prometheus:

        def trigger(**metadata: Any) -> Manifest:
            """The page's, with this Prometheus, and a shorter range, so that the test need not take minutes."""
            made = driven.scaled_object(BY_PROMETHEUS, {"threshold": SENSITIVE, "serverAddress": prometheus.url})
            its = made["spec"]["triggers"][0]["metadata"]
            assert "[2m]" in its["query"]
            its["query"] = its["query"].replace("[2m]", "[10s]")
            made["spec"]["triggers"][0]["metadata"] = without_none({**its, **metadata})
            return made

        # The metric is there before the autoscaler.
        query = trigger()["spec"]["triggers"][0]["metadata"]["query"]

        async def is_known() -> bool:
            return bool((await prometheus.ask("query", query=query))["result"])

        await until(is_known, WAIT, "the guest's load in Prometheus")
        await driven.apply(trigger())
        await driven.works(BY_PROMETHEUS)
        await driven.settles(1)
        await load(running, 2)
        await driven.at_least(2)

        agent.kill()
        await driven.fails(BY_PROMETHEUS)
        await driven.reports("Ready", "False", "TriggerError", BY_PROMETHEUS)
        before = (await driven.user.get("web")).body["spec"]["vcpus"]
        assert before >= 2, "the last data of an agent that is gone do not lower the count"
        await driven.keeps(before)
        # The trap: without the setting, KEDA takes no data for 0.
        await driven.apply(trigger(ignoreNullValues=None))
        await driven.declared(1)
        await agent.start()
        await driven.at_least(2)

        await prometheus.stop()
        await driven.fails(BY_PROMETHEUS)
        before = (await driven.user.get("web")).body["spec"]["vcpus"]
        assert before >= 2
        await driven.keeps(before)


# --- by numbers that a test sets ----------------------------------------------------------------------------------


async def test_agents_that_do_not_know_the_set_or_do_not_answer_are_skipped_while_one_agent_knows_it(
    agents: Agents, driven: Driven
) -> None:
    async with machine(driven):
        driven.busy = 2.3
        await driven.drive()
        await driven.settles(4)
        async with agents.endpoints(*USUAL, GONE):
            driven.busy = 3.5
            await driven.declared(6)
        driven.busy = None
        await driven.fails()
        await driven.reports("Ready", "False", "TriggerError")
        await driven.keeps(6)
        driven.busy = 1.1
        await driven.settles(2)
        async with agents.endpoints():
            await driven.fails()
            await driven.keeps(2)
        await driven.works()


async def test_a_pause_keeps_the_count_or_sets_it_or_forbids_less_and_afterwards_the_metric_decides_again(
    driven: Driven,
) -> None:
    async with machine(driven):
        driven.busy = 2.3
        await driven.drive()
        await driven.settles(4)

        await driven.annotate("paused", "true")
        await driven.autoscaler_is_gone()
        await driven.reports("Paused", "True")
        driven.busy = 3.5
        await driven.user.scale("web", 3)
        assert (await driven.user.wait_ready("web")).vcpus == 3
        await driven.annotate("paused", None)
        await driven.settles(6)

        assert USER not in driven.writers()
        await driven.annotate("paused-replicas", "4")
        await driven.declared(4)
        assert USER in driven.writers()
        assert (await driven.user.wait_ready("web")).vcpus == 4
        await driven.annotate("paused-replicas", "0")
        message = await driven.reports("Ready", "False", "ScaledObjectCheckFailed")
        assert "greater than or equal to 1" in message
        assert (await driven.user.get("web")).body["spec"]["vcpus"] == 4
        await driven.annotate("paused-replicas", None)
        await driven.settles(6)

        await driven.annotate("paused-scale-in", "true")
        await driven.autoscaler_only_adds()
        driven.busy = 1.1
        await driven.keeps(6)
        driven.busy = 5.3
        await driven.settles(9)
        await driven.annotate("paused-scale-in", None)
        driven.busy = 1.1
        await driven.settles(2)


async def test_with_a_fallback_the_count_is_the_fallbacks_or_stays_until_the_metric_is_back(driven: Driven) -> None:
    async with machine(driven):
        driven.busy = 1.1
        await driven.drive(fallback={"failureThreshold": 2, "replicas": 5})
        await driven.settles(2)
        driven.busy = None
        await driven.settles(5)
        await driven.reports("Fallback", "True")
        await driven.reports("Ready", "True")
        driven.busy = 1.1
        await driven.settles(2)
        await driven.reports("Fallback", "False")

        await driven.patch({"spec": {"fallback": {"behavior": "currentReplicas"}}})
        driven.busy = None
        await driven.reports("Fallback", "True")
        await driven.keeps(2)


async def test_without_a_minimum_keda_asks_for_0_which_is_refused_and_the_metric_goes_on_to_decide(
    driven: Driven,
) -> None:
    async with machine(driven):
        driven.busy = 1.7
        await driven.drive(minReplicaCount=None, cooldownPeriod=1)
        await driven.settles(3)
        driven.busy = 0
        await driven.settles(1)
        message = await driven.reports("Ready", "False", "ErrorScalingTarget")
        assert "greater than or equal to 1" in message
        driven.busy = 1.1
        await driven.settles(2)
        await driven.reports("Ready", "True")


async def test_a_count_outside_of_the_sets_bounds_is_refused_and_keda_does_not_show_it(driven: Driven) -> None:
    async with machine(driven, maxVCPUs=3):
        driven.busy = 5.6
        await driven.drive()
        message = await driven.says(f"keda-hpa-{BY_AGENT}", "AbleToScale", "False", "FailedUpdateScale")
        assert "vcpus must be at most maxVCPUs" in message
        await driven.settles(2)
        await driven.reports("Active", "True")
        await driven.reports("Ready", "True")
        await driven.patch({"spec": {"maxReplicaCount": 3}})
        await driven.settles(3)


async def test_a_set_without_a_count_is_scaled_once_it_has_one(driven: Driven) -> None:
    driven.busy = 2.3
    await driven.apply(PAGE.manifest("VCPUSet", "web"))
    await driven.apply(driven.scaled_object(BY_AGENT))
    message = await driven.reports("Ready", "False", "ScaledObjectCheckFailed")
    assert '".spec.vcpus" does not exist' in message
    async with Guest(None, smp="2,maxcpus=64", monitor_paths=[driven.monitor]) as running:
        driven.control = running.control
        await driven.settles(4)
        await driven.reports("Ready", "True")


async def test_kedas_webhook_refuses_a_second_driver_of_a_set(driven: Driven) -> None:
    async with machine(driven):
        driven.busy = 1.1
        await driven.drive()
        second = driven.scaled_object(BY_AGENT)
        second["metadata"]["name"] = "second"
        with pytest.raises(CommandFailed, match="already managed by"):
            await driven.apply(second)


async def test_without_kedas_operator_or_adapter_the_count_stays_whatever_the_fallback(
    control_plane: ControlPlane, driven: Driven, keda: Keda
) -> None:
    async with machine(driven):
        driven.busy = 1.1
        await driven.drive(fallback={"failureThreshold": 3, "replicas": 5})
        await driven.settles(2)

        keda.kill("adapter")
        driven.busy = 2.3
        await driven.fails()
        await driven.keeps(2)
        keda.start_adapter()
        await driven.settles(4)

        keda.kill("operator")
        driven.busy = 3.5
        path = f"/apis/{EXTERNAL_METRICS}/namespaces/{driven.user.namespace}/s0-metric-api-busyVCPUs"
        with pytest.raises(OSError, match="timed out"):
            await control_plane.request("GET", f"{path}?labelSelector=scaledobject.keda.sh%2Fname%3D{BY_AGENT}")
        # The API's registration still reports Available.
        await control_plane.until_condition(registration(EXTERNAL_METRICS), "Available", "True")
        assert (await driven.user.get("web")).body["spec"]["vcpus"] == 4
        await keda.start_operator()
        await driven.settles(6)
