"""Nodes with a kubelet, containerd and a network of pods, and their cluster, inside `harness.sandbox`.

    async with Cluster("node-1") as cluster:
        await cluster.kubectl("apply", "-f", "-", input=manifest)
        await cluster.rolled_out("vcpuset-agent", "daemonset/vcpuset-agent")

Each node has a network, a host name, mounts and a cgroup of its own; /run and /var are empty. The nodes and the API
server are on one bridge, and so is the test's own process, which reaches pods. The images are those of
`harness.containerimages`. kube-router enforces NetworkPolicies.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from harness.binaries import KUBE_ROUTER, NODE
from harness.containerimages import Image, images
from harness.controllermanager import CLUSTER, ControllerManager
from harness.controlplane import KUBELET_CLIENT, ControlPlane
from harness.processes import Child, CommandFailed, Completed, run
from harness.runnable import Runnable
from harness.sandbox import enter, joining, own_cgroups, remove_cgroups
from harness.wait import until

__all__ = ["PODS", "Cluster", "Node", "processes"]

CONTROLLERS: Final = (
    *CLUSTER,
    "endpointslice-controller",
    "horizontal-pod-autoscaler-controller",
    "node-lifecycle-controller",
    "pod-garbage-collector-controller",
    "resourcequota-controller",
    "taint-eviction-controller",
)

NAMESPACES: Final = ("--mount", "--net", "--ipc", "--uts", "--cgroup")
"""A node's own. The process ids are the test's."""

BRIDGE: Final = "lan"
LAN: Final = "192.168.100"
PODS: Final = "10.244"
"""The pods' network. Its third byte is the number of the node."""

SERVICES: Final = "10.96.0.0/24"

START_SECONDS: Final = 120.0
ROLLOUT_SECONDS: Final = 180.0
CONTAINERD: Final = "/run/containerd/containerd.sock"
CNI_PROGRAMS: Final = next(
    (each for each in ("/usr/lib/cni", "/usr/libexec/cni") if Path(each).is_dir()), "/opt/cni/bin"
)

Manifest = Mapping[str, Any]


class Node:
    """A node that joins a control plane which knows its name (`ControlPlane.kubelet_tokens`)."""

    def __init__(self, control_plane: ControlPlane, name: str, number: int) -> None:
        self.name: Final = name
        self.address: Final = f"{LAN}.{10 + number}"
        self.pods: Final = f"{PODS}.{number}.0/24"
        self._control_plane = control_plane
        self._directory = control_plane.directory / name
        self._var = self._directory / "var"
        self._holder: Child | None = None
        self._programs: dict[str, Child] = {}

    def cgroup(self, controller: str, pod: Manifest) -> Path:
        """The folder of a pod's cgroup, for the test."""
        uid = pod["metadata"]["uid"]
        (found,) = Path("/sys/fs/cgroup", controller, self.name, "kubepods").rglob(f"pod{uid}")
        return found

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """The command line that runs a program on the node."""
        assert self._holder is not None
        inside = ["nsenter", f"--target={self._holder.pid}", *NAMESPACES, "--", *map(str, words)]
        return ["sh", "-c", "\n".join(["set -eu", *joining(self.name), f"exec {shlex.join(inside)}"])]

    async def run(self, *words: str | Path, check: bool = True, timeout: float = 60) -> Completed:
        """Run a program on the node to its end; see `harness.processes.run`."""
        return await run(self.command(words), check=check, timeout=timeout)

    async def power_on(self, others: Sequence[Node]) -> None:
        """Start it and what runs on it, and wait until it is Ready.

        Raises:
            TimeoutError, ChildDied: something did not start; the message has the end of its log.
        """
        for folder in ("lib", "log", "tmp", "etc/cni"):
            (self._var / folder).mkdir(parents=True, exist_ok=True)
        if not (self._var / "run").is_symlink():
            (self._var / "run").symlink_to("/run")
        ready = self._var / "ready"
        ready.unlink(missing_ok=True)
        script = f"hostname {self.name}\nmount --rbind {self._var} /var\ntouch /var/ready\nexec sleep infinity"
        log = self._directory / "node.log"
        self._holder = Child.start(enter(self.name, script, NAMESPACES), name=self.name, log=log)

        async def is_prepared() -> bool:
            return ready.exists()

        await self._holder.until(is_prepared, START_SECONDS)
        await self._connect(others)
        self._configure()
        await self.start("containerd")
        for image in images():
            await self.load(image)
        for name in ("kubelet", "kube-proxy"):
            await self.start(name)
        await until(self.is_ready, START_SECONDS, lambda: f"{self.name} to be Ready\n{self.said('kubelet')}")
        await self.start("kube-router")  # ends if the node has no address yet

    async def power_off(self) -> None:
        """End all that runs on it, at once. Safe to call again."""
        if self._holder is None:
            return
        for child in (*self._programs.values(), self._holder):
            child.kill()
        self._programs.clear()
        self._holder = None

        def is_empty() -> bool:
            left = {pid for folder in own_cgroups() for pid in processes(folder / self.name)}
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return not left

        await until(is_empty, START_SECONDS, f"the end of what ran on {self.name}", interval=0.05)
        await asyncio.to_thread(remove_cgroups, self.name)

    async def start(self, name: str) -> None:
        """Start containerd, kubelet, kube-proxy or kube-router (again)."""
        log = self._directory / f"{name}.log"
        child = self._programs[name] = Child.start(self.command(self._argv(name)), name=name, log=log)
        if name == "containerd":

            async def answers() -> bool:
                asked = await self.run("ctr", "--address", CONTAINERD, "version", check=False)
                return asked.returncode == 0

            await child.until(answers, START_SECONDS)

    async def stop(self, name: str, *, kill: bool = False) -> None:
        """End one of them; containers keep running."""
        child = self._programs.pop(name)
        if kill:
            child.kill()
        else:
            await child.stop()

    async def load(self, image: Image) -> None:
        """Make an image known to containerd."""
        words = ("ctr", "--address", CONTAINERD, "--namespace=k8s.io", "images", "import", image.path)
        await self.run(*words, timeout=300)

    async def is_ready(self) -> bool:
        """Whether the API server reports it Ready and without taints."""
        for child in self._programs.values():
            child.require_running()
        node = (await self._control_plane.request("GET", f"/api/v1/nodes/{self.name}")).body
        conditions = {each["type"]: each["status"] for each in node.get("status", {}).get("conditions", ())}
        return conditions.get("Ready") == "True" and not node["spec"].get("taints")

    def said(self, name: str) -> str:
        """The end of a program's log."""
        return self._programs[name].log_tail() if name in self._programs else ""

    async def _connect(self, others: Sequence[Node]) -> None:
        """Connect it to the bridge, and make the routes between the nodes' networks."""
        assert self._holder is not None
        outside = f"veth-{self.name}"
        await run(
            ["ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid)]
        )
        await run(["ip", "link", "set", outside, "master", BRIDGE, "up"])
        await run(["ip", "route", "replace", self.pods, "via", self.address])
        for line in (
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {LAN}.1",
            *[f"route replace {each.pods} via {each.address}" for each in others],
        ):
            await self.run("ip", *line.split())
        for each in others:
            await each.run("ip", "route", "replace", self.pods, "via", self.address)
        # As Kubernetes asks of a node: packets between its pods are filtered too.
        await self.run("sysctl", "--quiet", "net.ipv4.ip_forward=1", "net.bridge.bridge-nf-call-iptables=1")

    def _configure(self) -> None:
        etc = self._var / "etc"
        self._control_plane.kubelet_authority.server(self.address, self.name).write_pem(etc, "kubelet")
        token = self._control_plane.kubelet_tokens[self.name]
        self._control_plane.write_kubeconfig(etc / "kubelet.kubeconfig", token)
        (etc / "kubelet.json").write_text(json.dumps(_KUBELET))
        (etc / "kube-proxy.json").write_text(
            json.dumps({**_KUBE_PROXY, "clientConnection": {"kubeconfig": str(self._control_plane.kubeconfig)}})
        )
        (etc / "containerd.toml").write_text(_CONTAINERD)
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": self.pods}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": "/run/cni-networks",
            },
        }
        plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
        conflist = {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}
        (etc / "cni" / "10-pods.conflist").write_text(json.dumps(conflist))

    def _argv(self, name: str) -> list[str | Path]:
        if name == "containerd":
            return ["containerd", "--config=/var/etc/containerd.toml"]
        if name == "kubelet":
            return [
                NODE.program("kubelet"),
                "--config=/var/etc/kubelet.json",
                "--kubeconfig=/var/etc/kubelet.kubeconfig",
                f"--hostname-override={self.name}",
                f"--node-ip={self.address}",
            ]
        if name == "kube-proxy":
            return [
                NODE.program("kube-proxy"),
                "--config=/var/etc/kube-proxy.json",
                f"--hostname-override={self.name}",
            ]
        return [
            KUBE_ROUTER.program("kube-router"),
            f"--kubeconfig={self._control_plane.kubeconfig}",
            f"--hostname-override={self.name}",
            "--run-firewall=true",
            "--run-router=false",
            "--run-service-proxy=false",
            "--run-loadbalancer=false",
            f"--service-cluster-ip-range={SERVICES}",
        ]


class Cluster(Runnable):
    """A control plane with scheduler, controllers and nodes with these names.

    more   nodes that `add` may join later
    """

    def __init__(self, *names: str, more: Sequence[str] = ()) -> None:
        self._first = names
        self.control_plane: Final = ControlPlane(service_accounts=True, address=f"{LAN}.1", kubelets=[*names, *more])
        self._numbers = {name: number for number, name in enumerate([*names, *more], 1)}
        self.nodes: Final[dict[str, Node]] = {}
        options = ("--node-monitor-period=1s", "--node-monitor-grace-period=8s")
        self._controllers = ControllerManager(self.control_plane, CONTROLLERS, options)
        self._scheduler: Child | None = None

    async def start(self) -> None:
        """Start all of it, and wait until the nodes are Ready."""
        await run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        await run(["ip", "address", "add", f"{LAN}.1/24", "dev", BRIDGE])
        await run(["ip", "link", "set", BRIDGE, "up"])
        await self.control_plane.start()
        await self._controllers.start()
        directory = self.control_plane.directory
        self._scheduler = Child.start(
            [
                NODE.program("kube-scheduler"),
                f"--kubeconfig={self.control_plane.kubeconfig}",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                f"--cert-dir={directory / 'scheduler'}",
            ],
            name="kube-scheduler",
            log=directory / "kube-scheduler.log",
        )
        reader = f"--user={KUBELET_CLIENT}"
        await self.kubectl("create", "clusterrolebinding", "kubelets", "--clusterrole=system:kubelet-api-admin", reader)
        for name in self._first:
            await self.add(name)

    async def stop(self) -> None:
        """End all of it. Safe to call again."""
        for node in self.nodes.values():
            await node.power_off()
        if self._scheduler is not None:
            self._scheduler.kill()
        await self._controllers.stop()
        await self.control_plane.stop()
        await run(["ip", "link", "delete", BRIDGE], check=False)

    async def add(self, name: str) -> Node:
        """Join one more node, and wait until it is Ready."""
        node = Node(self.control_plane, name, self._numbers[name])
        # Its part of the pods' network, which in most clusters a controller hands out.
        spec = {"podCIDR": node.pods, "podCIDRs": [node.pods]}
        await self.control_plane.ok("POST", "/api/v1/nodes", {"metadata": {"name": name}, "spec": spec})
        if not self.nodes:
            # The API server, which runs on no node, reaches Services through the first.
            await run(["ip", "route", "replace", SERVICES, "via", node.address])
        self.nodes[name] = node
        await node.power_on([each for each in self.nodes.values() if each is not node])
        return node

    async def remove(self, name: str) -> None:
        """Power a node off, and delete it from the cluster."""
        await self.nodes.pop(name).power_off()
        await self.kubectl("delete", "node", name)

    async def kubectl(self, *arguments: str | Path, **options: Any) -> Completed:
        """Run kubectl; see `ControlPlane.kubectl`."""
        return await self.control_plane.kubectl(*arguments, **options)

    async def apply(self, manifest: Manifest, *arguments: str, check: bool = True) -> Completed:
        """Apply one object; see `ControlPlane.apply`."""
        return await self.control_plane.apply(manifest, *arguments, check=check)

    async def pods(self, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        """The pods of a namespace that have these labels and are not being deleted."""
        path = f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}"
        items = (await self.control_plane.ok("GET", path))["items"]
        return [each for each in items if "deletionTimestamp" not in each["metadata"]]

    async def rolled_out(self, namespace: str, workload: str) -> None:
        """Wait until a Deployment or DaemonSet, such as `daemonset/NAME`, has all its pods ready.

        Raises:
            CommandFailed: not within three minutes; the message has what Kubernetes says of the pods.
        """
        arguments = ("rollout", "status", "-n", namespace, workload, f"--timeout={ROLLOUT_SECONDS:.0f}s")
        done = await self.kubectl(*arguments, check=False, timeout=ROLLOUT_SECONDS + 30)
        if done.returncode:
            described = await self.kubectl("describe", "pods", "-n", namespace)
            raise CommandFailed(Completed(done.argv, done.returncode, described.stdout, done.stderr))


def processes(cgroup: Path) -> list[int]:
    """The ids of the processes of a cgroup and those below it."""
    return [int(pid) for file in cgroup.rglob("cgroup.procs") for pid in file.read_text().split()]


_KUBELET: Final[Manifest] = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "failCgroupV1": False,
    "cgroupDriver": "cgroupfs",
    "failSwapOn": False,
    "containerRuntimeEndpoint": f"unix://{CONTAINERD}",
    "authentication": {
        "anonymous": {"enabled": False},
        "webhook": {"enabled": True},
        "x509": {"clientCAFile": "/var/etc/kubelet.ca"},
    },
    "authorization": {"mode": "Webhook"},
    "tlsCertFile": "/var/etc/kubelet.crt",
    "tlsPrivateKeyFile": "/var/etc/kubelet.key",
    "resolvConf": "",
    "evictionHard": {"memory.available": "50Mi"},
    # So that tests know how much there is: two CPUs.
    "systemReserved": {"cpu": str(max(0, (os.cpu_count() or 2) - 2))},
    # Often, since tests wait for what follows from a node's silence.
    "nodeStatusUpdateFrequency": "2s",
    "nodeStatusReportFrequency": "10s",
    "nodeLeaseDurationSeconds": 4,
}

_KUBE_PROXY: Final[Manifest] = {
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "mode": "nftables",
    "clusterCIDR": f"{PODS}.0.0/16",
    "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
}

_CONTAINERD: Final = f"""\
version = 2
[grpc]
  address = "{CONTAINERD}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  # A container may lack the right (CAP_SYS_RESOURCE) to lower it.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PROGRAMS}"
    conf_dir = "/var/etc/cni"
"""
