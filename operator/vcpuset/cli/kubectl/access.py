"""Which API server and namespace a command of `kubectl vcpuset` is for, and how its failures are shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from vcpuset.cli.values import NAMESPACE
from vcpuset.domain.assessment import sentence
from vcpuset.domain.errors import NoAnswer, Unavailable, VCPUSetError

if TYPE_CHECKING:
    from vcpuset.kube.user import UserAPI

__all__ = ["Access", "access_options", "complete_name", "connected", "execute"]

COMPLETION_SECONDS: Final = 3.0
"""Deadline of the completion of a name: a user waits at each key press."""

_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=Callable[..., Any])

_CHECK: Final = "check the server of the kubeconfig's context, with `kubectl cluster-info`"


@dataclass(frozen=True)
class Access:
    """As the options say; None: as the kubeconfig says."""

    kubeconfig: Path | None
    context: str | None
    namespace: str | None


def access_options(command: _Command) -> _Command:
    """Add the options of kubectl that select API server and namespace, for the fields of `Access`."""
    kubeconfig = click.option(
        "--kubeconfig",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Path of a kubeconfig. Default: the files in KUBECONFIG, or ~/.kube/config.",
    )
    context = click.option("--context", metavar="NAME", help="Context of the kubeconfig. Default: the current one.")
    namespace = click.option("--namespace", "-n", type=NAMESPACE, help="Namespace. Default: that of the context.")
    return kubeconfig(context(namespace(command)))


@contextlib.asynccontextmanager
async def connected(access: Access) -> AsyncIterator[tuple[UserAPI, str]]:
    """The API server, and the namespace. Raises APIError."""
    from vcpuset.kube.login import namespace_of_context
    from vcpuset.kube.user import UserAPI

    named = access.namespace or namespace_of_context(access.kubeconfig, access.context)
    async with await UserAPI.connect(access.kubeconfig, access.context) as api:
        yield api, named or "default"


def execute(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a command to its end; its errors end the program, with one line that has cause and remedy."""
    try:
        return asyncio.run(work)
    except VCPUSetError as error:
        remedy = f"; {_CHECK}" if isinstance(error, Unavailable | NoAnswer) else ""
        raise click.ClickException(sentence(f"{error}{remedy}")) from error


def complete_name(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The names of the namespace's VCPUSets, each with its count and reason."""
    given = {**(context.parent.params if context.parent is not None else {}), **_set(context.params)}
    access = Access(given.get("kubeconfig"), given.get("context"), given.get("namespace"))

    async def names() -> list[CompletionItem[str]]:
        async with asyncio.timeout(COMPLETION_SECONDS), connected(access) as (api, namespace):
            sets = await api.sets(namespace)
        return [
            CompletionItem(each.name, help="" if (ready := each.status.ready) is None else ready.reason)
            for each in sets
            if each.name.startswith(incomplete)
        ]

    try:
        return asyncio.run(names())
    except (VCPUSetError, TimeoutError):
        # There is nowhere to report it: what is printed here would be taken for names. The command itself reports it.
        return []


def _set(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
