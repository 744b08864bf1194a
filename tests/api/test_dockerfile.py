"""The Dockerfile and the manifests that run its image agree, and its dependencies exist for its Python."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from harness.binaries import binaries
from harness.cache import REPOSITORY
from harness.processes import run

__all__: list[str] = []

PROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in their order, with their arguments."""
    parser = DockerfileParser(str(REPOSITORY / "Dockerfile"))
    return [(each["instruction"], each["value"]) for each in parser.structure]


def last(instruction: str) -> str:
    """The arguments of the last such instruction."""
    return [value for name, value in instructions() if name == instruction][-1]


def test_the_label_is_the_version_of_the_program() -> None:
    version = PROJECT["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in last("LABEL")


async def test_the_manifests_run_what_the_image_is_made_for() -> None:
    built = await run([binaries().kubectl, "kustomize", REPOSITORY / "deploy" / "overlays" / "both"])
    workloads = [each for each in yaml.safe_load_all(built.stdout) if each["kind"] in ("DaemonSet", "Deployment")]
    assert len(workloads) == 2
    command = json.loads(last("CMD"))
    for each in workloads:
        spec = each["spec"]["template"]["spec"]
        container = spec["containers"][0]
        assert container["command"] == json.loads(last("ENTRYPOINT"))
        assert container["args"][: len(command)] == command
        assert f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}" == last("USER")
        assert [port["containerPort"] for port in container["ports"]] == [int(last("EXPOSE"))]


def test_both_stages_have_one_pinned_base_that_can_be_replaced() -> None:
    found = instructions()
    base = next(value for instruction, value in found if instruction == "ARG" and value.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-[a-z]+", base)
    assert [value.partition(" AS ")[0] for instruction, value in found if instruction == "FROM"] == ["${BASE}"] * 2


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
async def test_all_dependencies_are_ready_made_for_the_images_python(tmp_path: Path, machine: str) -> None:
    base = next(value for instruction, value in instructions() if value.startswith("BASE="))
    version = re.search(r"python:(3\.\d+\.\d+)-", base)
    assert version is not None
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in (17, 28)] + [
        f"--platform=manylinux2014_{machine}"
    ]
    await run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
            *("--only-binary=:all:", f"--python-version={version[1]}", *platforms, f"--target={tmp_path}"),
            *("--quiet", f"--constraint={REPOSITORY / 'constraints.txt'}", *PROJECT["project"]["dependencies"]),
        ],
        timeout=300,
    )
