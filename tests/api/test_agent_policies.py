"""What an agent can write with its pod's token, as the policies vcpuset-agent-… have it."""

import http.client
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from secrets import token_hex
from typing import Any, Final

import pytest
import pytest_asyncio

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.wait import until
from harness.world import manifest

__all__: list[str] = []

Json = dict[str, Any]
AGENTS: Final = "vcpuset-agent"
NODES: Final = ("node-1", "node-2")
SETS: Final = "/apis/vcpuset.dev/v1alpha1/namespaces/default/vcpusets"
EVENTS: Final = "/apis/events.k8s.io/v1/namespaces/default/events"


class Agent:
    """Whoever has a token of the agents' account: the answers to plain requests, which do not begin with a GET."""

    def __init__(self, cluster: ControlPlane, token: str) -> None:
        self._cluster = cluster
        self._token = token

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """The status of the answer, and the API server's message if it refuses."""
        host = self._cluster.url.removeprefix("https://")
        trusted = ssl.create_default_context(cafile=str(self._cluster.directory / "certificates" / "apiserver.crt"))
        connection = http.client.HTTPSConnection(host, timeout=30, context=trusted)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            return answer.status, str(json.loads(answer.read()).get("message", ""))
        finally:
            connection.close()

    def report(self, name: str) -> tuple[int, str]:
        """Write the status of a set."""
        return self.ask("PATCH", f"{SETS}/{name}/status", {"status": {"vcpus": 2}})

    def scale(self, name: str, vcpus: int = 2) -> tuple[int, str]:
        """Write the count of a set."""
        return self.ask("PATCH", f"{SETS}/{name}/scale", {"spec": {"replicas": vcpus}})


async def agent_of(cluster: ControlPlane, node: str) -> Agent:
    """The agent of a node: with the token that the kubelet would give to its pod."""
    words = ("create", "token", "vcpuset-agent", "-n", AGENTS)
    made = await cluster.kubectl(*words, "--bound-object-kind=Pod", f"--bound-object-name=agent-{node}")
    return Agent(cluster, made.stdout.strip())


async def set_of(cluster: ControlPlane, node: str | None, vcpus: int | None = 2) -> str:
    """A new set of a node; its name."""
    name = f"vm-{token_hex(4)}"
    body = manifest("default", name, vcpus, nodeName=node)
    assert (await cluster.request("POST", SETS, body)).status == http.client.CREATED
    return name


async def reported_set_of(cluster: ControlPlane, node: str | None, vcpus: int | None = None) -> str:
    """One whose operator has written its status, and that has no count unless one is given."""
    name = await set_of(cluster, node, vcpus)
    status = {"vcpus": 2, "selector": f"vcpuset.dev/name={name}"}
    answer = await cluster.request("PATCH", f"{SETS}/{name}/status", {"status": status})
    assert answer.status == http.client.OK
    return name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ControlPlane]:
    """An API server with the agent installed and a pod of it on each of two nodes, and the policies in force."""
    async with ControlPlane() as running:
        await running.install_crd()
        await running.kubectl("apply", "--server-side", "-k", REPOSITORY / "deploy" / "overlays" / "agent")
        got = await running.kubectl("get", "daemonset/vcpuset-agent", "-n", AGENTS, "-o", "json")
        spec = json.loads(got.stdout)["spec"]["template"]["spec"]
        for node in NODES:
            await running.request("POST", "/api/v1/nodes", {"metadata": {"name": node}})
            body = {"metadata": {"name": f"agent-{node}"}, "spec": {**spec, "nodeName": node}}
            made = await running.request("POST", f"/api/v1/namespaces/{AGENTS}/pods", body)
            assert made.status == http.client.CREATED, made.body
        foreign = await reported_set_of(running, NODES[1])
        agent = await agent_of(running, NODES[0])

        async def in_force() -> bool:
            told = (
                agent.report(foreign)[1],
                agent.ask("PATCH", f"{SETS}/{foreign}/scale?dryRun=All", {"spec": {"replicas": 2}})[1],
                agent.ask("POST", EVENTS, event("x", kind="Pod"))[1],
            )
            return all("ValidatingAdmissionPolicy" in message for message in told)

        # The API server takes new roles and policies into force some moments later.
        await until(in_force, 60, "the policies of the agent", interval=0.5)
        yield running


# --- sets ---------------------------------------------------------------------------------------------------------


async def test_an_agent_reports_on_its_own_nodes_sets(cluster: ControlPlane) -> None:
    for node in NODES:
        assert (await agent_of(cluster, node)).report(await set_of(cluster, node)) == (200, "")


async def test_an_agent_cannot_report_on_another_nodes_set(cluster: ControlPlane) -> None:
    agent = await agent_of(cluster, "node-1")
    status, message = agent.report(await set_of(cluster, "node-2"))
    assert status == http.client.FORBIDDEN
    assert "the agent of node node-1 may not write the status of a VCPUSet of node node-2" in message


async def test_an_agent_cannot_report_on_the_controllers_set(cluster: ControlPlane) -> None:
    agent = await agent_of(cluster, "node-1")
    status, message = agent.report(await set_of(cluster, None))
    assert status == http.client.FORBIDDEN
    assert "the agent of node node-1 may not write the status of a VCPUSet of no node" in message


async def test_a_token_that_is_bound_to_no_pod_reports_on_nothing(cluster: ControlPlane) -> None:
    made = await cluster.kubectl("create", "token", "vcpuset-agent", "-n", AGENTS)
    agent = Agent(cluster, made.stdout.strip())
    name = await set_of(cluster, "node-1")
    for status, message in (agent.report(name), agent.ask("POST", EVENTS, event(name))):
        assert status == http.client.FORBIDDEN
        assert "the agent's token names no node" in message


async def test_an_agent_follows_a_set_that_moves(cluster: ControlPlane) -> None:
    name = await set_of(cluster, "node-1")
    here, there = await agent_of(cluster, "node-1"), await agent_of(cluster, "node-2")
    await cluster.request("PATCH", f"{SETS}/{name}", {"spec": {"nodeName": "node-2"}})
    assert here.report(name)[0] == http.client.FORBIDDEN
    assert there.report(name) == (200, "")


async def test_an_agent_that_was_given_more_rights_by_mistake_still_writes_nothing_else(cluster: ControlPlane) -> None:
    binding = "too-much"
    account = f"--serviceaccount={AGENTS}:vcpuset-agent"
    await cluster.kubectl("create", "clusterrolebinding", binding, "--clusterrole=vcpuset-edit", account)
    agent = await agent_of(cluster, "node-1")
    name = await set_of(cluster, "node-1")

    def assert_refused(method: str, path: str, body: Json | None = None) -> None:
        status, message = agent.ask(method, path, body)
        assert status == http.client.FORBIDDEN, message
        assert "an agent may only write the status of a VCPUSet, and its count while none is set" in message

    async def in_force() -> bool:
        return "cannot delete resource" not in agent.ask("DELETE", f"{SETS}/{name}")[1]

    try:
        await until(in_force, 60, "the additional rights", interval=0.2)
        assert_refused("DELETE", f"{SETS}/{name}")
        assert_refused("DELETE", SETS)
        assert_refused("PATCH", f"{SETS}/{name}", {"spec": {"vcpus": 4}})
        assert_refused("PATCH", f"{SETS}/{await reported_set_of(cluster, 'node-1')}", {"spec": {"vcpus": 4}})
        spec = {"vcpus": 2, "nodeName": "node-1", "monitor": {"unix": {"path": "vm/qmp.sock"}}}
        body = {"apiVersion": "vcpuset.dev/v1alpha1", "kind": "VCPUSet", "metadata": {"name": "new"}, "spec": spec}
        assert_refused("POST", SETS, body)
    finally:
        await cluster.kubectl("delete", "clusterrolebinding", binding)


# --- pods of machines ---------------------------------------------------------------------------------------------


async def test_an_agent_resizes_pods_of_its_own_node_only_and_only_where_the_role_is_bound(
    cluster: ControlPlane,
) -> None:
    agent = await agent_of(cluster, NODES[0])
    account = {"metadata": {"name": "default"}}
    await cluster.request("POST", "/api/v1/namespaces/default/serviceaccounts", account)
    resources = {"limits": {"cpu": "1"}}
    for node in NODES:
        capacity = {"cpu": "8", "memory": "8Gi", "pods": "9"}
        status = {"status": {"capacity": capacity, "allocatable": capacity}}
        assert (await cluster.request("PATCH", f"/api/v1/nodes/{node}/status", status)).status == http.client.OK
        container = {"name": "qemu", "image": "qemu", "resources": resources}
        body = {"metadata": {"name": f"vm-of-{node}"}, "spec": {"nodeName": node, "containers": [container]}}
        made = await cluster.request("POST", "/api/v1/namespaces/default/pods", body)
        assert made.status == http.client.CREATED, made.body
        running = {
            "phase": "Running",
            "containerStatuses": [{**container, "imageID": "", "ready": True, "restartCount": 0}],
        }
        path = f"/api/v1/namespaces/default/pods/vm-of-{node}/status"
        assert (await cluster.request("PATCH", path, {"status": running})).status == http.client.OK

    def resize(node: str, part: str = "/resize") -> tuple[int, str]:
        larger = {"limits": {"cpu": "2"}, "requests": {"cpu": "2"}}
        body = {"spec": {"containers": [{"name": "qemu", "image": "qemu", "resources": larger}]}}
        return agent.ask("PATCH", f"/api/v1/namespaces/default/pods/vm-of-{node}{part}", body)

    assert 'cannot patch resource "pods/resize"' in resize(NODES[0])[1]
    words = ("--clusterrole=vcpuset-pods", f"--serviceaccount={AGENTS}:vcpuset-agent", "-n", "default")
    await cluster.kubectl("create", "rolebinding", "vcpuset-agent-pods", *words)

    async def bound() -> bool:
        return resize(NODES[0])[0] == http.client.OK

    await until(bound, 60, lambda: f"the right to take effect: {resize(NODES[0])}", interval=0.5)
    code, message = resize(NODES[1])
    assert code == http.client.FORBIDDEN
    assert "an agent may only resize pods of its own node" in message
    # Whatever else it was given by mistake, it changes pods in no other way.
    await cluster.kubectl("create", "role", "pods", "--verb=patch", "--resource=pods", "-n", "default")
    await cluster.kubectl("create", "rolebinding", "pods", "--role=pods", *words[1:])

    async def refused() -> bool:
        return "an agent may only resize a pod" in resize(NODES[0], part="")[1]

    await until(refused, 60, lambda: f"the policy: {resize(NODES[0], part='')}", interval=0.5)


# --- counts -------------------------------------------------------------------------------------------------------


async def test_an_agent_sets_the_count_of_its_own_nodes_sets_once(cluster: ControlPlane) -> None:
    for node in NODES:
        agent, name = await agent_of(cluster, node), await reported_set_of(cluster, node)
        assert agent.scale(name, 2) == (200, "")
        for vcpus in (2, 3):
            status, message = agent.scale(name, vcpus)
            assert status == http.client.FORBIDDEN
            assert "an agent may not change the count of a VCPUSet" in message
        assert (await cluster.request("GET", f"{SETS}/{name}")).body["spec"]["vcpus"] == 2


async def test_an_agent_cannot_change_the_count_of_a_set_that_was_created_with_one(cluster: ControlPlane) -> None:
    agent = await agent_of(cluster, "node-1")
    status, message = agent.scale(await reported_set_of(cluster, "node-1", 2), 3)
    assert status == http.client.FORBIDDEN
    assert "an agent may not change the count of a VCPUSet; it may only set it while spec.vcpus is not set" in message


@pytest.mark.parametrize(("node", "whose"), [("node-2", "node node-2"), (None, "no node")])
async def test_an_agent_cannot_set_the_count_of_anothers_set(
    cluster: ControlPlane, node: str | None, whose: str
) -> None:
    agent, name = await agent_of(cluster, "node-1"), await reported_set_of(cluster, node)
    # Its own set in the same namespace makes no difference.
    assert agent.scale(await reported_set_of(cluster, "node-1")) == (200, "")
    status, message = agent.scale(name)
    assert status == http.client.FORBIDDEN
    assert f"the agent of node node-1 may not set the count of a VCPUSet of {whose}" in message
    assert "vcpus" not in (await cluster.request("GET", f"{SETS}/{name}")).body["spec"]


async def test_an_agent_cannot_set_a_count_before_a_status_has_been_written(cluster: ControlPlane) -> None:
    # Of a set that was created this moment, the API server may not know the node yet when it asks its policies.
    agent = await agent_of(cluster, "node-1")
    status, message = agent.scale(await set_of(cluster, "node-1", None))
    assert status == http.client.FORBIDDEN
    assert "an agent may not set the count of a VCPUSet before its status has been written" in message
    assert agent.scale(await set_of(cluster, "node-2", None))[0] == http.client.FORBIDDEN


async def test_a_token_that_is_bound_to_no_pod_sets_no_count(cluster: ControlPlane) -> None:
    made = await cluster.kubectl("create", "token", "vcpuset-agent", "-n", AGENTS)
    for node in ("node-1", None):
        status, message = Agent(cluster, made.stdout.strip()).scale(await reported_set_of(cluster, node))
        assert status == http.client.FORBIDDEN
        assert "the agent's token names no node" in message


async def test_a_count_that_is_removed_may_be_set_once_more(cluster: ControlPlane) -> None:
    agent, name = await agent_of(cluster, "node-1"), await reported_set_of(cluster, "node-1")
    assert agent.scale(name) == (200, "")
    await cluster.request("PATCH", f"{SETS}/{name}", {"spec": {"vcpus": None}})
    assert agent.scale(name) == (200, "")


async def test_the_policies_of_the_agents_hinder_nobody_else(cluster: ControlPlane) -> None:
    for name in (await set_of(cluster, "node-1", None), await reported_set_of(cluster, None, 2)):
        for vcpus in (3, 4):
            body = {"spec": {"replicas": vcpus}}
            assert (await cluster.request("PATCH", f"{SETS}/{name}/scale", body)).status == http.client.OK


# --- Events -------------------------------------------------------------------------------------------------------


def event(
    name: str,
    *,
    kind: str = "VCPUSet",
    version: str = "vcpuset.dev/v1alpha1",
    namespace: str = "default",
    controller: str = "vcpuset.dev/operator",
) -> Json:
    """An Event about a set, as the recorder of the agent of node-1 writes it."""
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{token_hex(8)}"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": controller,
        "reportingInstance": "agent-node-1",
        "type": "Normal",
        "reason": "Plugging",
        "action": "Plug",
        "note": "2 to 4",
        "regarding": {"apiVersion": version, "kind": kind, "namespace": namespace, "name": name},
    }


SERIES: Final = {"series": {"count": 2, "lastObservedTime": "2026-01-01T00:01:00.000000Z"}}


async def test_an_agent_tells_of_sets_and_counts_the_repeats(cluster: ControlPlane) -> None:
    agent = await agent_of(cluster, "node-1")
    told = event("web")
    assert agent.ask("POST", EVENTS, told)[0] == http.client.CREATED
    assert agent.ask("PATCH", f"{EVENTS}/{told['metadata']['name']}", SERIES) == (200, "")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"kind": "Pod", "version": "v1"}, "may only write Events about VCPUSets", id="about a Pod"),
        pytest.param({"version": "other.dev/v1"}, "may only write Events about VCPUSets", id="about another's VCPUSet"),
        pytest.param({"controller": "kubelet"}, "reportingController vcpuset.dev/operator", id="as the kubelet"),
    ],
)
async def test_an_agent_cannot_tell_of_others_or_as_others(
    cluster: ControlPlane, changed: dict[str, str], message: str
) -> None:
    agent = await agent_of(cluster, "node-1")
    status, said = agent.ask("POST", EVENTS, event("web", **changed))
    assert status == http.client.FORBIDDEN
    assert message in said


async def test_an_agent_cannot_change_what_others_have_told(cluster: ControlPlane) -> None:
    others = event("web", kind="Pod", version="v1", controller="kubelet")
    assert (await cluster.request("POST", EVENTS, others)).status == http.client.CREATED
    agent = await agent_of(cluster, "node-1")
    status, said = agent.ask("PATCH", f"{EVENTS}/{others['metadata']['name']}", SERIES)
    assert status == http.client.FORBIDDEN
    assert "Events with the reportingController vcpuset.dev/operator" in said
