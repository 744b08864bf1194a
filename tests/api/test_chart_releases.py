"""The Helm chart on a real API server: a release's life, and what it says to whoever installs it."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
import yaml

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.helm import CHART, run_helm, settings
from harness.pki import Authority
from harness.processes import CommandFailed

__all__: list[str] = []

DEPLOY: Final = REPOSITORY / "deploy"


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[ControlPlane]:
    """An API server on which nothing is installed."""
    async with ControlPlane() as running:
        yield running


VCPUSET: Final = """\
apiVersion: vcpuset.dev/v1alpha1
kind: VCPUSet
metadata: {name: web, namespace: default}
spec: {vcpus: 2, nodeName: node-1, monitor: {unix: {path: web/qmp.sock}}}
"""


async def test_a_release_is_installed_upgraded_and_uninstalled_and_the_sets_stay(cluster: ControlPlane) -> None:
    async def release(*arguments: str | Path) -> str:
        return (await run_helm(*arguments, kubeconfig=cluster.kubeconfig)).stdout

    async def arguments() -> list[str]:
        got = await cluster.kubectl("get", "deploy/vcpuset-controller", "-n", "vcpuset-system", "-o", "json")
        return list(json.loads(got.stdout)["spec"]["template"]["spec"]["containers"][0]["args"])

    async def columns() -> str:
        path = "jsonpath={.spec.versions[0].additionalPrinterColumns[*].name}"
        return (await cluster.kubectl("get", "crd/vcpusets.vcpuset.dev", "-o", path)).stdout

    async def ours() -> set[str]:
        kinds = (
            "crd,ds,deploy,sa,clusterroles,clusterrolebindings,roles,rolebindings,pdb,networkpolicies,priorityclasses,"
        )
        kinds += "validatingadmissionpolicies,validatingadmissionpolicybindings"
        selector = "--selector=app.kubernetes.io/part-of=vcpuset"
        found = await cluster.kubectl("get", kinds, "--all-namespaces", selector, "-o=name")
        return set(found.stdout.split())

    # What the API server would do with it. A namespace that is not there yet takes nothing, so they are made before.
    for kind in ("agent", "controller"):
        await cluster.kubectl("apply", "--server-side", "-f", DEPLOY / "parts" / kind / "namespace.yaml")
    there = settings({"agent.namespace.create": False, "controller.namespace.create": False})
    await release("install", "vcpuset", CHART, "--dry-run=server", *there)
    assert await ours() == set()

    await release("install", "vcpuset", CHART, *there)
    await cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/vcpusets.vcpuset.dev")
    await cluster.kubectl("create", "-f", "-", input=VCPUSET)
    assert not any(word.startswith("--allow-tcp") for word in await arguments())
    installed = await ours()

    # As if an older version had been installed.
    complete = await columns()
    older = [{"op": "remove", "path": "/spec/versions/0/additionalPrinterColumns/0"}]
    await cluster.kubectl("patch", "crd/vcpusets.vcpuset.dev", "--type=json", "-p", json.dumps(older))
    assert await columns() != complete
    values = settings({"controller.allowTCP": ["192.0.2.0/24"], "credentials.namespaces": ["default"]})
    await release("upgrade", "vcpuset", CHART, *there, *values, "--force-conflicts")
    assert "--allow-tcp=192.0.2.0/24" in await arguments()
    assert await columns() == complete, "the definition is upgraded with the release"
    assert await ours() == installed | {"rolebinding.rbac.authorization.k8s.io/vcpuset-monitor-credentials"}

    await release("uninstall", "vcpuset")
    assert await ours() == {"customresourcedefinition.apiextensions.k8s.io/vcpusets.vcpuset.dev"}
    sets = await cluster.kubectl("get", "vcs", "--all-namespaces", "-o=name")
    assert sets.stdout.split() == ["vcpuset.vcpuset.dev/web"]

    await release("install", "vcpuset", CHART, *there)
    assert await ours() == installed, "what was kept does not stand in the way of another installation"


async def test_a_release_takes_over_what_kustomize_has_left(cluster: ControlPlane) -> None:
    """As docs/install.md says: the base and the sets are there, the components are not."""
    await cluster.kubectl("apply", "--server-side", "-k", DEPLOY / "base")
    await cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/vcpusets.vcpuset.dev")
    await cluster.kubectl("create", "-f", "-", input=VCPUSET)
    install = ("upgrade", "--install", "vcpuset", CHART)
    with pytest.raises(CommandFailed, match="cannot be imported"):
        await run_helm(*install, kubeconfig=cluster.kubeconfig)
    flags = ("--take-ownership", "--force-conflicts")
    block = Page(REPOSITORY / "docs" / "install.md").block("sh", "kustomize-to-helm")
    assert set(flags) <= set(block.text.split())
    await run_helm(*install, *flags, kubeconfig=cluster.kubeconfig)
    await cluster.kubectl("get", "deploy/vcpuset-controller", "-n", "vcpuset-system")
    await cluster.kubectl("get", "vcpuset", "web")


async def test_a_release_is_installed_into_a_namespace_that_helm_makes(cluster: ControlPlane) -> None:
    into = ("--namespace=vcpuset-system", "--create-namespace")
    said = await run_helm("install", "vcpuset", CHART, *into, kubeconfig=cluster.kubeconfig)
    # Helm gives it no labels.
    label = "pod-security.kubernetes.io/enforce=restricted"
    assert f"kubectl label namespace vcpuset-system {label}\n" in said.stdout
    await cluster.kubectl("get", "deploy/vcpuset-controller", "-n", "vcpuset-system")


async def test_a_release_of_the_agent_alone_in_a_namespace_that_helm_makes_says_which_labels_it_lacks(
    cluster: ControlPlane,
) -> None:
    into = ("--namespace=vcpuset-agent", "--create-namespace")
    values = settings({"controller.enabled": False})
    said = await run_helm("install", "vcpuset", CHART, *into, *values, kubeconfig=cluster.kubeconfig)
    (command,) = (line.strip() for line in said.stdout.splitlines() if "kubectl label namespace" in line)
    await cluster.kubectl(*command.split()[1:])
    shipped = yaml.safe_load((DEPLOY / "parts" / "agent" / "namespace.yaml").read_text())["metadata"]["labels"]
    wanted = {name: value for name, value in shipped.items() if name.startswith("pod-security.")}
    got = await cluster.kubectl("get", "namespace", "vcpuset-agent", "-o", "json")
    assert wanted.items() <= json.loads(got.stdout)["metadata"]["labels"].items()
    assert "vcpuset-system" not in said.stdout


async def test_a_release_makes_its_namespaces_with_the_labels_of_pod_security(cluster: ControlPlane) -> None:
    await run_helm("install", "vcpuset", CHART, kubeconfig=cluster.kubeconfig)
    label = "pod-security.kubernetes.io/enforce"
    got = await cluster.kubectl("get", "namespaces", f"--label-columns={label}", "--no-headers")
    enforced = {line.split()[0]: line.split()[-1] for line in got.stdout.splitlines()}
    assert (enforced["vcpuset-agent"], enforced["vcpuset-system"]) == ("privileged", "restricted")


async def test_an_upgrade_keeps_the_certificate_that_the_metrics_api_has_made(cluster: ControlPlane) -> None:
    """The Secret is shipped without contents, and the APIService without a bundle."""
    stored = "/api/v1/namespaces/vcpuset-metrics-api/secrets/vcpuset-metrics-api"
    service = "/apis/apiregistration.k8s.io/v1/apiservices/v1beta2.custom.metrics.k8s.io"
    certificate = base64.b64encode(Authority().certificate.encode()).decode()
    release: tuple[str | Path, ...] = (
        "vcpuset",
        CHART,
        *settings({"metricsAPI.enabled": True, "agent.enabled": False}),
    )
    await run_helm("install", *release, kubeconfig=cluster.kubeconfig)
    whole = (await cluster.request("GET", stored)).body
    written = await cluster.request("PUT", stored, {**whole, "data": {"tls.crt": certificate}})
    patched = await cluster.request("PATCH", service, {"spec": {"caBundle": certificate}})
    assert (written.status, patched.status) == (200, 200)

    await run_helm("upgrade", *release, *settings({"metricsAPI.replicas": 3}), kubeconfig=cluster.kubeconfig)
    got = await cluster.kubectl("get", "deployment", "-n=vcpuset-metrics-api", "-o=jsonpath={.items[*].spec.replicas}")
    assert got.stdout == "3"
    assert (await cluster.request("GET", stored)).body["data"] == {"tls.crt": certificate}
    assert (await cluster.request("GET", service)).body["spec"]["caBundle"] == certificate
    # Also while the API is registered, and nobody serves it.
    await run_helm("uninstall", "vcpuset", kubeconfig=cluster.kubeconfig)
    assert (await cluster.request("GET", service)).status == 404
