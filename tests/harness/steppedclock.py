"""A clock of the day for child processes that a test sets while they run, by libfaketime.

Only what a set clock moves is moved: CLOCK_REALTIME and what is made of it. Monotonic clocks, CLOCK_BOOTTIME, waits and
the times of files stay as they are. Standard library only, as the set-up uses it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["SteppedClock", "shared_object"]

_FOLDERS: Final = ("/usr/lib/*/faketime", "/usr/lib64/faketime", "/usr/lib/faketime")
"""Where Debian, Fedora and others have it."""


def shared_object() -> Path | None:
    """libfaketime for programs with threads; None: it is not installed."""
    found = (path for folder in _FOLDERS for path in Path("/").glob(f"{folder[1:]}/libfaketimeMT.so.1"))
    return next(found, None)


class SteppedClock:
    """The clock of all processes that are started with its `environment`; it is right until `step` is called.

    directory  a folder of the test's
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        self.step(0)

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables for such a process: ours and more."""
        found = shared_object()
        if found is None:
            raise FileNotFoundError("libfaketime is not installed; `make setup` installs what the tests need")
        return {
            **os.environ,
            "LD_PRELOAD": str(found),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",  # read again each time that the clock is read
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def step(self, seconds: int) -> None:
        """Let the clock be wrong by so many seconds from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)  # never seen half written

    @staticmethod
    def remove_traces(pid: int) -> None:
        """Remove what libfaketime has left behind of a process that has ended."""
        for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
            (Path("/dev/shm") / name).unlink(missing_ok=True)
