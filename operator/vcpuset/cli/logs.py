"""The operator's log lines: as text, or as one JSON object per line.

In JSON everything is an object: warnings of Python, uncaught exceptions, lines of the libraries, and lines that cannot
be formatted. Each has `timestamp` (UTC), `level`, `logger` and `message`, with an exception `exception`, and in a pass
the fields of `log_context` (`vcpuset`, `namespace`, `node`, `pass`).
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Literal, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from vcpuset.runtime.logcontext import FIELDS_ATTRIBUTE, LogContextFilter, LogfmtFormatter

__all__ = ["configure", "make_handler"]

_KOPF_EXTRAS: Final = ("k8s_ref", "k8s_skip", "settings")
"""Attributes that kopf adds to its records for its own handlers; the settings are a page of text."""

_logger = logging.getLogger("vcpuset")


def configure(log_format: Literal["text", "json"], level: str, stream: TextIO) -> None:
    """Write all log lines of this process from `level` on to `stream`, including what Python would print by itself."""
    logging.basicConfig(level=level.upper(), handlers=[make_handler(log_format, stream)])
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_of_thread
    sys.unraisablehook = _log_unraisable


def make_handler(log_format: Literal["text", "json"], stream: TextIO) -> logging.Handler:
    """The handler that writes lines in this format."""
    handler = _Handler(stream)
    handler.addFilter(LogContextFilter())
    handler.addFilter(_name_object)
    if log_format == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                timestamp=True,
                rename_fields={
                    "levelname": "level",
                    "name": "logger",
                    "exc_info": "exception",
                    "stack_info": "stack",
                },
                reserved_attrs=[*RESERVED_ATTRS, FIELDS_ATTRIBUTE, *_KOPF_EXTRAS],
            )
        )
    else:
        handler.setFormatter(LogfmtFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    return handler


class _Handler(logging.StreamHandler[TextIO]):
    """A handler that also writes what cannot be formatted; logging itself would print a traceback instead."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is that of logging.Handler, whose method this overrides
        """Write the record again, with its parts unformatted."""
        error = sys.exc_info()[1]
        if isinstance(error, (OSError, ValueError)) and self.stream.closed:
            return
        plain = copy.copy(record)
        plain.msg = f"{record.msg!r} cannot be formatted with {record.args!r}: {error!r}"
        plain.args = None
        try:
            self.stream.write(self.format(plain) + self.terminator)
            self.flush()
        except Exception:  # noqa: BLE001 - there is nowhere to report it, and code that logs must not fail because of it
            return


def _name_object(record: logging.LogRecord) -> bool:
    """Add the object of kopf's lines in the fields of our own lines."""
    reference = getattr(record, "k8s_ref", None)
    if isinstance(reference, Mapping):
        fields = {"vcpuset": reference.get("name"), "namespace": reference.get("namespace")}
        record.__dict__.update(fields)
        record.__dict__[FIELDS_ATTRIBUTE].update(fields)
    return True


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    _logger.critical("the program exits: %s", error or kind.__name__, exc_info=(kind, error, trace))


def _log_uncaught_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit:
        return
    name = arguments.thread.name if arguments.thread is not None else "?"
    error = arguments.exc_value or arguments.exc_type()
    _logger.error("thread %s has failed", name, exc_info=(arguments.exc_type, error, arguments.exc_traceback))


def _log_unraisable(arguments: sys.UnraisableHookArgs) -> None:
    error = arguments.exc_value or arguments.exc_type()
    _logger.error(
        "%s %r",
        arguments.err_msg or "exception ignored in",
        arguments.object,
        exc_info=(arguments.exc_type, error, arguments.exc_traceback),
    )
