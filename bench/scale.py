"""What many sets cost one operator process: 100, 1,000 and 5,000 of them, against a real API server.

The machines are simulated (`harness.simulator`): in one process, on a unix socket each, saying what QEMU says. These
ways to serve them take turns, twice, each time with an API server of its own:

    operator            `vcpuset run`, with the connection that is the default: Persistent
    operator, OnDemand  the same, with that connection
    textbook            what a kopf tutorial makes of it: `bench/textbook.py`

    start-up  from the start of the process until the status of every set has been written; "quiet" is when the last
              write that this caused was made. Its CPU time for each set, and that of all processes of the host
    idle      in the first turn: nothing changes for as long as a resync takes. 5,000 sets are observed every 300 s;
              fewer sets are observed more often, so that the observations per second, and thus the load, are the same
              for any number of sets. What can grow is what an observation costs
    memory    resident, then; and its peak, at the end
    changes   so many sets are changed at once: every second one up, 2 to 6 vCPUs, the others down, 6 to 2, which takes
              a guest 0.03 to 0.3 s a CPU. All patches are sent at one moment; each time counts from that one to the
              moment in which the machine has the count, by the simulator. "From acceptance" it counts from when the
              API server has answered the patch, by its audit log: this favours a way that keeps the API server busy, so
              that it accepts the patches slowly
    no counters
              the operator again, while idle, with machines that do not tell how busy their vCPUs are: the difference is
              the cost of a sample
    restart   in the first turn, with Persistent: the operator is stopped and started again, until it is connected to
              every monitor

The textbook operator gets a limited time for each step; what it has not done by then is printed. Idle, it is measured
only where a resync fits into that time. Its Kubernetes Events are not counted among its writes.

API server, machines and operator share the cores, so processes of others cost start-up and changes their time several
times over. Each step prints the machine's load average; CPU times are those of the operator process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from bench.measure import (
    LIMIT_SECONDS,
    SLOTS,
    WAYS,
    WITHOUT_COUNTERS,
    Burst,
    Outcome,
    measure,
    percentile,
    raise_file_limit,
)

__all__ = ["markdown"]

TURNS: Final = 2
OBSERVATIONS_PER_SECOND: Final = 5000 / 300
SAMPLED_SECONDS: Final = 60
"""The longest resync with which the cost of a sample is measured: with and without counters, one after the other."""
BURSTS: Final = (100, 100, 100, 1000)
"""How many sets are changed at once, one time after the other; left out where there are not so many sets."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


@dataclass
class Row:
    """The turns of one way with one number of sets."""

    turns: list[Outcome]

    @property
    def first(self) -> Outcome:
        """The turn in which more was measured."""
        return self.turns[0]

    def bursts(self, changes: int) -> list[Burst]:
        """All bursts of so many changes."""
        return [each for turn in self.turns for each in turn.bursts if each.changes == changes]

    def seconds(self, changes: int) -> list[float]:
        """How long each change of them took, ascending."""
        return sorted(second for each in self.bursts(changes) for second in each.seconds)

    def since_accepted(self, changes: int) -> list[float]:
        """The same, from acceptance."""
        return sorted(second for each in self.bursts(changes) for second in each.since_accepted)

    def cpu_ms(self, changes: int) -> float:
        """CPU time for a change."""
        return statistics.fmean(each.cpu_ms for each in self.bursts(changes))

    def measured(self, changes: int) -> bool:
        """Whether so many changes were made at once: not if start-up did not end in its time."""
        return bool(self.bursts(changes))

    @property
    def sizes(self) -> list[int]:
        """The numbers of changes made at once."""
        return sorted({each.changes for turn in self.turns for each in turn.bursts})


def told(value: float, form: str) -> str:
    """A value, or that it was not measured."""
    return "-" if math.isnan(value) else form.format(value)


def standing(rows: Iterable[Row]) -> str:
    """What the sets cost while they stand."""
    table = []
    for row in rows:
        first, idle = row.first, row.first.idle
        startups = ", ".join(f"{each.startup_seconds:.1f} s" for each in row.turns)
        table.append(
            [
                f"{first.sets}",
                first.way,
                startups if first.observed == first.sets else f"{first.observed} observed, then stopped",
                f"{first.startup_cpu / first.sets * 1000:.1f} ms of {first.startup_all / first.sets * 1000:.1f} ms",
                told(first.quiet_seconds, "{:.0f} s"),
                f"{first.resync_seconds} s",
                f"{idle.cpu_percent:.1f} % ({idle.busiest_percent:.1f})" if idle else "-",
                f"{idle.observations or '-'}" if idle else "-",
                told(idle.observation_ms, "{:.1f} ms") if idle else "-",
                f"{idle.writes}" if idle else "-",
                f"{first.megabytes:.0f} MB ({first.peak:.0f})",
                told(first.restart_seconds, f"{{:.1f}} s ({first.restart_cpu:.1f}), {first.restart_megabytes:.0f} MB"),
            ]
        )
    head = ["sets", "operator", "start-up", "CPU per set, of all processes'", "quiet", "resync"]
    head += ["idle CPU (busiest 20 s)", "observations", "CPU each", "writes", "RSS (peak)"]
    head += ["restart: all connected (CPU), RSS"]
    return markdown(head, table)


def changing(rows: Iterable[Row]) -> str:
    """What changes take."""
    table = []
    for row in rows:
        for changes in row.sizes:
            bursts, seconds, accepted = row.bursts(changes), row.seconds(changes), row.since_accepted(changes)
            made = changes * len(bursts)
            counts = [count for each in bursts for count in each.status_writes]
            medians = ", ".join(f"{percentile(each.seconds, 0.5):.2f}" for each in bursts)
            table.append(
                [
                    f"{row.first.sets}",
                    row.first.way,
                    f"{changes} ({len(bursts)} times)",
                    f"{max(each.accepting_seconds for each in bursts):.1f} s",
                    f"{len(seconds)} of {made}",
                    f"{percentile(seconds, 0.5):.2f} s ({medians})",
                    *(f"{percentile(seconds, part):.2f} s" for part in (0.99, 1)),
                    f"{percentile(accepted, 0.5):.2f} s, {percentile(accepted, 0.99):.2f} s",
                    f"{statistics.fmean(counts):.2f} ({max(counts)})",
                    f"{sum(each.events for each in bursts) / made:.2f}",
                    f"{row.cpu_ms(changes):.1f} ms",
                ]
            )
    head = ["sets", "operator", "changes at once", "accepted within", "carried out", "p50 (each time)", "p99", "last"]
    head += ["from acceptance: p50, p99", "status writes per change (max)", "Events per change", "CPU per change"]
    return markdown(head, table)


def targets(rows: Sequence[Row]) -> str:
    """Which promises the operator has kept."""
    textbook = {row.first.sets: row for row in rows if row.first.way == "textbook"}
    uncounted = {row.first.sets: row.first.idle for row in rows if row.first.way == WITHOUT_COUNTERS}
    lines = []
    for row in rows:
        first = row.first
        if first.way == "textbook":
            continue
        if first.way == WITHOUT_COUNTERS:
            continue
        persistent = WAYS[first.way] == "Persistent"
        bursts = [each for turn in row.turns for each in turn.bursts]
        most = max((count for each in bursts for count in each.status_writes), default=0)
        carried_out, asked = sum(len(each.seconds) for each in bursts), sum(each.changes for each in bursts)
        wrong = sum(each.wrong for each in row.turns)
        startup = max(each.startup_seconds for each in row.turns)
        megabytes = 58 + (0.045 if persistent else 0.020) * first.sets
        facts = [
            (startup <= 15, f"all observed after {startup:.1f} of 15 s"),
            (carried_out == asked, f"{carried_out} of {asked} changes carried out"),
            (not wrong, f"{wrong} statuses wrong at the end"),
            (most <= 2, f"at most {most} status writes per change, of 2"),
            (first.megabytes <= megabytes, f"{first.megabytes:.0f} of {megabytes:.0f} MB"),
        ]
        if first.idle is not None:
            ms, unevenness = 1.5 if persistent else 2.5, first.idle.busiest_percent / first.idle.cpu_percent
            facts += [
                (first.idle.writes == 0, f"{first.idle.writes} writes while idle"),
                (first.idle.observation_ms <= ms, f"{first.idle.observation_ms:.1f} of {ms} ms per observation"),
                (unevenness <= 1.3, f"busiest 20 s {unevenness:.1f} of 1.3 times the mean"),
            ]
            if persistent and (without := uncounted.get(first.sets)) is not None:
                sample = first.idle.observation_ms - without.observation_ms
                facts.append((sample <= 0.3, f"{sample:.2f} of 0.3 ms for a sample of how busy the vCPUs are"))
        if first.sets in textbook:
            other = textbook[first.sets]
            for changes in filter(other.measured, row.sizes):
                for when, times in (("", Row.seconds), (" from acceptance", Row.since_accepted)):
                    for part in (0.5, 0.99):
                        mine, its = (percentile(times(each, changes), part) for each in (row, other))
                        what = f"{changes} changes{when}: p{part * 100:.0f} {mine:.2f} s, textbook {its:.2f} s"
                        facts.append((mine <= its, what))
                mine, its = row.cpu_ms(changes), other.cpu_ms(changes)
                facts.append((mine < its, f"{changes} changes: CPU {mine:.1f} ms each, textbook {its:.1f} ms"))
        lines += [f"- {'kept' if kept else 'MISSED'}, {first.way}, {first.sets} sets: {what}" for kept, what in facts]
    return "\n".join(lines)


def circumstances(outcomes: Iterable[Outcome]) -> str:
    """What the numbers depend on."""
    simulated = max((each.idle.simulator_percent for each in outcomes if each.idle is not None), default=0)
    packages = ", ".join(f"{name} {version(name)}" for name in ("kopf", "kubernetes", "qemu.qmp"))
    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {packages}, machines of {SLOTS} slots, "
        f"simulator at most {simulated:.1f} % of a core while idle"
    )


async def measure_all(sizes: Sequence[int], turns: int, textbook_seconds: float, idle_seconds: float | None) -> None:
    """The whole run."""
    rows: dict[tuple[int, str], Row] = {}
    for sets in sizes:
        resync_seconds = max(1, round(sets / OBSERVATIONS_PER_SECOND))
        for turn in range(turns):
            for way, connection in WAYS.items():
                limit = textbook_seconds if way == "textbook" else LIMIT_SECONDS
                idles = turn == 0 and resync_seconds <= limit
                outcome = await measure(
                    way,
                    sets,
                    resync_seconds=resync_seconds,
                    idle_seconds=(idle_seconds or resync_seconds) if idles else 0,
                    bursts=[each for each in BURSTS if each <= sets],
                    restart=turn == 0 and connection == "Persistent",
                    limit=limit,
                )
                rows.setdefault((sets, way), Row([])).turns.append(outcome)
        if sets >= OBSERVATIONS_PER_SECOND and resync_seconds <= SAMPLED_SECONDS:
            outcome = await measure(
                WITHOUT_COUNTERS,
                sets,
                resync_seconds=resync_seconds,
                idle_seconds=idle_seconds or resync_seconds,
                bursts=[],
            )
            rows[sets, WITHOUT_COUNTERS] = Row([outcome])
    print(f"\n{circumstances(turn for row in rows.values() for turn in row.turns)}\n")
    for part in (standing(rows.values()), changing(rows.values()), targets(list(rows.values()))):
        print(f"{part}\n")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="100,1000,5000", help="how many sets, one number after the other")
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each way is measured with each number")
    parser.add_argument("--textbook-seconds", type=float, default=120, help="for each step of the textbook operator")
    parser.add_argument("--idle-seconds", type=float, help="in place of a whole resync: rough, and soon done")
    given = parser.parse_args()
    raise_file_limit()
    sizes = [int(each) for each in given.sets.split(",")]
    asyncio.run(measure_all(sizes, given.turns, given.textbook_seconds, given.idle_seconds))


if __name__ == "__main__":
    main()
