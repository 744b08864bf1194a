"""Tokens of pods are renewed while these run; a running agent takes the new one up, also after the old was refused."""

from __future__ import annotations

import os

import pytest

from harness.cache import REPOSITORY
from harness.container import WHY_NOT
from harness.guest import Guest
from harness.kubelet import cluster
from harness.qmp import count
from harness.wait import until
from harness.world import User

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

GROUP = 65532
"""The agents' group."""


async def test_an_agent_whose_token_is_refused_goes_on_with_the_one_that_the_kubelet_brings() -> None:
    async with cluster("node-a") as (control_plane, nodes):
        await control_plane.kubectl("apply", "--server-side", "-k", REPOSITORY / "deploy" / "overlays" / "agent")
        await nodes.rolled_out("vcpuset-agent", "daemonset/vcpuset-agent")
        user = User(control_plane, await control_plane.namespace("tenant"))
        folder = nodes.node("node-a").path("/run/vcpuset") / user.namespace
        folder.mkdir()
        async with Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "qmp.sock"]) as guest:
            os.chown(guest.monitors[0], -1, GROUP)
            guest.monitors[0].chmod(0o660)
            await user.create("vm", vcpus=2, monitor="qmp.sock", nodeName="node-a")
            await user.wait_ready("vm")
            agent = nodes.pod("vcpuset-agent")
            old = agent.token

            # From now on the API server takes no token that was made before.
            await control_plane.stop_apiserver(kill=True)
            await control_plane.replace_service_account_key()
            await control_plane.start_apiserver()
            headers = {"Authorization": f"Bearer {old}"}
            sets = f"/apis/vcpuset.dev/v1alpha1/namespaces/{user.namespace}/vcpusets"
            assert (await control_plane.request("GET", sets, headers=headers)).status == 401
            await user.change("vm", vcpus=3)
            await until(lambda: "401" in agent.text(), 90, lambda: f"the agent to be refused; it said {agent.text()}")
            assert await count(guest.control) == 2

            await agent.rotate_token()
            assert agent.token != old
            await user.wait_ready("vm")
            assert await count(guest.control) == 3
            assert (agent.restarts, nodes.pods) == (0, [agent])
