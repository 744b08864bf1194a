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


def test_what_only_prints_for_people_is_not_loaded_by_the_operator() -> None:
    """rich is imported when a command prints, so `vcpuset run` never has it."""
    program = "import sys, vcpuset.cli.main, vcpuset.app.operator; print(*{'rich', 'pygments'} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == []


def test_help_and_completion_of_the_plugin_load_neither_rich_nor_a_client_of_kubernetes() -> None:
    program = "import sys, vcpuset.cli.kubectl.main; print(*{'rich', 'kopf', 'aiohttp'} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == []
