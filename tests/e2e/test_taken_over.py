"""What somebody can do who has taken over an operator: its pod's real token, and requests that it never makes.

The operators are installed as shipped and run (see `harness.kubelet`); the attacker has read the token of one of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
import pytest_asyncio

from harness.cache import REPOSITORY
from harness.container import WHY_NOT
from harness.controlplane import Answer, ControlPlane
from harness.kubelet import Nodes, cluster, install
from harness.wait import until
from harness.world import manifest

# The pods are played in the module's event loop.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
]

SETS: Final = "/apis/vcpuset.dev/v1alpha1/namespaces/{ns}/vcpusets"
EVENTS: Final = "/apis/events.k8s.io/v1/namespaces/{ns}/events"
LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces/vcpuset-system/leases"
RBAC: Final = "/apis/rbac.authorization.k8s.io/v1"

POLICY: Final = "ValidatingAdmissionPolicy"
"""In the message of what a policy refuses; what RBAC refuses says `cannot`."""

Json = dict[str, Any]

SERIES: Final[Json] = {"series": {"count": 9, "lastObservedTime": "2026-01-01T00:00:00.000000Z"}}
"""All that the API server lets anybody change of an Event."""


@dataclass(frozen=True)
class World:
    """A cluster with both shapes installed.

    In `namespace` are a set of each node and one without, named for that, and one of node-b without a count, as its
    machine cannot be observed.
    """

    control_plane: ControlPlane
    nodes: Nodes
    namespace: str

    async def ask(self, token: str, method: str, path: str, body: Json | None = None, **headers: str) -> Answer:
        """Make a request with somebody's token."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers["Authorization"] = f"Bearer {token}"
        return await self.control_plane.request(method, path.format(ns=self.namespace), body, headers=headers)

    def agent(self, node: str = "node-a") -> str:
        """The token of the agent on a node."""
        return self.nodes.pod("vcpuset-agent", node).token

    def controller(self) -> str:
        """The token of a replica of the controller."""
        return min(self.nodes.pods, key=lambda each: (each.namespace != "vcpuset-system", each.name)).token


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """The cluster, once the policies are in force."""
    async with cluster("node-a", "node-b") as (control_plane, nodes):
        await install(control_plane, nodes)
        namespace = await control_plane.namespace("tenant")
        world = World(control_plane, nodes, namespace)
        for name in ("node-a", "node-b", "nobody"):
            body = manifest(namespace, name, nodeName=None if name == "nobody" else name)
            assert (await control_plane.request("POST", SETS.format(ns=namespace), body)).status == 201
        body = manifest(namespace, "without-count", None, nodeName="node-b")
        assert (await control_plane.request("POST", SETS.format(ns=namespace), body)).status == 201
        for kind, data in (("secrets", "stringData"), ("configmaps", "data")):
            body = {"metadata": {"name": "private"}, data: {"key": "value"}}
            answer = await control_plane.request("POST", f"/api/v1/namespaces/{namespace}/{kind}", body)
            assert answer.status == 201
        others = event(namespace, reportingController="kubelet", reportingInstance="node-b")
        others["metadata"]["name"] = "somebody-elses"
        assert (await control_plane.request("POST", EVENTS.format(ns=namespace), others)).status == 201
        # A policy takes force some moments after it is written.
        await until(lambda: refused(world), 60, "the policies to be in force", interval=0.5)
        yield world


async def refused(world: World) -> bool:
    """Whether each policy refuses what it should; that of counts, once the agent of node-b has written the status."""
    asked = [
        await world.ask(world.agent(), "PATCH", f"{SETS}/node-b/status", {"status": {"vcpus": 1}}),
        await world.ask(world.agent(), "PATCH", f"{SETS}/without-count/scale?dryRun=All", {"spec": {"replicas": 9}}),
        await world.ask(world.agent(), "POST", EVENTS, event(world.namespace, reportingInstance="other")),
    ]
    return all(answer.status == 403 for answer in asked) and "may not set the count" in asked[1].body["message"]


def event(namespace: str, **other: Any) -> Json:
    """An Event as an agent writes them, but for what is given."""
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": "made-up-", "namespace": namespace},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Normal",
        "reason": "Converged",
        "action": "Reconcile",
        "note": "made up",
        "reportingController": "vcpuset.dev/operator",
        "reportingInstance": "vcpuset-agent-other",
        "regarding": {
            "apiVersion": "vcpuset.dev/v1alpha1",
            "kind": "VCPUSet",
            "name": "node-a",
            "namespace": namespace,
        },
        **other,
    }


# --- the agent --------------------------------------------------------------------------------------------------------


async def test_an_agents_token_does_what_it_is_for(world: World) -> None:
    """Else each refusal below would prove nothing."""
    pod = world.nodes.pod("vcpuset-agent", "node-a")
    status = await world.ask(pod.token, "PATCH", f"{SETS}/node-a/status", {"status": {"onlineVCPUs": 7}})
    assert (status.status, status.body["status"]["onlineVCPUs"]) == (200, 7)
    told = await world.ask(pod.token, "POST", EVENTS, event(world.namespace, reportingInstance=pod.name))
    assert told.status == 201, told.body


AGENT: Final[dict[str, tuple[str, str, Json | None, str]]] = {
    # What is asked: method, path, body, and what the refusal has to say.
    "the status of another node's set": (
        "PATCH", f"{SETS}/node-b/status", {"status": {"vcpus": 7}},
        "the agent of node node-a may not write the status of a VCPUSet of node node-b",
    ),
    "the status of a set without a node": (
        "PATCH", f"{SETS}/nobody/status", {"status": {"vcpus": 7}},
        "the agent of node node-a may not write the status of a VCPUSet of no node",
    ),
    "replacing a status": ("PUT", f"{SETS}/node-a/status", {}, "cannot update"),
    "the count of its own set": ("PATCH", f"{SETS}/node-a", {"spec": {"vcpus": 9}}, "cannot patch"),
    "the node of its own set": ("PATCH", f"{SETS}/node-a", {"spec": {"nodeName": "node-b"}}, "cannot patch"),
    "pulling a set to its node": ("PATCH", f"{SETS}/node-b", {"spec": {"nodeName": "node-a"}}, "cannot patch"),
    "the scale of its own set": (
        "PATCH", f"{SETS}/node-a/scale", {"spec": {"replicas": 9}}, "an agent may not change the count of a VCPUSet",
    ),
    "the scale of another node's set": ("PATCH", f"{SETS}/node-b/scale", {"spec": {"replicas": 9}}, POLICY),
    "the first count of another node's set": (
        "PATCH", f"{SETS}/without-count/scale", {"spec": {"replicas": 9}},
        "the agent of node node-a may not set the count of a VCPUSet of node node-b",
    ),
    "the same as a replacement": ("PUT", f"{SETS}/without-count/scale", {}, "cannot update"),
    "reading a scale": ("GET", f"{SETS}/node-a/scale", None, "cannot get"),
    "labels of its own set": ("PATCH", f"{SETS}/node-a", {"metadata": {"labels": {"a": "b"}}}, "cannot patch"),
    "a finalizer": ("PATCH", f"{SETS}/node-a", {"metadata": {"finalizers": ["a.b/c"]}}, "cannot patch"),
    "deleting its own set": ("DELETE", f"{SETS}/node-a", None, "cannot delete"),
    "deleting all sets": ("DELETE", SETS, None, "cannot deletecollection"),
    "a new set": ("POST", SETS, {}, "cannot create"),
    "a Secret": ("GET", "/api/v1/namespaces/{ns}/secrets/private", None, "cannot get"),
    "all Secrets": ("GET", "/api/v1/secrets", None, "cannot list"),
    "watching Secrets": ("GET", "/api/v1/namespaces/{ns}/secrets?watch=1", None, "cannot watch"),
    "a ConfigMap": ("GET", "/api/v1/namespaces/{ns}/configmaps/private", None, "cannot get"),
    "ConfigMaps of its own namespace": ("GET", "/api/v1/namespaces/vcpuset-agent/configmaps", None, "cannot list"),
    "pods": ("GET", "/api/v1/pods", None, "cannot list"),
    "a pod beside its own": ("POST", "/api/v1/namespaces/vcpuset-agent/pods", {}, "cannot create"),
    "nodes": ("GET", "/api/v1/nodes", None, "cannot list"),
    "its own node": ("PATCH", "/api/v1/nodes/node-a", {"spec": {"unschedulable": True}}, "cannot patch"),
    "namespaces": ("GET", "/api/v1/namespaces", None, "cannot list"),
    "the controller's Lease": ("GET", f"{LEASES}/vcpuset-controller", None, "cannot get"),
    "taking the controller's Lease": ("PUT", f"{LEASES}/vcpuset-controller", {}, "cannot update"),
    "a Lease of its own": ("POST", LEASES, {}, "cannot create"),
    "reading Events": ("GET", EVENTS, None, "cannot list"),
    "deleting Events": ("DELETE", EVENTS, None, "cannot deletecollection"),
    "an Event of the old API": ("POST", "/api/v1/namespaces/{ns}/events", {}, "cannot create"),
    "changing another component's Event": ("PATCH", f"{EVENTS}/somebody-elses", SERIES, POLICY),
    "a token of the controller": (
        "POST", "/api/v1/namespaces/vcpuset-system/serviceaccounts/vcpuset-controller/token", {}, "cannot create",
    ),
    "another token of its own": (
        "POST", "/api/v1/namespaces/vcpuset-agent/serviceaccounts/vcpuset-agent/token", {}, "cannot create",
    ),
    "binding a role": ("POST", f"{RBAC}/namespaces/{{ns}}/rolebindings", {}, "cannot create"),
    "binding a role for the whole cluster": ("POST", f"{RBAC}/clusterrolebindings", {}, "cannot create"),
    "rules for its own role": ("PATCH", f"{RBAC}/clusterroles/vcpuset-agent", {"rules": []}, "cannot patch"),
    "lifting the policy": (
        "DELETE", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/vcpuset-agent-node", None,
        "cannot delete",
    ),
    "another definition": (
        "PATCH", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/vcpusets.vcpuset.dev", {}, "cannot patch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attempt", AGENT)
async def test_an_agent_is_refused(world: World, attempt: str) -> None:
    method, path, body, says = AGENT[attempt]
    answer = await world.ask(world.agent(), method, path, body)
    assert answer.status == 403, answer.body
    assert says in answer.body["message"]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"reportingController": "kubelet"}, id="in another component's name"),
        pytest.param({"reportingInstance": "vcpuset-agent-other"}, id="in another agent's name"),
        pytest.param(
            {"regarding": {"apiVersion": "v1", "kind": "Pod", "name": "a", "namespace": "{ns}"}}, id="about a pod"
        ),
        pytest.param(
            {"regarding": {"apiVersion": "vcpuset.dev/v1alpha1", "kind": "VCPUSet", "name": "a", "namespace": "other"}},
            id="about a set of another namespace",
        ),
    ],
)
async def test_an_agent_writes_no_event(world: World, other: Json) -> None:
    pod = world.nodes.pod("vcpuset-agent", "node-a")
    about = {name: value.format(ns=world.namespace) for name, value in other.get("regarding", {}).items()}
    body = event(world.namespace, **{"reportingInstance": pod.name, **other, **({"regarding": about} if about else {})})
    answer = await world.ask(pod.token, "POST", EVENTS, body)
    # The API server itself refuses one about another namespace.
    assert (answer.status, POLICY in answer.body["message"]) in {(403, True), (422, False)}, answer.body


async def test_an_agent_changes_no_event_of_another_agent(world: World) -> None:
    theirs = world.nodes.pod("vcpuset-agent", "node-b")
    told = await world.ask(theirs.token, "POST", EVENTS, event(world.namespace, reportingInstance=theirs.name))
    assert told.status == 201
    path = f"{EVENTS}/{told.body['metadata']['name']}"
    mine = await world.ask(world.agent("node-a"), "PATCH", path, SERIES)
    assert (mine.status, POLICY in mine.body["message"]) == (403, True)
    assert (await world.ask(theirs.token, "PATCH", path, SERIES)).status == 200


async def test_an_agent_changes_nothing_else_through_the_status(world: World) -> None:
    path = f"{SETS}/node-a"
    before = (await world.control_plane.request("GET", path.format(ns=world.namespace))).body
    body = {
        "metadata": {"labels": {"a": "b"}, "finalizers": ["a.b/c"], "annotations": {"a": "b"}},
        "spec": {"vcpus": 9, "nodeName": "node-b"},
        "status": {"vcpus": 1},
    }
    answer = await world.ask(world.agent(), "PATCH", f"{path}/status", body)
    assert answer.status == 200
    after = (await world.control_plane.request("GET", path.format(ns=world.namespace))).body
    assert after["spec"] == before["spec"]
    for name in ("labels", "finalizers", "annotations"):
        assert after["metadata"].get(name) == before["metadata"].get(name)


@pytest.mark.parametrize("whom", ["system:serviceaccount:vcpuset-system:vcpuset-controller", "admin"])
async def test_an_agent_cannot_act_as(world: World, whom: str) -> None:
    answer = await world.ask(world.agent(), "GET", SETS, Impersonate_User=whom)
    assert (answer.status, "cannot impersonate" in answer.body["message"]) == (403, True)


async def test_a_token_that_names_no_node_writes_no_status_and_no_event(world: World) -> None:
    made = await world.control_plane.kubectl("create", "token", "vcpuset-agent", "-n", "vcpuset-agent")
    for node in ("node-a", "node-b", "nobody"):
        answer = await world.ask(made.stdout.strip(), "PATCH", f"{SETS}/{node}/status", {"status": {"vcpus": 7}})
        assert (answer.status, "names no node" in answer.body["message"]) == (403, True)
    answer = await world.ask(made.stdout.strip(), "POST", EVENTS, event(world.namespace))
    assert (answer.status, "names no node" in answer.body["message"]) == (403, True)


async def test_the_agent_of_another_node_is_refused_too(world: World) -> None:
    answer = await world.ask(world.agent("node-b"), "PATCH", f"{SETS}/node-a/status", {"status": {"vcpus": 7}})
    assert (answer.status, "the agent of node node-b" in answer.body["message"]) == (403, True)
    assert (await world.ask(world.agent("node-b"), "PATCH", f"{SETS}/node-b/status", {"status": {}})).status == 200


async def test_a_token_ends_with_its_pod(world: World) -> None:
    pod = world.nodes.pod("vcpuset-agent", "node-b")
    token = pod.token
    await world.control_plane.kubectl("delete", "pod", "-n", "vcpuset-agent", pod.name)

    async def worthless() -> bool:
        return (await world.ask(token, "GET", SETS)).status == 401

    await until(worthless, 90, "the token of a deleted pod to be refused", interval=0.5)
    await world.nodes.rolled_out("vcpuset-agent", "daemonset/vcpuset-agent")


# --- the controller ---------------------------------------------------------------------------------------------------

CONTROLLER: Final[dict[str, tuple[str, str, Json | None]]] = {
    "a count": ("PATCH", f"{SETS}/nobody", {"spec": {"vcpus": 9}}),
    "a finalizer": ("PATCH", f"{SETS}/nobody", {"metadata": {"finalizers": ["a.b/c"]}}),
    "deleting a set": ("DELETE", f"{SETS}/nobody", None),
    "a new set": ("POST", SETS, {}),
    "a Secret of a namespace that has not bound the role": ("GET", "/api/v1/namespaces/{ns}/secrets/private", None),
    "all Secrets": ("GET", "/api/v1/secrets", None),
    "pods": ("GET", "/api/v1/pods", None),
    "nodes": ("GET", "/api/v1/nodes", None),
    "another Lease": ("PUT", f"{LEASES}/other", {}),
    "all Leases": ("GET", LEASES, None),
    "deleting its Lease": ("DELETE", f"{LEASES}/vcpuset-controller", None),
    "a Lease elsewhere": ("POST", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases", {}),
    "a token of an agent": ("POST", "/api/v1/namespaces/vcpuset-agent/serviceaccounts/vcpuset-agent/token", {}),
    "binding a role": ("POST", f"{RBAC}/namespaces/{{ns}}/rolebindings", {}),
}


@pytest.mark.parametrize("attempt", CONTROLLER)
async def test_the_controller_is_refused(world: World, attempt: str) -> None:
    method, path, body = CONTROLLER[attempt]
    answer = await world.ask(world.controller(), method, path, body)
    assert (answer.status, "cannot" in answer.body["message"]) == (403, True)


async def test_the_controller_changes_no_count_that_is_set(world: World) -> None:
    for name in ("nobody", "node-a"):
        answer = await world.ask(world.controller(), "PATCH", f"{SETS}/{name}/scale", {"spec": {"replicas": 9}})
        assert answer.status == 403
        assert "the controller may not change the count of a VCPUSet" in answer.body["message"]


async def test_the_controller_gets_a_secret_by_name_where_the_role_is_bound_and_cannot_list_there(world: World) -> None:
    other = await world.control_plane.namespace("bound")
    body = {"metadata": {"name": "private"}, "stringData": {"key": "value"}}
    await world.control_plane.request("POST", f"/api/v1/namespaces/{other}/secrets", body)
    example = (REPOSITORY / "deploy" / "examples" / "monitor-credentials.yaml").read_text()
    await world.control_plane.kubectl("apply", "-f", "-", input=example.replace("default", other))
    path = f"/api/v1/namespaces/{other}/secrets"

    async def allowed() -> bool:
        return (await world.ask(world.controller(), "GET", f"{path}/private")).status == 200

    await until(allowed, 60, "the role to be bound")
    asked = {
        "list": await world.ask(world.controller(), "GET", path),
        "watch": await world.ask(world.controller(), "GET", f"{path}?watch=1"),
        "patch": await world.ask(world.controller(), "PATCH", f"{path}/private", {}),
        "delete": await world.ask(world.controller(), "DELETE", f"{path}/private"),
        "elsewhere": await world.ask(world.controller(), "GET", "/api/v1/namespaces/{ns}/secrets/private"),
        "agent": await world.ask(world.agent(), "GET", f"{path}/private"),
    }
    assert {name: answer.status for name, answer in asked.items()} == dict.fromkeys(asked, 403)


# --- people -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "writes"), [("view", 403), ("edit", 200), ("admin", 200)])
async def test_people_with_the_clusters_own_role_work_with_sets_and_never_with_their_status(
    world: World, role: str, writes: int
) -> None:
    """The roles are Kubernetes' own; its aggregation controller has joined ours to them."""
    namespace = await world.control_plane.namespace(role)
    sets = SETS.format(ns=namespace)
    await world.control_plane.kubectl(
        "create", "rolebinding", "jo", f"--clusterrole={role}", "--user=jo", "-n", namespace
    )
    assert (await world.control_plane.request("POST", sets, manifest(namespace, "web"))).status == 201

    async def jo(method: str, path: str, body: Json | None = None) -> int:
        answer = await world.control_plane.request(method, path, body, headers={"Impersonate-User": "jo"})
        return answer.status

    async def bound() -> bool:
        return await jo("GET", f"{sets}/web") == 200

    await until(bound, 60, "the role to be joined and bound")
    assert await jo("GET", sets) == 200
    assert await jo("GET", f"{sets}/web/scale") == 200
    assert await jo("PATCH", f"{sets}/web", {"spec": {"vcpus": 3}}) == writes
    assert await jo("PATCH", f"{sets}/web/scale", {"spec": {"replicas": 4}}) == writes
    assert await jo("POST", sets, manifest(namespace, "db")) == (403 if writes == 403 else 201)
    assert await jo("PATCH", f"{sets}/web/status", {"status": {"vcpus": 9}}) == 403
    assert await jo("GET", SETS.format(ns=world.namespace)) == 403
    assert await jo("DELETE", f"{sets}/web") == writes
