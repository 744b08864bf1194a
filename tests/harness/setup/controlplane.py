"""Building etcd, kube-apiserver and kubectl from the modules pinned in build/controlplane/go.mod.

They come from source because the Go module proxy, unlike the various places for ready-made programs, verifies what it
delivers (go.sum) and is reachable wherever Go code is built. It is done once: the result stays in the cache folder.
"""

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

from harness.binaries import CONTROL_PLANE_MODULE, NAMES, Binaries, built_folder, kubernetes_version
from harness.cache import cache_dir
from harness.setup.console import NotPossible, SetupFailed, say
from harness.setup.golang import Go, find_go

__all__ = ["ensure_control_plane"]

PACKAGES: Final = {
    "server": "go.etcd.io/etcd/server/v3",  # Go names the program after the last element but the version
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
}

BUILD_SECONDS: Final = 2 * 3600
PROGRESS_SECONDS: Final = 10
"""How often progress is printed where it cannot be shown in one line that changes."""


def ensure_control_plane() -> None:
    """Build the programs, unless `KUBEBUILDER_ASSETS` or the cache folder has them.

    Raises:
        NotPossible: `KUBEBUILDER_ASSETS` is set, but not to a folder that holds them.
        SetupFailed: the build failed; its output has been shown.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets:
        if Binaries.within(Path(assets)) is None:
            raise NotPossible(
                f"KUBEBUILDER_ASSETS={assets} does not hold {', '.join(NAMES)}: correct the variable, or unset it to "
                "have them built"
            )
        return
    folder = built_folder()
    if Binaries.within(folder) is not None:
        return
    say(f"==> Control plane: Kubernetes {kubernetes_version()} and etcd, into {folder}")
    say("    Built from source, once: 10 to 20 minutes on two cores, 4 GB of disk while it lasts.")
    work = cache_dir() / "controlplane-work"
    work.mkdir(exist_ok=True)
    go = find_go(work)
    say(f"    with Go {go.version} ({go.program})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _build(go, temporary)
        (temporary / "server").rename(temporary / "etcd")
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one, or it would have been used
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(work)  # kept after a failure: the next try goes on from there


def _build(go: Go, target: Path) -> None:
    names = list(PACKAGES.values())
    common = ["-mod=readonly", "-trimpath"]
    packages = _go(go, ["list", "-mod=readonly", "-deps", *names], total=None)
    arguments = ["build", *common, "-v", f"-ldflags={_link_flags()}", "-o", str(target), *names]
    _go(go, arguments, total=len(packages))


def _link_flags() -> str:
    """Leave out debugging symbols; set what `kubectl version` and the API server report, and check."""
    version = kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".", 2)
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitCommit": "", "gitTreeState": "clean"}
    return " ".join(["-s -w", *(f"-X k8s.io/component-base/version.{name}={value}" for name, value in values.items())])


def _go(go: Go, arguments: list[str], total: int | None) -> list[str]:
    """Run `go` with its progress shown, and return what it printed to its standard output."""
    progress = _Progress(total)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [go.program, *arguments],
            cwd=CONTROL_PLANE_MODULE,
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
