"""What can be set about a running operator; the flags of `vcpuset run` in one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one operator process."""

    node_name: str | None = None
    """Serve the sets whose `spec.nodeName` is this; None: those that name no node."""

    namespaces: tuple[str, ...] = ()
    """Serve the sets of these namespaces; empty: of all."""

    label_selector: str | None = None
    """Serve the sets that match this label selector; None: all."""

    socket_root: Path | None = None
    """The folder that holds one folder with unix monitors for each namespace; None: unix monitors are not served."""

    workers: int = 16
    """How many sets are worked on at once. A pass mostly waits, for QEMU and the API server; more than that helps
    only while many monitors are slow."""

    resync_seconds: int = 60
    """How often a machine is looked at without an occasion, in seconds, 10 % more or less. Changes that others make
    to a machine are found by this look, so a longer time means a machine that is wrong for longer; each look costs
    some milliseconds."""

    http_address: tuple[str, int] | None = ("127.0.0.1", 8080)
    """Where `/healthz`, `/readyz` and `/metrics` are served; None: nowhere."""

    kubeconfig: Path | None = None
    """None: `KUBECONFIG` or `~/.kube/config` if there is one, else the service account of the pod."""
