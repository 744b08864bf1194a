"""The pages say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from vcpuset.domain.reasons import Reason, State

REPOSITORY = Path(__file__).resolve().parents[2]


def row(reason: Reason, state: State) -> str:
    """The line of docs/conditions.md for a reason in one of its states."""
    status = {each: "True" if each is state else "False" for each in State}
    cells = (f"`{reason}`", status[State.READY], status[State.RECONCILING], status[State.STALLED], reason.meaning)
    return f"| {' | '.join(cells)} |"


def test_the_conditions_page_has_one_row_for_each_state_of_each_reason_and_no_other() -> None:
    page = (REPOSITORY / "docs" / "conditions.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    expected = [row(reason, state) for reason in Reason for state in reason.states]
    assert rows == expected, "the table should be:\n" + "\n".join(expected)


def test_the_benchmark_table_in_the_readme_keeps_the_promised_overhead() -> None:
    """At most 60 ms over raw QMP for a plug of six, at most 1.25 times its time for their unplug."""
    readme = (REPOSITORY / "README.md").read_text()
    found = re.findall(r"^\| (\d → \d) \| operator \|.*\| ([\d.]+) x \(([+-]\d+) ms\) \|$", readme, re.MULTILINE)
    rows = {change: (float(ratio), int(milliseconds)) for change, ratio, milliseconds in found}
    assert rows["2 → 8"][1] <= 60
    assert rows["8 → 2"][0] <= 1.25
