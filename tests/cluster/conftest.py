"""All tests of this folder run in `harness.sandbox`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.sandbox import is_entered

__all__ = ["operator", "pytest_configure"]


def pytest_configure() -> None:
    """Refuse to run outside of the sandbox."""
    if not is_entered():
        raise pytest.UsageError("tests/cluster runs in namespaces of its own: make test-cluster")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """The operator of all sets without a node."""
    async with OperatorProcess(control_plane, socket_root=socket_root) as running:
        yield running
