"""The command line itself."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, Final

import click

from vcpuset.cli.outcome import Exit

__all__ = ["Program"]

_CANNOT_WRITE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class Program(click.Group):
    """A command line whose output cannot always be written, for example to a file on a full disk."""

    def invoke(self, ctx: click.Context) -> object:
        """As click's, but Ctrl-C ends the process with the status that a shell has for it, without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(Exit.INTERRUPTED) from None

    def main(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - overrides click.Group.main, which has these types
        """As click's (which exits silently if nothing reads the output), but without a traceback."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a terminal can lack a letter
        try:
            return super().main(*arguments, **options)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            # Python would try again at its exit, and print another error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            raise SystemExit(1) from error
