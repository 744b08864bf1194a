"""The cluster that most tests of this folder share: one node, with nothing installed. Runs in `harness.sandbox`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from harness.node import Cluster
from harness.sandbox import is_entered

__all__ = ["cluster", "pytest_configure"]


def pytest_configure() -> None:
    """Do not begin where all of it would fail."""
    if not is_entered():
        raise pytest.UsageError("tests/cluster runs in namespaces of its own: make test-cluster")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster() -> AsyncIterator[Cluster]:
    """The cluster; each module installs what it needs, and uninstalls it."""
    async with Cluster("node-1") as made:
        yield made
