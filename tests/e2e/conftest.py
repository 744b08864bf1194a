"""One operator for the tests of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess

__all__ = ["operator"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """A running operator. It serves every namespace: a test that runs one of its own narrows it to its own."""
    async with OperatorProcess(control_plane, socket_root=socket_root) as running:
        yield running
