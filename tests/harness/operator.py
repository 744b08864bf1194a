"""The real operator, as a child process: `vcpuset run` with the flags that a test gives it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from harness.processes import Child, free_port
from harness.wait import until

__all__ = ["OperatorProcess", "program"]

_TESTS: Final = Path(__file__).parents[1]


def program(
    times: Mapping[str, float] | None, environment: Mapping[str, str] | None = None
) -> tuple[list[str], Mapping[str, str] | None]:
    """What follows the interpreter's name to run `vcpuset`, and the environment; None: that of the test.

    times  constants of the program that are other ones in this process; see `harness.hurried`
    """
    if not times:
        return ["-m", "vcpuset.cli.main"], environment
    ways = [str(_TESTS), *filter(None, [(environment or os.environ).get("PYTHONPATH")])]
    constants = [f"vcpuset.{name}={value}" for name, value in times.items()]
    return ["-m", "harness.hurried", *constants, "--"], {
        **(environment or os.environ),
        "PYTHONPATH": os.pathsep.join(ways),
    }


class HasKubeconfig(Protocol):
    """A cluster, as far as an operator needs to know it; `ControlPlane` is one."""

    kubeconfig: Path


class OperatorProcess:
    """One operator. Its log is in `log`; its health and metrics are at `url`.

    kubeconfig   as whom it speaks to the API server; None: as the cluster's own says
    address      where it serves health and metrics; None: a port of its own on loopback
    socket_root  the folder with the namespaces' folders; None: it serves no unix monitors
    arguments    more flags of `vcpuset run`
    environment  its environment variables; None: those of the test
    times        constants of the program that are other ones in this process; see `harness.hurried`
    """

    def __init__(
        self,
        cluster: HasKubeconfig,
        *arguments: str,
        address: str | None = None,
        socket_root: Path | None = None,
        kubeconfig: Path | None = None,
        python: str | None = None,
        environment: Mapping[str, str] | None = None,
        times: Mapping[str, float] | None = None,
    ) -> None:
        words, self._environment = program(times, environment)
        self.directory = Path(tempfile.mkdtemp(prefix="vcpuset-operator-"))
        self.log = self.directory / "log"
        address = address or f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self._argv = [
            python or sys.executable,
            *words,
            "run",
            f"--kubeconfig={kubeconfig or cluster.kubeconfig}",
            f"--http-address={address}",
            *([f"--socket-root={socket_root}"] if socket_root else []),
            *arguments,
        ]
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        """The process id of the running operator."""
        assert self._child is not None, "the operator has not been started"
        return self._child.pid

    def require_running(self) -> None:
        """Raise `ChildDied`, with the end of the log, unless it runs."""
        assert self._child is not None, "the operator has not been started"
        self._child.require_running()

    async def start(self, *, ready: bool = True) -> Self:
        """Start it (again); with `ready`, wait until it has listed the sets."""
        self._child = Child.start(self._argv, name="vcpuset run", log=self.log, env=self._environment)
        if ready:
            await until(self._is_ready, 60, lambda: f"the operator's /readyz; its log ends with:\n{self.tail()}\n")
        return self

    def tail(self, lines: int = 40) -> str:
        """The end of the log, for messages."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def text(self) -> str:
        """The whole log."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._child is not None:
            self._child.kill()

    async def stop(self) -> int:
        """Ask it to end (SIGTERM); returns the exit status."""
        assert self._child is not None, "the operator has not been started"
        return await self._child.stop(timeout=30)

    def metrics(self) -> str:
        """What `/metrics` says now."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:  # noqa: S310 - our own URL
            text: str = answer.read().decode()
            return text

    def sets_served(self) -> int:
        """How many sets it serves, by its metrics."""
        return sum(
            int(float(line.rpartition(" ")[2]))
            for line in self.metrics().splitlines()
            if line.startswith("vcpuset_sets{")
        )

    def rss_bytes(self) -> int:
        """Its resident memory."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def _is_ready(self) -> bool:
        self.require_running()
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:  # noqa: S310 - our own URL
                return bool(answer.status == 200)
        except OSError:
            return False

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except BaseException:
            await self.close()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ask it to end, and remove its folder. For who cannot wait in a context until it is ready."""
        if self._child is not None:
            await self._child.stop(timeout=30)
        shutil.rmtree(self.directory, ignore_errors=True)
