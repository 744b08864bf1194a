"""KEDA: its operator, metrics adapter and webhook as local processes, with the definitions and roles of its module.

    async with ControlPlane() as control_plane:
        await control_plane.install_crd()
        async with Keda(control_plane), ControllerManager(control_plane):
            ...

They are KEDA's own programs, act as the account that KEDA has in a cluster, and find each other on loopback. The
adapter and the webhook always listen on all addresses, so it all runs inside `harness.sandbox`.
"""

from __future__ import annotations

import asyncio
import base64
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import yaml

from harness.aggregation import create_service, register, registration, until_served
from harness.binaries import KEDA
from harness.controlplane import ControlPlane
from harness.pki import Authority, Credentials
from harness.processes import Child, free_port
from harness.runnable import Runnable
from harness.sandbox import is_entered

__all__ = ["EXTERNAL_METRICS", "USER", "Keda"]

EXTERNAL_METRICS: Final = "external.metrics.k8s.io/v1beta1"

NAMESPACE: Final = "keda"
ACCOUNT: Final = "keda-operator"
USER: Final = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
"""The user of the KEDA operator's requests in the audit log."""

ADAPTER: Final = "keda-metrics-apiserver"
WEBHOOK: Final = "keda-admission-webhooks"
"""The names of the Services."""

MANIFESTS: Final = (
    "general/namespace.yaml",
    "service_account/service_account.yaml",
    "rbac/role.yaml",
    "rbac/role_binding.yaml",
    "metrics-server/role.yaml",
    "metrics-server/role_binding.yaml",
)
"""What `config/default` of KEDA's module installs, without the definitions, the pods and the webhook's registration."""

START_SECONDS: Final = 120.0


class Keda(Runnable):
    """KEDA of a control plane; ends before it."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._folder = Path()
        self._kubeconfig = Path()
        self._operator_port, self._adapter_port, self._webhook_port = free_port(), free_port(), free_port()
        self._children: dict[str, Child] = {}

    async def start(self) -> None:
        """Install and start it, and wait until the API server serves its metrics.

        Raises:
            BinariesMissing: the set-up for `make test-cluster` has not been run.
            ChildDied: a program ended; the message has the end of its log.
            TimeoutError: not ready, or not served, within two minutes; the same, or the API server's reason.
        """
        assert is_entered(), "KEDA listens on all addresses: run the test by `make test-cluster`"
        control_plane, config = self._control_plane, KEDA.program("config")
        await control_plane.install_crd(config / "crd")
        await control_plane.kubectl("apply", "--server-side", *(f"--filename={config / each}" for each in MANIFESTS))
        self._kubeconfig = await control_plane.service_account_kubeconfig(NAMESPACE, ACCOUNT)
        self._folder = control_plane.directory / "keda"
        names = [f"{name}.{NAMESPACE}.svc" for name in (ADAPTER, WEBHOOK)]
        server = Authority().server("localhost", "127.0.0.1", *names)
        await asyncio.to_thread(_write, self._folder, server.data())
        await asyncio.gather(self.start_operator(), self._start_webhook(server))
        self.start_adapter()
        await create_service(control_plane, NAMESPACE, ADAPTER, self._adapter_port)
        await register(control_plane, EXTERNAL_METRICS, NAMESPACE, ADAPTER, self._adapter_port, server.ca)
        await until_served(control_plane, EXTERNAL_METRICS)

    async def start_operator(self) -> None:
        """Start the operator (again) and wait until it is ready."""
        flags = ["--enable-cert-rotation=false", f"--metrics-service-bind-address=127.0.0.1:{self._operator_port}"]
        await self._start_ready("operator", *flags)

    def start_adapter(self) -> None:
        """Start the metrics adapter (again)."""
        clients = [f"--{each}-kubeconfig={self._kubeconfig}" for each in ("lister", "authentication", "authorization")]
        self._start(
            "adapter",
            f"--port={free_port()}",  # of its /metrics
            f"--secure-port={self._adapter_port}",
            "--bind-address=127.0.0.1",
            *clients,
            f"--client-ca-file={self._folder / 'ca.crt'}",
            f"--tls-cert-file={self._folder / 'tls.crt'}",
            f"--tls-private-key-file={self._folder / 'tls.key'}",
            f"--metrics-service-address=127.0.0.1:{self._operator_port}",
        )

    def kill(self, program: Literal["operator", "adapter"]) -> None:
        """End a program with SIGKILL."""
        self._children[program].kill()

    async def stop(self) -> None:
        """Remove the APIService and end all processes. Safe to call again."""
        # First: a registered API that is not served breaks discovery.
        await self._control_plane.request("DELETE", registration(EXTERNAL_METRICS))
        while self._children:
            await self._children.popitem()[1].stop()

    async def _start_webhook(self, server: Credentials) -> None:
        await self._start_ready("webhooks", f"--port={self._webhook_port}")
        await create_service(self._control_plane, NAMESPACE, WEBHOOK, self._webhook_port)
        shipped = KEDA.program("config") / "webhooks" / "validation_webhooks.yaml"
        configuration = yaml.safe_load(await asyncio.to_thread(shipped.read_text))
        for each in configuration["webhooks"]:
            each["clientConfig"]["caBundle"] = base64.b64encode(server.ca.encode()).decode()
            each["clientConfig"]["service"]["port"] = self._webhook_port
        await self._control_plane.apply(configuration)

    async def _start_ready(self, program: str, *arguments: str) -> None:
        health = free_port()
        more = [f"--health-probe-bind-address=127.0.0.1:{health}", "--metrics-bind-address=0"]  # 0: off
        child = self._start(program, *more, *arguments)

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{health}/readyz", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        await child.until(lambda: asyncio.to_thread(ready), START_SECONDS)

    def _start(self, program: str, *arguments: str) -> Child:
        directory, name = self._control_plane.directory, f"keda-{program}"
        environment = {
            **os.environ,
            "KUBECONFIG": str(self._kubeconfig),
            "POD_NAMESPACE": NAMESPACE,
            "KEDA_CLUSTER_OBJECT_NAMESPACE": NAMESPACE,
            "WATCH_NAMESPACE": "",  # all; it has to be set
        }
        argv: list[str | Path] = [KEDA.program(name), f"--cert-dir={self._folder}", *arguments]
        child = Child.start(argv, name=name, log=directory / f"{name}.log", env=environment, cwd=directory)
        self._children[program] = child
        return child


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(mode=0o700)
    for name, data in files.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(data)
