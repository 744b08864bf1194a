"""The shipped NetworkPolicies, enforced: what the documentation says is open is open, and the rest is refused."""

from __future__ import annotations

import json

import pytest
import pytest_asyncio

from cluster.node.conftest import idle_pod, start_pod
from harness.node import Cluster
from harness.nodevm import NodeVM
from harness.wait import until
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

WAIT = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def prober(installed: Cluster, user: User) -> None:
    """A pod from which to connect."""
    await start_pod(installed, idle_pod(user.namespace, "prober"))


async def fetches(cluster: Cluster, user: User, url: str) -> bool:
    """Whether the pod gets an answer."""
    words = ("exec", "-n", user.namespace, "prober", "--", "busybox", "wget", "-T", "2", "-q", "-O", "-", url)
    return (await cluster.kubectl(*words, check=False)).returncode == 0


async def address(cluster: Cluster, namespace: str) -> str:
    """The address of one of the operator's pods."""
    pods = await cluster.pods(namespace, "app.kubernetes.io/part-of=vcpuset")
    return str(pods[0]["status"]["podIP"])


@pytest.mark.parametrize("namespace", ["vcpuset-agent", "vcpuset-system"])
async def test_metrics_are_read_from_labelled_namespaces_only(installed: Cluster, user: User, namespace: str) -> None:
    url = f"http://{await address(installed, namespace)}:8080/metrics"

    async def is_refused() -> bool:
        return not await fetches(installed, user, url)

    # kube-router enforces a policy some seconds after its creation.
    await until(is_refused, WAIT, "the metrics to be refused", interval=0.5)
    await installed.kubectl("label", "namespace", user.namespace, "vcpuset.dev/metrics=allowed")
    await until(lambda: fetches(installed, user, url), WAIT, "the metrics to be readable", interval=0.5)
    await installed.kubectl("label", "namespace", user.namespace, "vcpuset.dev/metrics-")
    await until(is_refused, WAIT, "the metrics to be refused", interval=0.5)


async def test_the_controller_reaches_monitors_in_the_allowed_network_and_says_what_refuses_it_elsewhere(
    installed: Cluster, user: User
) -> None:
    vm = NodeVM(installed, user.namespace, "tcp", "node-1")
    await vm.start(monitor="tcp:0.0.0.0:4444")
    await vm.wait_online(2)
    host = (await vm.pod())["status"]["podIP"]
    await user.create("tcp", vcpus=3, monitor=(host, 4444))
    await user.wait_ready("tcp")
    await vm.wait_online(3)

    policy = ("networkpolicy", "vcpuset-controller", "-n", "vcpuset-system")
    before = json.loads((await installed.kubectl("get", *policy, "-o", "json")).stdout)["spec"]["egress"]
    await installed.kubectl(
        "patch", *policy, "--type=json", "-p", json.dumps([{"op": "remove", "path": "/spec/egress/2"}])
    )
    # kube-router does not interrupt open connections.
    await installed.kubectl("rollout", "restart", "-n", "vcpuset-system", "deployment/vcpuset-controller")
    await installed.rolled_out("vcpuset-system", "deployment/vcpuset-controller")
    seen = await user.wait_reason("tcp", "MonitorUnreachable")
    assert "network policy" in seen.message
    await installed.kubectl("patch", *policy, "--type=merge", "-p", json.dumps({"spec": {"egress": before}}))
    await user.wait_ready("tcp")
