"""The simulator of `harness.simulator` as a child process, and its journal: which machine got which count when.

A process of its own, so that its work is not the work of whoever measures, and can be told from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.cache import REPOSITORY
from harness.processes import Child
from harness.wait import until

__all__ = ["Counted", "Simulation"]

START_SECONDS = 60.0


@dataclass(frozen=True)
class Counted:
    """A machine's count has changed."""

    machine: str
    vcpus: int
    at: float
    """Time of the clock, in seconds since 1970."""


class Simulation:
    """Machines vm-0, vm-1, … with their monitors at `<folder>/vm-0.sock`, ….

    folder    existing folder for the sockets
    machines  how many
    cpus      their boot CPUs, in turn
    slots     CPU slots of each
    logs      existing folder for the journal and the process's own words
    kvm       whether they have KVM's counters
    """

    def __init__(
        self, folder: Path, machines: int, *, cpus: Sequence[int], slots: int, logs: Path, kvm: bool = True
    ) -> None:
        self._journal = logs / "journal"
        self._log = logs / "log"
        self._argv = [
            sys.executable,
            "-m",
            "harness.simulator",
            str(folder),
            str(self._journal),
            f"--machines={machines}",
            f"--cpus={','.join(map(str, cpus))}",
            f"--slots={slots}",
            *([] if kvm else ["--tcg"]),
        ]
        self._child: Child | None = None
        self._read = 0
        self._own_files = 0

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._child is not None, "the simulator has not been started"
        return self._child.pid

    def news(self) -> list[Counted]:
        """The changes that the journal tells since the last call, oldest first."""
        with self._journal.open("rb") as stream:
            stream.seek(self._read)
            whole_lines, end, _ = stream.read().rpartition(b"\n")
        self._read += len(whole_lines + end)
        words = (line.split() for line in whole_lines.decode().splitlines())
        return [Counted(each[0], int(each[1]), float(each[2])) for each in words if len(each) == 3]

    def connections(self) -> int:
        """How many monitors have a client."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir())) - self._own_files

    async def __aenter__(self) -> Self:
        self._journal.touch()
        child = Child.start(
            self._argv, name="simulator", log=self._log, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
        )
        self._child = child

        def listening() -> bool:
            child.require_running()
            return self._journal.read_text().startswith("listening\n")

        try:
            await until(listening, START_SECONDS, lambda: f"the simulator; its log ends with:\n{child.log_tail()}\n")
        except BaseException:
            await child.stop()
            raise
        self._own_files += self.connections()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child is not None
        await self._child.stop(timeout=30)
