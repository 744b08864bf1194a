"""One operator for the tests of a module, and the account that the shipped controller has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest_asyncio

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess

__all__ = ["account", "operator"]

DEPLOY: Final = REPOSITORY / "deploy"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """A running operator. It serves every namespace: a test that runs one of its own narrows it to its own."""
    async with OperatorProcess(control_plane, socket_root=socket_root) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def account(control_plane: ControlPlane) -> Path:
    """The controller's kubeconfig: it may do what the shipped roles say, so read no Secret as yet."""
    for file in ("base/monitor-credentials.yaml", "parts/controller/namespace.yaml", "parts/controller/rbac.yaml"):
        await control_plane.kubectl("apply", "--server-side", "--filename", DEPLOY / file)
    return await control_plane.service_account_kubeconfig("vcpuset-system", "vcpuset-controller")
