"""Options with values for which Kubernetes has a rule: impossible ones are rejected at the start.

An operator for a namespace or a node that cannot exist would manage nothing and report nothing.
"""

from __future__ import annotations

import re
from typing import Final

import click

__all__ = ["LEASE", "NAMESPACE", "NODE", "SERVICE", "VCPUSET", "Name", "repeat"]

_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


class Name(click.ParamType[str]):
    """A name of an object in Kubernetes. An empty one is accepted: the option defines its meaning.

    what     what has the name
    pattern  its regular expression
    words    the same for people
    """

    name = "NAME"

    def __init__(self, what: str, pattern: str, words: str) -> None:
        self._what = what
        self._pattern = re.compile(pattern)
        self._words = words

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The same, if it is a valid name."""
        if value and (fault := self.fault(value)) is not None:
            self.fail(f"{fault}{repeat(value, param)}", param, ctx)
        return value

    def fault(self, value: str) -> str | None:
        """Why this cannot be the name, with the remedy; None: it can."""
        if len(value) <= 253 and self._pattern.fullmatch(value) is not None:
            return None
        return f"{value!r} cannot be the name of {self._what}: {self._words}"


NAMESPACE: Final = Name("a namespace", _LABEL, "use up to 63 lower-case letters, digits and '-'")
_SUBDOMAIN: Final = rf"{_LABEL}(\.{_LABEL})*"
_SUBDOMAIN_WORDS: Final = "use up to 253 lower-case letters, digits, '-' and '.'"
NODE: Final = Name("a node", _SUBDOMAIN, _SUBDOMAIN_WORDS)
SERVICE: Final = Name("a Service", _LABEL, "use up to 63 lower-case letters, digits and '-'")
VCPUSET: Final = Name(
    "a VCPUSet", r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", "use up to 63 lower-case letters, digits, '-' and '.'"
)
LEASE: Final = Name("a Lease", _SUBDOMAIN, _SUBDOMAIN_WORDS)


def repeat(value: str, param: click.Parameter | None) -> str:
    """The remedy for a list with commas in an option that may be repeated."""
    if param is None or not param.multiple or "," not in value:
        return ""
    return f". Repeat {param.opts[0]} for each (in the environment: separate them by spaces)"
