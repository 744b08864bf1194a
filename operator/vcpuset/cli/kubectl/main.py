"""`kubectl vcpuset`: the command line of the plugin, and its completion.

`kubectl` starts the program `kubectl-vcpuset` in PATH, and `kubectl_complete-vcpuset` for the completion, in any shell.
What prints (rich) and what speaks to the API server (kubernetes) is imported when a command runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

import click
from click.shell_completion import ShellComplete

from vcpuset.cli.commands import inspect, plan
from vcpuset.cli.kubectl.access import Access, access_options, complete_name, connected, execute
from vcpuset.cli.options import ready_timeout_option
from vcpuset.cli.outcome import Exit, Progress, exit_status
from vcpuset.cli.program import Program
from vcpuset.cli.values import VCPUSET
from vcpuset.domain.errors import APIError, ObjectGone, VCPUSetError
from vcpuset.domain.report import UNREPORTED, state_of

__all__ = ["complete", "main", "run"]

if TYPE_CHECKING:
    from vcpuset.cli.render import Output as DocumentOutput
    from vcpuset.kube.user import UserAPI

Output = Literal["table", "wide", "json", "yaml"]

_NO_FILES: Final = 4
"""Cobra's ShellCompDirectiveNoFileComp."""


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if "" in ((value,) if isinstance(value, str) else value):
        raise click.BadParameter("the name is empty", ctx, param)
    return value


_name = click.argument("name", type=VCPUSET, callback=_not_empty, shell_complete=complete_name)
_names = click.argument(
    "names",
    metavar="NAME...",
    type=VCPUSET,
    nargs=-1,
    required=True,
    callback=_not_empty,
    shell_complete=complete_name,
)


def _say(words: str) -> None:
    click.echo(words, err=True)


def _output(*formats: str) -> Callable[[Any], Any]:
    return click.option(
        "--output",
        "-o",
        type=click.Choice(["table", *formats]),
        default="table",
        show_default=True,
        help="Output format: a table, or a document that docs/kubectl.md describes.",
    )


_everywhere = click.option("--all-namespaces", "-A", is_flag=True, help="The VCPUSets of all namespaces.")


@click.group(cls=Program)
@click.version_option(package_name="vcpuset")
@access_options
@click.pass_context
def main(context: click.Context, /, **access: Any) -> None:
    """See and change the vCPU counts of running QEMU machines (VCPUSets)."""
    # As for kubectl, these options may come before the command.
    given = {name: value for name, value in access.items() if value is not None}
    context.default_map = dict.fromkeys(main.commands, given)


main.add_command(inspect)
main.add_command(plan)


@main.command()
@_everywhere
@access_options
@click.option("--watch", "-w", is_flag=True, help="Follow the changes, until Ctrl-C.")
@_output("wide", "json", "yaml")
def status(all_namespaces: bool, watch: bool, output: Output, **access: Any) -> None:
    """Show all VCPUSets: their counts, whether they are Ready, and why not.

    DESIRED is spec.vcpus. CURRENT is the count that QEMU reported, ONLINE that of the guest (with a guest agent). BUSY
    is the mean number of vCPUs that were busy, if the cluster has the metrics API of this project. SINCE is when READY
    has changed.
    """
    if watch and output in {"json", "yaml"}:
        raise click.UsageError("--watch prints a table: leave out --output, or set it to wide.")
    from vcpuset.cli.kubectl import status as view
    from vcpuset.cli.render import show

    wide = output == "wide"

    async def run() -> None:
        async with connected(Access(**access)) as (api, own):
            namespace = None if all_namespaces else own
            if watch:
                await (view.live if sys.stdout.isatty() else view.lines)(api, namespace, wide=wide)
            rows = await view.rows_of(api, namespace, _say)
        if not rows and output in {"table", "wide"}:
            _say(_none(namespace))
            return
        page = view.status_page(rows, datetime.now(UTC), everywhere=all_namespaces, wide=wide)
        show("table" if output == "wide" else output, view.status_document(rows), page)

    execute(run())


@main.command()
@_everywhere
@access_options
@_output("json", "yaml")
def top(all_namespaces: bool, output: DocumentOutput, **access: Any) -> None:
    """Show how busy the vCPUs of the machines are, the busiest machine first.

    This needs the metrics API of this project in the cluster (docs/metrics-api.md).
    """
    from vcpuset.cli.kubectl import status as view
    from vcpuset.cli.render import show

    async def run() -> None:
        async with connected(Access(**access)) as (api, own):
            namespace = None if all_namespaces else own
            rows = await view.rows_of(api, namespace, _say)
        if not rows:
            _say(_none(namespace))
        elif all(row.busy is None for row in rows):
            raise APIError(
                "it is not known of any VCPUSet how busy its vCPUs are: install the metrics API (docs/metrics-api.md), "
                "and use KVM with QEMU 7.1 or a guest agent (spec.guestAgent)"
            )
        show(output, view.top_document(rows), view.top_page(rows, everywhere=all_namespaces) if rows else [])

    execute(run())


@main.command()
@_name
@access_options
@_output("json", "yaml")
def explain(name: str, output: DocumentOutput, **access: Any) -> None:
    """Show what the operator does with a VCPUSet, what it waits for, and what helps."""
    from vcpuset.cli.kubectl import explain as explaining
    from vcpuset.cli.render import show

    async def run() -> None:
        async with connected(Access(**access)) as (api, namespace):
            vcpuset = await api.read(namespace, name)
            busy, events = None, None
            try:
                busy = (await api.busy(namespace, name)).get(name)
            except ObjectGone:
                pass  # no metrics API, or no value: the page leaves it out
            except APIError as error:
                _say(f"Busy vCPUs are unknown: {error}")
            try:
                events = await api.events(vcpuset)
            except APIError as error:
                _say(f"Events are unknown: {error}")
        found = explaining.Explanation(vcpuset, busy, events, datetime.now(UTC))
        show(output, explaining.document(found), explaining.page(found))

    execute(run())


@main.command("set")
@_name
@click.argument("count", type=click.IntRange(1, 4096))
@access_options
@click.option("--wait", is_flag=True, help="Wait until the VCPUSet is Ready, or cannot be.")
@ready_timeout_option
def set_count(name: str, count: int, wait: bool, timeout: float, **access: Any) -> None:
    """Declare the vCPU count of a VCPUSet, through its scale subresource, as kubectl scale does.

    With --wait, each new report of the operator is a line, and the exit status is 0 if the VCPUSet is Ready, 1 if it
    cannot be (Stalled or suspended, or another client has declared another count), 3 if it is not Ready in time, and
    130 after Ctrl-C. Without --wait, it is 0 if the API server has accepted the count. It is 2 if the command line is
    invalid.
    """

    async def run() -> None:
        async with connected(Access(**access)) as (api, namespace):
            await api.scale(namespace, name, count)
            progress = Progress(f"VCPUSet {namespace}/{name}")
            progress.tell("declared", "1 vCPU" if count == 1 else f"{count} vCPUs")
            if wait:
                await _wait(api, namespace, name, count, timeout, progress)

    execute(run())


async def _wait(api: UserAPI, namespace: str, name: str, count: int, seconds: float, progress: Progress) -> NoReturn:
    from vcpuset.cli.kubectl.follow import follow

    reason: str | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), aclosing(follow(api, namespace, name, _say)) as states:
            async for sets in states:
                if (vcpuset := sets.get((namespace, name))) is None:
                    raise VCPUSetError(f"VCPUSet {namespace}/{name} has been deleted")
                if vcpuset.spec.vcpus != count:
                    raise VCPUSetError(
                        f"VCPUSet {namespace}/{name}: another client (an autoscaler?) has declared "
                        f"{vcpuset.spec.vcpus} vCPUs meanwhile"
                    )
                state, reason = state_of(vcpuset)
                if (ready := vcpuset.status.ready) is None or reason == UNREPORTED:
                    continue
                progress.tell(reason, ready.message)
                if (ended := exit_status(state)) is not Exit.NOT_YET:
                    progress.end(ended, reason)
    progress.end(Exit.NOT_YET, reason, waited=seconds)


@main.command()
@_names
@access_options
def suspend(names: tuple[str, ...], **access: Any) -> None:
    """Stop changing machines (spec.suspend): their VCPUSets are observed and reported only."""
    _set_suspend(names, Access(**access), suspend=True)


@main.command()
@_names
@access_options
def resume(names: tuple[str, ...], **access: Any) -> None:
    """Change machines again whose VCPUSets were suspended."""
    _set_suspend(names, Access(**access), suspend=False)


def _set_suspend(names: tuple[str, ...], access: Access, *, suspend: bool) -> None:
    async def run() -> None:
        async with connected(access) as (api, namespace):
            for name in names:
                await api.suspend(namespace, name, suspend=suspend)
                click.echo(f"VCPUSet {namespace}/{name} {'suspended' if suspend else 'resumed'}")

    execute(run())


def _none(namespace: str | None) -> str:
    return "No VCPUSets found." if namespace is None else f"No VCPUSets found in namespace {namespace}."


def run() -> None:
    """The program `kubectl-vcpuset`."""
    main(prog_name="kubectl vcpuset")


def complete() -> None:
    """The program `kubectl_complete-vcpuset`: prints what can follow the words after `kubectl vcpuset`.

    In the format of Cobra, which kubectl's own completion uses for bash, zsh and fish: one value per line, with a tab
    before its description, and a directive at the end.
    """
    *words, incomplete = sys.argv[1:] or [""]
    items = ShellComplete(main, {}, "kubectl-vcpuset", "").get_completions(words, incomplete)
    values = [item for item in items if item.type == "plain"]
    for item in values:
        click.echo(f"{item.value}\t{item.help}" if item.help else item.value)
    click.echo(f":{_NO_FILES if len(values) == len(items) else 0}")


if __name__ == "__main__":
    run()
