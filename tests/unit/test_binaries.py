"""Where the control plane's programs are looked for, and when they are built."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.binaries import CONTROL_PLANE, CONTROLLER_MANAGER, BinariesMissing, controller_manager
from harness.cache import REPOSITORY
from harness.setup import __main__ as setup
from harness.setup.console import SetupFailed


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any of the programs."""
    monkeypatch.setenv("VCPUSET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return tmp_path


def program(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "kube-controller-manager"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def pins(module: Path) -> dict[str, str]:
    """Versions by module, as required or replaced."""
    text = (module / "go.mod").read_text()
    required = re.findall(r"^\s+([\w./-]+) (v\S+)", text, re.MULTILINE)
    replaced = re.findall(r"^\s+[\w./-]+ => ([\w./-]+) (v\S+)", text, re.MULTILINE)
    return {**dict(required), **dict(replaced)}


def test_the_controller_manager_and_the_api_server_are_built_from_the_same_versions() -> None:
    servers, manager = pins(CONTROL_PLANE.module), pins(CONTROLLER_MANAGER.module)
    both = servers.keys() & manager.keys()
    assert {"k8s.io/kubernetes", "k8s.io/client-go", "google.golang.org/grpc"} <= both
    assert {name: servers[name] for name in both} == {name: manager[name] for name in both}
    assert CONTROL_PLANE.folder != CONTROLLER_MANAGER.folder


def test_the_controller_manager_comes_from_the_assets_then_the_cache_then_the_path(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BinariesMissing, match="nor in PATH: run `make setup`"):
        controller_manager()
    installed = program(nowhere / "bin")
    assert controller_manager() == installed
    built = program(CONTROLLER_MANAGER.folder)
    assert controller_manager() == built
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(nowhere / "assets"))
    assert controller_manager() == built, "the assets of Go operators' tests have no controller manager"
    brought = program(nowhere / "assets")
    assert controller_manager() == brought


def test_a_target_does_not_wait_for_what_only_others_need() -> None:
    make = shutil.which("make")
    assert make is not None

    def parts(target: str) -> set[str]:
        lines = subprocess.run([make, "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        found = re.search(r"-m harness\.setup *(.*)$", lines, re.MULTILINE)
        assert found is not None, lines
        return set(found[1].split())

    assert parts("demo") == {"system", "venv", "controlplane", "guest"}
    assert parts("demo") | {"prometheus", "controllermanager", "helm"} == parts("test") == parts("setup")
    assert parts("test-cluster") == setup.PARTS.keys()


@pytest.mark.parametrize(
    ("arguments", "fails", "kept"),
    [
        pytest.param(["venv", "controlplane", "helm"], False, False, id="all-built"),
        pytest.param(["controlplane", "helm"], True, True, id="a-build-failed"),
        pytest.param(["venv"], False, True, id="nothing-to-do-with-builds"),
    ],
)
def test_what_builds_need_is_kept_until_they_have_gone_well(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fails: bool, kept: bool
) -> None:
    def build() -> None:
        if fails:
            raise SetupFailed("no network")

    monkeypatch.setattr(setup, "PARTS", {"venv": lambda: None, "controlplane": build, "helm": build})
    work = nowhere / "cache" / "controlplane-work"
    work.mkdir(parents=True)
    assert setup.main(arguments) == (1 if fails else 0)
    assert work.exists() is kept
