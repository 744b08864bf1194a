"""The Helm chart: it makes what kustomize makes, and obeys and checks its values."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner

from harness.binaries import binaries
from harness.cache import REPOSITORY
from harness.chartpackage import package
from harness.helm import CHART, render, run_helm, settings
from harness.processes import run
from vcpuset.cli.main import main
from vcpuset.domain import networks

__all__: list[str] = []

DEPLOY: Final = REPOSITORY / "deploy"
METRICS_API: Final = ("metrics-api", "metrics-api/agent", "metrics-api/controller")
USERS_OWN: Final = ("Issuer", "Certificate")
"""Kinds that kustomize makes for an example, and users of the chart make themselves."""
HELMS_OWN_LABELS: Final = {"helm.sh/chart", "app.kubernetes.io/managed-by"}
Json = dict[str, Any]
Key = tuple[str, str, str]


async def kustomize(folder: Path) -> list[Json]:
    """The objects that `kubectl kustomize` makes."""
    built = await run([binaries().kubectl, "kustomize", folder])
    return [each for each in yaml.safe_load_all(built.stdout) if each]


def by_name(objects: list[Json]) -> dict[Key, Json]:
    """Objects by kind, namespace and name."""
    found = {(each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects), "an object is there twice"
    return found


def without_helms_own(objects: list[Json]) -> list[Json]:
    """What Helm made, without what Helm itself needs; each object must have had it."""
    for each in objects:
        metadata = each["metadata"]
        assert metadata["labels"].keys() >= HELMS_OWN_LABELS, metadata
        for label in HELMS_OWN_LABELS:
            del metadata["labels"][label]
        if each["kind"] == "CustomResourceDefinition":
            assert metadata.pop("annotations") == {"helm.sh/resource-policy": "keep"}
    return objects


# --- the same objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "components", "values"),
    [
        pytest.param("agent", [], {"controller.enabled": False}, id="agent"),
        pytest.param("controller", [], {"agent.enabled": False}, id="controller"),
        pytest.param("both", [], {}, id="both"),
        pytest.param(
            "both",
            ["shards", "allow-tcp", "socket-group", *METRICS_API, "ipv6", "monitoring", "monitoring/dashboard"],
            {
                "controller.shards": ["b", "c"],
                "controller.allowTCP": ["192.0.2.0/24"],
                "agent.supplementalGroups": [107],
                "listenAddress": "[::]",
                "metricsAPI.enabled": True,
                "monitoring.enabled": True,
                "monitoring.dashboard.enabled": True,
            },
            id="both with components",
        ),
        pytest.param(
            "agent",
            [*METRICS_API[:2], "metrics-api/cert-manager"],
            {
                "controller.enabled": False,
                "metricsAPI.enabled": True,
                "metricsAPI.certificate.secretName": "vcpuset-metrics-api-tls",
                "metricsAPI.certificate.injectCAFrom": "vcpuset-metrics-api/vcpuset-metrics-api",
            },
            id="metrics API with cert-manager",
        ),
    ],
)
async def test_the_chart_makes_the_same_objects_as_kustomize(
    tmp_path: Path, overlay: str, components: list[str], values: Mapping[str, object]
) -> None:
    (tmp_path / "deploy").symlink_to(DEPLOY)
    kustomization = {
        "resources": [f"deploy/overlays/{overlay}"],
        "components": [f"deploy/components/{name}" for name in components],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    expected = by_name(await kustomize(tmp_path if components else DEPLOY / "overlays" / overlay))
    expected = {key: each for key, each in expected.items() if key[0] not in USERS_OWN}
    made = by_name(without_helms_own(await render(*settings(values))))
    assert made.keys() == expected.keys()
    for key, each in expected.items():
        assert made[key] == each, key


async def test_a_release_of_each_kind_makes_together_what_one_of_both_makes() -> None:
    agent = by_name(await render(*settings({"controller.enabled": False})))
    second = {"agent.enabled": False, "base.create": False, "crds.install": False}
    controller = by_name(await render(*settings(second)))
    assert not agent.keys() & controller.keys()
    assert agent | controller == by_name(await render())


async def test_kustomize_and_chart_name_the_version_of_the_program() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    objects = await kustomize(DEPLOY / "overlays" / "both")
    images = [
        container["image"]
        for each in objects
        if each["kind"] in ("DaemonSet", "Deployment")
        for container in each["spec"]["template"]["spec"]["containers"]
    ]
    assert images == [f"vcpuset:{version}"] * 2


async def test_a_packaged_chart_holds_all_that_it_links_to(tmp_path: Path) -> None:
    said = (await run_helm("package", CHART, "--destination", tmp_path)).stdout
    package = Path(said.rpartition(": ")[2].strip())
    assert by_name(await render(chart=package)) == by_name(await render())


async def test_the_chart_of_a_release_installs_the_image_of_the_release_by_its_digest(tmp_path: Path) -> None:
    digest = f"sha256:{'0123456789abcdef' * 4}"
    archive = await package(tmp_path, image="registry.example.com/acme/vcpuset", digest=digest)
    text = yaml.safe_dump_all(await render(*settings({"metricsAPI.enabled": True}), chart=archive))
    assert set(re.findall(r"image: (\S+)", text)) == {f"registry.example.com/acme/vcpuset@{digest}"}


async def test_an_alert_has_the_link_to_its_own_runbook_and_to_none_by_default() -> None:
    default = await made_of({"monitoring.enabled": True})
    alerts = re.findall(r"alert: (\w+)$", default, re.MULTILINE)
    assert len(alerts) > 10
    assert "runbook" not in default
    linked = await made_of({"monitoring.enabled": True, "monitoring.runbookURL": "https://a.example.com/{alert}/$1"})
    links = re.findall(r"alert: (\w+)\n +annotations:.*?runbook_url: (\S+)$", linked, re.MULTILINE | re.DOTALL)
    # The keys are sorted: the name comes before the annotations of the same alert.
    assert links == [(name, f"https://a.example.com/{name}/$1") for name in alerts]


async def test_helm_finds_no_fault_in_the_chart() -> None:
    await run_helm("lint", "--strict", CHART)


# --- values -------------------------------------------------------------------------------------------------------


DEFAULT_CONTAINER: Final = {"kubectl.kubernetes.io/default-container": "other"}
SCHEMA: Final[Json] = json.loads((CHART / "values.schema.json").read_text())
LARGE: Final = ("resources", "affinity", "podAnnotations", "podLabels", "labels")
"""Values that are Kubernetes' own, and handed on as a whole."""


def leaves(schema: Json = SCHEMA, path: str = "") -> Iterator[str]:
    """The paths of all values that the schema knows; of its objects with any keys only their own."""
    schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    name = path.rpartition(".")[2]
    if "properties" not in schema or name in LARGE:
        yield path
        return
    for key, value in schema["properties"].items():
        yield from leaves(value, f"{path}.{key}" if path else key)


APPEARS: Final[list[tuple[str, object, str]]] = [
    ("image.repository", "registry.example.com/vcpuset", "image: registry.example.com/vcpuset:0.1.0"),
    ("image.tag", "1.2.3", "image: vcpuset:1.2.3"),
    ("image.digest", f"sha256:{'0123456789abcdef' * 4}", f"image: vcpuset@sha256:{'0123456789abcdef' * 4}"),
    ("image.pullPolicy", "Always", "imagePullPolicy: Always"),
    ("image.pullSecrets", ["token"], "imagePullSecrets:\n      - name: token\n"),
    ("logLevel", "debug", "- --log-level=debug\n"),
    ("resyncSeconds", 300, "- --resync-seconds=300\n"),
    ("workers", 32, "- --workers=32\n"),
    ("metricsSetLimit", 0, "- --metrics-set-limit=0\n"),
    ("extraArgs", ["--sweep-seconds=600"], "- --sweep-seconds=600\n"),
    ("watch.namespaces", ["shop"], "- --namespace=shop\n"),
    ("watch.labelSelector", "team=shop,!legacy", "- --label-selector=team=shop,!legacy\n"),
    ("listenAddress", "[::]", "- --http-address=[::]:8080\n"),
    ("agent.namespace.name", "node-agents", "username == 'system:serviceaccount:node-agents:vcpuset-agent'"),
    ("agent.socketRoot", "/srv/sockets", "- --socket-root=/srv/sockets\n"),
    ("agent.runAsUser", 64055, "runAsUser: 64055\n"),
    ("agent.runAsGroup", 108, "runAsGroup: 108\n"),
    ("agent.supplementalGroups", [107], "supplementalGroups:\n        - 107\n"),
    ("agent.maxUnavailable", 3, "maxUnavailable: 3\n"),
    ("agent.priorityClassName", "system-node-critical", "priorityClassName: system-node-critical\n"),
    ("agent.resources", {"requests": {"cpu": "77m"}}, "cpu: 77m\n"),
    ("agent.nodeSelector", {"machines": "yes"}, "machines: 'yes'\n"),
    ("agent.tolerations", [{"key": "machines", "operator": "Exists"}], "- key: machines\n        operator: Exists\n"),
    ("agent.affinity", {"nodeAffinity": {"x": "y"}}, "affinity:\n        nodeAffinity:\n          x: y\n"),
    ("agent.podAnnotations", {"team": "hv"}, "team: hv\n"),
    ("agent.podLabels", {"team": "hv"}, "team: hv\n"),
    ("controller.namespace.name", "control", "username == 'system:serviceaccount:control:vcpuset-controller'"),
    ("controller.replicas", 3, "replicas: 3\n"),
    ("controller.shards", ["b"], "- --leader-elect-name=vcpuset-controller-b\n"),
    ("controller.allowTCP", ["2001:db8::/32"], "- --allow-tcp=2001:db8::/32\n"),
    ("controller.leaderElection.leaseName", "other", "resourceNames:\n  - other\n"),
    ("controller.podDisruptionBudget.maxUnavailable", "50%", "maxUnavailable: 50%\n"),
    ("controller.priorityClassName", "system-cluster-critical", "priorityClassName: system-cluster-critical\n"),
    ("controller.resources", {"limits": {"memory": "1Gi"}}, "memory: 1Gi\n"),
    ("controller.nodeSelector", {"machines": "no"}, "machines: 'no'\n"),
    ("controller.tolerations", [{"key": "masters"}], "- key: masters\n"),
    ("controller.affinity", {"podAffinity": {"x": "y"}}, "affinity:\n        podAffinity:\n          x: y\n"),
    ("controller.podAnnotations", {"team": "hv"}, "team: hv\n"),
    ("controller.podLabels", {"team": "hv"}, "team: hv\n"),
    ("metricsAPI.enabled", True, "kind: APIService\n"),
    ("metricsAPI.namespace.name", "numbers", "    name: vcpuset-metrics-api\n    namespace: numbers\n    port: 443\n"),
    ("metricsAPI.replicas", 3, "replicas: 3\n"),
    ("metricsAPI.certificate.secretName", "tls", "secretName: tls\n"),
    ("metricsAPI.certificate.injectCAFrom", "shop/tls", "cert-manager.io/inject-ca-from: shop/tls\n"),
    ("metricsAPI.podDisruptionBudget.maxUnavailable", "50%", "maxUnavailable: 50%\n"),
    ("metricsAPI.priorityClassName", "system-cluster-critical", "priorityClassName: system-cluster-critical\n"),
    ("metricsAPI.resources", {"limits": {"memory": "1Gi"}}, "memory: 1Gi\n"),
    ("metricsAPI.nodeSelector", {"machines": "no"}, "machines: 'no'\n"),
    ("metricsAPI.tolerations", [{"key": "masters"}], "- key: masters\n"),
    ("metricsAPI.affinity", {"podAffinity": {"x": "y"}}, "affinity:\n        podAffinity:\n          x: y\n"),
    ("metricsAPI.podAnnotations", {"team": "hv"}, "team: hv\n"),
    ("metricsAPI.podLabels", {"team": "hv"}, "team: hv\n"),
    ("credentials.namespaces", ["shop"], "name: vcpuset-monitor-credentials\n  namespace: shop\n"),
    ("pods.namespaces", ["shop"], "name: vcpuset-agent-pods\n  namespace: shop\n"),
    ("networkPolicy.apiServer.cidrs", ["198.51.100.1/32"], "cidr: 198.51.100.1/32\n"),
    ("networkPolicy.apiServer.ports", [8443], "port: 8443\n"),
    ("networkPolicy.metricsNamespaceLabels", {"team": "metrics"}, "team: metrics\n"),
    ("networkPolicy.monitorPorts", [4444], "port: 4444\n"),
    ("monitoring.enabled", True, "kind: PodMonitor\n"),
    ("monitoring.namespace", "observability", "name: vcpuset\n  namespace: observability\n"),
    (
        "monitoring.labels",
        {"release": "kps"},
        "app.kubernetes.io/part-of: vcpuset\n    helm.sh/chart: vcpuset-0.1.0\n    release: kps\n",
    ),
    (
        "monitoring.runbookURL",
        "https://wiki.example.com/a/{alert}.html",
        "runbook_url: https://wiki.example.com/a/VCPUSetStalled.html\n",
    ),
    ("monitoring.dashboard.enabled", True, "name: vcpuset-dashboard\n"),
    ("monitoring.dashboard.labels", {"dashboards": "team"}, "    dashboards: team\n    grafana_dashboard: '1'\n"),
]
"""A value's path, another value than the default, and what is then in the objects and was not before."""

DISAPPEARS: Final[list[tuple[str, str]]] = [
    ("base.create", "name: vcpuset-edit\n"),
    ("crds.install", "kind: CustomResourceDefinition\n"),
    ("agent.enabled", "kind: DaemonSet\n"),
    (
        "agent.namespace.create",
        "kind: Namespace\nmetadata:\n  labels:\n    app.kubernetes.io/component: agent\n",
    ),
    ("controller.enabled", "kind: Deployment\n"),
    (
        "controller.namespace.create",
        "kind: Namespace\nmetadata:\n  labels:\n    app.kubernetes.io/component: controller\n",
    ),
    ("controller.podDisruptionBudget.enabled", "kind: PodDisruptionBudget\n"),
    (
        "metricsAPI.namespace.create",
        "kind: Namespace\nmetadata:\n  labels:\n    app.kubernetes.io/component: metrics-api\n",
    ),
    (
        "metricsAPI.podDisruptionBudget.enabled",
        "kind: PodDisruptionBudget\nmetadata:\n  labels:\n    app.kubernetes.io/component: metrics-api\n",
    ),
    ("networkPolicy.enabled", "kind: NetworkPolicy\n"),
]
"""The path of a switch, and what is no longer in the objects when it is off."""


def test_every_value_of_the_schema_is_tried() -> None:
    assert sorted([*(path for path, _, _ in APPEARS), *(path for path, _ in DISAPPEARS)]) == sorted(
        set(leaves()) - {"global"}
    )


_made: Final[dict[tuple[str, ...], str]] = {}


async def made_of(values: Mapping[str, object]) -> str:
    """What the chart makes of some values, as text. Each is made once: half of what is asked for is the same."""
    options = tuple(settings(values))
    if options not in _made:
        _made[options] = yaml.safe_dump_all(await render(*options))
    return _made[options]


def beside(path: str) -> dict[str, object]:
    """What has to be set so that a value has a meaning."""
    found: dict[str, object] = {}
    if path == "networkPolicy.monitorPorts":
        found["controller.allowTCP"] = ["192.0.2.0/24"]  # without a network there is no port in it
    if path == "metricsAPI.certificate.injectCAFrom":
        found["metricsAPI.certificate.secretName"] = "tls"
    if path == "monitoring.dashboard.labels":
        found["monitoring.dashboard.enabled"] = True
    for part in ("monitoring", "metricsAPI"):
        if path.startswith(f"{part}.") and path != f"{part}.enabled":
            found[f"{part}.enabled"] = True
    return found


@pytest.mark.parametrize(("path", "value", "sign"), APPEARS, ids=[path for path, _, _ in APPEARS])
async def test_a_value_is_obeyed(path: str, value: object, sign: str) -> None:
    assert sign not in await made_of(beside(path))
    assert sign in await made_of({**beside(path), path: value})


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        pytest.param({}, 90_000, id="by default"),
        pytest.param({"metricsSetLimit": 50_000}, 410_000, id="more"),
        pytest.param({"metricsSetLimit": 0}, 10_000, id="none"),
    ],
)
async def test_prometheus_may_read_as_many_samples_as_the_program_may_show(
    values: dict[str, object], limit: int
) -> None:
    """Six of each set, and some of the process; a scrape with more than its limit is refused as a whole."""
    objects = await render(*settings({**values, "monitoring.enabled": True}))
    (monitor,) = (each for each in objects if each["kind"] == "PodMonitor")
    assert monitor["spec"]["sampleLimit"] == limit


async def test_who_may_read_the_metrics_is_what_a_value_says_and_nobody_else() -> None:
    """With the shipped label beside the value's, a namespace would need both."""
    for objects, expected in (
        (await render(), {"vcpuset.dev/metrics": "allowed"}),
        (
            await render(*settings({"networkPolicy.metricsNamespaceLabels": {"team": "metrics"}})),
            {"team": "metrics"},
        ),
    ):
        selectors = [
            source["namespaceSelector"]
            for each in objects
            if each["kind"] == "NetworkPolicy"
            for rule in each["spec"]["ingress"]
            for source in rule["from"]
        ]
        assert selectors == [{"matchLabels": expected}] * 2


@pytest.mark.parametrize(("enabled", "disabled"), [("agent", "controller"), ("controller", "agent")])
async def test_the_right_to_resize_pods_is_for_the_components_that_are_there(enabled: str, disabled: str) -> None:
    made = await made_of({"pods.namespaces": ["shop"], f"{enabled}.enabled": True, f"{disabled}.enabled": False})
    assert f"name: vcpuset-{enabled}-pods\n  namespace: shop\n" in made
    assert f"name: vcpuset-{disabled}-pods" not in made


async def test_secrets_are_for_a_controller_that_is_there() -> None:
    made = await made_of({"credentials.namespaces": ["shop"], "controller.enabled": False})
    assert "kind: RoleBinding\nmetadata:\n  name: vcpuset-monitor-credentials" not in made
    assert "namespace: shop" not in made


@pytest.mark.parametrize(("path", "sign"), DISAPPEARS, ids=[path for path, _ in DISAPPEARS])
async def test_a_switch_is_obeyed(path: str, sign: str) -> None:
    assert sign in await made_of(beside(path))
    assert sign not in await made_of({**beside(path), path: False})


@pytest.mark.parametrize("kind", ["DaemonSet", "Deployment"])
async def test_the_program_takes_the_options_that_values_make(kind: str) -> None:
    values = {path: value for path, value, _ in APPEARS if "affinity" not in path.lower()}
    objects = await render(*settings(values))
    programs = [each["spec"]["template"]["spec"]["containers"][0]["args"] for each in objects if each["kind"] == kind]
    assert programs
    for arguments in programs:
        assert len(arguments) >= 9
        # The options are looked at in turn, and the last one is refused.
        expanded = [each.replace("$(NODE_NAME)", "node-1") for each in arguments]  # as the kubelet does
        told = CliRunner().invoke(main, [*expanded, "--kubeconfig=/does/not/exist"])
        assert told.exit_code == 2
        assert "File '/does/not/exist' does not exist" in told.output


async def test_each_controller_has_a_lease_and_a_selector_of_its_own() -> None:
    values = {"controller.shards": ["b", "c"], "watch.labelSelector": "!legacy"}
    objects = by_name(await render(*settings(values)))
    found = {}
    for (kind, namespace, name), each in objects.items():
        if kind == "Deployment":
            arguments = each["spec"]["template"]["spec"]["containers"][0]["args"]
            found[name] = [each for each in arguments if each.startswith(("--leader-elect-name", "--label-selector"))]
            budget = objects["PodDisruptionBudget", namespace, name]["spec"]["selector"]
            network = objects["NetworkPolicy", namespace, name]["spec"]["podSelector"]
            assert each["spec"]["selector"] == budget == network
    assert found == {
        "vcpuset-controller": ["--label-selector=!legacy,vcpuset.dev/shard notin (b,c)"],
        "vcpuset-controller-b": [
            "--leader-elect-name=vcpuset-controller-b",
            "--label-selector=!legacy,vcpuset.dev/shard=b",
        ],
        "vcpuset-controller-c": [
            "--leader-elect-name=vcpuset-controller-c",
            "--label-selector=!legacy,vcpuset.dev/shard=c",
        ],
    }
    (role,) = (
        each for each in objects.values() if each["metadata"]["name"] == "vcpuset-leader-election" and "rules" in each
    )
    assert role["rules"][1]["resourceNames"] == list(found)


async def test_other_namespaces_and_folders_leave_no_trace_of_the_shipped_ones() -> None:
    values = {
        "agent.namespace.name": "node-agents",
        "controller.namespace.name": "control",
        "agent.socketRoot": "/srv/sockets",
        "credentials.namespaces": ["shop"],
        "controller.leaderElection.leaseName": "other",
        "metricsAPI.enabled": True,
        "metricsAPI.namespace.name": "numbers",
        "monitoring.enabled": True,
        "monitoring.dashboard.enabled": True,
    }
    text = yaml.safe_dump_all(await render(*settings(values)))
    for shipped in (
        "vcpuset-system",
        "/run/vcpuset",
        "namespace: vcpuset-agent",
        "- vcpuset-agent\n",
        "serviceaccount:vcpuset-agent:",
        "namespace: vcpuset-metrics-api",
        "serviceaccount:vcpuset-metrics-api:",
        "metadata.name: vcpuset-metrics-api",
    ):
        assert shipped not in text
    assert "kubernetes.io/metadata.name: node-agents\n" in text
    assert "- --leader-elect-name=other\n" in text


async def test_the_namespace_that_helm_makes_is_not_made_by_the_chart_too() -> None:
    objects = await render("--namespace=vcpuset-system")
    namespaces = [each["metadata"]["name"] for each in objects if each["kind"] == "Namespace"]
    assert namespaces == ["vcpuset-agent"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("agent.enable", True, "at '/agent': additional properties 'enable' not allowed"),
        ("leaderElect", True, "at '': additional properties 'leaderElect' not allowed"),
        ("logLevel", "verbose", "at '/logLevel': value must be one of"),
        ("resyncSeconds", 0, "at '/resyncSeconds': minimum: got 0, want 1"),
        ("resyncSeconds", "60s", "at '/resyncSeconds': got string, want integer"),
        ("extraArgs", ["sweep"], "at '/extraArgs/0': 'sweep' does not match pattern"),
        ("watch.namespaces", ["Shop"], "at '/watch/namespaces/0': 'Shop' does not match pattern"),
        ("workers", 1025, "at '/workers': maximum: got 1,025, want 1,024"),
        ("image.digest", "latest", "at '/image/digest': 'latest' does not match pattern"),
        ("image.pullPolicy", "Sometimes", "at '/image/pullPolicy': value must be one of"),
        ("agent.runAsUser", 0, "at '/agent/runAsUser': minimum: got 0, want 1"),
        ("agent.supplementalGroups", [0], "at '/agent/supplementalGroups/0': minimum: got 0, want 1"),
        ("agent.socketRoot", "/run/../etc", "at '/agent/socketRoot': '/run/../etc' does not match pattern"),
        ("agent.socketRoot", "/", "at '/agent/socketRoot': '/' does not match pattern"),
        ("agent.maxUnavailable", 0, "at '/agent/maxUnavailable': minimum: got 0, want 1"),
        ("agent.namespace.name", "Agents", "at '/agent/namespace/name': 'Agents' does not match pattern"),
        ("agent.podLabels", {"app.kubernetes.io/name": "x"}, "at '/agent/podLabels/app.kubernetes.io~1name'"),
        (
            "agent.podAnnotations",
            DEFAULT_CONTAINER,
            "at '/agent/podAnnotations/kubectl.kubernetes.io~1default-container'",
        ),
        ("controller.podAnnotations", DEFAULT_CONTAINER, "at '/controller/podAnnotations/kubectl.kubernetes.io~1"),
        ("monitoring.labels", {"app.kubernetes.io/part-of": "x"}, "at '/monitoring/labels/app.kubernetes.io~1part-of'"),
        ("monitoring.labels", {"helm.sh/chart": "x"}, "at '/monitoring/labels/helm.sh~1chart'"),
        ("controller.shards", ["B"], "at '/controller/shards/0': 'B' does not match pattern"),
        ("controller.shards", ["b", "b"], "at '/controller/shards': items at 0 and 1 are equal"),
        ("controller.allowTCP", ["10.0.0.1"], "at '/controller/allowTCP/0': '10.0.0.1' does not match pattern"),
        ("controller.allowTCP", ["10.0.0.0/33"], "at '/controller/allowTCP/0': '10.0.0.0/33' does not match pattern"),
        ("controller.allowTCP", ["256.0.0.0/8"], "at '/controller/allowTCP/0': '256.0.0.0/8' does not match pattern"),
        ("controller.allowTCP", ["2001:db8::/129"], "at '/controller/allowTCP/0'"),
        ("controller.allowTCP", ["1:2/64"], "at '/controller/allowTCP/0'"),
        ("controller.allowTCP", ["12:34:/64"], "at '/controller/allowTCP/0'"),
        ("controller.allowTCP", ["1::2::3/64"], "at '/controller/allowTCP/0'"),
        ("controller.allowTCP", ["1:2:3:4:5:6:7:8:9/64"], "at '/controller/allowTCP/0'"),
        ("controller.allowTCP", "10.0.0.0/8", "at '/controller/allowTCP': got string, want array"),
        ("controller.leaderElection.leaseName", "a_b", "at '/controller/leaderElection/leaseName'"),
        ("controller.resources", {"cpu": "1"}, "at '/controller/resources': additional properties 'cpu' not allowed"),
        ("controller.tolerations", [{"keys": "x"}], "at '/controller/tolerations/0': additional properties 'keys'"),
        ("credentials.namespaces", ["*"], "at '/credentials/namespaces/0': '*' does not match pattern"),
        ("pods.namespaces", ["*"], "at '/pods/namespaces/0': '*' does not match pattern"),
        ("networkPolicy.apiServer.ports", [], "at '/networkPolicy/apiServer/ports': minItems"),
        ("networkPolicy.metricsNamespaceLabels", "any", "at '/networkPolicy/metricsNamespaceLabels'"),
        (
            "metricsAPI.certificate.injectCAFrom",
            "tls",
            "at '/metricsAPI/certificate/injectCAFrom': 'tls' does not match",
        ),
        # Left out, they would let pods of every namespace in.
        ("networkPolicy.metricsNamespaceLabels", None, "missing property 'metricsNamespaceLabels'"),
        ("agent.namespace.name", "vcpuset-system", "agent.namespace.name and controller.namespace.name must differ"),
    ],
)
async def test_a_bad_value_is_refused_by_its_name(path: str, value: object, named: str) -> None:
    refused = await run_helm("template", "vcpuset", CHART, *settings({path: value}), check=False)
    assert refused.returncode != 0
    assert named in refused.stderr


@pytest.mark.parametrize("other", ["vcpuset-agent", "vcpuset-system"])
async def test_the_metrics_api_has_a_namespace_of_its_own(other: str) -> None:
    values = settings({"metricsAPI.enabled": True, "metricsAPI.namespace.name": other})
    refused = await run_helm("template", "vcpuset", CHART, *values, check=False)
    assert refused.returncode != 0
    assert "metricsAPI.namespace.name and " in refused.stderr


@pytest.mark.parametrize(
    "network",
    [
        "::/0",
        "2001:db8::/32",
        "fd00:10:20:30::/64",
        "64:ff9b::/96",
        "1:2:3:4:5:6:7:8/128",
        "1::8/128",
        "1:2:3:4:5:6:7::/112",
        "::2:3:4:5:6:7:8/128",
        "FE80::/10",
        "0.0.0.0/0",
        "10.20.0.0/16",
    ],
)
async def test_a_network_that_the_schema_takes_the_program_takes_too(network: str) -> None:
    await made_of({"controller.allowTCP": [network]})
    networks.network(network)


async def test_an_older_kubernetes_is_refused_and_a_vendors_version_is_not() -> None:
    refused = await run_helm("template", "vcpuset", CHART, "--kube-version=v1.31.9", check=False)
    assert "chart requires kubeVersion: >=1.32.0-0" in refused.stderr
    await render("--kube-version=v1.32.1-gke.100")
