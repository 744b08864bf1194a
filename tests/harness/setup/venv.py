"""The virtual environment `.venv`: the project, editable, with its dependencies at the versions of constraints.txt."""

import json
import os
import platform
import sys
import tomllib
from pathlib import Path
from typing import Final

from harness.cache import REPOSITORY, digest
from harness.setup.console import probe, run_visibly, say

__all__ = ["PIP", "VENV", "VENV_PYTHON", "ensure_venv"]

VENV: Final = REPOSITORY / ".venv"
VENV_PYTHON: Final = VENV / "bin" / "python"
PIP: Final[tuple[str | Path, ...]] = (VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input")
STAMP: Final = VENV / ".set-up"
"""Written last; holds `_wanted()` of the environment that was made."""

INSTALL_SECONDS: Final = 1800


def ensure_venv() -> None:
    """Make or update the environment, unless it was made from the same interpreter, requirements and pins.

    Raises:
        SetupFailed: `venv` or `pip` failed; their output has been shown.
    """
    wanted = _wanted()
    if STAMP.exists() and STAMP.read_text() == wanted and os.access(VENV_PYTHON, os.X_OK):
        return
    say(f"==> Python packages, into {VENV}")
    STAMP.unlink(missing_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    present = probe([VENV_PYTHON, "-c", "import pip, sys; print('{}.{}'.format(*sys.version_info))"])
    if present is None or present.strip() != version:
        # Not sys.executable: that may be the very environment which is being replaced, if it is active.
        base: str = getattr(sys, "_base_executable", sys.executable)
        run_visibly([base, "-m", "venv", "--clear", VENV], seconds=300)
    constraints = REPOSITORY / "constraints.txt"
    run_visibly(
        [*PIP, "install", "--constraint", constraints, "--editable", f"{REPOSITORY}[dev]"], seconds=INSTALL_SECONDS
    )
    STAMP.write_text(wanted)


def _wanted() -> str:
    """A digest of all that decides what the environment holds."""
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    # Settings of tools stand in the same file, but change nothing in the environment.
    tables = json.dumps([pyproject["build-system"], pyproject["project"], pyproject["tool"].get("setuptools")])
    constraints = (REPOSITORY / "constraints.txt").read_bytes()
    # Not sys.version: it has the build's date, and installing Debian's python3-venv may bring a newer build.
    interpreter = (platform.python_version(), str(Path(sys.executable).resolve()))
    return digest([*interpreter, str(REPOSITORY), tables, constraints])
