"""A folder for the monitors of a test's namespace, and a user. Operators die here: each test starts its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.controlplane import ControlPlane
from harness.world import User

__all__ = ["folder", "socket_root", "user"]


@pytest.fixture
def socket_root() -> Iterator[Path]:
    """The folder that an operator looks for monitors in; its path is short, for QEMU's sake."""
    root = Path(tempfile.mkdtemp(prefix="vcpuset-root-"))
    yield root
    shutil.rmtree(root)


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
