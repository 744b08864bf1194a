"""The settings of the metrics API; the flags of `vcpuset metrics-api` in one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["AGENT_NAMESPACE", "CONTROLLER_NAMESPACE", "SERVICE", "CertificateFiles", "Settings"]

AGENT_NAMESPACE: Final = "vcpuset-agent"
CONTROLLER_NAMESPACE: Final = "vcpuset-system"
SERVICE: Final = "vcpuset-metrics-api"


@dataclass(frozen=True)
class CertificateFiles:
    """A serving certificate that something else makes and renews, such as cert-manager; both are PEM."""

    certificate: Path
    key: Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Each field is a flag; its help says more."""

    namespace: str
    """The namespace of this process' Service and Secret."""

    service: str = SERVICE
    """The name of the Service that the APIService names. The Secret with the certificate has the same name."""

    agent_namespace: str = AGENT_NAMESPACE
    """The namespace of the node agents."""

    controller_namespace: str = CONTROLLER_NAMESPACE
    """The namespace of the central controllers."""

    address: tuple[str, int] = ("0.0.0.0", 8443)  # noqa: S104 - the API server connects from another host, and only its front proxy's certificate is let in
    """The address of the API, with TLS."""

    health_address: tuple[str, int] | None = ("127.0.0.1", 8080)
    """The address of `/healthz` and `/readyz`; None: not served."""

    files: CertificateFiles | None = None
    """None: this process makes and renews its certificate, in a Secret that its replicas share."""

    kubeconfig: Path | None = None
    """None: `KUBECONFIG` or `~/.kube/config` if there is one, else the service account of the pod."""
