"""The operator as `deploy/` installs it, on a node with a container runtime, and machines in pods beside it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from harness.node import Cluster
from harness.nodevm import NodeVM
from harness.processes import run
from harness.wait import until
from harness.world import User

__all__: list[str] = []

WAIT: Final = 90.0

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def vm(installed: Cluster, user: User) -> NodeVM:
    """A machine that has booted, and its VCPUSet `web`, Ready with 2."""
    made = NodeVM(installed, user.namespace, "web", "node-1")
    await made.start()
    await user.create("web", vcpus=2, monitor="web/qmp.sock", nodeName="node-1")
    await user.wait_ready("web")
    await made.wait_online(2)
    return made


async def agent_process() -> int:
    """The process of the agent, once it runs. The test sees the processes of the node."""

    def found() -> int | None:
        pids = [
            int(file.parent.name)
            for file in Path("/proc").glob("[0-9]*/cmdline")
            if b"--node-name=" in (text := _read(file)) and b"vcpuset" in text
        ]
        return pids[0] if len(pids) == 1 else None

    return await until(found, WAIT, "the agent to run")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has ended
        return b""


async def test_a_machine_in_a_pod_gets_its_vcpus_and_gives_them_back(vm: NodeVM, user: User) -> None:
    await user.scale("web", 4)
    await user.wait_ready("web")
    await vm.wait_online(4)
    await user.scale("web", 2)
    await user.wait_ready("web")
    await vm.wait_online(2)
    plugged = await vm.commands("device_add")
    assert len(plugged) == 2
    assert await vm.commands("device_del") == plugged


async def disturb_by_rollout(cluster: Cluster) -> None:
    """Replace the agent's pod as an administrator does."""
    await cluster.kubectl("rollout", "restart", "-n", "vcpuset-agent", "daemonset/vcpuset-agent")


async def disturb_by_deletion(cluster: Cluster) -> None:
    """Delete the pod without waiting for the kubelet."""
    (pod,) = await cluster.pods("vcpuset-agent")
    name = pod["metadata"]["name"]
    await cluster.kubectl("delete", "pod", "-n", "vcpuset-agent", name, "--force", "--grace-period=0")


async def disturb_by_sigkill(cluster: Cluster) -> None:
    """Kill the process."""
    os.kill(await agent_process(), signal.SIGKILL)


async def disturb_by_memory(cluster: Cluster) -> None:
    """Have the kernel kill it: another process fills its cgroup, and the agent has the highest OOM score."""
    pid = await agent_process()
    _prefer(pid)
    group = Path("/sys/fs/cgroup/memory") / _memory_cgroup(pid).lstrip("/")
    fill = f"echo $$ >{group}/cgroup.procs; exec {sys.executable} -c 'x = bytearray(300 << 20)'"
    await run(["sh", "-c", fill], check=False)

    def has_ended() -> bool:
        return not Path(f"/proc/{pid}").exists()

    await until(has_ended, WAIT, "the agent to be killed for its memory")


def _prefer(pid: int) -> None:
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _memory_cgroup(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    (found,) = [line.split(":")[2] for line in lines if ":memory:" in line]
    return found


async def disturb_by_containerd(cluster: Cluster) -> None:
    """Restart the container runtime."""
    node = cluster.nodes["node-1"]
    await node.stop("containerd")
    await node.start("containerd")


async def disturb_by_kubelet(cluster: Cluster) -> None:
    """Kill the kubelet, and start it again."""
    node = cluster.nodes["node-1"]
    await node.stop("kubelet", kill=True)
    await node.start("kubelet")


@pytest.mark.parametrize(
    ("disturb", "first", "then"),
    [
        pytest.param(disturb_by_rollout, 2, 6, id="rollout-restart"),
        pytest.param(disturb_by_deletion, 6, 2, id="forced-deletion"),
        pytest.param(disturb_by_sigkill, 2, 6, id="SIGKILL"),
        pytest.param(disturb_by_memory, 6, 2, id="out-of-memory"),
        pytest.param(disturb_by_containerd, 2, 6, id="containerd-restart"),
        pytest.param(disturb_by_kubelet, 6, 2, id="kubelet-killed"),
    ],
)
async def test_a_change_in_progress_is_completed_and_no_vcpu_plugged_twice_when_the_agent_is_disturbed(
    installed: Cluster,
    vm: NodeVM,
    user: User,
    disturb: Callable[[Cluster], Awaitable[None]],
    first: int,
    then: int,
) -> None:
    await user.scale("web", first)
    await user.wait_ready("web")
    plugged, unplugged = await vm.commands("device_add"), await vm.commands("device_del")
    await user.scale("web", then)
    await disturb(installed)
    await user.wait_ready("web")
    await vm.wait_online(then)
    await installed.rolled_out("vcpuset-agent", "daemonset/vcpuset-agent")
    await user.wait_ready("web")
    more, fewer = await vm.commands("device_add") - plugged, await vm.commands("device_del") - unplugged
    assert sorted(more.values()) == [1] * max(0, then - first)
    # A request whose agent ends before the guest has answered may be made again: QEMU says that it is in progress.
    assert len(fewer) == max(0, first - then)


async def test_a_drained_node_keeps_its_agent_and_a_machine_that_comes_back_gets_its_count(
    installed: Cluster, vm: NodeVM, user: User
) -> None:
    await user.scale("web", 3)
    await user.wait_ready("web")
    (before,) = await installed.pods("vcpuset-agent")
    drain = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--disable-eviction", "--timeout=60s")
    await installed.kubectl("drain", "node-1", *drain, timeout=90)
    await installed.kubectl("taint", "node", "node-1", "maintenance=yes:NoExecute")
    await user.wait_reason("web", "MonitorUnreachable")
    (after,) = await installed.pods("vcpuset-agent")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    await installed.kubectl("taint", "node", "node-1", "maintenance-")
    await installed.kubectl("uncordon", "node-1")
    # A CPU that is plugged while the guest boots is brought online by udev, which the tests' guest does not have.
    assert (await user.wait_ready("web")).vcpus == 3
    await installed.rolled_out("vcpuset-system", "deployment/vcpuset-controller")
