"""A node that loses its power, and comes back."""

from __future__ import annotations

import pytest

from harness.node import Cluster
from harness.nodevm import NodeVM
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]


async def test_the_set_of_a_node_that_is_gone_is_not_ready_until_the_node_is_back(
    installed: Cluster, user: User
) -> None:
    node = await installed.add("node-2")
    await installed.rolled_out("vcpuset-agent", "daemonset/vcpuset-agent")
    vm = NodeVM(installed, user.namespace, "far", "node-2")
    await vm.start()
    await vm.wait_online(2)
    await user.create("far", vcpus=3, monitor="far/qmp.sock", nodeName="node-2")
    await user.wait_ready("far")
    await vm.wait_online(3)

    await node.power_off()
    # The agent's lease ends (8 s), Kubernetes marks its pod, and the grace period of the controller passes.
    seen = await user.wait("far", lambda seen: seen.condition("Ready")["status"] == "Unknown", "Ready Unknown")
    assert seen.condition("Ready")["reason"] == "AgentUnavailable"
    assert seen.vcpus == 3, "what was observed last"

    await node.power_on([installed.nodes["node-1"]])
    await vm.make_directories()
    seen = await user.wait_ready("far")
    assert seen.vcpus == 3, "the new QEMU, which has booted with 2, gets its count"
    await user.delete("far")
    await installed.kubectl("delete", "deployment", "-n", user.namespace, "far", "--timeout=60s", timeout=70)
    await installed.remove("node-2")
