"""The cluster that the tests of this folder share: one node, and a second for some."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import pytest_asyncio
import yaml

from harness.cache import REPOSITORY
from harness.containerimages import VM
from harness.kubelet import install
from harness.node import PODS, Cluster
from harness.world import User

__all__ = [
    "ALLOW_PODS",
    "IMPATIENT",
    "cluster",
    "idle_pod",
    "installed",
    "rights",
    "start_pod",
    "temporary_namespace",
    "user",
]

ALLOW_PODS: Final = (
    {
        "target": {"kind": "Deployment", "name": "vcpuset-controller"},
        "patch": f"- {{op: add, path: /spec/template/spec/containers/0/args/-, value: --allow-tcp={PODS}.0.0/16}}",
    },
    {
        "target": {"kind": "NetworkPolicy", "name": "vcpuset-controller"},
        "patch": f"- {{op: add, path: /spec/egress/-, value: {{to: [{{ipBlock: {{cidr: {PODS}.0.0/16}}}}]}}}}",
    },
)
"""deploy/components/allow-tcp, with the network of the pods."""

IMPATIENT: Final = {
    "target": {"kind": "Deployment", "name": "vcpuset-controller"},
    "patch": "- {op: add, path: /spec/template/spec/containers/0/args/-, value: --agent-grace-seconds=10}",
}
"""Ten seconds in place of 60: the rest would be waiting."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster() -> AsyncIterator[Cluster]:
    """The cluster, with nothing installed."""
    async with Cluster("node-1", more=["node-2"]) as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def installed(cluster: Cluster) -> Cluster:
    """The cluster with agent and controller, as shipped."""
    await install(cluster.control_plane, cluster, *ALLOW_PODS, IMPATIENT)
    return cluster


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def user(installed: Cluster) -> AsyncIterator[User]:
    """A user with a namespace of their own, which is deleted with its machines after the module."""
    async with temporary_namespace(installed) as name:
        yield User(installed.control_plane, name)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def rights(installed: Cluster, user: User) -> None:
    """The agents may resize the pods of the user's namespace."""
    binding = yaml.safe_load((REPOSITORY / "deploy" / "examples" / "pod-rights.yaml").read_text())
    binding["metadata"]["namespace"] = user.namespace
    await installed.apply(binding)


def idle_pod(namespace: str, name: str) -> dict[str, Any]:
    """A pod in which tests run commands."""
    container = {"name": name, "image": VM, "command": ["sleep", "infinity"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"terminationGracePeriodSeconds": 0, "containers": [container]},
    }


async def start_pod(cluster: Cluster, pod: Mapping[str, Any]) -> None:
    """Create a pod, and wait until it is Ready."""
    await cluster.apply(pod)
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    await cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "--timeout=60s", f"pod/{name}")


@contextlib.asynccontextmanager
async def temporary_namespace(cluster: Cluster, prefix: str = "test") -> AsyncIterator[str]:
    """A namespace, which is deleted with all that is in it."""
    name = await cluster.control_plane.namespace(prefix)
    yield name
    await cluster.kubectl("delete", "namespace", name, "--timeout=90s", timeout=100)
