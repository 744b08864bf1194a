"""Two nodes: a machine moves to the second, which loses its power and comes back."""

from __future__ import annotations

import pytest

from harness.node import Cluster
from harness.nodevm import NodeVM
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]


async def test_a_machine_moves_to_another_node_and_is_not_ready_while_that_node_is_gone(
    installed: Cluster, user: User
) -> None:
    node = await installed.add("node-2")
    await installed.rolled_out("vcpuset-agent", "daemonset/vcpuset-agent")
    near, far = (NodeVM(installed, user.namespace, "moves", name) for name in ("node-1", "node-2"))
    await near.start()
    await near.wait_online(2)
    await user.create("moves", vcpus=3, monitor="moves/qmp.sock", nodeName="node-1")
    await user.wait_ready("moves")
    await near.wait_online(3)

    await far.start()  # the same Deployment, for the other node
    await far.wait_online(2)
    await user.wait_reason("moves", "MonitorUnreachable")
    await user.change("moves", nodeName="node-2")
    await user.wait_ready("moves")
    await far.wait_online(3)

    await node.power_off()
    # The agent's lease ends (8 s), Kubernetes marks its pod, and the grace period of the controller passes.
    seen = await user.wait("moves", lambda seen: seen.condition("Ready")["status"] == "Unknown", "Ready Unknown")
    assert seen.condition("Ready")["reason"] == "AgentUnavailable"
    assert seen.vcpus == 3, "what was observed last"

    await node.power_on([installed.nodes["node-1"]])
    await far.make_directories()
    seen = await user.wait_ready("moves")
    assert seen.vcpus == 3, "the new QEMU, which has booted with 2, gets its count"
    await user.delete("moves")
    await installed.kubectl("delete", "deployment", "-n", user.namespace, "moves", "--timeout=60s", timeout=70)
    await installed.remove("node-2")
