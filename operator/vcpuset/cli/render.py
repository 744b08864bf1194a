"""Prints results: for a person at a terminal, as plain text for pipes and files, or as JSON and YAML.

Only imported by the commands that print results: the operator does not need rich, which takes memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import click
import yaml
from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vcpuset.cli.text import printable
from vcpuset.domain.reasons import State

__all__ = [
    "STATE_COLOURS",
    "Block",
    "Cell",
    "Facts",
    "Grid",
    "Heading",
    "Lines",
    "Output",
    "Styled",
    "aligned",
    "renderable",
    "show",
    "terminal",
]

Output = Literal["table", "json", "yaml"]

_FITTED_ROWS: Final = 500
"""Rich takes seconds to fit thousands of rows to a terminal; a longer table is printed unfitted."""

_DUMPER: Final = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""The one in C, if PyYAML has it, is ten times as fast."""


STATE_COLOURS: Final[Mapping[State, str]] = {
    State.READY: "green",
    State.RECONCILING: "yellow",
    State.STALLED: "red",
    State.HELD: "yellow",
    State.UNKNOWN: "yellow",
}
"""The colour of each state; what it means is always there in words too."""


class Styled(NamedTuple):
    """A text with a style of rich, which only terminals show."""

    text: str
    style: str


Cell = str | Styled


@dataclass(frozen=True, slots=True)
class Heading:
    """The name of what follows."""

    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with their values."""

    rows: Sequence[tuple[str, Cell]]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table.

    folded  the columns that a narrow terminal breaks into lines; None: all
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Lines:
    """Sentences, one per line; `indent` in spaces."""

    lines: Sequence[Cell]
    indent: int = 0


Block = Heading | Facts | Grid | Lines


def show(output: Output, document: Mapping[str, Any], page: Sequence[Block]) -> None:
    """Print a result to standard output: the page as a table, or the document."""
    if sys.stdout is None:  # closed by the process that started this one
        return
    match output:
        case "json":
            click.echo(json.dumps(document, indent=2))
        case "yaml":
            click.echo(yaml.dump(document, Dumper=_DUMPER, sort_keys=False, width=1 << 20), nl=False)
        case "table" if sys.stdout.isatty():
            console = terminal()
            for block in page:
                if isinstance(block, Grid) and len(block.rows) > _FITTED_ROWS:
                    _print_plain(block)
                else:
                    console.print(renderable(block))
        case "table":
            for block in page:
                _print_plain(block)


def terminal() -> Console:
    """Standard output, which is a terminal."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _print_plain(block: Block) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    for line in _plain(block):
        click.echo(line.rstrip().encode(encoding, "backslashreplace").decode(encoding))


def _text(cell: Cell) -> str:
    return printable(cell.text if isinstance(cell, Styled) else cell)


def _plain(block: Block) -> list[str]:
    match block:
        case Heading(text):
            return [printable(text)]
        case Facts(rows):
            return aligned([[f"{name}:", _text(value)] for name, value in rows])
        case Grid(header, rows):
            texts = [[_text(cell) for cell in row] for row in rows]
            return ["", *aligned([header, *texts]), ""]
        case Lines(lines, indent):
            return [" " * indent + _text(line) for line in lines]


def aligned(rows: Sequence[Sequence[str]], least: Sequence[int] = ()) -> list[str]:
    """The rows of a table as lines.

    least  the widths of columns that may not be narrower
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    if least:
        widths = list(map(max, widths, least))
    return ["  ".join(map(_padded, row, widths)) for row in rows]


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def renderable(block: Block) -> RenderableType:
    """A block for a terminal, which fits its width."""
    match block:
        case Heading(text):
            return Text(printable(text), style="bold")
        case Facts(rows):
            facts = Table.grid(padding=(0, 2, 0, 0))
            facts.add_column(style="bold", no_wrap=True)
            facts.add_column(overflow="fold")
            for name, value in rows:
                facts.add_row(name, _rich_text(value))
            return facts
        case Grid(header, rows, folded):
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
            for title in header:
                table.add_column(title, overflow="fold", no_wrap=folded is not None and title not in folded)
            for row in rows:
                table.add_row(*map(_rich_text, row))
            return table
        case Lines(lines, indent):
            return Padding(Group(*map(_rich_text, lines)), (0, 0, 0, indent))


def _rich_text(cell: Cell) -> Text:
    return Text(_text(cell), style=cell.style if isinstance(cell, Styled) else "")
