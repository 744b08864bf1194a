"""What set-up says, and the commands that it runs: each is shown, and so is all that it prints."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

__all__ = ["PROBE_SECONDS", "NotPossible", "SetupFailed", "probe", "run_visibly", "say"]

PROBE_SECONDS: Final = 60
"""Deadline of the quick questions that are put to other programs."""


class SetupFailed(Exception):
    """Set-up stopped; the message says at what and what to do. Exit status 1."""

    exit_status = 1


class NotPossible(SetupFailed):
    """Something is missing that set-up cannot get here; the message names it and the way to get it. Exit status 2."""

    exit_status = 2


def say(text: str = "") -> None:
    """Print a line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run_visibly(argv: Sequence[str | Path], *, seconds: float, shown: str = "") -> None:
    """Show a command (as `shown`, if given) and run it with its output going to the terminal.

    Raises:
        SetupFailed: it failed, or took longer than `seconds`.
    """
    words = [str(part) for part in argv]
    shown = shown or shlex.join(words)
    say(f"+ {shown}")
    try:
        status = subprocess.run(words, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired as error:
        raise SetupFailed(f"timed out after {seconds:.0f} s: {shown}") from error
    if status != 0:
        raise SetupFailed(f"exit status {status} (see above): {shown}")


def probe(argv: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str | None:
    """What a command prints, or None if it is missing, fails or hangs. For questions whose answer may be no."""
    try:
        done = subprocess.run(
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=cwd,
            env=env,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
