"""The settings of a running operator; the flags of `vcpuset run` in one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vcpuset.domain.networks import Networks

__all__ = ["LeaderElection", "Settings"]


@dataclass(frozen=True, kw_only=True)
class LeaderElection:
    """The Lease that selects the leader of several replicas; times as in client-go, in seconds."""

    namespace: str
    """The namespace of the Lease."""

    name: str = "vcpuset-controller"
    """The name of the Lease; operators that manage different sets need different ones."""

    lease_seconds: int = 15
    """How long the others wait after the holder's last renewal before one of them takes over."""

    renew_seconds: float = 10.0
    """How long the holder continues to work without a renewal. The difference to `lease_seconds` is for work that is in
    progress then."""

    retry_seconds: float = 2.0
    """The time between two attempts to renew or acquire the lease."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one operator process."""

    node_name: str | None = None
    """Manage the sets whose `spec.nodeName` is this; None: those without one."""

    namespaces: tuple[str, ...] = ()
    """Manage the sets of these namespaces; empty: of all."""

    label_selector: str | None = None
    """Manage the sets that match this label selector; None: all."""

    socket_root: Path | None = None
    """The folder that contains a folder with unix monitors for each namespace; None: unix monitors are rejected."""

    networks: Networks = field(default_factory=Networks)
    """The networks of TCP monitors; without any, TCP monitors are rejected."""

    workers: int = 64
    """How many passes run at once. A pass mostly waits, for QEMU and the API server: when a thousand sets change
    together, the number that wait at once determines when the last one is done. At most three quarters are for sets
    whose last pass was slow, so that these do not delay the others."""

    resync_seconds: int = 60
    """The interval of observations without another trigger, in seconds, plus or minus 10 %. With OnDemand, changes by
    other clients are found by these, so a longer interval means a machine that is wrong for longer; each observation
    costs some milliseconds."""

    sweep_seconds: int = 300
    """The interval of the lists of all sets, which find deletions that the watch has missed, in seconds, plus or minus
    10 %. There is also a list whenever the watch could not continue from its last version."""

    http_address: tuple[str, int] | None = ("127.0.0.1", 8080)
    """The address of the status page, `/healthz`, `/readyz` and `/metrics`; None: not served."""

    metrics_set_limit: int = 10_000
    """Up to so many sets, each has its own series; with more, only aggregates are exported. So a user who may create
    sets cannot fill the metrics' storage. 0: never."""

    agent_namespace: str | None = None
    """The namespace of the agents' pods. The sets of nodes without a ready one are reported as AgentUnavailable. None:
    this process does not look after the sets of nodes."""

    agent_grace_seconds: int = 60
    """How long a node may be without a ready agent before its sets are reported, in seconds. An update of the agent or
    a restart takes less. Kubernetes itself takes about 50 s to find that a node has died."""

    leader_election: LeaderElection | None = None
    """None: this process works from its start, and no other may manage the same sets."""

    kubeconfig: Path | None = None
    """None: `KUBECONFIG` or `~/.kube/config` if there is one, else the service account of the pod."""
