"""The commands for one machine, without a cluster: `vcpuset apply`, `vcpuset inspect` and `vcpuset plan`.

What they need for printing (rich, yaml) is imported when they run: `vcpuset run` does not need it.
"""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

import click

from vcpuset.cli.observation import TIMEOUT_SECONDS, monitor_address, read_credentials
from vcpuset.cli.options import Timeout, ready_timeout_option
from vcpuset.cli.outcome import Exit, Progress
from vcpuset.cli.text import printable
from vcpuset.cli.values import NAMESPACE
from vcpuset.domain.assessment import sentence
from vcpuset.domain.errors import MonitorBusy, VCPUSetError
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import UnixMonitor
from vcpuset.qmp.tcp import TCPEndpoint

if TYPE_CHECKING:
    from vcpuset.cli.manifests import Manifest
    from vcpuset.cli.render import Output

__all__ = ["apply", "inspect", "plan"]

_KEPT: Final = (
    "By default, the operator keeps the monitor of a VCPUSet: add a second monitor to QEMU (-qmp) and inspect that one."
)

_STOP_OPERATOR: Final = "If an operator manages this machine, it keeps the monitor: stop the operator first."


class _Monitor(click.ParamType[Path | TCPEndpoint]):
    """A monitor's address."""

    name = "MONITOR"

    def convert(
        self, value: str | Path | TCPEndpoint, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | TCPEndpoint:
        """Distinguish a path from HOST:PORT."""
        if not isinstance(value, str):
            return value
        try:
            return monitor_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _File(click.File):
    """A file with manifests."""

    def convert(
        self, value: str | os.PathLike[str] | IO[Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> IO[Any]:
        """As click's, but without a traceback where standard input is closed."""
        try:
            return super().convert(value, param, ctx)
        except RuntimeError:
            self.fail("there is no standard input", param, ctx)


_output = click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="Output format: a table, or a document that docs/cli.md describes.",
)
_timeout = click.option(
    "--timeout",
    type=Timeout(0.1, 3600),
    default=TIMEOUT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Timeout for each response of the monitor and the guest agent.",
)


_tls_credentials = click.option(
    "--tls-credentials",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="For TLS monitors: a directory with ca.crt, tls.crt and tls.key, as in the Secret of spec.monitor.tcp.tls.",
)


_namespace = click.option(
    "--namespace", "-n", type=NAMESPACE, help="Namespace of VCPUSets without one.  [default: default]"
)

_socket_root = click.option(
    "--socket-root",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="VCPUSET_SOCKET_ROOT",
    show_envvar=True,
    help="The operator's directory that contains a directory of unix monitors for each namespace.",
)


@click.command()
@click.argument("monitor", type=_Monitor())
@click.option(
    "--guest-agent",
    type=click.Path(path_type=Path),
    help="Unix socket of the machine's QEMU guest agent, to show which CPUs the guest has online.",
)
@click.option(
    "-f",
    "--filename",
    type=_File("rb"),
    help="The VCPUSet of this machine as printed by kubectl ('-': standard input), to show its unplug requests.",
)
@_tls_credentials
@click.option(
    "--tls-server-name",
    metavar="NAME",
    help="DNS name or address in the monitor's certificate, if it is not the host in MONITOR.",
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
    """Show a machine and its CPU slots, as reported by its QMP monitor. This command changes nothing.

    MONITOR is the path of a unix socket or HOST:PORT, with an IPv6 host in brackets. A value that contains a "/" or
    names an existing file is a path. Write ./NAME for a file that does not exist yet. QEMU's syntax also works:
    unix:PATH and tcp:HOST:PORT, with or without ,server=on,wait=off.

    A monitor serves one client at a time, and the operator keeps the monitor of a VCPUSet unless its
    spec.monitor.connection is OnDemand: use a second monitor of the machine. This command waits while another client
    uses the monitor.

    The exit status is 0 if the machine was observed, even if its guest agent did not answer, and 1 otherwise.
    """
    from vcpuset.cli import inspect as inspection
    from vcpuset.cli.render import show

    if tls_credentials is not None and isinstance(monitor, Path):
        raise click.UsageError(f"--tls-credentials requires a HOST:PORT monitor; {monitor} is a unix socket.")
    if tls_server_name is not None and tls_credentials is None:
        raise click.UsageError("--tls-server-name requires --tls-credentials.")
    vcpuset = None
    if filename is not None:
        vcpuset = _only(_manifests(filename, None)).vcpuset
    try:
        credentials = None if tls_credentials is None else read_credentials(tls_credentials)
        inspecting = inspection.inspect(monitor, guest_agent, vcpuset, timeout, credentials, tls_server_name)
        found = asyncio.run(inspecting)
    except MonitorBusy as error:
        raise click.ClickException(f"{sentence(str(error))} {_KEPT}") from error
    except VCPUSetError as error:
        raise click.ClickException(sentence(str(error))) from error
    show(output, inspection.document(found), inspection.page(found))


@click.command()
@click.option(
    "-f",
    "--filename",
    type=_File("rb"),
    required=True,
    help="One or more VCPUSets, as a manifest or as printed by kubectl ('-': standard input).",
)
@_namespace
@_socket_root
@click.option(
    "--monitor",
    type=_Monitor(),
    help="Use this monitor of the machine (see vcpuset inspect) instead of the one in the VCPUSet.",
)
@_tls_credentials
@click.option(
    "--tls-server-name",
    metavar="NAME",
    help="DNS name or address in the certificate of --monitor, if it differs from that of the VCPUSet's monitor.",
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
    """Show what the operator would do for a VCPUSet now, and everything that blocks it. This command changes nothing.

    The command observes the machine through its monitor and does not contact the cluster. To include the unplug
    requests in the status, pass the VCPUSet as printed by kubectl:

    kubectl get vcpuset NAME -o yaml | vcpuset plan -f - --socket-root DIR

    The exit status is 0 if all machines were observed, even if something blocks the change. It is 1 if a machine
    could not be observed or the file is invalid.
    """
    from vcpuset.cli import plan as planning
    from vcpuset.cli.render import show

    if tls_server_name is not None and (monitor is None or tls_credentials is None):
        raise click.UsageError("--tls-server-name requires --monitor and --tls-credentials.")
    manifests = _manifests(filename, namespace)
    if monitor is not None and len(manifests) != 1:
        raise click.ClickException(
            f"--monitor is for one machine, but -f contains {len(manifests)} VCPUSets: pass only one."
        )
    try:
        credentials = None if tls_credentials is None else read_credentials(tls_credentials)
    except VCPUSetError as error:
        raise click.ClickException(sentence(str(error))) from error
    sources = planning.Sources(socket_root, monitor, timeout, credentials, tls_server_name)
    results = asyncio.run(planning.preview_all(manifests, sources))
    show(output, planning.document(results), planning.page(results))
    if failed := [each for each in results if each.failed]:
        _end([f"VCPUSet {each.vcpuset}: {each.blockers[0].message} {each.blockers[0].remedy}" for each in failed])


@click.command()
@click.option(
    "-f",
    "--filename",
    type=_File("rb"),
    required=True,
    help="One VCPUSet, as a manifest or as printed by kubectl ('-': standard input).",
)
@_namespace
@_socket_root
@_tls_credentials
@click.option(
    "--wait",
    is_flag=True,
    help="Also wait for the guest, and for a machine that cannot be reached or changed now.",
)
@ready_timeout_option
@_output
def apply(
    filename: BinaryIO,
    namespace: str | None,
    socket_root: Path | None,
    tls_credentials: Path | None,
    wait: bool,
    timeout: float,
    output: Output,
) -> None:
    """Bring one machine to the vCPU count of a VCPUSet, without a cluster.

    This is one reconciliation of the operator: the same decisions, reasons and messages. It plugs vCPUs, or sends
    unplug requests to the guest. Without --wait, the command ends when these are sent. An operator that manages the
    machine must be stopped before: it keeps the monitor, and would correct the count.

    The guest may carry out unplug requests after the command has ended. They are recorded in
    $XDG_STATE_HOME/vcpuset (~/.local/state/vcpuset), where vcpuset plan and the next vcpuset apply find them.

    The exit status is 0 if the machine is Ready, 1 if it cannot be (Stalled or suspended), 3 if it is not Ready yet,
    2 if the command line or the file is invalid, and 130 after Ctrl-C.
    """
    from vcpuset.cli import apply as application

    manifest = _only(_manifests(filename, namespace, Exit.UNUSABLE), Exit.UNUSABLE)
    vcpuset = manifest.vcpuset
    if socket_root is None and isinstance(vcpuset.spec.monitor, UnixMonitor):
        raise click.UsageError(
            f"--socket-root is required: {vcpuset.spec.monitor.path} (spec.monitor.unix.path) is a path below it."
        )
    progress = Progress(f"VCPUSet {vcpuset}", to_stderr=output != "table")
    try:
        credentials = None if tls_credentials is None else read_credentials(tls_credentials)
        done = asyncio.run(
            application.apply(
                manifest,
                socket_root,
                credentials,
                wait=wait,
                seconds=timeout,
                tell=lambda assessment: progress.tell(assessment.reason, assessment.message),
            )
        )
    except VCPUSetError as error:
        raise click.ClickException(sentence(str(error))) from error
    if output != "table":
        from vcpuset.cli.render import show

        show(output, done.document, [])
    reason = None if done.assessment is None else done.assessment.reason
    hint = ""
    if reason is Reason.MONITOR_BUSY:
        hint = _STOP_OPERATOR
    elif done.in_flight:
        hint = "The guest may still carry out unplug requests; vcpuset plan shows them."
    progress.end(done.status, reason, waited=timeout if wait else None, hint=hint)


def _only(manifests: list[Manifest], status: int = 1) -> Manifest:
    if len(manifests) != 1:
        _end([f"-f contains {len(manifests)} VCPUSets: pass only the one of this machine."], status)
    return manifests[0]


def _manifests(file: BinaryIO, namespace: str | None, status: int = 1) -> list[Manifest]:
    from vcpuset.cli.manifests import InvalidManifest, read
    from vcpuset.cli.record import RecordFailed, remembered

    name = str(getattr(file, "name", "<stdin>"))
    try:
        return [
            remembered(each) for each in read(file.read().decode("utf-8-sig"), namespace or None, datetime.now(UTC))
        ]
    except UnicodeDecodeError:
        _end([f"{name} is not valid UTF-8: pass a VCPUSet in YAML or JSON."], status)
    except OSError as error:
        _end([f"{name} cannot be read: {error.strerror}."], status)
    except InvalidManifest as error:
        _end([f"{name}: {problem}" for problem in error.problems], status)
    except RecordFailed as error:
        _end([sentence(str(error))])


def _end(problems: list[str], status: int = 1) -> NoReturn:
    for problem in problems:
        click.echo(f"Error: {printable(problem)}", err=True)
    raise SystemExit(status)
