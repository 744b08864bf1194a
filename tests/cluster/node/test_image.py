"""The image that buildah built from the Dockerfile, in the agent's pod."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from harness.cache import REPOSITORY
from harness.node import Cluster
from harness.processes import Completed

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
VERSION: Final[str] = PROJECT["project"]["version"]

IMPORT_ALL: Final = """\
import importlib, json, pkgutil, sys, vcpuset
names = ["vcpuset", *(each.name for each in pkgutil.walk_packages(vcpuset.__path__, "vcpuset."))]
print(len([importlib.import_module(name) for name in names]))
"""

DISTRIBUTIONS: Final = """\
import json, importlib.metadata as metadata
print(json.dumps({each.metadata["Name"]: each.version for each in metadata.distributions()}))
"""

Inside = Callable[..., Awaitable[Completed]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def inside(installed: Cluster) -> Inside:
    """Runs a program in the agent's container."""

    async def run(*words: str, check: bool = True) -> Completed:
        container = ("exec", "-n", "vcpuset-agent", "daemonset/vcpuset-agent", "--")
        return await installed.kubectl(*container, *words, check=check)

    return run


async def test_the_program_prints_its_version(inside: Inside) -> None:
    assert (await inside("vcpuset", "--version")).stdout == f"vcpuset, version {VERSION}\n"


async def test_every_module_can_be_imported(inside: Inside) -> None:
    found = await inside("python", "-W", "error", "-c", IMPORT_ALL)
    assert int(found.stdout) == len(list((REPOSITORY / "operator" / "vcpuset").rglob("*.py")))


async def test_every_module_is_loaded_from_bytecode_including_the_standard_library(inside: Inside) -> None:
    log = (await inside("python", "-v", "-c", IMPORT_ALL)).stderr
    loaded = re.findall(r"^# code object from '?(.+?)'?$", log, re.MULTILINE)
    assert len(loaded) > 100, "python -v prints the file of each module: its source or its bytecode"
    assert not [path for path in loaded if Path(path).suffix != ".pyc"]


async def test_the_image_has_the_pinned_versions_and_nothing_that_only_tests_or_builds_need(inside: Inside) -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {plain(name): version for name, version in pins.items()} | {"vcpuset": VERSION}
    installed = json.loads((await inside("python", "-c", DISTRIBUTIONS)).stdout)
    found = {plain(name): version for name, version in installed.items()}
    assert found == {name: pinned.get(name) for name in found}
    assert not found.keys() & {"pip", "setuptools", "pytest", "mypy", "hypothesis"}
    assert {plain(re.split(r"[<>=]", each)[0]) for each in PROJECT["project"]["dependencies"]} <= found.keys()
    assert (await inside("python", "-m", "pip", "--version", check=False)).returncode != 0


async def test_nothing_can_be_written_into_it(inside: Inside) -> None:
    refused = await inside("touch", "/opt/vcpuset/file", check=False)
    assert "Read-only file system" in refused.stderr
