"""The Dockerfile's steps, carried out, give a program that runs as the manifests run it."""

import asyncio
import json
import os
import re
import tomllib
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from harness.binaries import binaries
from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.image import Image, build_image, instructions, tree
from harness.processes import Child, free_port, run
from harness.wait import until

__all__: list[str] = []

pytestmark = pytest.mark.timeout(900)  # pip installs into it

PROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
VERSION: Final[str] = PROJECT["project"]["version"]

IMPORT_ALL: Final = """\
import importlib, json, pkgutil, sys, vcpuset
names = ["vcpuset", *(each.name for each in pkgutil.walk_packages(vcpuset.__path__, "vcpuset."))]
modules = [importlib.import_module(name) for name in names]
print(json.dumps({"path": sys.path, "files": [module.__file__ for module in sys.modules.values()
    if getattr(module, "__file__", None)], "count": len(modules)}))
"""

DISTRIBUTIONS: Final = """\
import json, importlib.metadata as metadata
print(json.dumps({each.metadata["Name"]: each.version for each in metadata.distributions()}))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def image() -> AsyncIterator[Image]:
    """The image, built once for this module."""
    async with build_image() as built:
        yield built


async def test_the_program_says_its_version(image: Image) -> None:
    said = await image.run(*image.entrypoint, "--version")
    assert (said.stdout, said.stderr) == (f"vcpuset, version {VERSION}\n", "")
    assert image.labels["org.opencontainers.image.version"] == VERSION


async def test_every_module_is_there_and_none_is_of_the_work_tree(image: Image) -> None:
    before = tree(image.root)
    found = json.loads((await image.run("python", "-W", "error", "-c", IMPORT_ALL)).stdout)
    sources = list((REPOSITORY / "operator" / "vcpuset").rglob("*.py"))
    assert found["count"] == len(sources)
    assert not [path for path in [*found["path"], *found["files"]] if Path(path).is_relative_to(REPOSITORY)]
    assert tree(image.root) == before, "nothing is written into the image"


async def test_bytecode_of_all_that_is_loaded_is_in_the_image_that_of_the_standard_library_too(image: Image) -> None:
    said = (await image.run("python", "-v", "-c", IMPORT_ALL)).stderr
    loaded = [Path(path) for path in re.findall(r"^# code object from '?(.+?)'?$", said, re.MULTILINE)]
    assert len(loaded) > 100, "it is told where each module comes from: a source file that is compiled, or bytecode"
    assert not [path for path in loaded if path.suffix != ".pyc" or not path.is_relative_to(image.root)]


async def test_it_holds_the_pinned_versions_and_nothing_that_only_tests_or_builds_need(image: Image) -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {plain(name): version for name, version in pins.items()} | {"vcpuset": VERSION}
    installed = {
        plain(name): version
        for name, version in json.loads((await image.run("python", "-c", DISTRIBUTIONS)).stdout).items()
    }
    assert installed == {name: pinned.get(name) for name in installed}
    assert not installed.keys() & {"pip", "setuptools", "pytest", "mypy", "hypothesis"}
    assert {plain(re.split(r"[<>=]", each)[0]) for each in PROJECT["project"]["dependencies"]} <= installed.keys()
    assert (await image.run("python", "-m", "pip", "--version", check=False)).returncode != 0


async def test_the_operator_runs_as_the_images_user_and_writes_nothing(
    image: Image, control_plane: ControlPlane
) -> None:
    port = free_port()
    before = tree(image.root)
    # The control plane's folder is ours alone.
    kubeconfig, log = (image.root.with_name(f"{image.root.name}.{kind}") for kind in ("kubeconfig", "log"))
    config = json.loads(control_plane.kubeconfig.read_text())
    del config["clusters"][0]["cluster"]["certificate-authority"]
    config["clusters"][0]["cluster"]["insecure-skip-tls-verify"] = True
    kubeconfig.write_text(json.dumps(config))
    kubeconfig.chmod(0o644)
    words = [*image.entrypoint, *image.command, f"--kubeconfig={kubeconfig}", f"--http-address=127.0.0.1:{port}"]
    child = Child.start(image.argv(*words), name="vcpuset run", log=log, cwd=Path("/"))

    def is_ready() -> bool:
        child.require_running()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    async def ready() -> bool:
        return await asyncio.to_thread(is_ready)

    try:
        await until(ready, 60, lambda: f"/readyz; the log ends with:\n{child.log_tail()}\n")
        if os.geteuid() == 0:  # nobody else can become another user
            assert {"Uid": "65532 65532 65532 65532", "CapEff": "0000000000000000"}.items() <= status(child.pid).items()
        assert await child.stop(timeout=30) == 0
    finally:
        await child.stop(timeout=30)
        kubeconfig.unlink()
        log.unlink()
    assert tree(image.root) == before


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: " ".join(value.split()) for name, _, value in lines}


async def test_the_manifests_run_what_the_image_is_made_for(image: Image) -> None:
    built = await run([binaries().kubectl, "kustomize", REPOSITORY / "deploy" / "overlays" / "both"])
    workloads = [each for each in yaml.safe_load_all(built.stdout) if each["kind"] in ("DaemonSet", "Deployment")]
    assert len(workloads) == 2
    for each in workloads:
        spec = each["spec"]["template"]["spec"]
        container = spec["containers"][0]
        assert container["command"] == image.entrypoint
        assert container["args"][: len(image.command)] == image.command
        assert f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}" == image.user
        assert [port["containerPort"] for port in container["ports"]] == image.ports


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
            *(REPOSITORY / ".venv" / "bin" / "python", "-m", "pip", "install", "--dry-run", "--ignore-installed"),
            *("--only-binary=:all:", f"--python-version={version[1]}", *platforms, f"--target={tmp_path}"),
            *("--quiet", f"--constraint={REPOSITORY / 'constraints.txt'}", *PROJECT["project"]["dependencies"]),
        ],
        timeout=300,
    )
