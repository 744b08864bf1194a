"""What can be set about a running operator; the flags of `vcpuset run` in one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vcpuset.domain.networks import Networks

__all__ = ["LeaderElection", "Settings"]


@dataclass(frozen=True, kw_only=True)
class LeaderElection:
    """The Lease that decides which of several replicas works; times as in client-go, in seconds."""

    namespace: str
    """Where the Lease is."""

    name: str = "vcpuset-controller"
    """What the Lease is called; operators that serve different sets need different ones."""

    lease_seconds: int = 15
    """How long the others wait after the holder's last sign of life before one of them takes over."""

    renew_seconds: float = 10.0
    """How long the holder works on without having renewed the lease. The difference to `lease_seconds` is for what it
    has under way then."""

    retry_seconds: float = 2.0
    """The time between two tries to renew the lease, or to get it."""


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

    networks: Networks = field(default_factory=Networks)
    """Where TCP monitors may lie; without a network in it, none is served."""

    workers: int = 64
    """How many sets are worked on at once. A pass mostly waits, for QEMU and the API server: when a thousand sets
    change together, the number of those that wait at once decides how soon the last one is done. At most three
    quarters are sets whose last pass was slow, so that these do not hold up the others."""

    resync_seconds: int = 60
    """How often a machine is looked at without an occasion, in seconds, 10 % more or less. Changes that others make
    to a machine are found by this look, so a longer time means a machine that is wrong for longer; each look costs
    some milliseconds."""

    sweep_seconds: int = 300
    """How often all sets are listed, to find deletions that the watch has missed, in seconds, 10 % more or less. It
    happens too whenever the watch could not go on from where it was."""

    http_address: tuple[str, int] | None = ("127.0.0.1", 8080)
    """Where `/healthz`, `/readyz` and `/metrics` are served; None: nowhere."""

    metrics_set_limit: int = 10_000
    """Up to how many sets have metrics of their own; with more, only sums over all are shown. Who may create sets thus
    cannot fill the metrics' store. 0: never."""

    leader_election: LeaderElection | None = None
    """None: this process works from its start, and nobody else may serve the same sets."""

    kubeconfig: Path | None = None
    """None: `KUBECONFIG` or `~/.kube/config` if there is one, else the service account of the pod."""
