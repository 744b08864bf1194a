"""What `kubectl vcpuset` prints: tables, documents, and the page about one VCPUSet."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from harness.cache import REPOSITORY
from unit.domain.builders import NOW, a_set, a_spec
from vcpuset.cli.kubectl import explain, status
from vcpuset.cli.kubectl.main import main
from vcpuset.cli.outcome import remedy
from vcpuset.cli.render import Block, Listing, renderable, show
from vcpuset.cli.text import age
from vcpuset.domain.machine import Answer
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import UNREPORTED
from vcpuset.domain.resource import UID, Condition, Request, Status, VCPUSet
from vcpuset.kube.user import Busy, Event

__all__: list[str] = []

LONG = "database-of-the-accounting-department-in-frankfurt-am-main-1234"
"""As long as a name may be: 63 characters."""

MESSAGE = "8 vCPUs present, 4 declared; the guest refused to unplug slot 7 (device busy (_OST 0x82)). " * 3


def a_reported(
    name: str, state: State, reason: str, *, message: str = "…", generation: int = 1, **changes: Any
) -> VCPUSet:
    """A set of generation 1 with a report about a generation, 5 minutes old."""
    words = {State.READY: "True", State.UNKNOWN: "Unknown"}
    made = [("Ready", words.get(state, "False"))]
    made += [(each.value, str(state is each)) for each in (State.RECONCILING, State.STALLED)]
    since = NOW - timedelta(minutes=5)
    conditions = tuple(Condition(kind, value, reason, message, since, generation) for kind, value in made)
    found = Status(generation, vcpus=8, min_vcpus=1, max_vcpus=64, conditions=conditions)
    return replace(a_set(a_spec(4), status=replace(found, **changes)), name=name, uid=UID(name))


def rows(*sets: VCPUSet) -> list[status.Row]:
    return [status.Row(each, Busy(2.25, 12) if each.name == "web" else None) for each in sets]


SETS = rows(
    a_reported("web", State.READY, Reason.CONVERGED, online_vcpus=8),
    a_reported(LONG, State.STALLED, Reason.UNPLUG_REFUSED, message=MESSAGE),
    a_reported("suspended", State.HELD, Reason.SUSPENDED),
    a_reported("without-agent", State.UNKNOWN, Reason.AGENT_UNAVAILABLE),
    a_reported("changed", State.READY, Reason.CONVERGED, generation=0),
    replace(a_set(a_spec(None)), name="vm"),
)


def screen(blocks: list[Block], width: int, *, colours: bool = False) -> list[str]:
    """The lines of a terminal."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False, no_color=not colours)
    for block in blocks:
        console.print(renderable(block))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    return (text if colours else re.sub(r"\x1b\[[0-9;]*m", "", text)).splitlines()


def table(*, everywhere: bool = False, wide: bool = False) -> list[Block]:
    return status.status_page(SETS, NOW, everywhere=everywhere, wide=wide)


def test_a_table_has_a_line_for_each_set_and_no_escape_sequences_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show("table", {}, table())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "DESIRED", "CURRENT", "ONLINE", "BUSY", "READY", "REASON", "SINCE"],
        ["web", "4", "8", "8", "2.2", "True", "Converged", "5m"],
        [LONG, "4", "8", "-", "-", "False", "UnplugRefused", "5m"],
        ["suspended", "4", "8", "-", "-", "False", "Suspended", "5m"],
        ["without-agent", "4", "8", "-", "-", "Unknown", "AgentUnavailable", "5m"],
        ["changed", "4", "8", "-", "-", "Unknown", UNREPORTED, "-"],
        ["vm", "-", "-", "-", "-", "Unknown", UNREPORTED, "-"],
    ]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_word_is_broken_on_a_terminal_whatever_its_width(width: int, wide: bool, everywhere: bool) -> None:
    lines = screen(table(everywhere=everywhere, wide=wide), width)
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.replace("/", " ").split()}
    namespaces = {row.vcpuset.namespace for row in SETS} if everywhere else set()
    assert words >= {LONG, "UnplugRefused", "AgentUnavailable", "CURRENT", "Unknown", *namespaces}
    assert not wide or words >= set(MESSAGE.split())


def test_a_table_that_is_wide_enough_has_names_and_counts_in_one_line() -> None:
    assert any(line.startswith(f"{LONG}  4 ") for line in screen(table(), 200))
    assert f"{LONG}" in screen(table(), 80)


def test_columns_in_which_no_row_has_anything_are_the_first_to_go_on_a_narrow_terminal() -> None:
    vcpuset = replace(SETS[0].vcpuset, name="web-frontend", status=replace(SETS[0].vcpuset.status, online_vcpus=None))
    blocks = status.status_page([status.Row(vcpuset, None)], NOW, everywhere=True, wide=False)
    header = ["NAMESPACE", "NAME", "DESIRED", "CURRENT", "ONLINE", "BUSY", "READY", "REASON", "SINCE"]
    assert screen(blocks, 90)[0].split() == header
    header.remove("ONLINE")
    header.remove("BUSY")
    lines = screen(blocks, 75)
    assert [line.split() for line in lines] == [
        header,
        ["default", "web-frontend", "4", "8", "True", "Converged", "5m"],
    ]
    assert screen(blocks, 60)[0] == "NAMESPACE/NAME"
    assert screen([Listing(header, [], 2)], 20)[0] == "NAMESPACE/NAME", "a table without rows has all columns"


def test_colours_only_repeat_what_is_there_in_words() -> None:
    (line,) = [line for line in screen(table(), 200, colours=True) if "UnplugRefused" in line]
    assert "\x1b[31mUnplugRefused" in line
    assert "\x1b[31mFalse" in line


def test_documents_have_every_field_whatever_is_known() -> None:
    web, refused, *_, new = status.status_document(SETS)["items"]
    assert web.keys() == new.keys()
    assert (web["busyVCPUs"], web["ready"], web["state"], web["since"]) == (
        2.25,
        "True",
        "Ready",
        "2026-01-02T11:55:00Z",
    )
    assert (refused["reason"], refused["message"]) == ("UnplugRefused", MESSAGE)
    assert (new["reason"], new["ready"], new["since"], new["desiredVCPUs"]) == (UNREPORTED, "Unknown", None, None)


def test_the_busiest_machine_comes_first_and_what_is_not_known_last() -> None:
    sets = [
        status.Row(replace(SETS[0].vcpuset, name=name), busy)
        for name, busy in (("idle", Busy(0.1, 10)), ("unknown", None), ("full", Busy(7.9, 10)))
    ]
    (block,) = status.top_page(sets, everywhere=False)
    assert [line.split() for line in screen([block], 80)[1:]] == [
        ["full", "7.9", "8", "4", "99%", "10s"],
        ["idle", "0.1", "8", "4", "1%", "10s"],
        ["unknown", "-", "8", "4", "-", "-"],
    ]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (80, 8)])
def test_a_live_table_fits_the_terminal_and_shows_first_what_is_not_ready(width: int, height: int) -> None:
    many = [status.Row(replace(SETS[0].vcpuset, name=f"web-{number:04}"), None) for number in range(1000)]
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    frame = status.frame([*many, SETS[1]], "", console, everywhere=True, wide=False)
    lines = ["".join(part.text for part in line) for line in console.render_lines(frame)]
    assert len(lines) < height
    assert lines[0].startswith("1001 VCPUSets, 1000 Ready, ")
    assert any("UnplugRefused" in line for line in lines)


def explained(**changes: Any) -> explain.Explanation:
    requests = (
        Request(7, "/machine/peripheral/vcpu7", 44, NOW - timedelta(seconds=70), 3, Answer.BUSY),
        Request(6, "/machine/peripheral/vcpu6", 43, NOW - timedelta(seconds=5)),
    )
    vcpuset = a_reported("web", State.STALLED, Reason.UNPLUG_REFUSED, message=MESSAGE, pending_unplugs=requests)
    event = Event(NOW - timedelta(hours=2), 4, "Warning", "UnplugRefused", "the guest refused")
    return replace(explain.Explanation(vcpuset, Busy(2.25, 12), [event], NOW), **changes)


def test_the_page_about_a_set_says_what_what_for_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    show("table", {}, explain.page(explained()))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for line in (
        "Desired:     4",
        "Current:     8 (1 to 64 possible; 56 free, 1 asked to leave)",
        "Busy:        2.2 vCPUs, mean of 12 s",
        "UnplugRefused (Stalled=True, for 5m)",
        MESSAGE.strip(),
        f"Remedy: {Reason.UNPLUG_REFUSED.remedy}",
        "See docs/reasons.md#unplugrefused in the project's documentation.",
        "7     1m10s ago  3      device busy (_OST 0x82)",
        "6     5s ago     1      none yet",
        "2h ago     Warning  UnplugRefused  4      the guest refused",
    ):
        assert line in lines


def test_slots_in_a_row_with_the_same_answer_are_one_line_about_their_requests() -> None:
    busy = [Request(slot, "", slot, NOW, 2, Answer.BUSY) for slot in (9, 8, 3, 2, 1)]
    vcpuset = a_reported("web", State.STALLED, Reason.UNPLUG_REFUSED, pending_unplugs=(Request(7, "", 7, NOW), *busy))
    lines = screen(explain.page(explained(vcpuset=vcpuset)), 80)
    table = lines[lines.index("SLOT  REQUESTED  TIMES  ANSWER                 ") + 1 :]
    assert [line.split()[0] for line in table[:3]] == ["1-3", "7", "8-9"]


def test_events_are_aligned_whatever_the_width_and_their_messages_are_whole() -> None:
    events = [
        Event(NOW - timedelta(minutes=minutes), 1, "Warning", reason, MESSAGE)
        for minutes, reason in ((4, "UnplugRefused"), (90, "Contested"))
    ]
    for width in (80, 200):
        lines = [line.rstrip() for line in screen(explain.page(explained(events=events)), width)]
        first = next(place for place, line in enumerate(lines) if line.startswith("LAST SEEN  TYPE     REASON"))
        rows = [line for line in lines[first:] if " ago" in line]
        assert [(line.split()[0], line.index("Warning")) for line in rows] == [("4m", 11), ("1h30m", 11)]
        assert " ".join(" ".join(lines[first:]).split()).count("the guest refused to unplug slot 7") == 6


def test_of_a_set_without_a_report_the_page_says_what_may_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    changed = a_reported("web", State.READY, Reason.CONVERGED, message="QEMU has 8.", generation=0)
    show("table", {}, explain.page(explained(vcpuset=changed, busy=None, events=[])))
    text = capsys.readouterr().out
    assert "The last report was about generation 0 of 1: Converged: QEMU has 8." in text
    assert "check that an operator runs that manages this VCPUSet" in text
    assert "No Events." in text


def test_the_document_about_a_set_has_its_requests_and_events() -> None:
    found = explain.document(explained())
    assert found["documentation"] == "docs/reasons.md#unplugrefused"
    assert [each["answer"] for each in found["unplugRequests"]] == ["Busy", None]
    assert found["events"][0]["count"] == 4
    assert explain.document(explained(events=None))["events"] is None


def test_each_reason_has_a_remedy_and_a_section_that_the_documentation_has() -> None:
    text = (REPOSITORY / "docs" / "reasons.md").read_text()
    sections = {heading.lower() for heading in re.findall(r"^## (\w+)$", text, re.MULTILINE)}
    for reason in (*Reason, UNREPORTED):
        page, _, section = explain.documentation(reason).partition("#")
        assert (REPOSITORY / page).is_file()
        assert section in sections, reason
        assert remedy(reason)
    assert explain.documentation("OfALaterVersion") == "docs/reasons.md"
    assert remedy("OfALaterVersion")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0s"), (-5, "0s"), (59, "59s"), (60, "1m"), (310, "5m10s"), (3599, "59m"), (3660, "1h1m"), (90000, "1d1h")],
)
def test_ages_are_short(seconds: int, words: str) -> None:
    assert age(NOW - timedelta(seconds=seconds), NOW) == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "-w", "-o", "json"], "--watch prints a table"),
        (["set", "web"], "Missing argument 'COUNT'"),
        (["set", "web", "0"], "0 is not in the range 1<=x<=4096"),
        (["set", "", "1"], "the name is empty"),
        (["explain", "Web"], "cannot be the name of a VCPUSet"),
        (["-n", "Team", "status"], "cannot be the name of a namespace"),
        (["status", "--kubeconfig", "/nowhere"], "'/nowhere' does not exist"),
        (["suspend"], "Missing argument 'NAME...'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be_used_ends_with_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_without_a_kubeconfig_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "Error: KUBECONFIG names no existing file (/nowhere/config): pass --kubeconfig FILE"
    )


def test_a_server_that_does_not_answer_is_told_with_what_to_check(tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c"}}
    file.write_text(yaml.safe_dump({"current-context": "c", "clusters": [cluster], "contexts": [context]}))
    for command in (["status"], ["explain", "web"], ["set", "web", "3"]):
        result = CliRunner().invoke(main, [*command, "--kubeconfig", str(file)])
        assert result.exit_code == 1
        assert "kubectl cluster-info" in result.stderr, result.output


def test_the_page_says_who_manages_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    show("table", {}, explain.page(explained(vcpuset=replace(a_set(a_spec(4)), node_name="node-1"), events=None)))
    assert "Managed by:  the agent on node-1" in capsys.readouterr().out
