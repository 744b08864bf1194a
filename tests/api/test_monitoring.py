"""The monitoring component on a real API server, and the series that its alerts go by in a real operator's metrics."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.processes import run
from harness.wait import until

__all__: list[str] = []

COMPONENT: Final = REPOSITORY / "deploy" / "components" / "monitoring"
RULES: Final = yaml.safe_load((COMPONENT / "rules.yaml").read_text())
KINDS: Final = REPOSITORY / "tests" / "harness" / "prometheusoperator"
"""The definitions of the Prometheus operator 0.85.0, as its module has them in example/prometheus-operator-crd."""

USERS: Final = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
components:
- monitoring
- monitoring/dashboard
patches:
- target: {group: monitoring.coreos.com}
  patch: |-
    - {op: replace, path: /metadata/namespace, value: observability}
    - {op: add, path: /metadata/labels/release, value: kube-prometheus-stack}
- target: {kind: ConfigMap, name: vcpuset-dashboard}
  patch: |-
    - {op: replace, path: /metadata/namespace, value: observability}
    - {op: add, path: /metadata/labels/team, value: machines}
"""
"""A user's own kustomization, with the patches that the components' comments advise."""

OF_PROMETHEUS: Final = {"up"}
"""What Prometheus itself adds to each target."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ControlPlane]:
    """An API server that knows the Prometheus operator's kinds, with both overlays and the component."""
    async with ControlPlane() as running:
        await running.kubectl("apply", "--server-side", "-f", KINDS)
        for name in ("podmonitors", "prometheusrules"):
            await running.kubectl(
                "wait", "--for=condition=Established", f"crd/{name}.monitoring.coreos.com", "--timeout=60s"
            )
        await running.kubectl("create", "namespace", "observability")
        await running.kubectl("apply", "--server-side", "-k", REPOSITORY / "deploy" / "overlays" / "both")
        folder = tmp_path_factory.mktemp("users")
        shutil.copytree(COMPONENT, folder / "monitoring")
        (folder / "kustomization.yaml").write_text(USERS)
        await running.kubectl("apply", "--server-side", "-k", folder)
        yield running


@pytest.mark.asyncio(loop_scope="module")
async def test_the_component_is_accepted_and_an_overlay_may_change_its_namespace_and_labels(
    cluster: ControlPlane,
) -> None:
    found = await cluster.kubectl(
        "get", "podmonitors,prometheusrules", "-A", "-l", "release=kube-prometheus-stack", "--no-headers"
    )
    assert sorted(line.split()[:2] for line in found.stdout.splitlines()) == [
        ["observability", "podmonitor.monitoring.coreos.com/vcpuset"],
        ["observability", "prometheusrule.monitoring.coreos.com/vcpuset"],
    ]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_dashboard_has_the_label_of_grafanas_sidecar_and_is_the_file_that_users_import(
    cluster: ControlPlane,
) -> None:
    selector = "grafana_dashboard=1,team=machines"
    got = await cluster.kubectl("get", "configmap", "-n", "observability", "-l", selector, "-o", "json")
    (found,) = json.loads(got.stdout)["items"]
    assert found["data"] == {"vcpuset.json": (COMPONENT / "dashboard" / "vcpuset.json").read_text()}


@pytest.mark.asyncio(loop_scope="module")
async def test_the_pod_monitor_finds_the_pods_of_both_shapes_and_their_port(cluster: ControlPlane) -> None:
    got = await cluster.kubectl("get", "podmonitor", "vcpuset", "-n", "observability", "-o", "yaml")
    spec = yaml.safe_load(got.stdout)["spec"]
    shapes = [("vcpuset-agent", "daemonset/vcpuset-agent"), ("vcpuset-system", "deployment/vcpuset-controller")]
    assert sorted(spec["namespaceSelector"]["matchNames"]) == [namespace for namespace, _ in shapes]
    (endpoint,) = spec["podMetricsEndpoints"]
    for namespace, workload in shapes:
        got = await cluster.kubectl("get", workload, "-n", namespace, "-o", "yaml")
        pod = yaml.safe_load(got.stdout)["spec"]["template"]
        assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "vcpuset"  # the job's name, by which rules go
        (container,) = pod["spec"]["containers"]
        assert endpoint["port"] in {port["name"] for port in container["ports"]}
        assert pod["metadata"]["labels"]["app.kubernetes.io/component"] in {"agent", "controller"}


@pytest.mark.asyncio(loop_scope="module")
async def test_each_series_that_an_alert_goes_by_is_in_the_metrics_of_an_operator(
    cluster: ControlPlane, tmp_path: Path
) -> None:
    await cluster.kubectl("create", "namespace", "shop")
    manifest = tmp_path / "web.yaml"
    manifest.write_text(
        "{apiVersion: vcpuset.dev/v1alpha1, kind: VCPUSet, metadata: {name: web, namespace: shop}, "
        "spec: {vcpus: 2, monitor: {unix: {path: web.sock}}}}"
    )
    await cluster.kubectl("apply", "-f", manifest)
    async with OperatorProcess(
        cluster,
        "--leader-elect",
        "--leader-elect-namespace=vcpuset-system",
        "--agent-namespace=vcpuset-agent",
        socket_root=tmp_path,
    ) as operator:

        def reported() -> bool:
            return 'vcpuset_state{name="web",namespace="shop",reason="MonitorUnreachable"' in operator.metrics()

        await until(reported, 90, lambda: f"the set's reason in the metrics; they are:\n{operator.metrics()}")
        shown = {
            sample.name: set(sample.labels)
            for family in text_string_to_metric_families(operator.metrics())
            for sample in family.samples
        }

    wanted = {
        (name, label)
        for group in RULES["spec"]["groups"]
        for rule in group["rules"]
        for name, labels in re.findall(r"\b([a-z][a-z_]+)\{([^}]*)\}", rule["expr"])
        for label in re.findall(r"(\w+)\s*[=!]", labels)
    }
    assert len({name for name, _ in wanted}) > 10
    assert {name for name, _ in wanted} - OF_PROMETHEUS <= shown.keys()
    # `job` comes from the PodMonitor.
    assert {(name, label) for name, label in wanted if name in shown and label not in shown[name]} == {
        (name, "job") for name, _ in wanted if name in shown
    }


NEEDS_A_NODE: Final = ("kubectl logs", "kubectl top", "kubectl describe pod", "kubectl get certificate")
"""What only works where pods run, or where cert-manager is."""

DOCS: Final = REPOSITORY / "docs"
TEXTS: Final = [
    *(
        page.read_text().partition("## Diagnosis")[2].partition("## Mitigation")[0]
        for page in (DOCS / "runbooks").glob("*.md")
    ),
    (DOCS / "reasons.md").read_text(),
]
COMMANDS: Final = sorted({
    line
    for text in TEXTS
    for line in text.splitlines()
    if line.startswith("kubectl ") and not line.startswith(NEEDS_A_NODE)
})  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("command", COMMANDS)
async def test_a_command_of_a_runbook_or_of_the_page_of_reasons_works(
    cluster: ControlPlane, tmp_path: Path, command: str
) -> None:
    await cluster.kubectl("create", "namespace", "diagnosis", check=False)
    manifest = tmp_path / "objects.yaml"
    manifest.write_text(
        "{apiVersion: v1, kind: Secret, metadata: {name: tls, namespace: diagnosis}, stringData: {tls.key: secret}}\n"
        "---\n{apiVersion: vcpuset.dev/v1alpha1, kind: VCPUSet, metadata: {name: web, namespace: diagnosis}, "
        "spec: {vcpus: 2, monitor: {unix: {path: web.sock}}}}\n"
        "---\n{apiVersion: v1, kind: Pod, metadata: {name: pod, namespace: diagnosis}, "
        "spec: {containers: [{name: one, image: none}]}}\n"
        "---\n{apiVersion: v1, kind: Node, metadata: {name: node-1}}\n"
        "---\n{apiVersion: coordination.k8s.io/v1, kind: Lease, "
        "metadata: {name: vcpuset-controller, namespace: vcpuset-system}}\n"
    )
    await cluster.kubectl("apply", "-f", manifest)
    words = command.partition("    #")[0].partition(" | vcpuset plan")[0].partition(" | grep")[0]
    for placeholder, value in {
        "SET_NAMESPACE": "diagnosis",
        "NAMESPACE": "diagnosis",
        "secret/SECRET": "secret/tls",
        " SECRET": " tls",
        " NAME": " web",
        "=NAME": "=web",
        "POD": "pod",
        "NODE": "node-1",
    }.items():
        words = words.replace(placeholder, value)

    done = await run(
        ["bash", "-o", "pipefail", "-c", words],
        timeout=120,
        check=False,
        env={
            "PATH": f"{cluster.kubectl_path.parent}:/usr/bin:/bin",
            "KUBECONFIG": str(cluster.kubeconfig),
            "HOME": str(tmp_path),  # kubectl keeps a cache there
        },
    )

    # `kubectl auth can-i` says no with status 1 and nothing on standard error.
    assert re.sub(r"No resources found( in \S+ namespace)?\.?", "", done.stderr).strip() == ""
    assert done.returncode == 0 or done.stdout == "no\n"
    assert "secret" not in done.stdout
