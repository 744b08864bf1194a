"""All tests of this folder run in `harness.sandbox`."""

from __future__ import annotations

import pytest

from harness.sandbox import is_entered

__all__ = ["pytest_configure"]


def pytest_configure() -> None:
    """Do not begin where all of it would fail."""
    if not is_entered():
        raise pytest.UsageError("tests/cluster runs in namespaces of its own: make test-cluster")
