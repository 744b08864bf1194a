"""A real kube-controller-manager with the controllers that a test needs: the autoscaler's, or a cluster's.

    async with ControlPlane() as control_plane:
        await control_plane.install_crd()
        async with MetricsServer(control_plane) as metrics, ControllerManager(control_plane):
            ...

Each controller acts as the service account that it has in a cluster (such as `HPA_USER`), with the rights of
Kubernetes' own bootstrap roles and no others. Serve what the autoscaler scales and the metrics that it reads before it
starts: it discovers the APIs at its start, and after a miss not again for half a minute.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
from collections.abc import Sequence
from typing import Final

from harness.binaries import controller_manager
from harness.controlplane import ControlPlane
from harness.processes import Child, ReservedPort
from harness.runnable import Runnable

__all__ = ["AUTOSCALER", "CLUSTER", "HPA_USER", "ControllerManager"]

AUTOSCALER: Final = ("horizontal-pod-autoscaler-controller",)

CLUSTER: Final = (
    "clusterrole-aggregation-controller",
    "daemonset-controller",
    "deployment-controller",
    "disruption-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "replicaset-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
)
"""The controllers that create the pods of Deployments and DaemonSets and their accounts, and clean up deletions."""

HPA_USER: Final = "system:serviceaccount:kube-system:horizontal-pod-autoscaler"
"""The user of the autoscaler's requests in the audit log."""

START_SECONDS: Final = 120.0

SYNC_MILLISECONDS: Final = 200
"""How often each HorizontalPodAutoscaler is reconciled; every 15 s in a cluster."""


class ControllerManager(Runnable):
    """The controllers of a control plane; ends before it."""

    def __init__(
        self, control_plane: ControlPlane, controllers: Sequence[str] = AUTOSCALER, options: Sequence[str] = ()
    ) -> None:
        self._control_plane = control_plane
        self._controllers = controllers
        self._options = options
        self._port: ReservedPort | None = None
        self._child: Child | None = None

    async def start(self) -> None:
        """Start it and wait until it is healthy.

        Raises:
            BinariesMissing: `make setup` has not been run.
            ChildDied: it ended; the message has the end of its log.
            TimeoutError: not healthy within two minutes; the same.
        """
        directory = self._control_plane.directory
        program = controller_manager()
        self._port = ReservedPort()
        self._child = Child.start(
            [
                program,
                f"--kubeconfig={self._control_plane.kubeconfig}",
                f"--controllers={','.join(self._controllers)}",
                "--leader-elect=false",
                "--use-service-account-credentials=true",
                f"--service-account-private-key-file={self._control_plane.service_account_key}",
                f"--root-ca-file={self._control_plane.certificate}",
                f"--horizontal-pod-autoscaler-sync-period={SYNC_MILLISECONDS}ms",
                # The default stabilization window for scaling down; 5 min in a cluster.
                "--horizontal-pod-autoscaler-downscale-stabilization=1s",
                "--bind-address=127.0.0.1",
                f"--secure-port={self._port.number}",
                "--permit-port-sharing",  # see ReservedPort
                f"--cert-dir={directory / 'controller-manager'}",
                "--profiling=false",
                *self._options,
            ],
            name="kube-controller-manager",
            log=directory / "kube-controller-manager.log",
            cwd=directory,
        )
        await self._child.until(lambda: asyncio.to_thread(self._is_healthy), START_SECONDS)

    async def stop(self) -> None:
        """End it. Safe to call again."""
        if self._child is not None:
            await self._child.stop()
            self._child = None
        if self._port is not None:
            self._port.release()
            self._port = None

    def _is_healthy(self) -> bool:
        assert self._port is not None, "the controller manager has not been started"
        certificate = self._control_plane.directory / "controller-manager" / "kube-controller-manager.crt"
        try:
            tls = ssl.create_default_context(cafile=str(certificate))
            connection = http.client.HTTPSConnection("127.0.0.1", self._port.number, timeout=10, context=tls)
            try:
                connection.request("GET", "/healthz")
                return connection.getresponse().status == http.client.OK
            finally:
                connection.close()
        except (OSError, http.client.HTTPException):  # no certificate yet, nobody listens yet, …
            return False
