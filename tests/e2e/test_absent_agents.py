"""The sets of nodes whose agent is gone or was never there: what the central controller reports, and who takes over.

Agents and controllers run with the accounts, roles, policies and arguments of `deploy/`. There is no kubelet: the test
says whether an agent's pod is ready. The grace period is 2 s, so the controller looks every half second.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from secrets import token_hex
from typing import Any, Final
from urllib.parse import unquote

import pytest
import pytest_asyncio

from harness.audit import AuditEvent
from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.faultproxy import FaultProxy
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import Seen, User

__all__: list[str] = []

WAIT: Final = 120.0
CONTROLLER: Final = "system:serviceaccount:vcpuset-system:vcpuset-controller"
AGENTS: Final = "/api/v1/namespaces/vcpuset-agent/pods"
UNKNOWN: Final = ("Unknown", "False", "False")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def control_plane() -> AsyncIterator[ControlPlane]:
    """An API server with agent and controller installed."""
    async with ControlPlane() as running:
        await running.install_crd()
        await running.kubectl("apply", "--server-side", "-k", REPOSITORY / "deploy" / "overlays" / "both")
        yield running


async def template(control_plane: ControlPlane, workload: str, namespace: str) -> dict[str, Any]:
    """The pod template of a workload."""
    got = await control_plane.kubectl("get", workload, "-n", namespace, "-o", "json")
    found: dict[str, Any] = json.loads(got.stdout)["spec"]["template"]
    return found


class Node:
    """A node with the pod of its agent, which is ready if the test says so."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self.name = f"node-{token_hex(4)}"
        self.pod = f"agent-{self.name}"
        self._control_plane = control_plane

    async def join(self) -> None:
        """Make the node and the pod."""
        shipped = await template(self._control_plane, "daemonset/vcpuset-agent", "vcpuset-agent")
        pod = {
            "metadata": {"name": self.pod, "labels": shipped["metadata"]["labels"]},
            "spec": {**shipped["spec"], "nodeName": self.name},
        }
        for path, body in (("/api/v1/nodes", {"metadata": {"name": self.name}}), (AGENTS, pod)):
            made = await self._control_plane.request("POST", path, body)
            assert made.status == http.client.CREATED, made.body

    async def say(self, *, ready: bool) -> None:
        """Be the kubelet, or the node controller in its stead."""
        status = {"conditions": [{"type": "Ready", "status": str(ready)}]}
        said = await self._control_plane.request("PATCH", f"{AGENTS}/{self.pod}/status", {"status": status})
        assert said.status == http.client.OK, said.body

    async def account(self) -> Path:
        """The kubeconfig of its agent."""
        return await self._control_plane.service_account_kubeconfig("vcpuset-agent", "vcpuset-agent", self.pod)


class World:
    """Starts operators, and knows what they asked for."""

    def __init__(self, control_plane: ControlPlane, namespace: str, socket_root: Path, stack: AsyncExitStack) -> None:
        self.control_plane = control_plane
        self._namespace = namespace
        self._socket_root = socket_root
        self._stack = stack
        self._since = control_plane.audit_offset()

    async def controller(self, *flags: str) -> OperatorProcess:
        """Start a controller, for the sets of the test."""
        shipped = await template(self.control_plane, "deployment/vcpuset-controller", "vcpuset-system")
        arguments = [each for each in shipped["spec"]["containers"][0]["args"][1:] if "--http-address" not in each]
        assert "--agent-namespace=vcpuset-agent" in arguments
        process = OperatorProcess(
            self.control_plane,
            *arguments,
            "--leader-elect-namespace=vcpuset-system",
            f"--namespace={self._namespace}",
            "--agent-grace-seconds=2",
            *flags,
            kubeconfig=await self.control_plane.service_account_kubeconfig("vcpuset-system", "vcpuset-controller"),
        )
        return await self._stack.enter_async_context(process)

    async def agent(self, node: Node, proxy: FaultProxy | None = None) -> OperatorProcess:
        """Start the agent of a node."""
        account = await node.account()
        process = OperatorProcess(
            self.control_plane,
            f"--node-name={node.name}",
            f"--namespace={self._namespace}",
            socket_root=self._socket_root,
            kubeconfig=account if proxy is None else proxy.kubeconfig(account),
        )
        return await self._stack.enter_async_context(process)

    def asked(self) -> list[AuditEvent]:
        """What the controllers have asked for that is about the sets of nodes."""
        found = [each for each in self.control_plane.audit_events(self._since) if each.user == CONTROLLER]
        return [each for each in found if each.subresource == "status" or "nodeName!" in unquote(each.request_uri)]

    def writes(self) -> int:
        """How many statuses the controllers have written."""
        return sum(each.is_write and each.code == http.client.OK for each in self.asked())

    async def looked_again(self, controller: OperatorProcess, times: int = 2) -> None:
        """Wait until the controller has listed the sets of nodes some more times."""

        def lists() -> int:
            return sum(each.verb == "list" for each in self.asked())

        before = lists()
        await until(lambda: lists() >= before + times, WAIT, lambda: f"more lists; {controller.tail()}")


@pytest.fixture
async def world(control_plane: ControlPlane, namespace: str, socket_root: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(control_plane, namespace, socket_root, stack)


@pytest.fixture
async def node(control_plane: ControlPlane) -> AsyncIterator[Node]:
    made = Node(control_plane)
    await made.join()
    await made.say(ready=True)
    yield made
    await control_plane.request("DELETE", f"{AGENTS}/{made.pod}?gracePeriodSeconds=0")


@pytest.fixture
async def machine(folder: Path) -> AsyncIterator[FaultyMonitor]:
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as running:
        yield running


def is_reported(seen: Seen) -> bool:
    """Whether the present spec is said to have no agent."""
    ready = seen.condition("Ready")
    return (ready.get("reason"), ready.get("observedGeneration")) == (
        "AgentUnavailable",
        seen.body["metadata"]["generation"],
    )


async def reported(user: User, name: str, controller: OperatorProcess) -> Seen:
    """Wait until a set is said to have no agent."""
    try:
        return await user.wait(name, is_reported, "AgentUnavailable", WAIT)
    except TimeoutError as error:
        raise AssertionError(controller.tail()) from error


async def test_the_sets_of_a_dead_agent_are_unknown_until_it_is_back(
    world: World, user: User, node: Node, machine: FaultyMonitor
) -> None:
    controller = await world.controller()
    agent = await world.agent(node)
    await user.create("vm", 2, nodeName=node.name)
    await user.wait_ready("vm")
    await world.looked_again(controller)
    assert (await user.get("vm")).ready

    agent.kill()
    await node.say(ready=False)
    seen = await reported(user, "vm", controller)
    assert seen.states == UNKNOWN
    assert node.name in seen.message
    assert (seen.vcpus, seen.current) == (2, True)
    got = await world.control_plane.kubectl(
        "wait", "vcs/vm", "-n", user.namespace, "--for=condition=Ready", "--timeout=1s", check=False
    )
    assert got.returncode != 0

    # The report is about each new spec, and is not taken for an observation of it.
    await user.change("vm", vcpus=3)
    seen = await reported(user, "vm", controller)
    assert (seen.vcpus, seen.current) == (2, False)

    # Nothing is written while nothing changes.
    await world.looked_again(controller)
    assert world.writes() == 2
    assert "vcpuset_sets_without_agent 1.0" in controller.metrics()

    await agent.start()
    seen = await user.wait_ready("vm")
    assert seen.vcpus == 3
    await node.say(ready=True)
    await until(lambda: "vcpuset_sets_without_agent 0.0" in controller.metrics(), WAIT, "the metric")
    await world.looked_again(controller)
    assert (await user.get("vm")).ready
    assert world.writes() == 2
    reasons = [each["reason"] for each in await user.events("vm")]
    assert reasons[:1] == ["AgentUnavailable"]


async def test_an_agent_that_could_not_reach_the_api_server_replaces_the_report_when_it_can(
    world: World, user: User, node: Node, machine: FaultyMonitor, tmp_path: Path
) -> None:
    async with FaultProxy(world.control_plane, tmp_path) as proxy:
        controller = await world.controller()
        agent = await world.agent(node, proxy)
        await user.create("vm", 2, nodeName=node.name)
        before = await user.wait_ready("vm")

        proxy.block()
        await node.say(ready=False)
        await reported(user, "vm", controller)
        proxy.unblock()
        seen = await user.wait_ready("vm")
        await node.say(ready=True)

        assert seen.status["observedGeneration"] == before.status["observedGeneration"]
        assert seen.vcpus == 2
        # Both as ever, by the same process.
        agent.require_running()


async def test_an_agent_that_works_but_is_never_ready_and_the_controller_do_not_write_against_each_other(
    world: World, user: User, node: Node, machine: FaultyMonitor
) -> None:
    controller = await world.controller()
    await world.agent(node)
    await user.create("vm", 2, nodeName=node.name)
    await user.wait_ready("vm")
    await node.say(ready=False)

    await until(lambda: world.writes() == 1, WAIT, lambda: f"the report; {controller.tail()}")
    await user.wait_ready("vm")
    # The controller understands that the answer came from an agent.
    words = f"node {node.name}: its VCPUSets are no longer reported"
    await until(lambda: words in controller.text(), WAIT, lambda: f"{words!r}; {controller.tail()}")
    await user.wait_ready("vm")


async def test_a_set_of_a_node_without_any_agent_is_reported_and_keeps_what_its_status_says(
    world: World, user: User
) -> None:
    controller = await world.controller()
    await user.create("new", 2, nodeName="node-without-agent")
    await user.create("old", 2, nodeName="node-without-agent")
    request = {
        "slot": 1,
        "path": "/machine/peripheral/vcpu1",
        "threadID": 7,
        "requestedAt": "2026-01-01T00:00:00.000000Z",
        "attempts": 2,
    }
    foreign = {
        "type": "Backup",
        "status": "True",
        "reason": "Done",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    left = {
        "observedGeneration": 1,
        "vcpus": 2,
        "selector": "vcpuset.dev/name=old",
        "machine": {"minVCPUs": 1, "maxVCPUs": 8},
        "unplug": {"startedAt": "2026-01-01T00:00:00.000000Z", "requests": [request]},
        "conditions": [foreign],
    }
    path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{user.namespace}/vcpusets/old/status"
    assert (await world.control_plane.request("PATCH", path, {"status": left})).status == http.client.OK

    new, old = [await reported(user, name, controller) for name in ("new", "old")]

    assert (new.status["observedGeneration"], new.vcpus, new.states) == (-1, None, UNKNOWN)
    assert old.states == UNKNOWN
    assert {**old.status, "conditions": [old.condition("Backup")]} == left
    assert [each["type"] for each in new.status["conditions"]] == ["Ready", "Reconciling", "Stalled"]

    # The same at once for a set that comes later: the node has been without an agent for long.
    await user.create("later", 2, nodeName="node-without-agent")
    await reported(user, "later", controller)
    assert "vcpuset_sets_without_agent 3.0" in controller.metrics()


async def test_only_the_leader_of_two_replicas_reports(world: World, user: User) -> None:
    replicas = [await world.controller(), await world.controller()]
    await user.create("vm", 2, nodeName="node-without-agent")
    await reported(user, "vm", replicas[0])

    says = [f'leader_election_master_status{{name="vcpuset-controller"}} {n}.0' for n in (0, 1)]
    (leader,) = (each for each in replicas if says[1] in each.metrics())
    (standby,) = (each for each in replicas if says[0] in each.metrics())
    await world.looked_again(leader)
    assert world.writes() == 1
    assert "has no ready agent: 1 VCPUSets reported" in leader.text()
    assert "ready agent" not in standby.text()

    # The next leader finds the report, and has nothing to write.
    await leader.stop()
    await until(lambda: "vcpuset_sets_without_agent 1.0" in standby.metrics(), WAIT, standby.tail)
    assert world.writes() == 1


async def test_a_controller_with_a_label_selector_leaves_other_sets_to_others(world: World, user: User) -> None:
    controller = await world.controller("--label-selector=vcpuset.dev/shard notin (b)")
    await user.create("other", 2, labels={"vcpuset.dev/shard": "b"}, nodeName="node-without-agent")
    await user.create("mine", 2, nodeName="node-without-agent")
    await reported(user, "mine", controller)
    assert (await user.get("other")).condition("Ready") == {}
    assert world.writes() == 1


async def test_a_controller_that_may_not_list_the_agents_pods_reports_nothing_and_says_so_once(
    world: World, user: User
) -> None:
    controller = await world.controller("--agent-namespace=default")
    await user.create("vm", 2, nodeName="node-without-agent")

    await until(lambda: "in deploy/ grant" in controller.text(), WAIT, controller.tail)
    await world.looked_again(controller, times=4)
    assert controller.text().count("reporting the VCPUSets of nodes without an agent: GET") == 1
    assert (await user.get("vm")).status == {"observedGeneration": -1}


async def test_the_controller_may_write_nothing_else_into_the_status_of_a_nodes_set(world: World, user: User) -> None:
    await user.create("vm", 2, nodeName="node-without-agent")
    time = "2026-01-01T00:00:00Z"
    ready = {
        "type": "Ready",
        "status": "Unknown",
        "reason": "AgentUnavailable",
        "message": "",
        "lastTransitionTime": time,
    }
    path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{user.namespace}/vcpusets/vm/status"

    async def write(**status: Any) -> tuple[int, str]:
        as_controller = {"Impersonate-User": CONTROLLER}
        answer = await world.control_plane.request(
            "PATCH", f"{path}?dryRun=All", {"status": status}, headers=as_controller
        )
        return answer.status, str(answer.body.get("message", ""))

    async def refused(**status: Any) -> str:
        code, message = await write(**status)
        assert code == http.client.FORBIDDEN, (status, message)
        return message

    async def enforced() -> bool:
        return (await write(vcpus=3))[0] == http.client.FORBIDDEN

    await until(enforced, WAIT, "the policy")
    assert (await write(conditions=[ready]))[0] == http.client.OK
    for other in ({"status": "True"}, {"reason": "Converged"}, {"type": "Other"}):
        assert "only report that no agent is ready" in await refused(conditions=[{**ready, **other}])
    for field, value in (
        ("vcpus", 3),
        ("observedGeneration", 1),
        ("machine", {"maxVCPUs": 3}),
        ("selector", "a=b"),
        ("onlineVCPUs", 1),
        ("unplug", {"startedAt": time}),
    ):
        assert "may not change what the agent" in await refused(conditions=[ready], **{field: value})
