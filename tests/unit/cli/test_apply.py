"""`vcpuset apply`: what it does not accept, and the record of its unplug requests."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vcpuset.cli.main import main
from vcpuset.cli.manifests import Manifest, read
from vcpuset.cli.record import RecordFailed, remembered

__all__: list[str] = []

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)

MONITOR = {"unix": {"path": "web.sock"}}


def a_manifest(vcpus: int = 2, **others: Any) -> dict[str, Any]:
    body = {"apiVersion": "vcpuset.dev/v1alpha1", "kind": "VCPUSet", "metadata": {"name": "web"}}
    return {**body, "spec": {"vcpus": vcpus, "monitor": MONITOR}, **others}


def status_with_request(time: str) -> dict[str, Any]:
    request = {"slot": 1, "path": "/machine/peripheral/vcpu1", "threadID": 7, "requestedAt": time, "attempts": 1}
    return {"status": {"unplug": {"requests": [request]}}}


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (json.dumps(a_manifest()), [], "--socket-root is required: web.sock (spec.monitor.unix.path)"),
        (json.dumps(a_manifest(0)), ["--socket-root=."], "spec.vcpus is 0: declare from 1 to 4096."),
        ("a: [", ["--socket-root=."], "The file is not YAML (or JSON)"),
        (f"{json.dumps(a_manifest())}\n---\n{json.dumps(a_manifest())}", ["--socket-root=."], "contains 2 VCPUSets"),
        (json.dumps(a_manifest()), ["--socket-root=.", "--timeout=0"], "0.0 is not in the range"),
        (json.dumps(a_manifest()), ["--socket-root=.", "--timeout=nan"], "'nan' is not a number of seconds"),
        (json.dumps(a_manifest()), ["--socket-root=/nowhere", "--tls-credentials=/nowhere"], "does not exist"),
    ],
    ids=["no-root", "count", "no-yaml", "two", "timeout", "nan", "credentials"],
)
def test_what_cannot_be_used_ends_with_2(text: str, options: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["apply", "-f", "-", *options], input=text)
    assert words in result.stderr
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "vcpuset").mkdir()
    return tmp_path / "vcpuset" / "default.web.json"


def parsed(**others: Any) -> Manifest:
    (found,) = read(json.dumps(a_manifest(**others)), None, NOW)
    return found


def test_without_a_record_a_manifest_is_as_it_is_written(record: Path) -> None:
    assert remembered(parsed()) == parsed()


@pytest.mark.parametrize(("vcpus", "generation"), [(2, 3), (4, 4)], ids=["same", "changed"])
def test_recorded_requests_are_of_the_recorded_generation_unless_the_spec_has_changed(
    record: Path, vcpus: int, generation: int
) -> None:
    kept = a_manifest(metadata={"name": "web", "generation": 3}, **status_with_request("2026-01-02T11:00:00Z"))
    record.write_text(json.dumps(kept))
    found = remembered(parsed(vcpus=vcpus))
    assert (found.vcpuset.generation, found.record) == (generation, record)
    assert [request.slot for request in found.vcpuset.status.pending_unplugs] == [1]


@pytest.mark.parametrize(
    ("time", "recorded"), [("2026-01-02T10:00:00Z", True), ("2026-01-02T11:30:00Z", False)], ids=["older", "newer"]
)
def test_of_a_manifest_with_requests_of_its_own_the_later_ones_count(record: Path, time: str, recorded: bool) -> None:
    record.write_text(json.dumps(a_manifest(**status_with_request("2026-01-02T11:00:00Z"))))
    assert (remembered(parsed(**status_with_request(time))).record is not None) == recorded


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"kind": "Pod"})])
def test_a_damaged_record_is_told_with_its_path(record: Path, text: str) -> None:
    record.write_text(text)
    with pytest.raises(RecordFailed, match=r"default\.web\.json is damaged; delete it"):
        remembered(parsed())


def test_without_a_home_directory_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")  # as of a user without an entry in /etc/passwd

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(RecordFailed, match=r"no home directory .* set XDG_STATE_HOME"):
        remembered(parsed())


@pytest.mark.parametrize("command", ["plan", "apply"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
@pytest.mark.usefixtures("record")
def test_a_file_of_an_editor_for_windows_is_read(tmp_path: Path, command: str, mark: bytes) -> None:
    file = tmp_path / "web.json"
    file.write_bytes(mark + json.dumps(a_manifest(), indent="\t").replace("\n", "\r\n").encode())
    result = CliRunner().invoke(main, [command, "-f", str(file), "--socket-root", str(tmp_path)])
    assert "MonitorUnreachable" in result.output


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_file_that_cannot_be_read_is_told_by_its_name(command: str) -> None:
    result = CliRunner().invoke(main, [command, "-f", "/proc/self/mem", "--socket-root=."])
    assert result.stderr == "Error: /proc/self/mem cannot be read: Input/output error.\n"


def test_no_error_is_more_than_a_line(tmp_path: Path) -> None:
    (tmp_path / "default").mkdir()
    manifest = {**a_manifest(), "spec": {"vcpus": 2, "monitor": {"unix": {"path": "a\nb"}}}}
    for command in ("plan", "apply"):
        arguments = [command, "-f", "-", "--socket-root", str(tmp_path)]
        result = CliRunner().invoke(main, arguments, input=json.dumps(manifest))
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert "default/a?b" in result.output
