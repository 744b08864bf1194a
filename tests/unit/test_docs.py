"""The pages say what the code says."""

from __future__ import annotations

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


def test_the_benchmark_table_in_the_readme_is_filled_in() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert "| 2 → 8 | operator |" in readme
    assert "| 8 → 2 | operator |" in readme
