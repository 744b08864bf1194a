"""The pages say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from harness import docpage
from harness.cache import REPOSITORY
from harness.pages import PAGES, OutOfPlace, main, renewed
from vcpuset.domain.guest import AgentReason
from vcpuset.domain.machine import Answer
from vcpuset.domain.reasons import Reason
from vcpuset.domain.report import UNREPORTED

NOT_RUN: Final = {
    "docs/replicas.md": "`ss --kill` needs a host of QEMU whose kernel allows it",
    "docs/scale.md": "a label; tests/e2e/test_moves.py moves VCPUSets in this way",
    "RELEASING.md": "needs GitHub and a registry",
    "deploy/helm/vcpuset/README.md": "the command is that of docs/install.md, with other values",
}
"""Pages whose commands no test takes from the page, and why."""

CONDITIONS = REPOSITORY / "docs" / "conditions.md"


def table(part: str) -> list[list[str]]:
    """The cells of a generated table of the conditions page, without its head."""
    text = CONDITIONS.read_text().partition(f"<!-- generated: {part} -->")[2].partition("<!-- end of generated")[0]
    rows = [line for line in text.splitlines() if line.startswith(("| `", "| [`"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_conditions_page_has_one_row_of_four_cells_for_each_reason_and_no_other() -> None:
    cells = table("reasons")
    assert [row[0] for row in cells] == [f"[`{reason}`](reasons.md#{reason.lower()})" for reason in Reason]
    for row, reason in zip(cells, Reason, strict=True):
        assert row[2:] == [reason.meaning, reason.remedy]
    conditions = {row[0].partition("`]")[0].strip("[`"): row[1] for row in cells}
    assert conditions["Converged"] == "Ready"
    assert conditions["UnplugRefused"] == "Reconciling, then Stalled"
    assert conditions["Suspended"] == "none"


def test_the_reasons_page_has_a_section_for_each_reason_which_says_more_than_the_table() -> None:
    text = (REPOSITORY / "docs" / "reasons.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == [*map(str, Reason), UNREPORTED]
    assert f"\n{UNREPORTED}\n" in sections[UNREPORTED]
    assert "operator" in sections.pop(UNREPORTED)
    for name, section in sections.items():
        generated, _, by_hand = section.partition(f"<!-- end of generated: {name} -->")
        assert f"<!-- generated: {name} -->" in generated
        assert "**What to do:** " in generated
        assert re.search(rf"^```text\nDesired +.*\nCurrent .*\n{name}(, | \()", generated, re.MULTILINE | re.DOTALL), (
            name
        )
        assert len(by_hand.split()) > 10, name


def test_each_reason_but_the_good_one_says_what_helps() -> None:
    assert Reason.CONVERGED.remedy == "\N{EN DASH}"
    for reason in set(Reason) - {Reason.CONVERGED}:
        assert re.fullmatch(r"[A-Z][^|\n]+\.", reason.remedy), reason


def test_the_conditions_page_names_each_reason_of_the_guest_agent_and_each_answer_of_a_guest() -> None:
    assert table("agent") == [[f"`{each}`", each.status, each.meaning] for each in AgentReason]
    answers = {row[0].strip("`"): row[1:] for row in table("answers")}
    assert answers.keys() == {answer.value for answer in Answer}
    assert answers["Busy"] == ["device busy (_OST 0x82)", "yes"]
    assert answers["InProgress"] == ["in progress (_OST 0x84)", "no"]


def test_the_commands_of_each_page_are_run_by_a_test_or_there_is_a_reason_why_not() -> None:
    tests = "".join(
        path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py") if path.name != Path(__file__).name
    )
    pages = [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").glob("*.md"),
        REPOSITORY / "deploy/helm/vcpuset/README.md",
    ]
    with_commands = {
        str(page.relative_to(REPOSITORY))
        for page in pages
        if any(block.language in ("sh", "console") for block in docpage.Page(page).blocks())
    }
    followed = {name for name in with_commands if f'"{Path(name).name}"' in tests and name not in NOT_RUN}
    assert with_commands - followed == NOT_RUN.keys()


def test_the_generated_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert CONDITIONS in PAGES
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_not_up_to_date_is_told_and_put_right_with_its_prose_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    good = CONDITIONS.read_text()
    page.write_text(good.replace("| [`Contested`]", "| [`Grain`]").replace("# Conditions\n", "# By hand\n"))
    assert main(["--check"], [page]) == 1
    assert "run `make docs`" in capsys.readouterr().err
    assert "`Grain`" in page.read_text(), "a check writes nothing"
    assert main([], [page]) == 0
    assert page.read_text() == good.replace("# Conditions\n", "# By hand\n")
    assert main(["--check"], [page]) == 0


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("# Conditions\n", id="no-marks"),
        pytest.param("<!-- generated: reasons -->\n", id="no-end"),
        pytest.param("<!-- generated: poems -->\n<!-- end of generated: poems -->\n", id="unknown-part"),
    ],
)
def test_a_page_whose_marks_were_damaged_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(OutOfPlace):
        renewed(text)
    page = tmp_path / "page.md"
    page.write_text(text)
    assert main([], [page]) == 2
    assert "page.md" in capsys.readouterr().err
    assert page.read_text() == text


def test_the_benchmark_table_keeps_the_promised_overhead() -> None:
    """At most 60 ms over raw QMP for a plug of six, at most 1.25 times its time for their unplug."""
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    found = re.findall(r"^\| (\d → \d) \| operator \|.*\| ([\d.]+) x \(([+-]\d+) ms\) \|$", page, re.MULTILINE)
    rows = {change: (float(ratio), int(milliseconds)) for change, ratio, milliseconds in found}
    assert rows["2 → 8"][1] <= 60
    assert rows["8 → 2"][0] <= 1.25
