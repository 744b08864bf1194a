"""The Dockerfile carried out without Docker: its stages in folders, its RUN lines by the shell, its result to be run.

A container engine cannot be counted on where the tests run, and a registry not either. What can go wrong in a
Dockerfile can be seen all the same: a file that is not copied, a dependency that is not installed, a path that is not
the same in both stages. Two things differ: `python` of the base image is the machine's own, as a fresh virtual
environment, and absolute paths lie below the result's folder. The instructions are read from the file itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import string
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dockerfile_parse import DockerfileParser

from harness.cache import REPOSITORY
from harness.processes import Completed, run

__all__ = ["Image", "build_image", "instructions", "tree"]

_KEPT: Final = ("HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""Of the user's environment, for pip: where its settings and the package index are."""


def pip_environment() -> dict[str, str]:
    """What pip needs of the environment of whoever runs the tests."""
    return {name: text for name, text in os.environ.items() if name in _KEPT or name.startswith("PIP_")}


@dataclass
class Image:
    """What the Dockerfile says of a container of the image, and where its files are.

    root        the only folder that is the image's; nobody may write in it
    env         the environment of its processes
    user        as whom they run: user and group
    entrypoint  what is run
    command     its arguments, if none are given
    """

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)

    def argv(self, *words: str) -> list[str]:
        """The command line that runs `words` as in a container, with the image's environment and nothing of ours.

        The image's user is taken where that is allowed: for root.
        """
        user, _, group = self.user.partition(":")
        become: list[str] = []
        if os.geteuid() == 0:
            become = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
        return [*become, "env", "-i", *(f"{name}={value}" for name, value in self.env.items()), *words]

    async def run(self, *words: str, check: bool = True) -> Completed:
        """Run a command as in a container, in a folder that is not ours."""
        return await run(self.argv(*words), cwd=Path("/"), check=check)


def instructions(path: Path = REPOSITORY / "Dockerfile") -> list[tuple[str, str]]:
    """Instructions with their values, continued lines joined; without comments."""
    parser: Any = DockerfileParser(path=str(path))
    return [(each["instruction"], each["value"]) for each in parser.structure if each["instruction"] != "COMMENT"]


@contextlib.asynccontextmanager
async def build_image() -> AsyncIterator[Image]:
    """Carry out the Dockerfile. The result is removed afterwards."""
    # Not below a folder that only we may enter, as that of pytest is.
    root = Path(tempfile.mkdtemp(prefix="vcpuset-image-"))
    try:
        await asyncio.to_thread(root.chmod, 0o755)
        builder = _Builder(root, await _base_python())
        for instruction, value in instructions():
            await builder.carry_out(instruction, value)
        builder.finish()
        yield builder.image
    finally:
        _set_writable(root, True)
        shutil.rmtree(root)


class _Builder:
    """Carries out one instruction after the other."""

    def __init__(self, root: Path, python: Path) -> None:
        self._root = root
        self._python = python
        self._base = root.with_name(f"{root.name}-base")
        self._args: dict[str, str] = {}
        self._folder = root
        self._kept: set[Path] = set()
        self.image = Image(root)

    async def carry_out(self, instruction: str, value: str) -> None:
        """One instruction; those that the Dockerfile does not use are not known."""
        match instruction:
            case "FROM":
                await self._begin()
            case "ARG":
                name, _, default = value.partition("=")
                self._args[name] = str(self._root / default.lstrip("/")) if default.startswith("/") else default
            case "ENV":
                self.image.env |= _pairs(self._expand(value))
            case "LABEL":
                self.image.labels |= _pairs(self._expand(value))
            case "WORKDIR":
                self._folder = self._place(value)
                self._folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(shlex.split(self._expand(value)))
            case "RUN":
                env = {**pip_environment(), **self.image.env, **self._args}
                await run(["sh", "-ec", value], env=env, cwd=self._folder, timeout=600)
            case "USER":
                self.image.user = value
            case "EXPOSE":
                self.image.ports.append(int(value))
            case "ENTRYPOINT":
                self.image.entrypoint = json.loads(value)
            case "CMD":
                self.image.command = json.loads(value)
            case _:
                raise NotImplementedError(f"{instruction} in the Dockerfile")

    def finish(self) -> None:
        """Leave what the last stage has, and let nobody write in it."""
        self._remove_all_but(self._kept)
        shutil.rmtree(self._base)
        self.image.env["PATH"] = self.image.env["PATH"].replace(f":{self._base}/bin", "")
        _set_writable(self._root, False)

    async def _begin(self) -> None:
        shutil.rmtree(self._base, ignore_errors=True)
        await run([self._python, "-m", "venv", self._base], timeout=300)
        self._args, self._folder = {}, self._root
        self.image = Image(self._root, env={"PATH": f"{self._base}/bin:/usr/local/bin:/usr/bin:/bin"})

    def _copy(self, words: list[str]) -> None:
        *sources, target = [word for word in words if not word.startswith("--from=")]
        if len(words) > len(sources) + 1:
            # An argument has it in the same place in both stages.
            assert sources == [target], "files of another stage stay where they are"
            self._kept.add(Path(target))
            return
        sent = (REPOSITORY / ".dockerignore").read_text().splitlines()
        for source in sources:
            assert f"!{source}" in sent, f".dockerignore keeps {source} from being sent"
            destination = self._place(target) / source if target.endswith("/") else self._place(target)
            if (REPOSITORY / source).is_dir():
                left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(REPOSITORY / source, destination, ignore=left_out)
            else:
                shutil.copy(REPOSITORY / source, destination)

    def _place(self, path: str) -> Path:
        whole = self._folder / path
        return whole if whole.is_relative_to(self._root) else self._root / path.lstrip("/")

    def _expand(self, value: str) -> str:
        return string.Template(value).substitute(self.image.env | self._args)

    def _remove_all_but(self, kept: set[Path]) -> None:
        for folder, folders, files in os.walk(self._root, topdown=True):
            here = Path(folder)
            for name in list(folders):
                if here / name in kept:
                    folders.remove(name)
                elif not any(path.is_relative_to(here / name) for path in kept):
                    shutil.rmtree(here / name)
                    folders.remove(name)
            for name in files:
                (here / name).unlink()


def _pairs(value: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(value))


async def _base_python() -> Path:
    """A Python that the image's user may run; ours may lie in a folder that only we may enter."""
    candidates = [Path(getattr(sys, "_base_executable", sys.executable)), Path("/usr/bin/python3")]
    # setpriv itself still has root's capabilities when it looks for the program; env has not.
    other = ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "env"] if os.geteuid() == 0 else []
    new_enough = "import sys, ensurepip; sys.exit(sys.version_info < (3, 11))"
    for candidate in candidates:
        if candidate.exists() and (await run([*other, candidate, "-c", new_enough], check=False)).returncode == 0:
            return candidate
    raise FileNotFoundError(f"none of {', '.join(map(str, candidates))} is a Python 3.11 that all users may run")


def _set_writable(root: Path, writable: bool) -> None:
    for folder, _, files in os.walk(root):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | 0o200 if writable else mode & ~0o222)


def tree(root: Path) -> Mapping[str, tuple[int, int]]:
    """Every file below a folder, with its size and the time of its last change."""
    found = {}
    for folder, _, files in os.walk(root):
        for name in files:
            stat = Path(folder, name).lstat()
            found[str(Path(folder, name))] = (stat.st_size, stat.st_mtime_ns)
    return found
