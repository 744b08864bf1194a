"""Every shipped manifest on a real API server: applied without a warning, and applied again without a change."""

import json
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from harness.cache import REPOSITORY
from harness.controllermanager import ControllerManager
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.helm import render
from harness.wait import until

__all__: list[str] = []

DEPLOY: Final = REPOSITORY / "deploy"
OVERLAYS: Final = sorted(path.parent for path in DEPLOY.glob("overlays/*/kustomization.yaml"))
COMPONENTS: Final = sorted(path.parent for path in DEPLOY.glob("components/*/kustomization.yaml"))
EXAMPLES: Final = sorted(DEPLOY.glob("examples/*.yaml"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ControlPlane]:
    """An API server of this module's own, with the definition, and the warning on insecure monitors in force."""
    async with ControlPlane() as running:
        await running.install_crd()
        await running.install_crd(REPOSITORY / "tests" / "harness" / "prometheusoperator")
        await running.kubectl("create", "namespace", "monitoring")  # where the component monitoring goes
        warning = DEPLOY / "base" / "insecure-monitor-warning.yaml"
        await running.kubectl("apply", "--server-side", "-f", warning)

        async def warned() -> bool:
            insecure = DEPLOY / "examples" / "tcp-insecure.yaml"
            done = await running.kubectl("create", "--dry-run=server", "-f", insecure)
            return "INSECURE" in done.stderr

        await until(warned, 60, "the warning of an insecure monitor", interval=0.5)
        yield running


async def apply_twice(cluster: ControlPlane, *source: str | Path, stdin: str | None = None) -> None:
    """Apply it; warnings are errors. Applied again it must change nothing."""
    words = ("apply", "--server-side", "--warnings-as-errors", *source, "-o", "json")

    async def versions() -> dict[str, str]:
        # A List, but a lone object is printed as it is.
        applied = json.loads((await cluster.kubectl(*words, input=stdin)).stdout)
        return {
            f"{each['kind']}/{each['metadata'].get('namespace')}/{each['metadata']['name']}": each["metadata"][
                "resourceVersion"
            ]
            for each in applied.get("items", [applied])
        }

    last = await versions()

    async def unchanged() -> bool:
        nonlocal last
        before, last = last, await versions()
        return before == last

    # The API server itself writes the status of an APIService meanwhile.
    await until(unchanged, 60, "an apply that changes nothing", interval=1)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
async def test_an_overlay_is_applied_without_a_warning_and_again_without_a_change(
    cluster: ControlPlane, overlay: Path
) -> None:
    await apply_twice(cluster, "-k", overlay)


async def test_the_overlays_in_turn_leave_each_others_objects_as_they_are(cluster: ControlPlane) -> None:
    async def versions() -> dict[str, str]:
        got = json.loads((await cluster.kubectl("get", "-k", DEPLOY / "overlays" / "both", "-o", "json")).stdout)
        return {
            f"{each['kind']}/{each['metadata']['name']}": each["metadata"]["resourceVersion"] for each in got["items"]
        }

    for overlay in OVERLAYS:
        await cluster.kubectl("apply", "--server-side", "-k", overlay)
    before = await versions()
    for overlay in OVERLAYS:
        await cluster.kubectl("apply", "--server-side", "-k", overlay)
    assert await versions() == before


async def test_kubernetes_own_type_check_finds_no_fault_in_the_policies(cluster: ControlPlane) -> None:
    await cluster.kubectl("apply", "--server-side", "-k", DEPLOY / "overlays" / "both")

    async def policies() -> dict[str, dict[str, Any]]:
        got = await cluster.kubectl("get", "validatingadmissionpolicies", "-o", "json")
        return {policy["metadata"]["name"]: policy for policy in json.loads(got.stdout)["items"]}

    async def checked() -> bool:
        return all(
            policy.get("status", {}).get("observedGeneration") == policy["metadata"]["generation"]
            for policy in (await policies()).values()
        )

    async with ControllerManager(cluster, ["validatingadmissionpolicy-status-controller"]):
        await until(checked, 60, "the types of all policies to be checked")
    found = {name: policy["status"]["typeChecking"] for name, policy in (await policies()).items()}
    agents = ("adoption", "events", "node", "pods", "vm-pods")
    controllers = ("adoption", "node")
    ours = (*(f"vcpuset-agent-{each}" for each in agents), *(f"vcpuset-controller-{each}" for each in controllers))
    assert found == {name: {} for name in (*ours, "vcpuset-insecure-monitor")}


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda path: path.name)
async def test_a_component_is_applied_without_a_warning_and_again_without_a_change(
    cluster: ControlPlane, tmp_path: Path, component: Path
) -> None:
    (tmp_path / "deploy").symlink_to(DEPLOY)
    plain = await cluster.kubectl("kustomize", DEPLOY / "overlays" / "both")
    kustomization = {"resources": ["deploy/overlays/both"], "components": [f"deploy/components/{component.name}"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    assert (await cluster.kubectl("kustomize", tmp_path)).stdout != plain.stdout
    await apply_twice(cluster, "-k", tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
async def test_an_example_is_applied_without_a_warning_that_it_does_not_deserve(
    cluster: ControlPlane, example: Path
) -> None:
    if "insecure" in example.stem:
        refused = await cluster.kubectl(
            "apply", "--server-side", "--dry-run=server", "--warnings-as-errors", "-f", example, check=False
        )
        assert "INSECURE MONITOR" in refused.stderr
        assert "1 warning received" in refused.stderr
    else:
        applied = await cluster.kubectl("apply", "--server-side", "--warnings-as-errors", "-f", example)
        if applied.stdout.startswith("vcpuset.vcpuset.dev/"):
            # A new set's default status is stored with its first change: here as in a cluster by the operator's report.
            status = ("--subresource=status", "--type=merge", "-p", '{"status": {"observedGeneration": 1}}')
            await cluster.kubectl("patch", "-f", example, *status)
        await apply_twice(cluster, "-f", example)


async def test_what_the_chart_makes_is_applied_without_a_warning_and_again_without_a_change(
    cluster: ControlPlane,
) -> None:
    objects = await render()
    # As Helm sends them: a namespace before what is in it.
    await apply_twice(cluster, "-f", "-", stdin=yaml.safe_dump_all(objects))


async def test_the_customizations_for_argo_cd_are_added_to_its_config_map(cluster: ControlPlane) -> None:
    await cluster.kubectl("create", "namespace", "argocd")
    await cluster.kubectl(
        "create", "configmap", "argocd-cm", "-n", "argocd", "--from-literal=url=https://argocd.example"
    )
    command = Page(REPOSITORY / "docs" / "gitops.md").block("sh").text
    program, *words, patch = shlex.split(command)
    assert program == "kubectl"
    await cluster.kubectl(*words, REPOSITORY / patch)
    data = json.loads((await cluster.kubectl("get", "configmap", "argocd-cm", "-n", "argocd", "-o", "json")).stdout)[
        "data"
    ]
    assert data.pop("url") == "https://argocd.example"
    assert data == yaml.safe_load((REPOSITORY / patch).read_text())["data"]
