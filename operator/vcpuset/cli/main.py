"""`vcpuset`: the command line."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import click
import uvloop

from vcpuset.app.settings import LeaderElection, Settings
from vcpuset.cli.commands import apply, inspect, plan
from vcpuset.cli.metricsapi import metrics_api
from vcpuset.cli.options import (
    Address,
    EmptyCounts,
    configure_logs,
    kubeconfig_option,
    log_options,
    not_empty,
    own_namespace,
)
from vcpuset.cli.program import Program
from vcpuset.cli.values import LEASE, NAMESPACE, NODE, repeat
from vcpuset.domain.errors import VCPUSetError
from vcpuset.domain.networks import Network, Networks, network

__all__ = ["main"]


_SECONDS = re.compile(r"(?P<number>[0-9]{1,6}(\.[0-9]{1,3})?)s?")

_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY = rf"([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?{_NAME}"
_VALUES = rf"\s*\(\s*({_NAME})?(\s*,\s*({_NAME})?)*\s*\)"
_REQUIREMENT = rf"\s*(!\s*{_KEY}|{_KEY}(\s*(==?|!=)\s*({_NAME})?|\s*[<>]\s*[0-9]{{1,18}}|\s+(not)?in{_VALUES})?)\s*"
_LABEL_SELECTOR = re.compile(rf"{_REQUIREMENT}(,{_REQUIREMENT})*", re.ASCII)
"""Label selectors that the API server accepts."""


class _Seconds(click.ParamType[float]):
    """A time of at least a second, with or without the unit that other components of Kubernetes require: 15s or 15."""

    name = "SECONDS"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of seconds."""
        found = _SECONDS.fullmatch(str(value))
        if found is None or float(found["number"]) < 1:
            self.fail(f"{value!r} is not a number of seconds, at least 1, such as 15s", param, ctx)
        return float(found["number"])


class _Network(click.ParamType[Network]):
    """A network, such as 192.0.2.0/24."""

    name = "CIDR"

    def convert(self, value: str | Network, param: click.Parameter | None, ctx: click.Context | None) -> Network:
        """The network."""
        if not isinstance(value, str):
            return value
        try:
            return network(value)
        except ValueError as error:
            self.fail(f"{error}{repeat(value, param)}", param, ctx)


def _label_selector(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Reject what the API server would reject at each list and watch."""
    if value and _LABEL_SELECTOR.fullmatch(value) is None:
        raise click.BadParameter(
            f"{value!r} is not a label selector, such as team=shop,tier in (web, cache),!legacy", ctx, param
        )
    return value or None


@click.group(cls=Program)
@click.version_option(package_name="vcpuset")
def main() -> None:
    """Keep running QEMU machines at their declared vCPU count."""


main.add_command(apply)
main.add_command(inspect)
main.add_command(metrics_api)
main.add_command(plan)


@main.command()
@click.option(
    "--node-name",
    type=NODE,
    envvar="VCPUSET_NODE_NAME",
    show_envvar=True,
    help="Manage the VCPUSets with this spec.nodeName. Default: those without spec.nodeName.",
)
@click.option(
    "--namespace",
    "namespaces",
    type=NAMESPACE,
    multiple=True,
    envvar="VCPUSET_NAMESPACE",
    show_envvar=True,
    callback=not_empty,
    help="Manage only this namespace. Repeatable (in the environment: separated by spaces).",
)
@click.option(
    "--label-selector",
    envvar="VCPUSET_LABEL_SELECTOR",
    show_envvar=True,
    callback=_label_selector,
    help="Manage only the VCPUSets that match this label selector.",
)
@click.option(
    "--socket-root",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="VCPUSET_SOCKET_ROOT",
    show_envvar=True,
    callback=not_empty,
    help="Directory that contains a directory of unix monitors for each namespace. Without it, unix monitors are "
    "rejected.",
)
@click.option(
    "--allow-tcp",
    "networks",
    type=_Network(),
    multiple=True,
    envvar="VCPUSET_ALLOW_TCP",
    show_envvar=True,
    help="A network in which TCP monitors are allowed. Repeatable (in the environment: separated by spaces). Without "
    "it, TCP monitors are rejected. Loopback and link-local addresses are only allowed by a network of their own "
    "range, such as 127.0.0.0/8.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=Settings.workers,
    show_default=True,
    envvar="VCPUSET_WORKERS",
    show_envvar=True,
    help="Maximum number of concurrent reconciliations. At most three quarters of them are for VCPUSets whose "
    "monitors hang or answer slowly.",
)
@click.option(
    "--resync-seconds",
    type=click.IntRange(1, 86400),
    default=Settings.resync_seconds,
    show_default=True,
    envvar="VCPUSET_RESYNC_SECONDS",
    show_envvar=True,
    help="Interval between two observations of a machine without any other trigger, plus or minus 10 %.",
)
@click.option(
    "--sweep-seconds",
    type=click.IntRange(1, 86400),
    default=Settings.sweep_seconds,
    show_default=True,
    envvar="VCPUSET_SWEEP_SECONDS",
    show_envvar=True,
    help="Interval between two lists of all VCPUSets, which find deletions that the watch has missed, plus or minus "
    "10 %.",
)
@click.option(
    "--http-address",
    cls=EmptyCounts,
    type=Address(),
    default="127.0.0.1:8080",
    show_default=True,
    envvar="VCPUSET_HTTP_ADDRESS",
    show_envvar=True,
    help="Address of the status page, /healthz, /readyz, /metrics and the busy vCPUs (/v1/…/busy). Empty: disabled.",
)
@click.option(
    "--metrics-set-limit",
    type=click.IntRange(0),
    default=Settings.metrics_set_limit,
    show_default=True,
    envvar="VCPUSET_METRICS_SET_LIMIT",
    show_envvar=True,
    help="Number of VCPUSets up to which each has its own metric series. With more, only aggregates are exported. 0: "
    "never.",
)
@click.option(
    "--agent-namespace",
    type=NAMESPACE,
    envvar="VCPUSET_AGENT_NAMESPACE",
    show_envvar=True,
    help="Namespace of the agents' pods. VCPUSets with spec.nodeName whose node has no ready agent are reported as "
    "AgentUnavailable. Default: they are left alone.",
)
@click.option(
    "--agent-grace-seconds",
    type=click.IntRange(1, 86400),
    default=Settings.agent_grace_seconds,
    show_default=True,
    envvar="VCPUSET_AGENT_GRACE_SECONDS",
    show_envvar=True,
    help="How long a node may be without a ready agent before its VCPUSets are reported as AgentUnavailable.",
)
@click.option(
    "--leader-elect/--no-leader-elect",
    default=False,
    envvar="VCPUSET_LEADER_ELECT",
    show_envvar=True,
    help="Take part in leader election with a Lease: one replica is the leader, the others are standbys.",
)
@click.option(
    "--leader-elect-namespace",
    type=NAMESPACE,
    envvar="VCPUSET_LEADER_ELECT_NAMESPACE",
    show_envvar=True,
    help="Namespace of the Lease. Default: the namespace of the pod.",
)
@click.option(
    "--leader-elect-name",
    type=LEASE,
    default=LeaderElection.name,
    show_default=True,
    envvar="VCPUSET_LEADER_ELECT_NAME",
    show_envvar=True,
    callback=not_empty,
    help="Name of the Lease. Operators that manage different VCPUSets need different names.",
)
@click.option(
    "--leader-elect-lease-duration",
    type=_Seconds(),
    default=f"{LeaderElection.lease_seconds}s",
    show_default=True,
    envvar="VCPUSET_LEADER_ELECT_LEASE_DURATION",
    show_envvar=True,
    help="How long a standby waits after the last renewal before it takes over; whole seconds.",
)
@click.option(
    "--leader-elect-renew-deadline",
    type=_Seconds(),
    default=f"{LeaderElection.renew_seconds:g}s",
    show_default=True,
    envvar="VCPUSET_LEADER_ELECT_RENEW_DEADLINE",
    show_envvar=True,
    help="How long a leader keeps working while it cannot renew the Lease; less than the lease duration.",
)
@click.option(
    "--leader-elect-retry-period",
    type=_Seconds(),
    default=f"{LeaderElection.retry_seconds:g}s",
    show_default=True,
    envvar="VCPUSET_LEADER_ELECT_RETRY_PERIOD",
    show_envvar=True,
    help="Time between two attempts to acquire or renew the Lease.",
)
@log_options
@kubeconfig_option
def run(
    node_name: str | None,
    namespaces: tuple[str, ...],
    label_selector: str | None,
    socket_root: Path | None,
    networks: tuple[Network, ...],
    workers: int,
    resync_seconds: int,
    sweep_seconds: int,
    http_address: tuple[str, int] | None,
    metrics_set_limit: int,
    agent_namespace: str | None,
    agent_grace_seconds: int,
    leader_elect: bool,
    leader_elect_namespace: str | None,
    leader_elect_name: str,
    leader_elect_lease_duration: float,
    leader_elect_renew_deadline: float,
    leader_elect_retry_period: float,
    log_format: str,
    log_level: str,
    kubeconfig: Path | None,
) -> None:
    """Run the operator until SIGTERM or SIGINT."""
    if node_name and agent_namespace:
        raise click.UsageError(
            "--agent-namespace cannot be combined with --node-name: the central controller looks after the VCPUSets of "
            "all nodes. Leave out --agent-namespace"
        )
    election: LeaderElection | None = None
    if leader_elect:
        if node_name:
            raise click.UsageError(
                "--leader-elect cannot be combined with --node-name: a node has exactly one operator. Leave out "
                "--leader-elect"
            )
        election = _election(
            leader_elect_namespace,
            leader_elect_name,
            leader_elect_lease_duration,
            leader_elect_renew_deadline,
            leader_elect_retry_period,
        )
    configure_logs(log_format, log_level)
    settings = Settings(
        node_name=node_name or None,
        namespaces=namespaces,
        label_selector=label_selector,
        socket_root=socket_root,
        networks=Networks(networks),
        workers=workers,
        resync_seconds=resync_seconds,
        sweep_seconds=sweep_seconds,
        http_address=http_address,
        metrics_set_limit=metrics_set_limit,
        agent_namespace=agent_namespace or None,
        agent_grace_seconds=agent_grace_seconds,
        leader_election=election,
        kubeconfig=kubeconfig,
    )
    from vcpuset.app import operator  # noqa: PLC0415 - imports kopf and kubernetes: every other command would start 0.5 s later

    try:
        uvloop.run(operator.run(settings))
    except VCPUSetError as error:
        # Not as click would print it: the last message belongs in the log too, in its format.
        logging.getLogger("vcpuset").critical("%s", error)
        raise SystemExit(1) from error


def _election(namespace: str | None, name: str, lease: float, renew: float, retry: float) -> LeaderElection:
    """The settings of leader election, checked together."""
    if not lease.is_integer():
        raise click.UsageError(f"--leader-elect-lease-duration {lease:g}: a Lease only supports whole seconds")
    if not lease > renew > retry * 1.2:
        raise click.UsageError(
            f"--leader-elect-lease-duration ({lease:g} s) must be longer than --leader-elect-renew-deadline "
            f"({renew:g} s), and that longer than 1.2 times --leader-elect-retry-period ({retry:g} s)"
        )
    namespace = namespace or own_namespace("--leader-elect", "the Lease", "--leader-elect-namespace")
    return LeaderElection(
        namespace=namespace, name=name, lease_seconds=int(lease), renew_seconds=renew, retry_seconds=retry
    )


if __name__ == "__main__":
    main()
