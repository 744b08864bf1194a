"""docs/install.md, "Upgrade" and "From kustomize to Helm", on a node: back to the version before and up again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from cluster.node.conftest import ALLOW_PODS, IMPATIENT
from harness.cache import REPOSITORY
from harness.containerimages import before, checkout_before, operator_image
from harness.docpage import Page
from harness.helm import run_helm
from harness.kubelet import install
from harness.node import PODS, Cluster
from harness.nodevm import NodeVM
from harness.wait import until
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

PAGE: Final = Page(REPOSITORY / "docs" / "install.md")
BEFORE_IMAGE: Final = {
    "target": {"kind": "Deployment|DaemonSet", "labelSelector": "app.kubernetes.io/part-of=vcpuset"},
    "patch": f"- {{op: replace, path: /spec/template/spec/containers/0/image, value: {before().reference}}}",
}
WORKLOADS: Final = (("vcpuset-agent", "daemonset/vcpuset-agent"), ("vcpuset-system", "deployment/vcpuset-controller"))
WAIT: Final = 120.0
POD: Final = {"selector": {"matchLabels": {"vm": "web"}}, "timeoutSeconds": 60}
"""A field that the version before does not have."""


@dataclass(frozen=True)
class Machines:
    """Two machines: `web`, which changes its count, and `mute`, whose guest does not answer unplug requests."""

    user: User
    web: NodeVM
    mute: NodeVM


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the version before."""
    folder = tmp_path_factory.mktemp("before")
    checkout_before(folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def machines(installed: Cluster, user: User, rights: None) -> Machines:
    """The machines: one Ready with 2, and one with an unplug request that stays open."""
    await installed.nodes["node-1"].load(before())
    web, mute = (NodeVM(installed, user.namespace, name, "node-1") for name in ("web", "mute"))
    await web.start(cpu="500m")
    await mute.start(cpu="500m", append="rdinit=/bin/busybox panic=0")  # its kernel ends in a panic
    await until(lambda: has_panicked(mute), WAIT, "the panic")
    await user.create("web", vcpus=2, monitor="web/qmp.sock", nodeName="node-1", pod=POD)
    await user.create("mute", vcpus=3, monitor="mute/qmp.sock", nodeName="node-1", unplug={"timeoutSeconds": 3600})
    await web.wait_online(2)
    await user.wait_ready("web")
    await user.wait_ready("mute")
    await user.scale("mute", 2)
    await user.wait_reason("mute", "UnplugPending")
    return Machines(user, web, mute)


async def has_panicked(vm: NodeVM) -> bool:
    """Whether the guest's kernel has panicked."""
    return "Kernel panic" in await vm.log()


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def restored(installed: Cluster) -> AsyncIterator[None]:
    """Leave the cluster as the other modules of this folder expect it."""
    yield
    await run_helm(
        "uninstall", "vcpuset", "--ignore-not-found", "--wait", kubeconfig=installed.control_plane.kubeconfig
    )
    await install(installed.control_plane, installed, *ALLOW_PODS, IMPATIENT)


async def change_while(
    machines: Machines, cluster: Cluster, vcpus: int, replace: Coroutine[object, object, None], image: str
) -> None:
    """Change the count and replace the operator; check both, and that no vCPU is plugged or unplugged twice."""
    user, web = machines.user, machines.web
    first = int((await user.get("web")).body["spec"]["vcpus"])
    plugged, unplugged = await web.commands("device_add"), await web.commands("device_del")
    asked = (await user.get("mute")).status["unplug"]["startedAt"]
    await user.scale("web", vcpus)
    await replace
    for namespace, workload in WORKLOADS:
        await cluster.rolled_out(namespace, workload)
        what = "jsonpath={.spec.template.spec.containers[0].image}"
        done = await cluster.kubectl("get", "-n", namespace, workload, "-o", what)
        assert done.stdout.rpartition("/")[2] == image
    await user.wait_ready("web")
    await web.wait_online(vcpus)
    more, fewer = await web.commands("device_add") - plugged, await web.commands("device_del") - unplugged
    assert sorted(more.values()) == [1] * max(0, vcpus - first)
    assert len(fewer) == max(0, first - vcpus)
    assert (await user.get("web")).body["spec"]["pod"] == POD
    assert (await user.wait_reason("mute", "UnplugPending")).status["unplug"]["startedAt"] == asked


async def test_kustomize_replaces_each_version_by_the_other_while_counts_change(
    installed: Cluster, machines: Machines, tree: Path
) -> None:
    plane = installed.control_plane
    keep = PAGE.block("yaml", "rollback").document()["patches"]
    back = install(plane, installed, *ALLOW_PODS, BEFORE_IMAGE, *keep, tree=tree)
    await change_while(machines, installed, 6, back, before().reference)
    again = install(plane, installed, *ALLOW_PODS, IMPATIENT)
    await change_while(machines, installed, 2, again, operator_image().reference)


async def test_helm_takes_over_from_kustomize_and_replaces_each_version_by_the_other_while_counts_change(
    installed: Cluster, machines: Machines, tree: Path
) -> None:
    kubeconfig = installed.control_plane.kubeconfig

    async def helm(folder: Path, image: str, *options: str) -> None:
        repository, _, tag = image.partition(":")
        values = (f"--set=image.repository={repository}", f"--set-string=image.tag={tag}")
        allowed = f"--set=controller.allowTCP={{{PODS}.0.0/16}}"
        chart = folder / "deploy" / "helm" / "vcpuset"
        release = ("upgrade", "--install", "vcpuset", "--namespace", "default")
        await run_helm(*release, chart, *values, allowed, *options, kubeconfig=kubeconfig)

    async def take_over() -> None:
        for part in ("agent", "controller"):
            await installed.kubectl("delete", "-k", REPOSITORY / "deploy" / "parts" / part, timeout=120)
        await helm(REPOSITORY, operator_image().reference, "--take-ownership", "--force-conflicts")

    await change_while(machines, installed, 6, take_over(), operator_image().reference)
    back = helm(tree, before().reference, "--set=crds.install=false")
    await change_while(machines, installed, 2, back, before().reference)
    again = helm(REPOSITORY, operator_image().reference)
    await change_while(machines, installed, 6, again, operator_image().reference)
