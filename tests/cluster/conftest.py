"""The cluster that most tests of this folder share: one node. Runs in `harness.sandbox`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from harness.kubelet import install
from harness.node import PODS, Cluster
from harness.sandbox import is_entered
from harness.world import User

__all__ = ["cluster", "installed", "pytest_configure", "user"]

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


def pytest_configure() -> None:
    """Do not begin where all of it would fail."""
    if not is_entered():
        raise pytest.UsageError("tests/cluster runs in namespaces of its own: make test-cluster")


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
    namespace = await installed.control_plane.namespace()
    yield User(installed.control_plane, namespace)
    await installed.kubectl("delete", "namespace", namespace, "--timeout=90s", timeout=100)
