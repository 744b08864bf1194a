"""What many sets cost one operator process: 100, 1,000 and 5,000 of them, against a real API server.

The machines are simulated (`harness.simulator`): in one process, on a unix socket each, saying what QEMU says. Two ways
to serve them, one after the other, each with an API server of its own:

    operator  `vcpuset run` with OnDemand monitors
    textbook  what a kopf tutorial makes of it: `bench/textbook.py`

    start-up  from the start of the process until the status of every set has been written; "quiet" is when the last
              write that this caused was made, which is an Event
    idle      nothing changes for as long as a resync takes. 5,000 sets are looked at every 300 s; fewer sets are looked
              at more often, so that the looks per second, and thus the load, are the same for any number of sets. What
              can grow is what a look costs
    memory    resident, then; and its peak, at the end
    changes   so many sets are changed at once: every second one up, 2 to 6 vCPUs, the others down, 6 to 2, which takes
              a guest 0.03 to 0.3 s a CPU. Each time counts from the moment in which the API server has answered the
              patch, by its audit log, to the one in which the machine has the count, by the simulator

The textbook operator gets a limited time for each step; what it has not done by then is printed. Idle, it is measured
only where a resync fits into that time. Its Kubernetes Events are not counted among its writes.

The whole takes some 20 minutes, of which 5,000 sets take the operator 11: Events are posted at an easy pace, and then
there is the resync. Processes of others cost start-up and changes their time several times over: both cores are busy.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from bench.apiload import Audit, Load

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.processes import Child
from harness.simulation import Simulation

LOW, HIGH, SLOTS = 2, 6, 8
LOOKS_PER_SECOND: Final = 5000 / 300
BURSTS: Final = (100, 100, 100, 1000)
"""How many sets are changed at once, one time after the other; left out where there are not so many sets."""
QUIET_SECONDS: Final = 3.0
"""So long after the last write a step is over."""
POLL_SECONDS: Final = 0.1
OPERATOR_SECONDS: Final = 600.0
"""For a step of the operator. It is a bound for a fault: the times come from the logs."""

MOST_CPU_PERCENT: Final = 7.0
MOST_STATUS_WRITES: Final = 2


def most_memory(sets: int) -> float:
    """MB."""
    return 63 + 0.025 * sets


class Serving(Protocol):
    """A process that serves sets, from entering to leaving its context."""

    @property
    def pid(self) -> int: ...
    def require_running(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Textbook:
    """The textbook operator as a child process."""

    def __init__(self, control_plane: ControlPlane, namespace: str, root: Path, resync_seconds: float) -> None:
        self._argv = [sys.executable, "-m", "kopf", "run", "--standalone", "--quiet", f"--namespace={namespace}"]
        self._argv.append(str(REPOSITORY / "bench" / "textbook.py"))
        self._log = control_plane.directory / "textbook.log"
        self._env = {
            **os.environ,
            "KUBECONFIG": str(control_plane.kubeconfig),
            "SOCKET_ROOT": str(root),
            "POLL_SECONDS": str(resync_seconds),
        }
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._child is not None
        return self._child.pid

    def require_running(self) -> None:
        """Raise `ChildDied`, with the end of the log, unless it runs."""
        assert self._child is not None
        self._child.require_running()

    async def __aenter__(self) -> Self:
        self._child = Child.start(self._argv, name="textbook operator", log=self._log, env=self._env)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            await self._child.stop(timeout=5)


@dataclass
class Burst:
    """Changes made at once.

    accepting_seconds  from the first patch that the API server took to the last
    seconds            of each change that was carried out, ascending
    status_writes      of each changed set
    cpu_ms             of the process, for a change
    """

    changes: int
    accepting_seconds: float
    seconds: list[float]
    status_writes: list[int]
    cpu_ms: float


@dataclass
class Idle:
    """A time without changes.

    cpu_percent  of one core
    looks        passes over sets; None: not known
    """

    seconds: float
    cpu_percent: float
    simulator_percent: float
    looks: int | None
    writes: int


@dataclass
class Outcome:
    """What one way did with so many sets.

    observed         sets whose status was written within the time
    startup_seconds  until then; `startup_cpu` is the CPU time of the process until then
    quiet_seconds    until the last write that start-up has caused
    megabytes        resident memory while idle; `peak` is the highest until the end
    wrong            sets whose status, at the end, did not say what the machine had been told
    """

    way: str
    sets: int
    resync_seconds: int
    observed: int = 0
    startup_seconds: float = math.nan
    startup_cpu: float = math.nan
    quiet_seconds: float = math.nan
    bursts: list[Burst] = field(default_factory=list)
    idle: Idle | None = None
    megabytes: float = math.nan
    peak: float = math.nan
    wrong: int = 0


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, line: str) -> float:
    """`VmRSS` or `VmHWM` of a process, in MB."""
    found = re.search(rf"^{line}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


class Run:
    """One way with one number of sets, from the start to what is left."""

    def __init__(
        self, way: str, names: Sequence[str], serving: Serving, load: Load, audit: Audit, simulation: Simulation
    ) -> None:
        self._way = way
        self._names = names
        self._serving = serving
        self._load = load
        self._audit = audit
        self._simulation = simulation
        self.declared = dict(zip(names, (LOW, HIGH) * len(names), strict=False))

    async def startup(self, outcome: Outcome, begun: float, limit: float) -> None:
        """Wait until every set has a status."""
        written: dict[str, float] = {}

        def observed() -> bool:
            for record in self._audit.news():
                if record.status and not record.own:
                    written.setdefault(record.name, record.at)
            return len(written) == len(self._names)

        done = await self._until(observed, limit)
        outcome.observed = len(written)
        if done:
            outcome.startup_seconds = max(written.values()) - begun
        outcome.startup_cpu = cpu_seconds(self._serving.pid)

    async def quiet(self, outcome: Outcome, begun: float, limit: float) -> None:
        """Wait until nothing has been written for a while."""
        last = time.time()

        def still() -> bool:
            nonlocal last
            last = max([last, *(record.at for record in self._audit.news() if not record.own)])
            return time.time() > last + QUIET_SECONDS

        if await self._until(still, limit):
            outcome.quiet_seconds = last - begun

    async def burst(self, changes: int, number: int, limit: float) -> Burst:
        """Change sets that lie far apart, all at once."""
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
        cpu = cpu_seconds(self._serving.pid)
        accepted: dict[str, float] = {}
        matched: dict[str, float] = {}
        status_writes: Counter[str] = Counter()
        last = time.time()

        def over() -> bool:
            nonlocal last
            for record in self._audit.news():
                if record.own:
                    accepted[record.name] = record.at
                elif record.status:
                    last = max(last, record.at)
                    status_writes[record.name] += 1
            for news in self._simulation.news():
                if news.vcpus == aims.get(news.machine):
                    matched[news.machine] = news.at
                else:
                    matched.pop(news.machine, None)
            return len(matched) == len(aims) == len(accepted) and time.time() > last + QUIET_SECONDS

        changing = asyncio.ensure_future(self._load.change(aims))
        try:
            await self._until(over, limit)
        finally:
            await changing
        cpu = cpu_seconds(self._serving.pid) - cpu
        return Burst(
            changes=len(aims),
            accepting_seconds=max(accepted.values(), default=math.nan) - min(accepted.values(), default=math.nan),
            seconds=sorted(at - accepted[name] for name, at in matched.items() if name in accepted),
            status_writes=[status_writes[name] for name in aims],
            cpu_ms=cpu / len(aims) * 1000,
        )

    async def idle(self, seconds: float) -> Idle:
        """Let nothing change."""
        self._audit.news()
        pids = (self._serving.pid, self._simulation.pid)
        looks, before, begun = self._passes(), [cpu_seconds(pid) for pid in pids], time.monotonic()
        await asyncio.sleep(seconds)
        passed = time.monotonic() - begun
        used = [(cpu_seconds(pid) - cpu) / passed * 100 for pid, cpu in zip(pids, before, strict=True)]
        after = self._passes()
        return Idle(
            seconds=passed,
            cpu_percent=used[0],
            simulator_percent=used[1],
            looks=None if looks is None or after is None else after - looks,
            writes=len(self._audit.news()),
        )

    async def wrong(self) -> int:
        """How many sets do not say of their machine what it has been told to be."""
        return sum(not self._right(found) for found in await self._load.sets())

    def _right(self, found: Mapping[str, Any]) -> bool:
        status = found.get("status", {})
        ready = {each["type"]: each["status"] for each in status.get("conditions", ())}.get("Ready")
        says_so = self._way == "textbook" or ready == "True"
        return says_so and status.get("vcpus") == self.declared[found["metadata"]["name"]]

    def _passes(self) -> int | None:
        if not isinstance(self._serving, OperatorProcess):
            return None
        counts = re.findall(r"^controller_runtime_reconcile_total\{.*\} (\S+)$", self._serving.metrics(), re.MULTILINE)
        return round(sum(map(float, counts)))

    async def _until(self, holds: Callable[[], bool], limit: float) -> bool:
        """Whether it came to hold within so many seconds."""
        deadline = time.monotonic() + limit
        while not holds():
            self._serving.require_running()
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True


async def measure(way: str, sets: int, textbook_seconds: float, idle_seconds: float | None) -> Outcome:
    """One way with one number of sets."""
    resync = max(1, round(sets / LOOKS_PER_SECOND))
    outcome = Outcome(way, sets, resync)
    limit = textbook_seconds if way == "textbook" else OPERATOR_SECONDS
    names = [f"vm-{number}" for number in range(sets)]
    root = Path(tempfile.mkdtemp(prefix="vcpuset-scale-"))
    try:
        async with AsyncExitStack() as stack:
            control_plane = await stack.enter_async_context(ControlPlane())
            await control_plane.install_crd()
            namespace = await control_plane.namespace("s")
            (root / namespace).mkdir()
            (root / "log").mkdir()
            simulation = await stack.enter_async_context(
                Simulation(root / namespace, sets, cpus=(LOW, HIGH), slots=SLOTS, logs=root / "log")
            )
            load = await stack.enter_async_context(Load(control_plane, namespace))
            audit = Audit(control_plane)
            serving: Serving = (
                Textbook(control_plane, namespace, root, resync)
                if way == "textbook"
                else OperatorProcess(
                    control_plane, f"--resync-seconds={resync}", f"--namespace={namespace}", socket_root=root
                )
            )
            run = Run(way, names, serving, load, audit, simulation)
            say(way, sets, "the sets are created")
            await load.create(run.declared)
            begun = time.time()
            await stack.enter_async_context(serving)
            await run.startup(outcome, begun, limit)
            say(way, sets, f"start-up: {outcome.observed} observed, {outcome.startup_seconds:.1f} s")
            if outcome.observed == sets:
                await run.quiet(outcome, begun, limit)
                if way == "operator" or resync <= limit:
                    outcome.idle = await run.idle(idle_seconds or resync)
                    say(way, sets, f"idle: {outcome.idle.cpu_percent:.1f} % of a core")
            outcome.megabytes = memory(serving.pid, "VmRSS")
            if outcome.observed == sets:
                for number, changes in enumerate(each for each in BURSTS if each <= sets):
                    burst = await run.burst(changes, number, limit)
                    outcome.bursts.append(burst)
                    say(way, sets, f"{changes} changes at once: {len(burst.seconds)} carried out")
                outcome.wrong = await run.wrong()
            outcome.peak = memory(serving.pid, "VmHWM")
    finally:
        await asyncio.to_thread(shutil.rmtree, root)
    return outcome


def say(way: str, sets: int, what: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {way}, {sets} sets: {what}", flush=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def standing(outcomes: Sequence[Outcome]) -> str:
    """What the sets cost while they stand."""
    rows = []
    for each in outcomes:
        if each.observed < each.sets:
            startup, cost = f"{each.observed} observed, then stopped", "-"
        else:
            startup = f"{each.startup_seconds:.1f} s"
            cost = f"{each.startup_cpu / each.sets * 1000:.1f} ms"
        idle = ["not measured", "-", "-", "-"]
        if each.idle is not None:
            looks = each.idle.looks
            cpu = each.idle.cpu_percent * each.idle.seconds * 10
            idle = [
                f"{each.idle.cpu_percent:.1f} % ({each.idle.seconds:.0f} s)",
                "-" if looks is None else f"{looks}",
                f"{cpu / looks:.1f} ms" if looks else "-",
                f"{each.idle.writes}",
            ]
        megabytes = f"{each.megabytes:.0f} MB ({each.peak:.0f})"
        quiet = "-" if math.isnan(each.quiet_seconds) else f"{each.quiet_seconds:.0f} s"
        rows.append([f"{each.sets}", each.way, startup, cost, quiet, f"{each.resync_seconds} s", *idle, megabytes])
    head = [
        "sets",
        "operator",
        "start-up",
        "CPU per set",
        "quiet",
        "resync",
        "idle CPU",
        "observations",
        "CPU each",
        "writes",
    ]
    head += ["RSS (peak)"]
    return markdown(head, rows)


def changing(outcomes: Sequence[Outcome]) -> str:
    """What changes take."""
    rows = []
    for outcome in outcomes:
        for changes in sorted({each.changes for each in outcome.bursts}):
            bursts = [each for each in outcome.bursts if each.changes == changes]
            seconds = sorted(second for each in bursts for second in each.seconds)
            made = changes * len(bursts)
            counts = [count for each in bursts for count in each.status_writes]
            rows.append(
                [
                    f"{outcome.sets}",
                    outcome.way,
                    f"{changes}" + (f" ({len(bursts)} times)" if len(bursts) > 1 else ""),
                    f"{max(each.accepting_seconds for each in bursts):.1f} s",
                    f"{len(seconds)} of {made}",
                    *(f"{percentile(seconds, part):.2f} s" for part in (0.5, 0.99, 1)),
                    f"{statistics.fmean(counts):.2f} ({max(counts)})",
                    f"{statistics.fmean(each.cpu_ms for each in bursts):.1f} ms",
                ]
            )
    head = ["sets", "operator", "changes at once", "patches took", "carried out", "p50", "p99", "last"]
    head += ["status writes per change (max)", "CPU per change"]
    return markdown(head, rows)


def percentile(ascending: Sequence[float], part: float) -> float:
    """The smallest value that this part of all does not exceed; not a number if there are none."""
    return ascending[max(0, math.ceil(part * len(ascending)) - 1)] if ascending else math.nan


def targets(outcomes: Sequence[Outcome]) -> str:
    """Which promises the operator has kept."""
    lines = []
    for each in outcomes:
        if each.way != "operator":
            continue
        most = max((count for burst in each.bursts for count in burst.status_writes), default=0)
        carried_out = sum(len(burst.seconds) for burst in each.bursts)
        asked = sum(burst.changes for burst in each.bursts)
        facts = [
            (each.observed == each.sets, f"{each.observed} of {each.sets} observed"),
            (carried_out == asked, f"{carried_out} of {asked} changes carried out"),
            (not each.wrong, f"{each.wrong} statuses wrong at the end"),
            (most <= MOST_STATUS_WRITES, f"at most {most} status writes per change, of {MOST_STATUS_WRITES}"),
            (each.megabytes <= most_memory(each.sets), f"{each.megabytes:.0f} of {most_memory(each.sets):.0f} MB"),
        ]
        if each.idle is not None:
            facts += [
                (each.idle.writes == 0, f"{each.idle.writes} writes while idle"),
                (
                    each.idle.cpu_percent <= MOST_CPU_PERCENT,
                    f"{each.idle.cpu_percent:.1f} of {MOST_CPU_PERCENT:g} % of a core while idle",
                ),
            ]
        lines += [f"- {'kept' if kept else 'MISSED'}, {each.sets} sets: {what}" for kept, what in facts]
    return "\n".join(lines)


def circumstances(outcomes: Sequence[Outcome]) -> str:
    """What the numbers depend on."""
    simulated = [each.idle.simulator_percent for each in outcomes if each.idle is not None and each.way == "operator"]
    share = f", simulator at most {max(simulated):.1f} % of a core while idle" if simulated else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("kopf", "kubernetes", "qemu.qmp"))
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {packages}, machines of {SLOTS} slots{share}"


async def measure_all(sizes: Sequence[int], textbook_seconds: float, idle_seconds: float | None) -> None:
    """The whole run."""
    ways = ("operator", "textbook") if textbook_seconds else ("operator",)
    outcomes = [await measure(way, sets, textbook_seconds, idle_seconds) for sets in sizes for way in ways]
    print(f"\n{circumstances(outcomes)}\n")
    for part in (standing(outcomes), changing(outcomes), targets(outcomes)):
        print(f"{part}\n")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="100,1000,5000", help="how many sets, one number after the other")
    parser.add_argument(
        "--textbook-seconds", type=float, default=60, help="for each step of the textbook operator; 0: without it"
    )
    parser.add_argument("--idle-seconds", type=float, help="in place of a whole resync: rough, and soon done")
    given = parser.parse_args()
    sizes = [int(each) for each in given.sets.split(",")]
    asyncio.run(measure_all(sizes, given.textbook_seconds, given.idle_seconds))


if __name__ == "__main__":
    main()
