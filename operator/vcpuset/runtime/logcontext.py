"""Fields for every log line of a piece of work, without passing them from call to call.

    with log_context(order="A-17", attempt=2):
        ...                                     # whatever is logged here, and in what is awaited here, has both fields

The fields follow the work through `await` and into the tasks that it starts; other tasks do not see them
(`contextvars`). They end with the block, also for timers and tasks that outlive it: these have inherited its context,
but no longer belong to a piece of work.

    LogContextFilter   adds the fields to each record, as attributes; formatters for JSON use these as they are
    LogfmtFormatter    text, with the fields after the message: `done order=A-17 attempt=2`
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

__all__ = ["Field", "LogContextFilter", "LogfmtFormatter", "current_fields", "log_context"]

Field = str | int | float | bool | None
"""The value of a field. None: it has no value here; JSON shows null, text shows nothing."""

FIELDS_ATTRIBUTE: Final = "context_fields"
"""The record's attribute with all fields in one mapping, for formatters that treat them separately."""

_RESERVED: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", FIELDS_ATTRIBUTE}

_BARE: Final = re.compile(r"[^\s\"=\x00-\x1f\x7f]+")
"""Values that logfmt does not quote."""


@dataclass(slots=True)
class _Scope:
    """One `with` block; `active` is shared by all contexts that were copied inside it."""

    outer: _Scope | None
    fields: Mapping[str, Field]
    active: bool = True


_scope: ContextVar[_Scope | None] = ContextVar("log_context", default=None)


@contextlib.contextmanager
def log_context(**fields: Field) -> Iterator[None]:
    """Add `fields` to log lines until the end of the block, with those of the enclosing blocks.

    Raises:
        ValueError: a field has the name of an attribute of log records.
    """
    if not _RESERVED.isdisjoint(fields):
        taken = ", ".join(sorted(_RESERVED & fields.keys()))
        raise ValueError(f"log_context: {taken}: log records have an attribute of that name already")
    scope = _Scope(_scope.get(), fields)
    token = _scope.set(scope)
    try:
        yield
    finally:
        scope.active = False
        _scope.reset(token)


def current_fields() -> dict[str, Field]:
    """The fields of the open blocks, the outermost first; of two with one name the inner one counts."""
    scopes: list[_Scope] = []
    scope = _scope.get()
    while scope is not None:
        if scope.active:
            scopes.append(scope)
        scope = scope.outer
    return {name: value for scope in reversed(scopes) for name, value in scope.fields.items()}


class LogContextFilter(logging.Filter):
    """Adds the current fields to each record; passes every record.

    It belongs on a handler: only there it sees the records of all loggers. Fields of the record's own call (`extra`)
    are kept.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields."""
        fields = current_fields()
        for name, value in fields.items():
            record.__dict__.setdefault(name, value)
        setattr(record, FIELDS_ATTRIBUTE, {name: record.__dict__[name] for name in fields})
        return True


class LogfmtFormatter(logging.Formatter):
    """Text with the fields after the message, before the traceback; empty ones are left out."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without a traceback."""
        fields: Mapping[str, Field] = getattr(record, FIELDS_ATTRIBUTE, {})
        shown = [f"{name}={_logfmt(value)}" for name, value in fields.items() if value is not None and value != ""]
        return " ".join([super().formatMessage(record), *shown])


def _logfmt(value: Field) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)
