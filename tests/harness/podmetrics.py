"""metrics-server, which tells autoscalers how much CPU the containers of pods use, as a local process.

    async with Cluster("node-a") as cluster, PodMetrics(cluster.control_plane) as metrics:
        await metrics.until_measured(namespace, pod)

It is metrics-server's own program, with the account and the roles of its module. `harness.metricsserver` is the
stand-in whose numbers a test sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from harness.aggregation import create_service, register, registration, until_served
from harness.binaries import METRICS_SERVER
from harness.controlplane import ControlPlane
from harness.pki import Authority
from harness.processes import Child, free_port
from harness.runnable import Runnable

__all__ = ["PodMetrics"]

POD_METRICS: Final = "metrics.k8s.io/v1beta1"

NAMESPACE: Final = "kube-system"
NAME: Final = "metrics-server"
"""Of the account and of the Service."""

MEASURED_SECONDS: Final = 120.0
"""Two samples of each container are needed, 10 s apart at least: metrics-server takes no shorter interval."""


class PodMetrics(Runnable):
    """The metrics-server of a control plane, on loopback; ends before it.

    It asks the kubelet of each node, at the node's InternalIP and the port in its status, and verifies the certificate
    with `ControlPlane.kubelet_authority`. The kubelets need authentication and authorization by webhook.
    """

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._child: Child | None = None

    async def start(self) -> None:
        """Install and start it, and wait until the API server serves its API, before it has measured any pod.

        Raises:
            BinariesMissing: the set-up for `make test-cluster` has not been run.
            TimeoutError: not served within two minutes; the message has the API server's reason.
        """
        control_plane, directory, port = self._control_plane, self._control_plane.directory, free_port()
        roles = METRICS_SERVER.program("manifests") / "base" / "rbac.yaml"
        await control_plane.kubectl("apply", "--server-side", f"--filename={roles}")
        kubeconfig = await control_plane.service_account_kubeconfig(NAMESPACE, NAME)
        server = Authority().server(f"{NAME}.{NAMESPACE}.svc")
        server.write_pem(directory, NAME)
        argv: list[str | Path] = [
            METRICS_SERVER.program("metrics-server"),
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--tls-cert-file={directory / f'{NAME}.crt'}",
            f"--tls-private-key-file={directory / f'{NAME}.key'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--kubelet-use-node-status-port",
            f"--kubelet-certificate-authority={directory / 'kubelet-client.ca'}",
            "--kubelet-request-timeout=5s",
            "--metric-resolution=10s",
        ]
        self._child = Child.start(argv, name=NAME, log=directory / f"{NAME}.log", cwd=directory)
        await create_service(control_plane, NAMESPACE, NAME, port)
        await register(control_plane, POD_METRICS, NAMESPACE, NAME, port, server.ca)
        await until_served(control_plane, POD_METRICS)

    async def until_measured(self, namespace: str, pod: str) -> None:
        """Wait until it has measured a pod.

        Raises:
            ChildDied: it ended; the message has the end of its log.
            TimeoutError: not within two minutes; the same.
        """
        assert self._child is not None, "it has not been started"
        path = f"/apis/{POD_METRICS}/namespaces/{namespace}/pods/{pod}"

        async def is_measured() -> bool:
            return (await self._control_plane.request("GET", path)).status == 200

        await self._child.until(is_measured, MEASURED_SECONDS, f"to measure {namespace}/{pod}")

    async def stop(self) -> None:
        """Remove the APIService and end the process. Safe to call again."""
        # First: a registered API that is not served breaks discovery.
        await self._control_plane.request("DELETE", registration(POD_METRICS))
        if self._child is not None:
            await self._child.stop()
            self._child = None
