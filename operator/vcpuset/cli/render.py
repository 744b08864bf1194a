"""Prints results: for a person at a terminal, as plain text for pipes and files, or as JSON and YAML.

Only imported by the commands that print results: the operator does not need rich, which takes memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import click
import yaml
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
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
    "Listing",
    "Output",
    "Styled",
    "aligned",
    "plain",
    "renderable",
    "show",
    "terminal",
]

Output = Literal["table", "json", "yaml"]

_FITTED_ROWS: Final = 500
"""Rich takes seconds to fit thousands of rows to a terminal; a longer table is printed unfitted."""

_PROSE_WIDTH: Final = 40
"""The width of a column with sentences that a terminal must have, at least."""

_GAP: Final = 2
"""Between two columns."""

_UNKNOWN_SIZE: Final = frozenset({("COLUMNS", "0"), ("LINES", "0")})
_NOTHING: Final = "-"
"""A cell that has nothing to say."""

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
    """A table. On a terminal that is too narrow for it, the cells of all columns are broken into lines."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Listing:
    """A table as kubectl prints one, whose words are never broken.

    On a terminal that is too narrow, columns in which no row has anything are left out. If this is not enough, what
    names a row and what is prose are lines of their own.

    labels  how many of the first columns name a row
    prose   the last column has sentences, which a narrow terminal breaks into lines
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    labels: int = 1
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Lines:
    """Sentences, one per line; `indent` in spaces."""

    lines: Sequence[Cell]
    indent: int = 0


Block = Heading | Facts | Grid | Listing | Lines


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
                if isinstance(block, Grid | Listing) and len(block.rows) > _FITTED_ROWS:
                    _print_plain(block)
                else:
                    console.print(renderable(block))
        case "table":
            for block in page:
                _print_plain(block)


def terminal() -> Console:
    """Standard output, which is a terminal."""
    # Some programs set COLUMNS=0 where they do not know the width; rich would print nothing.
    known = {name: value for name, value in os.environ.items() if (name, value) not in _UNKNOWN_SIZE}
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, _environ=known)


def _print_plain(block: Block) -> None:
    for line in _plain(block):
        click.echo(line.rstrip())


def plain(cell: Cell) -> str:
    """A cell without its style."""
    return printable(cell.text if isinstance(cell, Styled) else cell)


def _plain(block: Block) -> list[str]:
    match block:
        case Heading(text):
            return [printable(text)]
        case Facts(rows):
            return aligned([[f"{name}:", plain(value)] for name, value in rows])
        case Grid(header, rows):
            texts = [[plain(cell) for cell in row] for row in rows]
            return ["", *aligned([header, *texts]), ""]
        case Listing(header, rows):
            return aligned([header, *[[plain(cell) for cell in row] for row in rows]])
        case Lines(lines, indent):
            return [" " * indent + plain(line) for line in lines]


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
        case Grid(header, rows):
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
            for title in header:
                table.add_column(title, overflow="fold")
            for row in rows:
                table.add_row(*map(_rich_text, row))
            return table
        case Listing():
            return _Fitted(block)
        case Lines(lines, indent):
            return Padding(Group(*map(_rich_text, lines)), (0, 0, 0, indent))


def _rich_text(cell: Cell) -> Text:
    return Text(plain(cell), style=cell.style if isinstance(cell, Styled) else "")


class _Fitted:
    """A `Listing` in the form that the terminal is wide enough for."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for listing in (self._listing, _without_empty_columns(self._listing)):
            widths = _widths(listing)
            if sum(widths) + _GAP * (len(widths) - 1) <= options.max_width:
                yield _table(listing)
                return
        yield from _stacked(listing, widths)


def _widths(listing: Listing) -> list[int]:
    rows = [[plain(cell) for cell in row] for row in listing.rows]
    widths = [max(map(cell_len, column)) for column in zip(listing.header, *rows, strict=True)]
    if listing.prose:
        widths[-1] = min(widths[-1], _PROSE_WIDTH)
    return widths


def _without_empty_columns(listing: Listing) -> Listing:
    shown = [
        place
        for place, column in enumerate(zip(*listing.rows, strict=True))
        if place < listing.labels or any(plain(cell) != _NOTHING for cell in column)
    ]
    prose = listing.prose and len(listing.header) - 1 in shown
    rows = [[row[place] for place in shown] for row in listing.rows]
    return Listing([listing.header[place] for place in shown], rows, listing.labels, prose) if rows else listing


def _table(listing: Listing) -> Table:
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for place, title in enumerate(listing.header, 1):
        table.add_column(title, no_wrap=not (listing.prose and place == len(listing.header)))
    for row in listing.rows:
        table.add_row(*map(_rich_text, row))
    return table


def _stacked(listing: Listing, widths: Sequence[int]) -> RenderResult:
    cells = slice(listing.labels, len(widths) - listing.prose)
    indent = _GAP if listing.labels else 0
    titles = [Styled(title, "bold") for title in listing.header]
    for row in (titles, *listing.rows):
        if listing.labels:
            yield Text("/".join(map(plain, row[: listing.labels])), style="bold", overflow="fold")
        yield _line(row[cells], widths[cells], indent)
        if listing.prose and row is not titles and plain(row[-1]) != _NOTHING:
            yield Padding(_rich_text(row[-1]), (0, 0, 0, _GAP))


def _line(cells: Sequence[Cell], widths: Sequence[int], indent: int) -> Text:
    line = Text(" " * indent, overflow="fold")
    for cell, width in zip(cells, widths, strict=True):
        line.append_text(_rich_text(cell)).append(" " * (width + _GAP - cell_len(plain(cell))))
    line.rstrip()
    return line
