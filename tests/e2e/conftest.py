"""One operator for the tests of a module, a folder for the monitors of a test's namespace, and a user."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.world import User

__all__ = ["folder", "operator", "socket_root", "user"]


@pytest.fixture(scope="module")
def socket_root() -> Iterator[Path]:
    """The folder that the operator looks for monitors in; its path is short, for QEMU's sake."""
    root = Path(tempfile.mkdtemp(prefix="vcpuset-root-"))
    yield root
    shutil.rmtree(root)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """A running operator. It serves every namespace: a test that runs one of its own narrows it to its own."""
    async with OperatorProcess(control_plane, socket_root=socket_root) as running:
        yield running


@pytest.fixture
def folder(socket_root: Path, namespace: str) -> Path:
    """Where the monitors of the test's namespace are."""
    path = socket_root / namespace
    path.mkdir()
    return path


@pytest.fixture
def user(control_plane: ControlPlane, namespace: str) -> User:
    """Somebody who works in the test's namespace."""
    return User(control_plane, namespace)
