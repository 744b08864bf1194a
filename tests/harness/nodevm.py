"""Machines in pods of a real node: deploy/examples/vm-pod.yaml with the tests' image and guest.

    vm = NodeVM(cluster, user, "web", "node-1")
    await vm.start(cpu="2")
    await vm.wait_online(4)

QEMU writes each QMP command that it is given into the pod's log, and the guest its online CPUs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Final

import yaml

from harness.cache import REPOSITORY
from harness.containerimages import VM
from harness.guest import KERNEL_OPTIONS, reported_online
from harness.guestimage import INITRAMFS, KERNEL
from harness.node import Cluster
from harness.wait import until

__all__ = ["SOCKET_ROOT", "NodeVM"]

EXAMPLE: Final = REPOSITORY / "deploy" / "examples" / "vm-pod.yaml"
SOCKET_ROOT: Final = "/run/vcpuset"
AGENT_GROUP: Final = "65532"
GUEST_AGENT: Final = (
    "-chardev socket,id=agent,path=/run/monitor/ga.sock,server=on,wait=off -device virtio-serial-pci "
    "-device virtserialport,chardev=agent,name=org.qemu.guest_agent.0"
)
BOOT_SECONDS: Final = 180.0
WAIT: Final = 60.0


class NodeVM:
    """The Deployment of a machine, with its socket at NAME/qmp.sock in the namespace's directory."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, node: str) -> None:
        self.name: Final = name
        self._cluster = cluster
        self._namespace = namespace
        self._node = node

    async def start(self, *, cpu: str = "1", monitor: str = "", append: str = "", agent: bool = False) -> None:
        """Make its directory, and start it; `wait_online` waits until it has booted.

        monitor   where QEMU listens in place of the socket, such as `tcp:0.0.0.0:4444`
        append    more options of the guest's kernel
        agent     run the guest agent, with its socket at NAME/ga.sock
        """
        await self.make_directories()
        await self._cluster.apply(self.manifest(cpu, monitor, append, agent=agent), "--server-side")

    async def make_directories(self) -> None:
        """Make its directory as the administrator does, also after each boot of the node: /run is empty then."""
        directory = f"{SOCKET_ROOT}/{self._namespace}"
        node = self._cluster.nodes[self._node]
        await node.run("install", "-d", "-m", "0755", SOCKET_ROOT)
        paths = (directory, f"{directory}/{self.name}")
        await node.run("install", "-d", "-m", "2770", "-g", AGENT_GROUP, *paths)

    def manifest(self, cpu: str, monitor: str, append: str = "", *, agent: bool = False) -> dict[str, Any]:
        """The example, for this machine; see `start`."""
        made: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
        made["metadata"] = {"name": self.name, "namespace": self._namespace}
        made["spec"]["selector"]["matchLabels"] = {"vm": self.name}
        template = made["spec"]["template"]
        template["metadata"]["labels"] = {"vm": self.name}
        template["spec"]["nodeSelector"] = {"kubernetes.io/hostname": self._node}
        template["spec"]["terminationGracePeriodSeconds"] = 1
        template["spec"]["volumes"][0]["hostPath"]["path"] = f"{SOCKET_ROOT}/{self._namespace}/{self.name}"
        (container,) = template["spec"]["containers"]
        container["image"] = VM
        container["resources"] = {"limits": {"cpu": cpu, "memory": "448Mi"}}
        (script,) = container["args"]
        options = f"{append} ga=1" if agent else append
        machine = (
            "-machine q35,accel=tcg -m 192 -smp 2,maxcpus=64 -nodefaults -display none -serial stdio "
            f"-kernel /guest/{KERNEL} -initrd /guest/{INITRAMFS} -append '{KERNEL_OPTIONS} {options}' "
            "-trace handle_qmp_command"
        )
        if agent:
            machine += f" {GUEST_AGENT}"
        written = re.sub(r"-machine .*-nographic", lambda _: machine, script)
        assert written != script, f"{EXAMPLE} has another machine"
        if monitor:
            written = re.sub(r"-qmp unix:[^,]+", f"-qmp {monitor}", written)
        container["args"] = [written]
        return made

    async def pod(self) -> dict[str, Any]:
        """Its one pod that is not being deleted."""
        (found,) = await self._cluster.pods(self._namespace, f"vm={self.name}")
        return found

    async def log(self) -> str:
        """The output of QEMU and the guest."""
        arguments = ("logs", "-n", self._namespace, f"deployment/{self.name}")

        async def read() -> str | None:
            done = await self._cluster.kubectl(*arguments, check=False)
            return done.stdout if done.returncode == 0 else None  # the kubelet has just been started, for example

        try:
            return await until(read, WAIT, f"the log of {self.name}", interval=0.5) or ""
        except TimeoutError as error:
            described = await self._cluster.kubectl("describe", "pods", "-n", self._namespace, "-l", f"vm={self.name}")
            raise TimeoutError(f"{error}\n{described.stdout[-3000:]}") from error

    async def online(self) -> int:
        """How many CPUs are online in the guest; 0 before it has booted."""
        return len(reported_online(await self.log()))

    async def wait_online(self, cpus: int) -> None:
        """Wait until so many CPUs are online in the guest."""
        last = ""

        async def reached() -> bool:
            nonlocal last
            last = await self.log()
            return len(reported_online(last)) == cpus

        def described() -> str:
            return f"{cpus} CPUs online in {self.name}; its log ends with:\n{last[-2000:]}\n"

        await until(reached, BOOT_SECONDS, described, interval=0.5)

    async def commands(self, name: str) -> Counter[str]:
        """How often QEMU was given a QMP command, such as device_del, for each device id."""
        lines = re.findall(r"handle_qmp_command .*? req: (\{.*\})", await self.log())
        given = [json.loads(line) for line in lines]
        # A device is deleted by its path.
        return Counter(each["arguments"]["id"].rpartition("/")[2] for each in given if each.get("execute") == name)
