"""The registration of aggregated APIs that are served on this host.

A control plane without nodes has no kube-proxy. The Service is of type ExternalName, because no other type leads to a
loopback address.
"""

from __future__ import annotations

import base64
from typing import Final

from harness.controlplane import ControlPlane
from harness.wait import until

__all__ = ["create_service", "register", "registration", "until_served"]

SERVED_SECONDS: Final = 120.0

_REGISTRATIONS: Final = "/apis/apiregistration.k8s.io/v1/apiservices"


def registration(api: str) -> str:
    """The path of the APIService of an API, such as `metrics.k8s.io/v1beta1`."""
    group, _, version = api.partition("/")
    return f"{_REGISTRATIONS}/{version}.{group}"


async def create_service(control_plane: ControlPlane, namespace: str, name: str, port: int) -> None:
    """Create a Service for a port on loopback."""
    service = {
        "metadata": {"name": name},
        "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]},
    }
    await control_plane.ok("POST", f"/api/v1/namespaces/{namespace}/services", service)


async def register(control_plane: ControlPlane, api: str, namespace: str, name: str, port: int, ca: str) -> None:
    """Create the APIService of an API that this Service serves; the server's certificate is for NAME.NAMESPACE.svc.

    ca  what the API server verifies the certificate with, as PEM
    """
    group, _, version = api.partition("/")
    body = {
        "metadata": {"name": f"{version}.{group}"},
        "spec": {
            "group": group,
            "version": version,
            "service": {"namespace": namespace, "name": name, "port": port},
            "caBundle": base64.b64encode(ca.encode()).decode(),
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
        },
    }
    await control_plane.ok("POST", _REGISTRATIONS, body)


async def until_served(control_plane: ControlPlane, api: str) -> None:
    """Wait until the API server serves an API.

    Raises:
        TimeoutError: not in time; the message has its reason.
    """
    await control_plane.until_condition(registration(api), "Available", "True")

    async def served() -> bool:
        return (await control_plane.request("GET", f"/apis/{api}")).status == 200

    # The paths follow the condition by a moment.
    await until(served, SERVED_SECONDS, f"the API server to serve {api}")
