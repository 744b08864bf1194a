"""How a change ends for the user who waits for it: what is printed, and the exit status of the command."""

from __future__ import annotations

import enum
from typing import Final, NoReturn

import click

from vcpuset.cli.text import printable
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import UNREPORTED

__all__ = ["Exit", "Progress", "exit_status", "remedy"]

_UNREPORTED_REMEDY: Final = (
    "Wait. If this stays: check that an operator runs that manages this VCPUSet (spec.nodeName, namespace, labels), "
    "with `kubectl get pods -A -l app.kubernetes.io/part-of=vcpuset`."
)

_LATER_VERSION: Final = "This reason is of a later version of the operator: update this program."


class Exit(enum.IntEnum):
    """Exit statuses. 2 is click's, for a command line or a file that cannot be used."""

    READY = 0
    FAILED = 1
    UNUSABLE = 2
    NOT_YET = 3
    INTERRUPTED = 130
    """As a shell has it for a command that SIGINT has ended."""


def exit_status(state: State) -> Exit:
    """How a change in this state has ended, if it has."""
    match state:
        case State.READY:
            return Exit.READY
        case State.STALLED | State.HELD:
            return Exit.FAILED
        case State.RECONCILING | State.UNKNOWN:
            return Exit.NOT_YET


def remedy(reason: str) -> str:
    """What helps."""
    if reason == UNREPORTED:
        return _UNREPORTED_REMEDY
    return next((each.remedy for each in Reason if each == reason), _LATER_VERSION)


class Progress:
    """Prints each new report about one set.

    to_stderr  standard output is for a document
    """

    def __init__(self, name: str, *, to_stderr: bool = False) -> None:
        self._name = name
        self._to_stderr = to_stderr
        self._last = ("", "")

    def tell(self, reason: str, message: str) -> None:
        """A report; one that is the same as the last is not printed again."""
        if (reason, message) != self._last:
            self._last = (reason, message)
            click.echo(printable(f"{self._name}: {reason}: {message}"), err=self._to_stderr)

    def end(self, status: Exit, reason: str | None, *, waited: float | None = None, hint: str = "") -> NoReturn:
        """End the command with this status; if the set is not Ready, say why, and what helps.

        reason  the last one; None: there is no report yet
        waited  for how many seconds; None: the command was not to wait
        """
        words = {
            Exit.FAILED: "",
            Exit.NOT_YET: "not Ready yet: " if waited is None else f"not Ready within {waited:g} s: ",
            Exit.INTERRUPTED: "interrupted: ",
        }.get(status)
        if words is not None:
            text = f"{words}{reason or UNREPORTED}. {remedy(reason) if reason else ''} {hint}"
            click.echo(f"Error: {self._name}: {' '.join(text.split())}", err=True)
        raise SystemExit(status)
