"""Nodes that run pods: scheduler and kubelets of a control plane, played, so that what `deploy/` says is what runs.

    async with cluster("node-a", "node-b") as (control_plane, nodes):
        await install(control_plane, nodes, ALLOW_LOOPBACK)
        agent = nodes.pod("vcpuset-agent", node="node-a")

Each pod is a process with exactly the command, arguments, environment, user, volumes and token of its manifest (see
`harness.container`), is probed, restarted, told to end with SIGTERM and its grace period, and reported on. One thing is
the test's own: all pods share the host's network, so each has a loopback address of its own, and where an argument says
`0.0.0.0` the pod gets that address. Network policies, resources and tolerations are not played.

A node's file system is a folder: the pods' hostPath volumes are in it, and `Node.command` runs a node's programs on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import yaml

from harness.cache import REPOSITORY
from harness.container import Mount, contained
from harness.controllermanager import CLUSTER, ControllerManager
from harness.controlplane import ControlPlane
from harness.kubeletapi import KubeletAPI
from harness.pod import Pod
from harness.processes import CommandFailed

__all__ = ["ALLOW_LOOPBACK", "Node", "Nodes", "cluster", "install"]

POLL_SECONDS: Final = 0.1
ROLLOUT_SECONDS: Final = 120.0

Manifest = Mapping[str, Any]

ALLOW_LOOPBACK: Final[Manifest] = {
    "target": {"kind": "Deployment", "name": "vcpuset-controller"},
    "patch": "- {op: add, path: /spec/template/spec/containers/0/args/-, value: --allow-tcp=127.0.0.0/8}",
}
"""What the administrator adds to the shipped Deployment: the network of a test's machines."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    name: str
    root: Path
    """The folder that plays its file system, as far as pods and `command` see it."""

    def path(self, path: str) -> Path:
        """Where a path of the node is for the test, such as /run/vcpuset."""
        return self.root / path.lstrip("/")

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs a program of the node: with the node's own /run, else the host's files."""
        self.path("/run").mkdir(parents=True, exist_ok=True)
        return contained([Mount(self.path("/run"), Path("/run"))], words)


class Nodes:
    """Nodes with these names, of a control plane with a controller manager; end before both."""

    def __init__(self, control_plane: ControlPlane, *names: str) -> None:
        self._control_plane = control_plane
        self.directory = Path()
        self._names = names
        self._nodes: dict[str, Node] = {}
        self._pods: dict[str, Pod] = {}  # by uid
        self._task: asyncio.Task[None] | None = None
        self._api = KubeletAPI(control_plane.directory, self._log_of)
        # So that two test runs on one host do not meet: see the module's docstring.
        self._network = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
        self._hosts = iter(range(1, 255))

    def node(self, name: str) -> Node:
        """A node by its name."""
        return self._nodes[name]

    @property
    def pods(self) -> list[Pod]:
        """The pods that run now, on all nodes."""
        return [each for each in self._pods.values() if not each.ended]

    def pod(self, owner: str, node: str | None = None) -> Pod:
        """The one pod of a Deployment or DaemonSet, on a node or anywhere."""
        (found,) = [
            each for each in self.pods if each.name.startswith(f"{owner}-") and (node is None or each.node == node)
        ]
        return found

    async def rolled_out(self, namespace: str, workload: str) -> None:
        """Wait until a Deployment or DaemonSet, such as `daemonset/NAME`, has all its pods ready.

        Raises:
            CommandFailed: not within two minutes; the message has what the pods said.
        """
        arguments = ("rollout", "status", "-n", namespace, workload, f"--timeout={ROLLOUT_SECONDS:.0f}s")
        done = await self._control_plane.kubectl(*arguments, check=False, timeout=ROLLOUT_SECONDS + 30)
        if done.returncode:
            said = "\n".join(f"{each.name}: {each.text()[-2000:]}" for each in self.pods)
            raise CommandFailed(replace(done, stderr=f"{done.stderr}\n{said}"))

    async def __aenter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="vcpuset-nodes-"))
        self.directory.chmod(0o755)
        try:
            await self._api.start()
            for name in self._names:
                await self.add(name)
        except BaseException:
            await self._end()
            raise
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def add(self, name: str) -> Node:
        """Join one more node, Ready from the start."""
        root = self.directory / name
        root.mkdir()
        labels = {"kubernetes.io/os": "linux", "kubernetes.io/hostname": name}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
        await self._control_plane.ok("POST", "/api/v1/nodes", node)
        status = {
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "addresses": [{"type": "InternalIP", "address": self._api.host}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._api.port}},
            "allocatable": {"cpu": "8", "memory": "16Gi", "pods": "110"},
        }
        await self._control_plane.ok("PATCH", f"/api/v1/nodes/{name}/status", {"status": status})
        # A new node is tainted as not ready until its first report; the node controller would take that away.
        await self._control_plane.ok("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        self._nodes[name] = Node(name, root)
        return self._nodes[name]

    async def _end(self) -> None:
        try:
            if self._task is not None:
                self._task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._task  # what went wrong in it goes wrong in the test
        finally:
            self._task = None
            await asyncio.gather(*(each.stop() for each in self._pods.values()))
            await self._api.stop()
            shutil.rmtree(self.directory, ignore_errors=True)

    async def _work(self) -> None:
        """Bind, start and let go of pods, as the API server lists them."""
        while True:
            with contextlib.suppress(OSError):  # an API server that is away: the pods go on
                answer = await self._control_plane.request("GET", "/api/v1/pods")
                if answer.status == 200:
                    await self._take(answer.body["items"])
            await asyncio.sleep(POLL_SECONDS)

    async def _take(self, manifests: Sequence[Manifest]) -> None:
        listed = {str(each["metadata"]["uid"]): each for each in manifests}
        for uid, manifest in listed.items():
            if "nodeName" not in manifest["spec"]:
                await self._bind(manifest, self._choose(manifest, manifests))
            elif uid in self._pods:
                self._pods[uid].seen(manifest)
            elif manifest["spec"]["nodeName"] in self._nodes and manifest["status"].get("phase") == "Pending":
                address = f"{self._network}.{next(self._hosts)}"
                root = self._nodes[manifest["spec"]["nodeName"]].root
                directory = self.directory / f"pod-{uid}"
                self._pods[uid] = Pod(self._control_plane, {**manifest}, address, directory, root)
                self._pods[uid].start()
        for uid in self._pods.keys() - listed.keys():
            await self._pods[uid].stop()  # deleted by force
        for pod in self._pods.values():
            pod.raise_failure()

    def _choose(self, manifest: Manifest, manifests: Sequence[Manifest]) -> str:
        """The node for a pod: the one that a DaemonSet's pod names, else the one with the fewest."""
        affinity = manifest["spec"].get("affinity", {}).get("nodeAffinity", {})
        terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
        named = [field["values"][0] for term in terms for field in term.get("matchFields", ())]
        if named:
            return str(named[0])
        taken = [each["spec"].get("nodeName") for each in manifests]
        return min(self._nodes, key=taken.count)

    async def _bind(self, manifest: Manifest, node: str) -> None:
        meta = manifest["metadata"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": meta["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/binding"
        await self._control_plane.request("POST", path, binding)  # 404, 409: gone meanwhile

    def _log_of(self, namespace: str, name: str) -> Path | None:
        found = (each for each in self._pods.values() if (each.namespace, each.name) == (namespace, name))
        return next((each.log for each in found), None)


@contextlib.asynccontextmanager
async def cluster(*nodes: str, status_in_audit: bool = False) -> AsyncIterator[tuple[ControlPlane, Nodes]]:
    """A whole cluster: control plane, controllers, and nodes with these names. Nothing is installed in it."""
    async with (
        ControlPlane(service_accounts=True, status_in_audit=status_in_audit) as control_plane,
        ControllerManager(control_plane, CLUSTER),
        Nodes(control_plane, *nodes) as running,
    ):
        yield control_plane, running


class RollsOut(Protocol):
    """A cluster whose nodes run pods."""

    async def rolled_out(self, namespace: str, workload: str) -> None:
        """Wait until a Deployment or DaemonSet has all its pods ready."""


async def install(
    control_plane: ControlPlane,
    nodes: RollsOut,
    *patches: Manifest,
    overlay: str = "both",
    components: Sequence[str] = (),
    tree: Path = REPOSITORY,
) -> None:
    """Install an overlay as shipped, but for components and a user's own patches, and wait until all pods are ready.

    tree   the folder with `deploy/` and `crds/`

    Raises:
        CommandFailed: not in time; the message has what the pods said.
    """
    with tempfile.TemporaryDirectory(prefix="vcpuset-install-") as folder:
        _write_kustomization(Path(folder), tree, overlay, components, patches)
        await control_plane.kubectl("apply", "--server-side", "-k", folder)
    ours = "--selector=app.kubernetes.io/part-of=vcpuset"
    workloads = await control_plane.kubectl("get", "daemonset,deployment", "--all-namespaces", ours, "--output=json")
    for each in json.loads(workloads.stdout)["items"]:
        await nodes.rolled_out(each["metadata"]["namespace"], f"{each['kind'].lower()}/{each['metadata']['name']}")


def _write_kustomization(
    folder: Path, tree: Path, overlay: str, components: Sequence[str], patches: Sequence[Manifest]
) -> None:
    """Lay out a user's kustomization with a copy of the shipped ones beside it."""
    for shipped in ("deploy", "crds"):
        shutil.copytree(tree / shipped, folder / shipped)
    own = {
        "resources": [f"deploy/overlays/{overlay}"],
        "components": [f"deploy/components/{each}" for each in components],
        "patches": [dict(each) for each in patches],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
