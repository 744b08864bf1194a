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
        (json.dumps(a_manifest()), ["--socket-root=/nowhere", "--tls-credentials=/nowhere"], "does not exist"),
    ],
    ids=["no-root", "count", "no-yaml", "two", "timeout", "credentials"],
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


def test_no_name_leads_out_of_the_folder_of_the_records(record: Path) -> None:
    outside = record.parent.parent / "x.json"
    outside.write_text(json.dumps(a_manifest(**status_with_request("2026-01-02T11:00:00Z"))))
    (evil,) = read(json.dumps(a_manifest(metadata={"name": "x", "namespace": "../a/.."})), None, NOW)
    assert remembered(evil) == evil
