"""Building Go programs (etcd, kube-apiserver, helm, …) from the modules pinned in build/*/go.mod.

They come from source because the Go module proxy, unlike the various places for ready-made programs, verifies what it
delivers (go.sum) and is reachable wherever Go code is built. It is done once: the result stays in the cache folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Final

from harness.binaries import (
    CONTROL_PLANE,
    CONTROLLER_MANAGER,
    Binaries,
    BinariesMissing,
    Build,
    controller_manager,
    kubernetes_version,
)
from harness.cache import cache_dir
from harness.setup.console import NotPossible, SetupFailed, run_visibly, say
from harness.setup.golang import Go, find_go

__all__ = ["ensure_built", "remove_build_cache"]

BUILD_SECONDS: Final = 2 * 3600
PROGRESS_SECONDS: Final = 10
"""How often progress is printed where it cannot be shown in one line that changes."""


def ensure_built(build: Build) -> None:
    """Build the programs, unless they are there already: in the cache folder, or where the user has them.

    Raises:
        NotPossible: `KUBEBUILDER_ASSETS` is set, but not to a folder that holds the control plane.
        SetupFailed: the build failed; its output has been shown.
    """
    if _is_brought(build) or build.is_there:
        return
    say(f"==> {', '.join(build.packages)}, into {build.folder}")
    say(f"    Built from source, once: {build.takes}.")
    _build(build)


def _is_brought(build: Build) -> bool:
    """Whether the user has the programs elsewhere."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if build is CONTROL_PLANE and assets:
        if Binaries.within(Path(assets)) is None:
            raise NotPossible(
                f"KUBEBUILDER_ASSETS={assets} does not hold {', '.join(build.packages)}: correct the variable, or "
                "unset it to have them built"
            )
        return True
    if build is CONTROLLER_MANAGER:
        try:
            controller_manager()
        except BinariesMissing:
            return False
        return True
    return False


def remove_build_cache() -> None:
    """Remove what only the builds need, as set-up does once all of them have gone well.

    Kept between two builds, since most packages are common to them, and after a failure: the next try goes on there.
    """
    shutil.rmtree(_work(), ignore_errors=True)


def _work() -> Path:
    return cache_dir() / "controlplane-work"


def _build(build: Build) -> None:
    """Build the packages into the build's folder, which appears when all of them are done."""
    work = _work()
    work.mkdir(exist_ok=True)
    go = find_go(work, build.module)
    say(f"    with Go {go.version} ({go.program})")
    build.folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{build.folder.name}.", dir=build.folder.parent))
    try:
        names = list(build.packages.values())
        listed = _go(go, build.module, ["list", "-mod=readonly", "-deps", *names], total=None)
        arguments = ["build", "-mod=readonly", "-trimpath", "-v", f"-ldflags={_link_flags()}", "-o", f"{temporary}/"]
        _go(go, build.module, [*arguments, *names], total=len(listed))
        for name, package in build.packages.items():
            # Go's own name: the last element of the package, but for a version.
            (temporary / re.sub(r"/v\d+$", "", package).rpartition("/")[2]).rename(temporary / name)
        for name, (module, path) in build.folders.items():
            said = _go(go, build.module, ["mod", "download", "-json", module], total=None)
            source = Path(json.loads("".join(said))["Dir"], path)
            # Without the modes of the module cache: nothing there can be removed.
            run_visibly(["cp", "-r", "--no-preserve=mode", source, temporary / name], seconds=60)
        temporary.chmod(0o755)
        shutil.rmtree(build.folder, ignore_errors=True)  # an incomplete one, or it would have been used
        temporary.rename(build.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_flags() -> str:
    """Leave out debugging symbols; set what `kubectl version` and the API server report, and check."""
    version = kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".", 2)
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitCommit": "", "gitTreeState": "clean"}
    return " ".join(["-s -w", *(f"-X k8s.io/component-base/version.{name}={value}" for name, value in values.items())])


def _go(go: Go, module: Path, arguments: list[str], total: int | None) -> list[str]:
    """Run `go` in a module with its progress shown, and return what it printed to its standard output."""
    progress = _Progress(total)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [go.program, *arguments],
            cwd=module,
            env=dict(go.env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            assert process.stderr is not None
            for line in process.stderr:
                progress.saw(line.rstrip("\n"))
                if progress.seconds > BUILD_SECONDS:
                    raise SetupFailed(f"`go {arguments[0]}` took more than {BUILD_SECONDS / 3600:.0f} h")
            status = process.wait(timeout=60)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(timeout=60)
            progress.end()
        if status != 0:
            raise SetupFailed(
                f"`go {arguments[0]}` ended with status {status} (see above). Check the network and the free disk "
                "space; the next try goes on from here"
            )
        output.seek(0)
        return output.read().splitlines()


class _Progress:
    """Turns the lines of `go build -v` (one a package compiled, one a module downloaded) into a running count.

    Lines of any other kind are errors or warnings, and are passed on.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._compiled = self._downloaded = 0
        self._began = self._shown = time.monotonic()
        self._is_terminal = sys.stdout.isatty()
        self._recent: deque[str] = deque(maxlen=1)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def saw(self, line: str) -> None:
        if line.startswith("go: downloading "):
            self._downloaded += 1
            self._recent.append(line.removeprefix("go: "))
        elif re.fullmatch(r"[\w.~/+-]+", line):
            self._compiled += 1
            self._recent.append(line)
        else:
            self.end()
            say(line)
            return
        pause = 0.1 if self._is_terminal else PROGRESS_SECONDS
        if time.monotonic() - self._shown >= pause:
            self._show("\r\x1b[K" if self._is_terminal else "", "" if self._is_terminal else "\n")

    def end(self) -> None:
        """Show the final count, if there is any."""
        if self._recent:
            self._show("\r\x1b[K" if self._is_terminal else "", "\n")
            self._recent.clear()

    def _show(self, before: str, after: str) -> None:
        self._shown = time.monotonic()
        compiled = f"{self._compiled} of at most {self._total} packages" if self._total else ""
        downloaded = f"{self._downloaded} modules downloaded" if self._downloaded else ""
        counts = ", ".join(part for part in (compiled, downloaded) if part)
        text = f"    {self.seconds:4.0f} s  {counts}  {self._recent[-1]}"
        sys.stdout.write(f"{before}{text[:100] if self._is_terminal else text}{after}")
        sys.stdout.flush()
