"""One operator process with many simulated machines, measured from its start to what is left.

Each measurement has an API server and machines of its own. `bench.scale` says what its steps are.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from bench.apiload import Audit, Load

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.simulation import Simulation

__all__ = [
    "LIMIT_SECONDS",
    "SLOTS",
    "WAYS",
    "WITHOUT_COUNTERS",
    "Burst",
    "Idle",
    "Outcome",
    "cpu_seconds",
    "measure",
    "percentile",
    "raise_file_limit",
]

LOW, HIGH, SLOTS = 2, 6, 8
WAYS: Final = {"operator": "Persistent", "operator, OnDemand": "OnDemand", "textbook": None}
"""What serves the sets, and their `spec.monitor.connection`."""
WITHOUT_COUNTERS: Final = "operator, no counters"
"""The default connection, with machines that do not tell how busy they are."""
QUIET_SECONDS: Final = 3.0
"""So long after the last write a step is over."""
POLL_SECONDS: Final = 0.1
WINDOW_SECONDS: Final = 20
"""Idle CPU is also told for the busiest time of this length."""
LIMIT_SECONDS: Final = 600.0
"""For a step. It is a bound for a fault: the times come from the logs."""


class Textbook(OperatorProcess):
    """The textbook operator. It has no health and no metrics."""

    def __init__(self, control_plane: ControlPlane, namespace: str, root: Path, resync_seconds: float) -> None:
        environment = {
            **os.environ,
            "KUBECONFIG": str(control_plane.kubeconfig),
            "SOCKET_ROOT": str(root),
            "RESYNC_SECONDS": str(resync_seconds),
        }
        super().__init__(control_plane, environment=environment)
        self._argv = [sys.executable, "-m", "kopf", "run", "--standalone", "--quiet", f"--namespace={namespace}"]
        self._argv.append(str(REPOSITORY / "bench" / "textbook.py"))

    async def start(self, *, ready: bool = False) -> Self:
        """Start it."""
        return await super().start(ready=False)


@dataclass
class Burst:
    """Changes made at once.

    accepting_seconds  until the API server has answered all patches
    seconds            of each change that was carried out, from when all patches were sent, ascending
    since_accepted     the same, from when the API server has answered its patch
    status_writes      of each changed set
    events             writes of Kubernetes Events
    until_last_write   seconds
    cpu_ms             of the process until then, for a change; observations of all sets go on meanwhile
    """

    changes: int
    accepting_seconds: float
    seconds: list[float]
    since_accepted: list[float]
    status_writes: list[int]
    events: int
    until_last_write: float
    cpu_ms: float


@dataclass
class Idle:
    """A time without changes.

    cpu_percent      of one core; `busiest_percent` is that of the busiest 20 s
    observations     passes over sets; None: not known
    writes           of anything
    """

    seconds: float
    cpu_percent: float
    busiest_percent: float
    simulator_percent: float
    observations: int | None
    writes: int

    @property
    def observation_ms(self) -> float:
        """CPU time of an observation, and whatever else the process does meanwhile."""
        return self.cpu_percent * self.seconds * 10 / self.observations if self.observations else math.nan


@dataclass
class Outcome:
    """What one way did with so many sets in one turn.

    observed         sets whose status was written within the time
    startup_seconds  until then; `startup_cpu` is the CPU time of the process until then, and `startup_all` that of all
                     processes of the host: also the API server, etcd and the machines
    quiet_seconds    until the last write that start-up has caused
    megabytes        resident memory while idle; `peak` is the highest until the end
    restart_seconds  from the start of the next process until it is connected to every monitor; its CPU time and memory
                     then
    wrong            sets whose status, at the end, did not say what the machine had been told
    """

    way: str
    sets: int
    resync_seconds: int
    observed: int = 0
    startup_seconds: float = math.nan
    startup_cpu: float = math.nan
    startup_all: float = math.nan
    quiet_seconds: float = math.nan
    bursts: list[Burst] = field(default_factory=list)
    idle: Idle | None = None
    megabytes: float = math.nan
    peak: float = math.nan
    restart_seconds: float = math.nan
    restart_cpu: float = math.nan
    restart_megabytes: float = math.nan
    wrong: int = 0


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def all_cpu_seconds() -> float:
    """CPU time that all processes of the host have used since it was booted."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, line: str) -> float:
    """`VmRSS` or `VmHWM` of a process, in MB."""
    found = re.search(rf"^{line}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def raise_file_limit() -> None:
    """Let this process and its children open as many files as they may: the simulator has two for each machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Run:
    """One way with one number of sets, from the start to what is left."""

    def __init__(
        self, outcome: Outcome, serving: OperatorProcess, load: Load, audit: Audit, simulation: Simulation, limit: float
    ) -> None:
        self._outcome = outcome
        self._serving = serving
        self._load = load
        self._audit = audit
        self._simulation = simulation
        self._limit = limit
        self._polls = isinstance(serving, Textbook)
        """Whether statuses are written also when nothing changes, so that no silence tells the end of a step."""
        self._names = [f"vm-{number}" for number in range(outcome.sets)]
        self.declared = dict(zip(self._names, (LOW, HIGH) * outcome.sets, strict=False))

    async def startup(self, begun: float, used: float) -> None:
        """Wait until every set has a status, and until nothing has been written for a while after that.

        `begun` and `used`: when the process was started, and the CPU time of all processes until then.
        """
        written: dict[str, float] = {}
        last = begun

        def observed() -> bool:
            nonlocal last
            for record in self._audit.news():
                if record.own:
                    continue
                last = record.at
                if record.status:
                    written.setdefault(record.name, record.at)
            return len(written) == len(self._names)

        outcome = self._outcome
        done = await self._until(observed)
        outcome.observed = len(written)
        outcome.startup_cpu, outcome.startup_all = cpu_seconds(self._serving.pid), all_cpu_seconds() - used
        if done:
            outcome.startup_seconds = max(written.values(), default=begun) - begun
            self._say(f"start-up: all observed after {outcome.startup_seconds:.1f} s")
            if not self._polls and await self._until(lambda: observed() and time.time() > last + QUIET_SECONDS):
                outcome.quiet_seconds = last - begun
        outcome.megabytes = memory(self._serving.pid, "VmRSS")

    async def burst(self, changes: int, number: int) -> None:
        """Change sets that lie far apart, all at once, and wait until nothing has been written for a while."""
        step = len(self._names) // changes
        # Pairs of neighbours, so that as many go up as down.
        chosen = [
            self._names[(place * step + number + place % 2 * (1 - step % 2)) % len(self._names)]
            for place in range(changes)
        ]
        aims = {name: LOW + HIGH - self.declared[name] for name in chosen}
        self.declared.update(aims)
        self._audit.news()
        self._simulation.news()
        cpu = used = cpu_seconds(self._serving.pid)
        accepted: dict[str, float] = {}
        matched: dict[str, float] = {}
        status_writes: Counter[str] = Counter()
        events = 0
        begun = last = time.time()

        def over() -> bool:
            nonlocal last, events, used
            for record in self._audit.news():
                if record.own:
                    accepted[record.name] = record.at
                    continue
                last, used = record.at, cpu_seconds(self._serving.pid)
                events += record.event
                if record.status:
                    status_writes[record.name] += 1
            for news in self._simulation.news():
                if news.vcpus == aims.get(news.machine):
                    matched[news.machine] = news.at
                else:
                    matched.pop(news.machine, None)
            settled = status_writes.keys() >= aims.keys() if self._polls else time.time() > last + QUIET_SECONDS
            return settled and len(matched) == len(aims) == len(accepted)

        changing = asyncio.ensure_future(self._load.change(aims))
        try:
            await self._until(over)
        finally:
            await changing
        burst = Burst(
            changes=len(aims),
            accepting_seconds=max(accepted.values(), default=math.nan) - begun,
            seconds=sorted(at - begun for at in matched.values()),
            since_accepted=sorted(at - accepted[name] for name, at in matched.items() if name in accepted),
            status_writes=[status_writes[name] for name in aims],
            events=events,
            until_last_write=last - begun,
            cpu_ms=(used - cpu) / len(aims) * 1000,
        )
        self._outcome.bursts.append(burst)
        self._say(
            f"{changes} changes at once: accepted within {burst.accepting_seconds:.1f} s, "
            f"p50 {percentile(burst.seconds, 0.5):.2f} s, p99 {percentile(burst.seconds, 0.99):.2f} s"
        )

    async def idle(self, seconds: float) -> None:
        """Let nothing change."""
        self._audit.news()
        simulator, observations = cpu_seconds(self._simulation.pid), self._observations()
        used, begun = [cpu_seconds(self._serving.pid)], time.monotonic()
        while (passed := time.monotonic() - begun) < seconds:
            await asyncio.sleep(min(1.0, seconds - passed))
            used.append(cpu_seconds(self._serving.pid))
        after = self._observations()
        window = min(WINDOW_SECONDS, len(used) - 1)
        self._outcome.idle = Idle(
            seconds=passed,
            cpu_percent=(used[-1] - used[0]) / passed * 100,
            busiest_percent=max(last - first for first, last in zip(used, used[window:], strict=False)) / window * 100,
            simulator_percent=(cpu_seconds(self._simulation.pid) - simulator) / passed * 100,
            observations=None if observations is None or after is None else after - observations,
            writes=len(self._audit.news()),
        )
        self._say(f"idle: {self._outcome.idle.cpu_percent:.1f} % of a core")

    async def restart(self) -> None:
        """Start the operator again, and wait until it is connected to every monitor."""
        await self._serving.stop()
        begun = time.time()
        await self._serving.start(ready=False)
        if await self._until(lambda: self._simulation.connections() == len(self._names)):
            self._outcome.restart_seconds = time.time() - begun
        self._outcome.restart_cpu = cpu_seconds(self._serving.pid)
        self._outcome.restart_megabytes = memory(self._serving.pid, "VmRSS")
        self._say(f"restart: connected to all monitors after {self._outcome.restart_seconds:.1f} s")

    async def finish(self) -> None:
        """Count the sets that do not say of their machine what it has been told to be."""
        self._outcome.peak = memory(self._serving.pid, "VmHWM")
        self._outcome.wrong = sum(not self._right(found) for found in await self._load.sets())

    def _right(self, found: Mapping[str, Any]) -> bool:
        status = found.get("status", {})
        ready = {each["type"]: each["status"] for each in status.get("conditions", ())}.get("Ready")
        says_so = self._outcome.way == "textbook" or ready == "True"
        return says_so and status.get("vcpus") == self.declared[found["metadata"]["name"]]

    def _observations(self) -> int | None:
        if self._polls:
            return None
        counts = re.findall(r"^controller_runtime_reconcile_total\{.*\} (\S+)$", self._serving.metrics(), re.MULTILINE)
        return round(sum(map(float, counts)))

    def _say(self, what: str) -> None:
        say(f"{self._outcome.way}, {self._outcome.sets} sets: {what}")

    async def _until(self, holds: Callable[[], bool]) -> bool:
        """Whether it came to hold within the time."""
        deadline = time.monotonic() + self._limit
        while not holds():
            self._serving.require_running()
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True


async def measure(
    way: str,
    sets: int,
    *,
    resync_seconds: int,
    idle_seconds: float,
    bursts: Sequence[int],
    restart: bool = False,
    limit: float = LIMIT_SECONDS,
) -> Outcome:
    """One way with one number of sets.

    idle_seconds  0: this is not measured
    limit         how long a step may take
    """
    outcome = Outcome(way, sets, resync_seconds)
    root = Path(tempfile.mkdtemp(prefix="vcpuset-scale-"))
    try:
        async with AsyncExitStack() as stack:
            control_plane = await stack.enter_async_context(ControlPlane())
            await control_plane.install_crd()
            namespace = await control_plane.namespace("s")
            (root / namespace).mkdir()
            (root / "log").mkdir()
            simulation = await stack.enter_async_context(
                Simulation(
                    root / namespace,
                    sets,
                    cpus=(LOW, HIGH),
                    slots=SLOTS,
                    logs=root / "log",
                    kvm=way != WITHOUT_COUNTERS,
                )
            )
            load = Load(control_plane, namespace)
            flags = (f"--resync-seconds={resync_seconds}", f"--namespace={namespace}")
            serving: OperatorProcess = (
                Textbook(control_plane, namespace, root, resync_seconds)
                if way == "textbook"
                else OperatorProcess(control_plane, *flags, socket_root=root)
            )
            run = Run(outcome, serving, load, Audit(control_plane), simulation, limit)
            await load.create(run.declared, connection=WAYS.get(way, "Persistent"))
            begun, used = time.time(), all_cpu_seconds()
            await stack.enter_async_context(serving)
            await run.startup(begun, used)
            if outcome.observed < sets:
                return outcome
            if idle_seconds:
                await run.idle(idle_seconds)
                outcome.megabytes = memory(serving.pid, "VmRSS")
            for number, changes in enumerate(bursts):
                await run.burst(changes, number)
            await run.finish()
            if restart:
                await run.restart()
    finally:
        await asyncio.to_thread(shutil.rmtree, root)
    return outcome


def say(what: str) -> None:
    """Progress, and how busy the machine is."""
    print(f"{time.strftime('%H:%M:%S')} load {os.getloadavg()[0]:4.1f} {what}", flush=True)


def percentile(ascending: Sequence[float], part: float) -> float:
    """The smallest value that this part of all does not exceed; not a number if there are none."""
    return ascending[max(0, math.ceil(part * len(ascending)) - 1)] if ascending else math.nan
