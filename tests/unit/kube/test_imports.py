"""What the process loads."""

from __future__ import annotations

import subprocess
import sys

__all__: list[str] = []


def test_the_synchronous_kubernetes_client_is_not_loaded() -> None:
    """It is a seventh of the memory of an operator without sets."""
    program = "import sys, vcpuset.app.operator; print(*{'kubernetes', 'requests', 'oauthlib'} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == ["kubernetes"]
