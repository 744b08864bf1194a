"""Options that several commands have: addresses, logs, and the kubeconfig."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from vcpuset.cli.logs import configure

__all__ = [
    "Address",
    "EmptyCounts",
    "Timeout",
    "configure_logs",
    "kubeconfig_option",
    "log_options",
    "not_empty",
    "own_namespace",
    "ready_timeout_option",
]

_ADDRESS: Final = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})")

_OWN_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""The file with the namespace of a pod."""

_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=Callable[..., Any])


class Address(click.ParamType[tuple[str, int] | None]):
    """HOST:PORT; empty: off."""

    name = "HOST:PORT"

    def convert(
        self, value: str | tuple[str, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int] | None:
        """Split HOST:PORT; an IPv6 host is in brackets."""
        if isinstance(value, tuple):
            return value
        if not value:
            return None
        found = _ADDRESS.fullmatch(value)
        if found is None or int(found["port"]) > 65535:
            self.fail(f"{value!r} is not HOST:PORT (or empty, for off)", param, ctx)
        return found["ipv6"] or found["host"], int(found["port"])


class EmptyCounts(click.Option):
    """An option whose environment variable may be set and empty; click treats that as unset."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The variable's value, also an empty one."""
        return os.environ.get(self.envvar) if isinstance(self.envvar, str) else super().resolve_envvar_value(ctx)


class Timeout(click.FloatRange):
    """A time in seconds."""

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The same; NaN is in no range, but click takes it."""
        found: float = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return found


ready_timeout_option: Final = click.option(
    "--timeout",
    type=Timeout(0.1, 86400),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="How long the machine may take to be Ready.",
)
"""Of the commands that wait for that."""


def not_empty(ctx: click.Context, param: click.Parameter, value: _T) -> _T:
    """Reject an empty value: it would mean the current folder, or every namespace."""
    if any(str(each) in {"", "."} for each in (value if isinstance(value, tuple) else (value,)) if each is not None):
        raise click.BadParameter("must not be empty or the current directory", ctx, param)
    return value


def own_namespace(command: str, what: str, option: str) -> str:
    """The namespace of this process' pod.

    Raises:
        click.UsageError: it is in no pod; `command` needs the namespace of `what`, which `option` sets.
    """
    try:
        return _OWN_NAMESPACE.read_text().strip()
    except OSError as error:
        raise click.UsageError(
            f"{command} outside of a pod (there is no {_OWN_NAMESPACE}): set the namespace of {what} with {option}"
        ) from error


def log_options(command: _Command) -> _Command:
    """Add the options of the log lines, for `configure_logs`."""
    log_format = click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        envvar="VCPUSET_LOG_FORMAT",
        show_envvar=True,
        help="Format of the log lines on standard error.",
    )
    log_level = click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        envvar="VCPUSET_LOG_LEVEL",
        show_envvar=True,
        help="Minimum level of the log lines.",
    )
    return log_format(log_level(command))


def configure_logs(log_format: str, level: str) -> None:
    """Write the log lines of this process to standard error."""
    configure("json" if log_format == "json" else "text", level, sys.stderr)


kubeconfig_option = click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="VCPUSET_KUBECONFIG",
    show_envvar=True,
    help="Path of a kubeconfig. Default: KUBECONFIG or ~/.kube/config if it exists, otherwise the pod's service "
    "account.",
)
