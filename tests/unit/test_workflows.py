"""The workflows on GitHub: they call targets of make that exist, with pinned actions and no more rights than needed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml

from harness.cache import REPOSITORY

FOLDER: Final = REPOSITORY / ".github" / "workflows"
NAMES: Final = sorted(path.name for path in FOLDER.glob("*.yml"))
TARGETS: Final = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def jobs(name: str) -> dict[str, dict[str, Any]]:
    """The jobs of a workflow."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / name).read_text())["jobs"]
    return found


def steps(name: str) -> Iterator[dict[str, Any]]:
    """The steps of all jobs of a workflow."""
    for job in jobs(name).values():
        yield from job.get("steps", ())


def test_there_are_workflows_to_check_to_test_and_to_release() -> None:
    assert NAMES == ["check.yml", "release.yml", "test.yml"]


@pytest.mark.parametrize("name", NAMES)
def test_each_target_of_make_exists(name: str) -> None:
    run = "\n".join(step.get("run", "") for step in steps(name))
    called = set(re.findall(r"^make (?:--silent )?([a-z-]+)", run, re.MULTILINE))
    called |= {"test", "test-long"} if 'make "$TARGET"' in run else set()
    assert called
    assert called <= TARGETS
    assert not re.search(r"pytest|mypy|ruff|mkdocs", run), "make knows how"


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_pinned_by_commit_with_their_version(name: str) -> None:
    lines = [line for line in (FOLDER / name).read_text().splitlines() if " uses: " in f" {line.strip('- ')} "[:7]]
    for line in lines:
        assert re.search(r"uses: (\./\.github/workflows/[a-z]+\.yml|[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+)$", line), (
            line
        )
    assert len(lines) == sum("uses" in each for each in [*steps(name), *jobs(name).values()])


@pytest.mark.parametrize("name", NAMES)
def test_rights_are_granted_job_by_job_and_no_secret_is_needed(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert yaml.safe_load(text)["permissions"] == {}
    assert "secrets" not in text
    for job, each in jobs(name).items():
        assert each["permissions"]["contents"] == "read", job
        assert "timeout-minutes" in each or "uses" in each, job


def test_a_release_is_only_published_after_all_checks_and_the_long_tests() -> None:
    release = jobs("release.yml")
    assert release["publish"]["needs"] == ["check", "test"]
    assert release["test"]["with"] == {"target": "test-long"}
    assert release["site"]["needs"] == ["publish"]


def test_all_that_a_release_ships_names_the_version_of_the_program() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    deploy = REPOSITORY / "deploy"
    images = [
        image
        for file in deploy.rglob("*.yaml")
        for image in re.findall(r"^ *image: vcpuset:(.+)$", file.read_text(), re.MULTILINE)
    ]
    assert set(images) == {version}
    assert yaml.safe_load((deploy / "krew" / "vcpuset.yaml").read_text())["spec"]["version"] == f"v{version}"
    assert f"\n## {version} (" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_image_installs_by_hash_the_versions_of_the_tests_and_nothing_else() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (REPOSITORY / name).read_text().splitlines()
        found = (re.match(r"([\w.-]+)==(\S+)", line) for line in lines)
        return {re.sub(r"[-_.]+", "-", each[1]).lower(): each[2] for each in found if each}

    hashed, tested = pins("requirements.txt"), pins("constraints.txt")
    assert hashed == {name: tested[name] for name in hashed}
    blocks = re.split(r"^(?=[\w.-]+==)", (REPOSITORY / "requirements.txt").read_text(), flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = {re.sub(r"[-_.]+", "-", re.split(r"[<>=]", each)[0]).lower() for each in project["dependencies"]}
    assert wanted <= hashed.keys()
