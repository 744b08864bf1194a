"""`vcpuset metrics-api` beside a control plane: the process, and the way from the API server to it.

A control plane without nodes has no kube-proxy. So the Service of the shipped manifests is made one of type
ExternalName, which leads the API server to a loopback address.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from harness.aggregation import registration, until_served
from harness.controlplane import ControlPlane
from harness.operator import program
from harness.processes import Child, free_port
from harness.wait import until

__all__ = ["API", "NAMESPACE", "REGISTRATION", "MetricsAPIProcess", "ServiceProxy", "available", "expose"]

_GROUP_VERSION: Final = "custom.metrics.k8s.io/v1beta2"
API: Final = f"/apis/{_GROUP_VERSION}"
REGISTRATION: Final = registration(_GROUP_VERSION)
NAMESPACE: Final = "vcpuset-metrics-api"
"""The namespace and the name of the shipped objects."""

WAIT_SECONDS: Final = 90.0


class MetricsAPIProcess:
    """One replica, on loopback ports.

    kubeconfig  as whom it speaks to the API server
    arguments   more flags
    times       constants of the program that are other ones in this process; see `harness.hurried`
    ready       whether `async with` waits until it serves
    """

    def __init__(
        self, kubeconfig: Path, *arguments: str, times: Mapping[str, float] | None = None, ready: bool = True
    ) -> None:
        self._wait = ready
        self._directory = tempfile.TemporaryDirectory(prefix="vcpuset-metrics-api-")
        self.log = Path(self._directory.name) / "log"
        self.port = free_port()
        self._health = free_port()
        words, self._environment = program(times)
        self._argv = [
            sys.executable,
            *words,
            "metrics-api",
            f"--kubeconfig={kubeconfig}",
            f"--address=127.0.0.1:{self.port}",
            f"--health-address=127.0.0.1:{self._health}",
            f"--service-namespace={NAMESPACE}",
            *arguments,
        ]
        self._child: Child | None = None

    def text(self) -> str:
        """All that it has said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ready(self) -> bool:
        """Whether its /readyz says so."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _up(self) -> bool:
        assert self._child is not None
        self._child.require_running()
        return self.ready()

    async def ends(self) -> int:
        """Wait until it has ended by itself; returns the exit status."""
        assert self._child is not None
        return await self._child.wait(WAIT_SECONDS)

    async def stop(self) -> int:
        """Ask it to end (SIGTERM); returns the exit status."""
        assert self._child is not None
        return await self._child.stop(timeout=30)

    async def __aenter__(self) -> Self:
        self._child = Child.start(self._argv, name="vcpuset metrics-api", log=self.log, env=self._environment)
        try:
            if self._wait:
                await until(self._up, WAIT_SECONDS, lambda: f"its /readyz; its log:\n{self.text()}")
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        self._directory.cleanup()


class ServiceProxy:
    """kube-proxy, played, for one Service: each connection goes to the first of its pods that accepts it.

    addresses  where the ready pods listen just now
    """

    def __init__(self, addresses: Callable[[], Sequence[tuple[str, int]]]) -> None:
        self._addresses = addresses
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Its port on loopback."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            for host, port in self._addresses():
                try:
                    there, back = await asyncio.open_connection(host, port)
                except OSError:
                    continue
                await _joined((reader, back), (there, writer))
                return
        finally:
            self._connections.discard(task)
            writer.close()


async def _joined(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Pass on what comes, until one end closes."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()

    passing = [asyncio.create_task(pass_on(*way)) for way in ways]
    try:
        await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
        for _, writer in ways:
            writer.close()


async def expose(control_plane: ControlPlane, port: int) -> None:
    """Lead the API server to a port on loopback when it looks for the shipped Service."""
    service = {
        "type": "ExternalName", "externalName": "localhost", "clusterIP": None, "clusterIPs": None, "selector": None,
        "ports": [{"name": "https", "port": port}],
    }  # fmt: skip
    for path, spec in (
        (f"/api/v1/namespaces/{NAMESPACE}/services/{NAMESPACE}", service),
        (REGISTRATION, {"service": {"port": port}}),
    ):
        answer = await control_plane.request("PATCH", path, {"spec": spec})
        assert answer.status == 200, answer.body


async def available(control_plane: ControlPlane) -> None:
    """Wait until the API server has taken the API up."""
    await until_served(control_plane, _GROUP_VERSION)
