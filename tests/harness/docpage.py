"""The examples of a documentation page, run as they stand there by somebody who follows it.

An example is a fenced block. The first word after the fence is its language; those behind it, which no reader sees,
mark the block for the tests:

    ```sh certificates
    openssl req …
    ```

Pages introduce as shell variables what differs from place to place, and a test gives these their values first:

    page = Page(REPOSITORY / "docs" / "monitors.md")
    with Reader(folder, SOCKET_ROOT=str(root)) as reader:
        for block in page.blocks("sh", "certificates"):
            await reader.run(block)
        qemu = reader.start(page.block("sh", "machine"))
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import yaml

from harness.processes import Child, CommandFailed, Completed, run

__all__ = ["Block", "Page", "Reader"]

STEP_SECONDS: Final = 120.0
"""How long all commands of a block may take together."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]+)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)

_NAMED = re.compile(r"`([\w./-]+)`:\n*\Z")
"""The end of the line before a block that says how the file is called in which the block is."""

_HANDED_ON = """
trap 'status=$?; env -0 >{environment}; pwd >{directory}; exit $status' EXIT
"""
"""What follows a block in the same terminal finds the variables and the folder as the block left them."""


@dataclass(frozen=True)
class Block:
    """One example.

    language  the word that the page is highlighted by, such as ``sh``, ``yaml``, ``console``
    marks     the words behind it
    text      what stands between the fences
    file      the name of the file that it is, if the line before says so: "`name.yaml`:"
    where     page and line of its first line, for messages
    """

    language: str
    marks: tuple[str, ...]
    text: str
    file: str | None
    where: str

    def document(self) -> Any:  # noqa: ANN401 - YAML
        """The YAML that it is."""
        return yaml.safe_load(self.text)

    def documents(self) -> list[Any]:
        """The YAML documents in it, one or more."""
        return list(yaml.safe_load_all(self.text))

    def commands(self) -> Iterator[tuple[str, str]]:
        """Of a block in the language ``console``: each command, with the output that the page shows."""
        for command in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            line, _, output = command.partition("\n")
            yield line, output


class Page:
    """A page in Markdown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")

    def blocks(self, language: str | None = None, *marks: str) -> list[Block]:
        """The blocks in this language that have all these marks, in the order of the page."""
        found = map(self._block, _FENCE.finditer(self.text))
        return [each for each in found if language in (None, each.language) and set(marks) <= set(each.marks)]

    def block(self, language: str, *marks: str) -> Block:
        """The only block in this language with these marks. LookupError: there is none, or more than one."""
        found = self.blocks(language, *marks)
        if len(found) != 1:
            places = ", ".join(each.where for each in found) or "none"
            raise LookupError(f"{self.path}: one block {' '.join([language, *marks])} was expected; there is {places}")
        return found[0]

    def manifest(self, kind: str, name: str) -> dict[str, Any]:
        """The only example of an object of this kind and name. LookupError: there is none, or more than one."""
        examples = [block.document() for block in self.blocks("yaml")]
        found = [each for each in examples if (each.get("kind"), each.get("metadata", {}).get("name")) == (kind, name)]
        if len(found) != 1:
            raise LookupError(f"{self.path}: one {kind} {name} was expected; there are {len(found)}")
        example: dict[str, Any] = found[0]
        return example

    def _block(self, found: re.Match[str]) -> Block:
        language, *marks = found["info"].split()
        before = self.text[: found.start()]
        named = _NAMED.search(before)
        text = re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        where = f"{self.path.name}:{before.count(chr(10)) + 2}"
        return Block(language, tuple(marks), text, named[1] if named else None, where)


class Reader:
    """Somebody who types the blocks of a page into one terminal, a bash in `folder`.

    A variable that a block sets is there in the next one, as is the folder it changed to. A block ends at the first
    command that fails, also at an unset variable. What was started is ended with the reader.

    variables  what the page leaves to its reader, and what stands in for the place: PATH, KUBECONFIG, …
    terminal   the command line that runs a command where the terminal is, such as on a node; None: here
    """

    def __init__(
        self, folder: Path, terminal: Callable[[Sequence[str]], list[str]] | None = None, /, **variables: str
    ) -> None:
        self.folder = folder
        self._terminal = terminal or list
        self.variables: dict[str, str] = {**_own_environment(folder), **variables}
        self._started: list[Child] = []
        self._state = folder / ".terminal"
        self._state.mkdir(parents=True)

    async def run(self, block: Block | str, timeout: float = STEP_SECONDS, *, check: bool = True) -> Completed:
        """Run all commands of a block.

        Raises:
            CommandFailed: one of them failed, and `check` is set; names the page and the line, and all that was said.
            TimeoutError: no end within `timeout` seconds; the same. Whatever the commands had started is ended.
        """
        environment, directory = self._state / "environment", self._state / "directory"
        text = _HANDED_ON.format(environment=shlex.quote(str(environment)), directory=shlex.quote(str(directory)))
        # `timeout` makes a process group and ends all of it; `run` would know bash alone.
        argv = ["timeout", "--signal=KILL", f"{timeout:g}", *self._terminal(_bash(text + _text(block)))]
        done = await run(argv, env=self.variables, cwd=self.folder, check=False, timeout=timeout + 30)
        done = Completed((_where(block), _text(block)), done.returncode, done.stdout, done.stderr)
        if directory.exists():
            self.folder = Path(directory.read_text().rstrip("\n"))
            entries = environment.read_bytes().decode().split("\0")
            self.variables = {name: value for name, found, value in (each.partition("=") for each in entries) if found}
            directory.unlink()
        else:
            raise TimeoutError(f"{_where(block)}: no end within {timeout:g} s; so far: {done.stdout}{done.stderr}")
        if check and done.returncode:
            raise CommandFailed(done)
        return done

    def start(self, block: Block | str, name: str = "the example") -> Child:
        """Start the one command of a block that is to go on beside what follows, such as a machine."""
        log = self._state / f"log-{len(self._started)}"
        # With nothing after it the command takes bash's place, and so is ended when it is told to end.
        child = Child.start(
            self._terminal(_bash(_text(block))), name=name, log=log, env=self.variables, cwd=self.folder
        )
        self._started.append(child)
        return child

    def write(self, block: Block) -> Path:
        """Save a block as the file that the page calls it."""
        assert block.file is not None, f"{block.where}: the line before has no file name"
        path = self.folder / block.file
        path.write_text(block.text)
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._started:
            child.kill()


def _bash(text: str) -> list[str]:
    """All variables are exported (-a), so that they can be handed on."""
    return ["bash", "--norc", "-a", "-e", "-u", "-o", "pipefail", "-c", text]


def _own_environment(folder: Path) -> Mapping[str, str]:
    """The reader has programs, and a home in the folder: no settings of whoever runs the tests."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}


def _text(block: Block | str) -> str:
    return block if isinstance(block, str) else block.text


def _where(block: Block | str) -> str:
    return "typed" if isinstance(block, str) else block.where
