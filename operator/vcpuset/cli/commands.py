"""The commands that look and change nothing: `vcpuset inspect` and `vcpuset plan`.

What they need to print (rich, yaml) is imported when they run: the operator shares this program and has no use for it.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import click

from vcpuset.cli.look import TIMEOUT_SECONDS, monitor_address, read_credentials
from vcpuset.cli.values import NAMESPACE
from vcpuset.domain.errors import VCPUSetError
from vcpuset.domain.verdict import sentence
from vcpuset.qmp.tcp import TCPEndpoint

if TYPE_CHECKING:
    from vcpuset.cli.manifests import Manifest
    from vcpuset.cli.render import Output

__all__ = ["inspect", "plan"]


class _Monitor(click.ParamType[Path | TCPEndpoint]):
    """A monitor's address."""

    name = "MONITOR"

    def convert(
        self, value: str | Path | TCPEndpoint, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | TCPEndpoint:
        """Tell a path from HOST:PORT."""
        if not isinstance(value, str):
            return value
        try:
            return monitor_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_output = click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print: a table for people, or one document for programs (docs/cli.md describes it).",
)
_timeout = click.option(
    "--timeout",
    type=click.FloatRange(0.1, 3600),
    default=TIMEOUT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long the monitor, and the guest's agent, may take for each answer.",
)


_tls_credentials = click.option(
    "--tls-credentials",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="For monitors on TLS: a folder with ca.crt, tls.crt and tls.key, as in the Secret of spec.monitor.tcp.tls.",
)


@click.command()
@click.argument("monitor", type=_Monitor())
@click.option(
    "--guest-agent",
    type=click.Path(path_type=Path),
    help="The unix socket of the machine's QEMU guest agent: ask it which CPUs the guest uses.",
)
@click.option(
    "-f",
    "--filename",
    type=click.File("rb"),
    help="The VCPUSet of this machine as kubectl prints it ('-': standard input), for the unplug requests in it.",
)
@_tls_credentials
@click.option(
    "--tls-server-name",
    metavar="NAME",
    help="What the monitor's certificate is for, if not the host in MONITOR: a DNS name or an address.",
)
@_output
@_timeout
def inspect(
    monitor: Path | TCPEndpoint,
    guest_agent: Path | None,
    filename: BinaryIO | None,
    tls_credentials: Path | None,
    tls_server_name: str | None,
    output: Output,
    timeout: float,
) -> None:
    """Show a machine and each of its CPU slots, as its QMP monitor shows them. Nothing is changed.

    MONITOR is the path of a unix socket or HOST:PORT, an IPv6 host in brackets. What contains a "/" or names an
    existing file is a path; write ./NAME for a file that is not there yet. QEMU's own spelling is taken too: unix:PATH
    and tcp:HOST:PORT, with or without ,server=on,wait=off.

    A monitor serves one client at a time. While it is looked at (some milliseconds) the operator waits, and while
    another client holds it this command does.

    The exit status is 0 if the machine was looked at, also if its guest could not be asked; 1 if not.
    """
    from vcpuset.cli import inspect as inspection  # noqa: PLC0415 - needs rich: `run`, which imports this module too, would keep 4 MB
    from vcpuset.cli.render import show  # noqa: PLC0415 - needs rich: `run`, which imports this module too, would keep 4 MB

    if tls_credentials is not None and isinstance(monitor, Path):
        raise click.UsageError(f"--tls-credentials: TLS is for HOST:PORT, and {monitor} is a unix socket.")
    if tls_server_name is not None and tls_credentials is None:
        raise click.UsageError("--tls-server-name takes --tls-credentials.")
    vcpuset = None
    if filename is not None:
        manifests = _manifests(filename, None)
        if len(manifests) != 1:
            raise click.ClickException(f"-f has {len(manifests)} VCPUSets: give the one whose machine this is.")
        vcpuset = manifests[0].vcpuset
    try:
        credentials = None if tls_credentials is None else read_credentials(tls_credentials)
        looking = inspection.inspect(monitor, guest_agent, vcpuset, timeout, credentials, tls_server_name)
        found = asyncio.run(looking)
    except VCPUSetError as error:
        raise click.ClickException(sentence(str(error))) from error
    show(output, inspection.document(found), inspection.page(found))


@click.command()
@click.option(
    "-f",
    "--filename",
    type=click.File("rb"),
    required=True,
    help="One VCPUSet or several, as written by hand or printed by kubectl ('-': standard input).",
)
@click.option("--namespace", "-n", type=NAMESPACE, help="For sets that name none.  [default: default]")
@click.option(
    "--socket-root",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="VCPUSET_SOCKET_ROOT",
    show_envvar=True,
    help="The operator's folder with one folder of unix monitors for each namespace.",
)
@click.option(
    "--monitor",
    type=_Monitor(),
    help="Look through this monitor of the machine (see vcpuset inspect) in place of the one that the set names.",
)
@_tls_credentials
@click.option(
    "--tls-server-name",
    metavar="NAME",
    help="What the certificate of the monitor given with --monitor is for, if not what the set's is for.",
)
@_output
@_timeout
def plan(
    filename: BinaryIO,
    namespace: str | None,
    socket_root: Path | None,
    monitor: Path | TCPEndpoint | None,
    tls_credentials: Path | None,
    tls_server_name: str | None,
    output: Output,
    timeout: float,
) -> None:
    """Show what the operator would do for a VCPUSet now, and each thing that stands in its way. Nothing is changed.

    The machine is looked at through its monitor; the cluster is not asked. With a set as kubectl prints it, the unplug
    requests in its status count: kubectl get vcpuset NAME -o yaml | vcpuset plan -f - --socket-root DIR

    The exit status is 0 if each machine was looked at, whatever stands in the way; 1 if one could not be, or the file
    cannot be used.
    """
    from vcpuset.cli import plan as planning  # noqa: PLC0415 - needs rich: `run`, which imports this module too, would keep 4 MB
    from vcpuset.cli.render import show  # noqa: PLC0415 - needs rich: `run`, which imports this module too, would keep 4 MB

    if tls_server_name is not None and (monitor is None or tls_credentials is None):
        raise click.UsageError("--tls-server-name takes --monitor and --tls-credentials.")
    manifests = _manifests(filename, namespace)
    if monitor is not None and len(manifests) != 1:
        raise click.ClickException(f"--monitor is one machine's, and -f has {len(manifests)} VCPUSets: give one.")
    try:
        credentials = None if tls_credentials is None else read_credentials(tls_credentials)
    except VCPUSetError as error:
        raise click.ClickException(sentence(str(error))) from error
    sources = planning.Sources(socket_root, monitor, timeout, credentials, tls_server_name)
    studies = asyncio.run(planning.study(manifests, sources))
    show(output, planning.document(studies), planning.page(studies))
    if failed := [each for each in studies if each.failed]:
        _end([f"VCPUSet {each.vcpuset}: {each.obstacles[0].message} {each.obstacles[0].remedy}" for each in failed])


def _manifests(file: BinaryIO, namespace: str | None) -> list[Manifest]:
    from vcpuset.cli.manifests import InvalidManifest, read  # noqa: PLC0415 - needs PyYAML, which only commands with -f use

    name = str(getattr(file, "name", "<stdin>"))
    try:
        return read(file.read().decode(), namespace or None, datetime.now(UTC))
    except UnicodeDecodeError:
        _end([f"{name} is not text in UTF-8: give a VCPUSet in YAML or JSON."])
    except InvalidManifest as error:
        _end([f"{name}: {problem}" for problem in error.problems])


def _end(problems: list[str]) -> NoReturn:
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    raise SystemExit(1)
