"""`vcpuset metrics-api` with the shipped rights, behind a real API server: what it serves, and to whom.

The operator's pods are the tests' own, because real ones do not answer wrongly. There is no kubelet: the tests report
the pods as ready. `e2e/test_metrics_api.py` has real ones.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import pytest
import pytest_asyncio
import yaml
from aiohttp import web
from cryptography import x509
from yarl import URL

from harness.audit import AuditEvent
from harness.cache import REPOSITORY
from harness.controlplane import FRONT_PROXY, Answer, ControlPlane
from harness.metricsapi import API, NAMESPACE, REGISTRATION, MetricsAPIProcess, available, expose
from harness.pki import Authority, Credentials
from harness.wait import until
from harness.world import User
from vcpuset.kube.aggregation import AggregatedAPI
from vcpuset.kube.cluster import USER_AGENT
from vcpuset.metricsapi.certificates import CertificateUnavailable, OwnCertificate

__all__: list[str] = []

# The pods are served in the module's event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT: Final = 60.0
ACCOUNT: Final = f"system:serviceaccount:{NAMESPACE}:{NAMESPACE}"
ROOT: Final = {"X-Remote-User": "admin", "X-Remote-Group": "system:masters"}
"""Headers of the front proxy that name a user who may do everything."""

SAMPLE: Final = {
    "busyVCPUs": 1.2346, "vcpus": 2, "windowSeconds": 12.4, "source": "KVM", "time": "2026-01-01T12:00:00.999Z",
}  # fmt: skip
VALUE: Final = {
    "metric": {"name": "busy_vcpus"}, "timestamp": "2026-01-01T12:00:00Z", "windowSeconds": 12, "value": "1235m",
}  # fmt: skip

TIMES: Final = {"metricsapi.server.REREAD_SECONDS": 0.5, "metricsapi.sources.ASK_SECONDS": 1}
"""The deadline need not be met by anything real here: what answers at all answers at once."""

Response = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answering(status: int, body: object) -> Response:
    """A pod's answer, as JSON."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    return answer


def refusing(reason: str) -> Response:
    """What a pod answers that has no value."""
    return answering(404, {"reason": reason, "message": f"because of {reason}"})


class OperatorPod:
    """A ready pod of the operator; `responses` are its answers by the name of the set.

    asked  of which sets it was asked
    """

    def __init__(self, control_plane: ControlPlane, workload: str, node: str, name: str) -> None:
        self.responses: dict[str, Response] = {}
        self.asked: list[str] = []
        self.name = name
        self._control_plane = control_plane
        self._workload = workload
        self._node = node
        self._runner: web.AppRunner | None = None
        self._namespace = {"daemonset/vcpuset-agent": "vcpuset-agent"}.get(workload, "vcpuset-system")
        self._pods = f"/api/v1/namespaces/{self._namespace}/pods"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked.append(name)
        return await self.responses.get(name, refusing("NotServed"))(request)

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.add_routes([web.get("/v1/namespaces/{namespace}/vcpusets/{name}/busy", self._answer)])
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        got = await self._control_plane.kubectl("get", self._workload, "-n", self._namespace, "-o=json")
        template = json.loads(got.stdout)["spec"]["template"]
        template["spec"]["nodeName"] = self._node
        template["spec"]["containers"][0]["ports"][0]["containerPort"] = self._runner.addresses[0][1]
        body = {"metadata": {"name": self.name, "labels": template["metadata"]["labels"]}, "spec": template["spec"]}
        created = await self._control_plane.request("POST", self._pods, body)
        assert created.status == 201, created.body
        await self.report(ready=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._control_plane.request("DELETE", f"{self._pods}/{self.name}", {"gracePeriodSeconds": 0})
        assert self._runner is not None
        await self._runner.cleanup()

    async def report(self, *, ready: bool, address: str = "127.0.0.1") -> None:
        """Report on it as the kubelet does."""
        status = {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        }
        patched = await self._control_plane.request("PATCH", f"{self._pods}/{self.name}/status", {"status": status})
        assert patched.status == 200, patched.body


@dataclass(frozen=True)
class World:
    """A cluster with the metrics API, an agent on node-a, and a namespace with VCPUSets."""

    control_plane: ControlPlane
    process: MetricsAPIProcess
    user: User
    agent: OperatorPod

    async def get(self, name: str, query: str = "", headers: Mapping[str, str] | None = None) -> Answer:
        """Ask for the metric by way of the API server."""
        return await self.control_plane.request("GET", f"{self.path(name)}{query}", headers=headers)

    def path(self, name: str) -> str:
        return f"{API}/namespaces/{self.user.namespace}/vcpusets.vcpuset.dev/{name}/busy_vcpus"

    async def unknown(self, name: str) -> str:
        """Check that the metric is not found; returns the message."""
        answer = await self.get(name)
        assert (answer.status, answer.body["kind"], answer.body["reason"]) == (404, "Status", "NotFound"), answer.body
        return str(answer.body["message"])

    def session(self, credentials: Credentials | None) -> aiohttp.ClientSession:
        """A client with this certificate that connects to the metrics API itself."""
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        if credentials is not None:
            folder = credentials.write(self.control_plane.directory / "client")
            tls.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
        return aiohttp.ClientSession(f"https://127.0.0.1:{self.process.port}", connector=aiohttp.TCPConnector(ssl=tls))

    async def direct(
        self, credentials: Credentials | None, headers: Mapping[str, str], path: str = ""
    ) -> tuple[int, Any]:
        """Ask the metrics API itself. Raises aiohttp.ClientError or OSError if it ends the connection."""
        async with (
            self.session(credentials) as session,
            session.get(path or self.path("web"), headers=headers) as answer,
        ):
            return answer.status, await answer.json()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """All of it, set up as the manifests say."""
    folder = tmp_path_factory.mktemp("install")
    for shipped in ("deploy", "crds"):
        (folder / shipped).symlink_to(REPOSITORY / shipped)
    component = "deploy/components/metrics-api"
    own = {
        "resources": ["deploy/overlays/both"],
        "components": [component, f"{component}/agent", f"{component}/controller"],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
    async with ControlPlane() as control_plane:
        await control_plane.kubectl("apply", "--server-side", "--warnings-as-errors", "-k", folder)
        await control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/vcpusets.vcpuset.dev")
        account = await control_plane.service_account_kubeconfig(NAMESPACE, NAMESPACE)
        user = User(control_plane, await control_plane.namespace())
        async with (
            OperatorPod(control_plane, "daemonset/vcpuset-agent", "node-a", "agent-a") as agent,
            MetricsAPIProcess(account, times=TIMES) as process,
        ):
            await expose(control_plane, process.port)
            await available(control_plane)
            await user.create("web", nodeName="node-a", labels={"app": "web"})
            agent.responses["web"] = answering(200, SAMPLE)
            yield World(control_plane, process, user, agent)
            # An API that is registered and not served is in everyone's way.
            await control_plane.request("DELETE", REGISTRATION)


# --- values -----------------------------------------------------------------------------------------------------------


async def test_a_single_set_has_exactly_one_value_with_the_time_and_window_of_its_sample(world: World) -> None:
    answer = await world.get("web", "?metricLabelSelector=")
    described = {"apiVersion": "vcpuset.dev/v1alpha1", "kind": "VCPUSet", "namespace": world.user.namespace}
    assert (answer.status, answer.body) == (
        200,
        {
            "kind": "MetricValueList",
            "apiVersion": "custom.metrics.k8s.io/v1beta2",
            "metadata": {},
            "items": [{"describedObject": {**described, "name": "web"}, **VALUE}],
        },
    )


async def test_the_metric_is_discovered(world: World) -> None:
    found = await world.control_plane.kubectl("get", "--raw", API)
    names = [each["name"] for each in json.loads(found.stdout)["resources"]]
    assert names == ["vcpusets.vcpuset.dev/busy_vcpus", "vcpusets.vcpuset.dev/demand_vcpus"]


async def test_demand_is_known_where_a_guest_agent_tells_its_load(world: World) -> None:
    path = f"{API}/namespaces/{world.user.namespace}/vcpusets.vcpuset.dev/web/demand_vcpus"
    unknown = await world.control_plane.request("GET", path)
    assert unknown.status == 404
    assert "no guest agent (spec.guestAgent, version 10.0) says what the guest's load is" in unknown.body["message"]
    world.agent.responses["web"] = answering(200, {**SAMPLE, "demandVCPUs": 5.25})
    try:
        (item,) = (await world.control_plane.request("GET", path)).body["items"]
        assert (item["metric"], item["windowSeconds"], item["value"]) == ({"name": "demand_vcpus"}, 60, "5250m")
        (one,) = (await world.control_plane.request("GET", path.replace("/web/", "/*/"))).body["items"]
        assert one == item
    finally:
        world.agent.responses["web"] = answering(200, SAMPLE)


async def test_all_sets_that_match_a_selector_are_listed_without_those_of_which_nothing_is_known(world: World) -> None:
    for name in ("shop-1", "shop-2", "shop-3", "shop-4"):
        node = "node-z" if name == "shop-4" else "node-a"
        await world.user.create(name, nodeName=node, labels={"app": "shop"})
    world.agent.responses["shop-1"] = answering(200, {**SAMPLE, "busyVCPUs": 0})
    world.agent.responses["shop-2"] = answering(200, {**SAMPLE, "busyVCPUs": 2})
    world.agent.responses["shop-3"] = refusing("NoSource")

    async def listed(query: str) -> dict[str, str]:
        answer = await world.get("*", query)
        assert answer.status == 200, answer.body
        return {each["describedObject"]["name"]: each["value"] for each in answer.body["items"]}

    assert await listed("?labelSelector=app%3Dshop") == {"shop-1": "0m", "shop-2": "2000m"}
    assert await listed("?labelSelector=app+in+(shop,web),app!%3Dshop") == {"web": "1235m"}
    assert await listed("") == {"shop-1": "0m", "shop-2": "2000m", "web": "1235m"}
    assert (await world.get("*", "?labelSelector=app%3Dnone")).status == 404
    wrong = await world.get("*", "?labelSelector=a%3D%3D%3D")
    assert (wrong.status, wrong.body["reason"]) == (400, "BadRequest")


async def test_a_set_without_a_node_is_asked_of_all_controllers_and_the_leader_answers(world: World) -> None:
    await world.user.create("remote", monitor=("192.0.2.1", 4444))
    assert "no pod of the operator is ready in namespace vcpuset-system" in await world.unknown("remote")
    workload = "deployment/vcpuset-controller"
    async with (
        OperatorPod(world.control_plane, workload, "node-b", "standby") as standby,
        OperatorPod(world.control_plane, workload, "node-c", "leader") as leader,
    ):
        assert "because of NotServed" in await world.unknown("remote")
        leader.responses["remote"] = refusing("NoSample")
        assert "because of NoSample" in await world.unknown("remote")
        leader.responses["remote"] = answering(200, SAMPLE)
        assert (await world.get("remote")).body["items"][0]["value"] == "1235m"
        await leader.report(ready=False)
        assert "because of NotServed" in await world.unknown("remote")
        assert standby.asked


async def hanging(_: web.Request) -> web.StreamResponse:
    """Never answers."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def redirecting(_: web.Request) -> web.StreamResponse:
    """Sends the client somewhere else, where it would find a value."""
    raise web.HTTPFound("/v1/namespaces/x/vcpusets/web/busy")


async def compressed(_: web.Request) -> web.StreamResponse:
    """A value, which would have to be decompressed."""
    response = web.json_response(SAMPLE)
    response.enable_compression(web.ContentCoding.gzip)
    return response


async def endless(request: web.Request) -> web.StreamResponse:
    """Never ends."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 65536)


@pytest.mark.parametrize(
    ("response", "words"),
    [
        pytest.param(refusing("NotServed"), "because of NotServed", id="not managed"),
        pytest.param(refusing("NoSource"), "because of NoSource", id="no counters"),
        pytest.param(refusing("NoSample"), "because of NoSample", id="no sample"),
        pytest.param(answering(404, {}), "something else", id="not found without a reason"),
        pytest.param(answering(200, {}), "something else", id="no value"),
        pytest.param(answering(200, {**SAMPLE, "busyVCPUs": None}), "something else", id="null"),
        pytest.param(answering(200, {**SAMPLE, "busyVCPUs": -1}), "something else", id="negative"),
        pytest.param(answering(200, {**SAMPLE, "busyVCPUs": "1"}), "something else", id="text"),
        pytest.param(answering(200, {**SAMPLE, "time": "yesterday"}), "something else", id="no time"),
        pytest.param(answering(500, SAMPLE), "HTTP status 500", id="an error"),
        pytest.param(redirecting, "HTTP status 302", id="a redirect"),
        pytest.param(hanging, "does not answer within", id="no answer"),
        pytest.param(compressed, "something else", id="a compressed answer"),
        pytest.param(endless, "something else", id="an endless answer"),
    ],
)
async def test_whatever_a_pod_answers_instead_of_a_value_is_not_found(
    world: World, response: Response, words: str
) -> None:
    world.agent.responses["web"] = response
    try:
        assert words in await world.unknown("web")
    finally:
        world.agent.responses["web"] = answering(200, SAMPLE)


async def test_what_nobody_serves_is_not_found(world: World) -> None:
    assert "there is no VCPUSet" in await world.unknown("nothing")
    await world.user.create("lost", nodeName="node-z")
    assert "no pod of the operator is ready in namespace vcpuset-agent on node node-z" in await world.unknown("lost")
    await world.agent.report(ready=False)
    assert "on node node-a" in await world.unknown("web")
    await world.agent.report(ready=True)
    assert (await world.get("web")).status == 200
    assert (await world.get("web", "?metricLabelSelector=a%3Db")).status == 404
    path = f"{API}/namespaces/{world.user.namespace}/vcpusets.vcpuset.dev/web/memory"
    other = await world.control_plane.request("GET", path)
    assert (other.status, other.body["message"]) == (
        404,
        "there is no metric 'memory' of vcpusets.vcpuset.dev, only busy_vcpus and demand_vcpus",
    )


async def test_a_pod_with_an_ipv6_address_is_asked_there(world: World) -> None:
    await world.agent.report(ready=True, address="100::1")  # RFC 6666: nothing is ever there
    try:
        message = await world.unknown("web")
        assert "pod vcpuset-agent/agent-a" in message
        assert "Cannot connect to host 100::1:" in message or "does not answer" in message
    finally:
        await world.agent.report(ready=True)


async def test_a_value_costs_the_api_server_two_reads_and_a_review_that_is_kept_for_a_while(world: World) -> None:
    async def requests() -> list[tuple[str, str]]:
        since = world.control_plane.audit_offset()
        assert (await world.get("web")).status == 200
        await world.control_plane.kubectl("get", "vcpusets", "--all-namespaces", "--output=name")

        def recorded() -> list[AuditEvent]:
            return world.control_plane.audit_events(since)

        # A record follows its response by a moment, in their order.
        await until(lambda: any(each.user == "admin" and each.verb == "list" for each in recorded()), WAIT, "the end")
        polled = ("configmaps", "secrets", "apiservices")
        return [
            (each.verb, each.resource) for each in recorded() if each.user == ACCOUNT and each.resource not in polled
        ]

    await requests()
    assert await requests() == [("get", "vcpusets"), ("list", "pods")]


async def test_a_process_that_is_told_to_end_answers_the_requests_that_it_has(world: World) -> None:
    released = asyncio.Event()

    async def waiting(_: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.json_response(SAMPLE)

    account = await world.control_plane.service_account_kubeconfig(NAMESPACE, NAMESPACE)
    async with MetricsAPIProcess(account) as process:
        other = replace(world, process=process)
        world.agent.responses["web"] = waiting
        asked = len(world.agent.asked)
        asking = asyncio.create_task(other.direct(world.control_plane.front_proxy.client(FRONT_PROXY), ROOT))
        await until(lambda: len(world.agent.asked) > asked, WAIT, "the pod to be asked")
        ending = asyncio.create_task(process.stop())
        await until(lambda: not process.ready(), WAIT, "the process to end")
        released.set()
        world.agent.responses["web"] = answering(200, SAMPLE)
        assert (await asking)[0] == 200
        assert await ending == 0


async def test_the_network_policies_let_the_metrics_api_reach_the_operator_and_nothing_else_in_its_namespaces(
    world: World,
) -> None:
    async def got(kind: str, namespace: str) -> Mapping[str, Any]:
        listed = await world.control_plane.kubectl("get", kind, "-n", namespace, "-o=json")
        (found,) = json.loads(listed.stdout)["items"]
        spec: Mapping[str, Any] = found["spec"]
        return spec

    async def template(kind: str, namespace: str) -> tuple[Mapping[str, str], Mapping[str, int]]:
        """The labels of a workload's pods, and their ports by name."""
        spec = (await got(kind, namespace))["template"]
        ports = spec["spec"]["containers"][0]["ports"]
        return spec["metadata"]["labels"], {each["name"]: each["containerPort"] for each in ports}

    mine, my_ports = await template("deployment", NAMESPACE)
    policy = await got("networkpolicy", NAMESPACE)
    assert policy["podSelector"]["matchLabels"].items() <= mine.items()
    assert [each["ports"] for each in policy["ingress"]] == [[{"protocol": "TCP", "port": "https"}]]
    assert "https" in my_ports
    (out,) = (rule for rule in policy["egress"] if "to" in rule)
    (peer,) = out["to"]
    for kind, namespace in (("daemonset", "vcpuset-agent"), ("deployment", "vcpuset-system")):
        labels, ports = await template(kind, namespace)
        assert namespace in peer["namespaceSelector"]["matchExpressions"][0]["values"]
        assert peer["podSelector"]["matchLabels"].items() <= labels.items()
        assert [each["port"] for each in out["ports"]] == [ports["http"]]
        inward = (await got("networkpolicy", namespace))["ingress"]
        (rule,) = (each for each in inward if "podSelector" in each["from"][0])
        (source,) = rule["from"]
        assert source["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": NAMESPACE}
        assert source["podSelector"]["matchLabels"].items() <= mine.items()
        # Otherwise, other pods with the operator's name would be let in.
        assert "app.kubernetes.io/component" in source["podSelector"]["matchLabels"]
        assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]


# --- attacks ----------------------------------------------------------------------------------------------------------


async def own_credentials(world: World) -> Credentials:
    """The serving certificate, and its key."""
    answer = await world.control_plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/{NAMESPACE}")
    data = {key: base64.b64decode(value).decode() for key, value in answer.body["data"].items()}
    return Credentials(data["ca.crt"], data["tls.crt"], data["tls.key"])


@pytest.mark.parametrize("kind", ["none", "another CA", "expired", "the metrics API's own"])
async def test_a_pod_that_calls_without_the_front_proxys_certificate_does_not_get_through_tls(
    world: World, kind: str
) -> None:
    trusted = world.control_plane.front_proxy
    assert (await world.direct(trusted.client(FRONT_PROXY), ROOT))[0] == 200, "the attack fails for another reason"
    credentials = {
        "none": None,
        "another CA": Authority().client(FRONT_PROXY),
        "expired": trusted.client(FRONT_PROXY, expired=True),
        "the metrics API's own": await own_credentials(world),
    }[kind]
    before = len(world.agent.asked)
    for path in ("", API):
        with pytest.raises((aiohttp.ClientError, OSError)):
            await world.direct(credentials, {**ROOT, "Authorization": f"Bearer {world.control_plane.token}"}, path)
    assert len(world.agent.asked) == before


@pytest.mark.parametrize("path", ["", API])
@pytest.mark.parametrize(
    ("name", "headers"),
    [
        pytest.param("kubelet", ROOT, id="another name of the same CA"),
        pytest.param(FRONT_PROXY, {}, id="no user"),
        pytest.param(FRONT_PROXY, {"X-Remote-User": "", "X-Remote-Group": "system:masters"}, id="an empty user"),
        pytest.param(FRONT_PROXY, {"X-Remote-Group": "system:masters"}, id="only a group"),
        pytest.param(FRONT_PROXY, {"X-Forwarded-User": "admin"}, id="another header"),
    ],
)
async def test_a_client_that_is_not_the_front_proxy_or_names_no_user_is_unauthorized(
    world: World, name: str, headers: Mapping[str, str], path: str
) -> None:
    before = len(world.agent.asked)
    status, body = await world.direct(world.control_plane.front_proxy.client(name), headers, path)
    assert (status, body["reason"]) == (401, "Unauthorized")
    assert len(world.agent.asked) == before


async def test_a_client_without_tls_is_refused(world: World) -> None:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{world.process.port}") as session:
        with pytest.raises(aiohttp.ClientError):
            async with session.get(API, headers=ROOT):
                pass


async def test_only_users_who_may_read_the_metric_get_it_also_from_the_front_proxy_itself(world: World) -> None:
    proxy = world.control_plane.front_proxy.client(FRONT_PROXY)
    jo = {"Impersonate-User": "jo"}
    refused = await world.get("web", headers=jo)
    assert refused.status == 403
    # The API server removes such headers from what clients send.
    assert (await world.get("web", headers={**jo, **ROOT})).status == 403
    status, body = await world.direct(proxy, {"X-Remote-User": "jo"})
    assert (status, body["reason"]) == (403, "Forbidden")
    assert body["message"].startswith("jo may not get vcpusets.vcpuset.dev/busy_vcpus of custom.metrics.k8s.io")
    await world.control_plane.kubectl(
        "create", "rolebinding", "jo", "--clusterrole=vcpuset-metrics-view", "--group=readers",
        f"--namespace={world.user.namespace}",
    )  # fmt: skip

    async def granted() -> bool:
        return (await world.get("web", headers={**jo, "Impersonate-Group": "readers"})).status == 200

    await until(granted, WAIT, "jo to be allowed")
    assert (await world.direct(proxy, {"X-Remote-User": "jo", "X-Remote-Group": "readers"}))[0] == 200
    # In other namespaces nothing has changed.
    elsewhere = world.path("web").replace(world.user.namespace, "default")
    assert (await world.direct(proxy, {"X-Remote-User": "jo", "X-Remote-Group": "readers"}, elsewhere))[0] == 403


@pytest.mark.parametrize("name", ["..%2F..%2F..", "web%2Fstatus", "web%3Fwatch=1", "Web", ".", "a..b"])
async def test_names_that_lead_elsewhere_are_not_found_and_ask_nobody(world: World, name: str) -> None:
    proxy = world.control_plane.front_proxy.client(FRONT_PROXY)
    since = world.control_plane.audit_offset()
    before = len(world.agent.asked)
    async with world.session(proxy) as session:
        url = URL(f"https://127.0.0.1:{world.process.port}{world.path(name)}", encoded=True)
        async with session.get(url, headers=ROOT) as answer:
            assert answer.status == 404
    assert len(world.agent.asked) == before
    assert not [each for each in world.control_plane.audit_events(since) if each.resource == "vcpusets"]


async def test_a_new_front_proxy_is_let_in_and_one_that_is_no_longer_trusted_is_put_out(world: World) -> None:
    path = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"
    before = (await world.control_plane.request("GET", path)).body["data"]["requestheader-client-ca-file"]
    other = Authority()
    credentials = other.client(FRONT_PROXY)

    async def let_in() -> bool:
        try:
            return (await world.direct(credentials, ROOT))[0] == 200
        except (aiohttp.ClientError, OSError):
            return False

    async def trust(bundle: str) -> None:
        changed = await world.control_plane.request("PATCH", path, {"data": {"requestheader-client-ca-file": bundle}})
        assert changed.status == 200, changed.body

    assert not await let_in()
    await trust(before + other.certificate)
    await until(let_in, WAIT, "the new front proxy to be let in")
    assert (await world.get("web")).status == 200, "the old one still is"
    async with world.session(credentials) as session, session.get(world.path("web"), headers=ROOT) as answer:
        await answer.read()
        kept = answer.connection
        await trust(before)

        async def put_out() -> bool:
            return not await let_in()

        await until(put_out, WAIT, "the front proxy to be put out")
        # Its open connection has been closed too.
        with pytest.raises((aiohttp.ClientError, OSError)):
            async with session.get(world.path("web"), headers=ROOT):
                pass
        assert kept is None or kept.transport is None or kept.transport.is_closing()
    assert (await world.get("web")).status == 200


# --- certificates -----------------------------------------------------------------------------------------------------


GROUP: Final = "tests.vcpuset.dev"


@contextlib.asynccontextmanager
async def registered(control_plane: ControlPlane, service: str, owner: str) -> AsyncIterator[str]:
    """The Secret of a Service without contents, and the path of an APIService that names the Service `owner`."""
    name = f"v1.{service}.{GROUP}"
    path = f"/apis/apiregistration.k8s.io/v1/apiservices/{name}"
    secret = {"metadata": {"name": service}}
    spec = {
        "group": f"{service}.{GROUP}", "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 100,
        "service": {"namespace": "default", "name": owner, "port": 443},
    }  # fmt: skip
    for where, body in (
        ("/api/v1/namespaces/default/secrets", secret),
        (path.rpartition("/")[0], {"metadata": {"name": name}, "spec": spec}),
    ):
        created = await control_plane.request("POST", where, body)
        assert created.status == 201, created.body
    yield path
    await control_plane.request("DELETE", path)


async def bundle_of(control_plane: ControlPlane, path: str) -> list[x509.Certificate]:
    """The certificates that the API server trusts an APIService by."""
    spec = (await control_plane.request("GET", path)).body["spec"]
    return x509.load_pem_x509_certificates(base64.b64decode(spec["caBundle"])) if "caBundle" in spec else []


async def test_replicas_share_a_certificate_and_renew_it_without_a_moment_in_which_one_is_not_trusted(
    world: World,
) -> None:
    now = datetime.now(UTC)
    async with (
        registered(world.control_plane, "shared", "shared") as path,
        await AggregatedAPI.connect(world.control_plane.kubeconfig) as cluster,
    ):

        def replica() -> OwnCertificate:
            return OwnCertificate(cluster, path.rpartition("/")[2], "default", "shared", lambda: now)

        replicas = [replica(), replica()]
        first, same = await asyncio.gather(*(each.current() for each in replicas))
        assert first == same
        (trusted,) = await bundle_of(world.control_plane, path)
        assert trusted == x509.load_pem_x509_certificate(first.chain)
        now += timedelta(days=59)
        assert await replicas[0].current() == first
        now += timedelta(days=2)
        assert await replicas[0].current() == first, "the API server may not trust the new one yet"
        renewed = await replicas[1].current()
        assert renewed != first
        assert await replicas[0].current() == renewed
        assert await replica().current() == renewed
        assert await bundle_of(world.control_plane, path) == [
            x509.load_pem_x509_certificate(renewed.chain), trusted,
        ]  # fmt: skip


@pytest.mark.parametrize("damaged", ["tls.crt", "tls.key", "ca.crt"])
async def test_a_damaged_secret_is_made_again(world: World, damaged: str) -> None:
    service = f"damaged-{damaged.replace('.', '-')}"
    async with (
        registered(world.control_plane, service, service) as path,
        await AggregatedAPI.connect(world.control_plane.kubeconfig) as cluster,
    ):

        def replica() -> OwnCertificate:
            return OwnCertificate(cluster, path.rpartition("/")[2], "default", service, lambda: datetime.now(UTC))

        first = await replica().current()
        secret = {"data": {damaged: base64.b64encode(b"nothing").decode()}}
        await world.control_plane.request("PATCH", f"/api/v1/namespaces/default/secrets/{service}", secret)
        renewed = await replica().current()
        assert renewed != first
        assert x509.load_pem_x509_certificate(renewed.chain) in await bundle_of(world.control_plane, path)


async def test_the_registration_of_another_metrics_api_is_left_alone(world: World) -> None:
    async with (
        registered(world.control_plane, "contested", "prometheus-adapter") as path,
        await AggregatedAPI.connect(world.control_plane.kubeconfig) as cluster,
    ):
        mine = OwnCertificate(cluster, path.rpartition("/")[2], "default", "contested", lambda: datetime.now(UTC))
        with pytest.raises(CertificateUnavailable, match="names Service default/prometheus-adapter, so another"):
            await mine.current()
        assert await bundle_of(world.control_plane, path) == []


@pytest.mark.parametrize(
    "patch",
    [
        {"spec": {"service": {"namespace": "default"}}},
        {"spec": {"service": {"port": 8444}}},
        {"spec": {"insecureSkipTLSVerify": True, "caBundle": None}},
        {"spec": {"versionPriority": 1000}},
        {"metadata": {"finalizers": ["example.com/for-ever"]}},
        {"metadata": {"annotations": {"cert-manager.io/inject-ca-from": "default/mine"}}},
    ],
    ids=json.dumps,
)
async def test_the_account_may_change_nothing_of_its_registration_but_the_bundle(
    world: World, patch: Mapping[str, Any]
) -> None:
    token = await world.control_plane.kubectl("create", "token", NAMESPACE, f"--namespace={NAMESPACE}")
    mine = {"Authorization": f"Bearer {token.stdout.strip()}"}

    async def denied() -> bool:
        answer = await world.control_plane.request("PATCH", f"{REGISTRATION}?dryRun=All", patch, headers=mine)
        assert answer.status in {200, 403}, answer.body
        return "may only change the CA bundle of its APIService" in answer.body.get("message", "")

    # The API server takes a new policy into force some moments later.
    await until(denied, WAIT, "the change to be denied")


async def test_a_certificate_from_files_is_served_again_when_they_change_and_nothing_is_written(
    world: World, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def write(credentials: Credentials) -> None:
        certificate.write_text(credentials.certificate)
        key.write_text(credentials.key)

    dns_name = f"{NAMESPACE}.{NAMESPACE}.svc"
    authorities = Authority(), Authority()
    write(authorities[0].server(dns_name))
    account = await world.control_plane.service_account_kubeconfig(NAMESPACE, NAMESPACE)
    since = world.control_plane.audit_offset()
    flags = (f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}")
    async with MetricsAPIProcess(account, *flags, times=TIMES) as process:

        async def presents(authority: Authority) -> bool:
            tls = ssl.create_default_context(cadata=authority.certificate)
            proxy = world.control_plane.front_proxy.client(FRONT_PROXY).write(tmp_path / "client")
            tls.load_cert_chain(proxy / "server-cert.pem", proxy / "server-key.pem")
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
                try:
                    url = f"https://127.0.0.1:{process.port}{API}"
                    async with session.get(url, headers=ROOT, server_hostname=dns_name) as answer:
                        return answer.status == 200
                except aiohttp.ClientError:
                    return False

        assert await presents(authorities[0])
        key.write_text(authorities[1].server(dns_name).key)

        async def complained() -> bool:
            return "still serving what was current before" in process.text()

        await until(complained, WAIT, "a key that does not belong to the certificate to be noticed")
        assert await presents(authorities[0])
        write(authorities[1].server(dns_name))
        await until(lambda: presents(authorities[1]), WAIT, "the new certificate")
        assert await process.stop() == 0
    written = [each for each in world.control_plane.audit_events(since) if each.user == ACCOUNT and each.is_write]
    assert {each.resource for each in written} <= {"subjectaccessreviews"}


async def test_a_process_whose_address_is_taken_says_so_and_ends(world: World) -> None:
    account = await world.control_plane.service_account_kubeconfig(NAMESPACE, NAMESPACE)
    taken = f"127.0.0.1:{world.process.port}"
    async with MetricsAPIProcess(account, f"--address={taken}", ready=False) as second:
        assert await second.ends() == 1
        assert f"cannot listen on --address {taken}: Address already in use" in second.text()


# --- rights: keep this at the end -------------------------------------------------------------------------------------


async def test_every_right_is_used_and_no_request_is_refused(world: World) -> None:
    granted = set()
    for kinds in ("clusterrolebindings", "rolebindings"):
        listed = await world.control_plane.kubectl("get", kinds, "--all-namespaces", "-o=json")
        for binding in json.loads(listed.stdout)["items"]:
            if NAMESPACE not in [each["name"] for each in binding.get("subjects", ()) if "namespace" in each]:
                continue
            kind, name = binding["roleRef"]["kind"], binding["roleRef"]["name"]
            place = binding["metadata"].get("namespace", "")
            role = await world.control_plane.kubectl("get", kind, name, *(["-n", place] if place else []), "-o=json")
            granted |= {
                (place, verb, group, resource)
                for rule in json.loads(role.stdout)["rules"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
            }

    def mine() -> list[AuditEvent]:
        events = world.control_plane.audit_events()
        return [each for each in events if each.user == ACCOUNT and each.user_agent == USER_AGENT]

    def used() -> set[tuple[str, str, str, str]]:
        return {
            (place, each.verb, each.group, each.resource)
            for each in mine()
            for place in (each.namespace, "")
            if each.code in {200, 201}
        }

    # Kubernetes' own Role for the ConfigMap also allows these.
    unused = {("kube-system", verb, "", "configmaps") for verb in ("list", "watch")}
    await until(lambda: granted - unused <= used(), WAIT, lambda: f"uses of {granted - unused - used()}")
    assert [each for each in mine() if each.code in {401, 403}] == []
