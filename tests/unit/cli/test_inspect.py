"""What `vcpuset inspect` makes of a machine: tables that fold, words for codes, addresses told apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from unit.domain.builders import NOW, a_machine, a_request, a_set, ago
from vcpuset.cli.inspect import Inspection, document, ost_words, page
from vcpuset.cli.main import main
from vcpuset.cli.observation import Observation, monitor_address
from vcpuset.cli.render import Facts, Grid, Lines, Styled
from vcpuset.cli.text import printable
from vcpuset.domain.errors import AgentTimeout
from vcpuset.domain.guest import GuestCPU, GuestCPUs, GuestReport
from vcpuset.domain.machine import Answer, Machine, Ost
from vcpuset.domain.resource import Status, VCPUSet
from vcpuset.qmp import replies
from vcpuset.qmp.tcp import TCPEndpoint

__all__: list[str] = []

FOUR = a_machine(plugged=[2, 3])


def found(
    machine: Machine, guest: GuestReport | None = None, vcpuset: VCPUSet | None = None, not_queried: str | None = None
) -> Inspection:
    return Inspection("/run/qmp.sock", Observation(machine, "10.0.2"), guest, not_queried, vcpuset, NOW)


def guest(*online: bool) -> GuestReport:
    return GuestReport(GuestCPUs(tuple(GuestCPU(number, each, True) for number, each in enumerate(online))))


def rows(inspection: Inspection) -> list[dict[str, str]]:
    """The lines of the table."""
    (grid,) = [block for block in page(inspection) if isinstance(block, Grid)]
    texts = [[cell.text if isinstance(cell, Styled) else cell for cell in row] for row in grid.rows]
    return [dict(zip(grid.header, row, strict=True)) for row in texts]


def facts(inspection: Inspection) -> Mapping[str, str]:
    (block,) = [block for block in page(inspection) if isinstance(block, Facts)]
    return {name: value.text if isinstance(value, Styled) else value for name, value in block.rows}


def notes(inspection: Inspection) -> str:
    return " ".join(str(line) for block in page(inspection) if isinstance(block, Lines) for line in block.lines)


def test_each_occupied_slot_has_a_line_and_a_run_of_free_ones_has_one() -> None:
    lines = rows(found(FOUR))

    assert [line["SLOT"] for line in lines] == ["0", "1", "2", "3", "4-7"]
    assert [line["STATE"] for line in lines] == ["boot", "boot", "plugged", "plugged", "free"]
    assert lines[2]["OCCUPIED BY"] == "/machine/peripheral/vcpu2"
    assert lines[4]["PROPS"] == "core 4-7"


def test_few_free_slots_and_those_that_have_a_story_are_not_folded() -> None:
    assert [line["SLOT"] for line in rows(found(a_machine(plugged=[5])))] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    quiet = dict.fromkeys(range(8), Ost(0, 0))
    lines = rows(found(replace(a_machine(), ost=quiet | {5: Ost(3, 0)})))
    assert [line["SLOT"] for line in lines] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert lines[5]["LAST _OST"] == "unplugged (_OST 0x0)"


def test_a_document_has_every_slot_of_the_largest_machine() -> None:
    machine = a_machine(boot=range(10), slots=4096)
    slots = document(found(machine))["slots"]

    assert [slot["slot"] for slot in slots] == list(range(4096))
    assert len(rows(found(machine))) == 11


def test_types_and_sizes_have_columns_only_if_they_differ() -> None:
    assert "TYPE" not in rows(found(FOUR))[0]
    assert FOUR.slots is not None
    mixed = replace(FOUR, slots=(*FOUR.slots[:7], replace(FOUR.slots[7], driver="other-cpu", vcpus=2)))

    assert [(line["TYPE"], line["VCPUS"]) for line in rows(found(mixed))][-1] == ("other-cpu", "2")
    assert facts(found(mixed))["Slots"] == "8: cpu with 1 vCPU each, other-cpu with 2 vCPUs each"


@pytest.mark.parametrize(
    ("source", "status", "words"),
    [
        (0, 0, None),
        (0x3, 0x0, "unplugged (_OST 0x0)"),
        (0x3, 0x1, "non-specific failure (_OST 0x1)"),
        (0x3, 0x80, "not supported by the guest (_OST 0x80)"),
        (0x103, 0x81, "device in use (_OST 0x81)"),
        (0x3, 0x84, "in progress (_OST 0x84)"),
        (0x3, 0x99, "refused, with a code that ACPI does not define (_OST 0x99)"),
        (0x3, 0x8, "refused, with a code that ACPI does not define (_OST 0x8)"),
        (0x1, 0x0, "plug accepted (_OST 0x0)"),
        (0x1, 0x81, "plug rejected (_OST 0x81)"),
        (0x200, 0x80, "plug rejected (_OST 0x80)"),
        (0x77, 0x5, "about event 0x77 (_OST 0x5)"),
    ],
)
def test_an_ost_report_is_told_in_words_with_its_code(source: int, status: int, words: str | None) -> None:
    assert ost_words(Ost(source, status)) == words


def test_a_slot_is_online_only_if_the_guest_uses_every_cpu() -> None:
    assert [line["ONLINE"] for line in rows(found(FOUR, guest(*[True] * 4)))] == ["yes"] * 4 + ["-"]
    some = found(FOUR, guest(True, True, True, False))
    assert [line["ONLINE"] for line in rows(some)] == ["unknown"] * 4 + ["-"]
    assert "ONLINE unknown" in notes(some)
    assert facts(some)["Guest"] == "3 of 4 online; offline (guest CPU numbers): 3"
    assert [slot["online"] for slot in document(some)["slots"]] == [None] * 8
    assert document(some)["guest"]["offlineCPUs"] == [3]
    assert "ONLINE" not in rows(found(FOUR))[0]


def test_an_agent_of_another_machine_and_one_that_is_silent_are_told() -> None:
    assert "the agent of another machine" in facts(found(FOUR, guest(*[True] * 5)))["Guest"]
    silent = found(FOUR, GuestReport(None, AgentTimeout("agent.sock has not answered")))
    assert facts(silent)["Guest"] == "no answer: agent.sock has not answered"
    assert document(silent)["guest"]["reason"] == "NoAnswer"
    assert document(found(FOUR, not_queried="it is paused"))["guest"]["reason"] == "NotQueried"


def test_requests_of_a_set_are_joined_to_the_slots_that_they_are_about() -> None:
    status = Status(
        pending_unplugs=(
            a_request(2, at=ago(60), attempts=2, answer=Answer.BUSY),
            a_request(3, at=ago(5)),
            a_request(5, at=ago(5)),
        )
    )
    joined = found(FOUR, vcpuset=a_set(status=status))

    assert [line["PENDING"] for line in rows(joined)[2:4]] == [
        "requested at 2026-01-02T11:59:00Z, 2 times: device busy (_OST 0x82)",
        "requested at 2026-01-02T11:59:55Z, no answer",
    ]
    assert "slot 5." in notes(joined)
    shown = document(joined)
    assert [slot["slot"] for slot in shown["slots"] if slot["pendingUnplug"]] == [2, 3]
    assert [request["slot"] for request in shown["vcpuset"]["voidUnplugs"]] == [5]


def test_an_unplug_in_progress_is_pending_without_a_set() -> None:
    quiet = dict.fromkeys(range(8), Ost(0, 0))
    machine = replace(FOUR, ost=quiet | {3: Ost(3, 0x84), 6: Ost(3, 0x84)})

    assert [line["PENDING"] for line in rows(found(machine))[:4]] == ["-", "-", "-", "in progress"]
    assert [slot["unplugInProgress"] for slot in document(found(machine))["slots"]].count(True) == 1


@pytest.mark.parametrize(
    ("machine", "name", "words"),
    [
        (a_machine(slots=None, vcpus=4), "Hotplug", "not supported by this machine type"),
        (a_machine(ost={}), "Unplug", "does not accept requests"),
        (a_machine(ost=None, arch="ppc64"), "Unplug", "unknown until a request is sent"),
        (a_machine(ost=None, arch="s390x"), "Unplug", "no vCPU can be unplugged"),
        (a_machine(migrating=True), "Run state", "migrating (CPUs cannot be changed now)"),
        (a_machine(run_state="shutdown"), "Run state", "shutdown (CPUs can no longer be changed)"),
    ],
)
def test_what_keeps_cpus_from_being_changed_is_told(machine: Machine, name: str, words: str) -> None:
    assert words in facts(found(machine))[name]


@pytest.mark.parametrize(
    ("greeting", "version"),
    [
        ({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": " (Debian 1:10)"}, "10.0.2 (Debian 1:10)"),
        ({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "10.0.2"),
        ({"qemu": {"major": 10, "minor": 0, "micro": 2}}, "10.0.2"),
        ({"qemu": {"major": "10"}}, None),
        ({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": 3}, None),
        ({}, None),
    ],
)
def test_a_version_that_is_not_understood_is_no_version(greeting: object, version: str | None) -> None:
    assert replies.version(greeting) == version


def test_what_would_steer_a_terminal_is_not_printed() -> None:
    assert printable("a\x1b[31mb\nc\u202e") == "a?[31mb?c?"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/qmp.sock", Path("/run/qmp.sock")),
        ("./qmp.sock", Path("qmp.sock")),
        ("web/host:1", Path("web/host:1")),
        ("unix:qmp.sock", Path("qmp.sock")),
        ("unix:/a,,b/q.sock,server=on,wait=off", Path("/a,b/q.sock")),
        ("tcp:host:4444,server=on", TCPEndpoint("host", 4444)),
        ("localhost:4444", TCPEndpoint("localhost", 4444)),
        ("[::1]:4444", TCPEndpoint("::1", 4444)),
        ("unix:1234", Path("1234")),
    ],
)
def test_a_path_is_told_from_host_and_port(text: str, address: Path | TCPEndpoint) -> None:
    assert monitor_address(text) == address


def test_a_name_of_an_existing_file_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host:4444").touch()

    assert monitor_address("host:4444") == Path("host:4444")


@pytest.mark.parametrize("text", ["", "qmp.sock", "host:", "host:0", "host:65536", "::1:4444", "tcp:host", "tcp:h:0"])
def test_what_is_neither_is_a_usage_error(text: str) -> None:
    result = CliRunner().invoke(main, ["inspect", text])

    assert result.exit_code == 2
    assert "is not a monitor" in result.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere/qmp.sock", "start QEMU with its socket there, or correct the path."),
        ("file", "is a regular file, not a socket: specify the socket that QEMU creates."),
        (".", "is a directory, not a socket"),
    ],
)
def test_what_is_no_socket_is_an_error_with_its_remedy(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["inspect", f"{tmp_path}/{name}"])

    assert (result.exit_code, result.stdout) == (1, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_to_be_joined_must_be_a_set(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", f"{tmp_path}/x", "-f", "-"], input="kind: Pod")
    assert result.exit_code == 1
    assert "not a VCPUSet" in result.stderr


def test_the_operator_does_not_load_what_only_tables_need() -> None:
    program = "import sys, vcpuset.cli.main; print('rich' in sys.modules, 'vcpuset.cli.plan' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.split() == ["False", "False"]
