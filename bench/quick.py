"""What an operator costs, in less than three minutes: to see whether a change of the code made it dearer.

`bench.scale` says what is measured. CPU times are those of the operator process; they grow with the load of the
machine, which is printed. The resync is so short that 50 machines are observed per second; what this costs while sets
are changed is not counted as a cost of the changes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from bench.measure import Outcome, measure, raise_file_limit
from bench.scale import markdown

import vcpuset

OBSERVATIONS_PER_SECOND: Final = 50
STEPS: Final = (("operator", 0), ("operator", 100), ("operator", 1000), ("operator, OnDemand", 1000))
CHANGES: Final = 100
IDLE_SECONDS: Final = 10.0
LIMIT_SECONDS: Final = 120.0
"""For a step, such as the wait for the last Event."""


def row(outcome: Outcome) -> list[str]:
    """What one step has cost."""
    first = [f"{outcome.sets}", outcome.way, f"{outcome.megabytes:.0f} MB"]
    if outcome.idle is None:
        return [*first, *["-"] * 4]
    (burst,) = outcome.bursts
    observing_ms = outcome.idle.cpu_percent * 10 * burst.until_last_write / burst.changes
    return [
        *first,
        f"{outcome.idle.observation_ms:.2f} ms",
        f"{burst.cpu_ms - observing_ms:.1f} ms",
        f"{sum(burst.status_writes) / burst.changes:.2f}",
        f"{burst.events / burst.changes:.2f}",
    ]


async def main() -> None:
    """Measure, and print a table."""
    rows = []
    for way, sets in STEPS:
        outcome = await measure(
            way,
            sets,
            resync_seconds=max(1, sets // OBSERVATIONS_PER_SECOND),
            idle_seconds=IDLE_SECONDS if sets else 0,
            bursts=[CHANGES] if sets else [],
            limit=LIMIT_SECONDS,
        )
        rows.append(row(outcome))
    head = ["sets", "operator", "RSS", "CPU per observation", "CPU per change", "status writes per change"]
    print(f"\n{markdown([*head, 'Events per change'], rows)}\n")
    files = Path(vcpuset.__file__).parent.rglob("*.py")
    print(f"{sum(len(each.read_text().splitlines()) for each in files)} lines in the package")


if __name__ == "__main__":
    raise_file_limit()
    asyncio.run(main())
