"""`kubectl vcpuset status` and `top`: VCPUSets as tables, once or as they change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vcpuset.cli.kubectl.follow import Key, follow
from vcpuset.cli.render import STATE_COLOURS, Block, Cell, Listing, Styled, aligned, plain, renderable, terminal
from vcpuset.cli.text import age, count, monitor, printable
from vcpuset.domain.errors import APIError, ObjectGone
from vcpuset.domain.reasons import State
from vcpuset.domain.report import UNREPORTED, state_of
from vcpuset.domain.resource import VCPUSet

if TYPE_CHECKING:
    from vcpuset.kube.user import Busy, UserAPI

__all__ = [
    "Row",
    "busy_of",
    "frame",
    "lines",
    "live",
    "rows_of",
    "status_document",
    "status_page",
    "top_document",
    "top_page",
]

AT_ONCE: Final = 8
"""How many namespaces are asked at once how busy their machines are."""

BUSY_SECONDS: Final = 15.0
"""How often a live table asks how busy the machines are. The operator takes a sample every 5 s at most."""

FRAME_SECONDS: Final = 0.25
"""The least time between two frames of a live table."""

AGE_SECONDS: Final = 1.0
"""How often a live table is drawn although nothing has changed, because times pass."""


@dataclass(frozen=True, slots=True)
class Row:
    """A VCPUSet, and how busy its vCPUs are; None: not known."""

    vcpuset: VCPUSet
    busy: Busy | None


async def rows_of(api: UserAPI, namespace: str | None, tell: Callable[[str], None]) -> list[Row]:
    """The sets of a namespace (None: of all) by name. `tell` is as in `busy_of`. Raises APIError."""
    sets = sorted(await api.sets(namespace), key=lambda each: (each.namespace, each.name))
    busy = await busy_of(api, sorted({each.namespace for each in sets}), tell)
    return [Row(each, busy.get((each.namespace, each.name))) for each in sets]


async def busy_of(api: UserAPI, namespaces: Sequence[str], tell: Callable[[str], None]) -> Mapping[Key, Busy]:
    """How busy the machines of these namespaces are, as far as it is known.

    tell  called with the reason if they could not be asked; that nothing is known of any is no news
    """
    turns = asyncio.Semaphore(AT_ONCE)

    async def ask(namespace: str) -> Mapping[Key, Busy]:
        try:
            async with turns:
                found = await api.busy(namespace)
        except ObjectGone:
            return {}
        except APIError as error:
            tell(f"BUSY is unknown: {error}")
            return {}
        return {(namespace, name): busy for name, busy in found.items()}

    return {key: busy for found in await asyncio.gather(*map(ask, namespaces)) for key, busy in found.items()}


def status_page(rows: Sequence[Row], now: datetime, *, everywhere: bool, wide: bool) -> list[Block]:
    """A table with one line for each set."""
    header = [*(["NAMESPACE"] if everywhere else []), "NAME", *_COUNTS, "READY", "REASON", "SINCE"]
    header += ["NODE", "MESSAGE"] if wide else []
    cells = [_status_cells(row, now, everywhere=everywhere, wide=wide) for row in rows]
    return [Listing(header, cells, labels=1 + everywhere, prose=wide)]


_COUNTS: Final = ("DESIRED", "CURRENT", "ONLINE", "BUSY")


def _status_cells(row: Row, now: datetime, *, everywhere: bool, wide: bool) -> list[Cell]:
    vcpuset = row.vcpuset
    status, spec = vcpuset.status, vcpuset.spec
    state, reason = state_of(vcpuset)
    colour = STATE_COLOURS[state]
    cells: list[Cell] = [vcpuset.namespace] if everywhere else []
    cells += [vcpuset.name, count(spec.vcpus), count(status.vcpus), count(status.online_vcpus), _busy(row)]
    cells += [Styled(_ready(vcpuset), colour), Styled(reason, colour), _since(vcpuset, now)]
    if wide:
        message = "" if status.ready is None or reason == UNREPORTED else status.ready.message
        cells += [vcpuset.node_name or "-", message or "-"]
    return cells


def _ready(vcpuset: VCPUSet) -> str:
    state, reason = state_of(vcpuset)
    if state is State.UNKNOWN or reason == UNREPORTED:
        return "Unknown"
    return str(state is State.READY)


def _since(vcpuset: VCPUSet, now: datetime) -> str:
    ready = vcpuset.status.ready
    return "-" if ready is None or state_of(vcpuset)[1] == UNREPORTED else age(ready.last_transition_time, now)


def _busy(row: Row) -> str:
    return "-" if row.busy is None else f"{row.busy.vcpus:.1f}"


def status_document(rows: Sequence[Row]) -> dict[str, Any]:
    """The result for programs."""
    return {"items": [_item(row) for row in rows]}


def _item(row: Row) -> dict[str, Any]:
    vcpuset = row.vcpuset
    status, ready = vcpuset.status, vcpuset.status.ready
    state, reason = state_of(vcpuset)
    known = ready is not None and reason != UNREPORTED
    return {
        "namespace": vcpuset.namespace,
        "name": vcpuset.name,
        "desiredVCPUs": vcpuset.spec.vcpus,
        "vcpus": status.vcpus,
        "onlineVCPUs": status.online_vcpus,
        "busyVCPUs": None if row.busy is None else row.busy.vcpus,
        "ready": _ready(vcpuset),
        "state": state.value,
        "reason": reason,
        "message": ready.message if known and ready is not None else None,
        "since": ready.last_transition_time.strftime("%Y-%m-%dT%H:%M:%SZ") if known and ready is not None else None,
        "nodeName": vcpuset.node_name,
        "monitor": monitor(vcpuset),
    }


# --- top --------------------------------------------------------------------------------------------------------------


def top_page(rows: Sequence[Row], *, everywhere: bool) -> list[Block]:
    """A table with one line for each set; the busiest of what it has first, those that are not known last."""
    header = [*(["NAMESPACE"] if everywhere else []), "NAME", "BUSY", "CURRENT", "DESIRED", "BUSY%", "WINDOW"]
    cells = [_top_cells(row, everywhere=everywhere) for row in sorted(rows, key=_idleness)]
    return [Listing(header, cells, labels=1 + everywhere)]


def _idleness(row: Row) -> tuple[float, str, str]:
    share = _share(row)
    return (1.0 if share is None else -share, row.vcpuset.namespace, row.vcpuset.name)


def _share(row: Row) -> float | None:
    return row.busy.vcpus / row.vcpuset.status.vcpus if row.busy is not None and row.vcpuset.status.vcpus else None


def _top_cells(row: Row, *, everywhere: bool) -> list[Cell]:
    share = _share(row)
    cells: list[Cell] = [row.vcpuset.namespace] if everywhere else []
    cells += [row.vcpuset.name, _busy(row), count(row.vcpuset.status.vcpus), count(row.vcpuset.spec.vcpus)]
    cells.append("-" if share is None else f"{share:.0%}")
    cells.append("-" if row.busy is None else f"{row.busy.seconds:g}s")
    return cells


def top_document(rows: Sequence[Row]) -> dict[str, Any]:
    """The result for programs."""
    return {
        "items": [
            {
                "namespace": row.vcpuset.namespace,
                "name": row.vcpuset.name,
                "busyVCPUs": None if row.busy is None else row.busy.vcpus,
                "windowSeconds": None if row.busy is None else row.busy.seconds,
                "vcpus": row.vcpuset.status.vcpus,
                "desiredVCPUs": row.vcpuset.spec.vcpus,
            }
            for row in rows
        ]
    }


# --- as they change ---------------------------------------------------------------------------------------------------


async def lines(api: UserAPI, namespace: str | None, *, wide: bool) -> None:
    """Print the table, and then a line for each set that has changed, as `kubectl get --watch` does. Endless."""
    known: dict[Key, list[str]] = {}
    widths: list[int] = []

    def tell(words: str) -> None:
        click.echo(words, err=True)

    async for sets in follow(api, namespace, None, tell):
        busy: Mapping[Key, Busy] = {}
        if not widths:
            busy = await busy_of(api, sorted({key[0] for key in sets}), tell)
        rows = [Row(each, busy.get(key)) for key, each in sorted(sets.items())]
        (table,) = status_page(rows, datetime.now(UTC), everywhere=namespace is None, wide=wide)
        assert isinstance(table, Listing)
        texts = [[plain(cell) for cell in row] for row in table.rows]
        # What passes by itself is no change.
        passing = {table.header.index("BUSY"), table.header.index("SINCE")}
        news = []
        for key, text in zip(sorted(sets), texts, strict=True):
            seen = [cell for place, cell in enumerate(text) if place not in passing]
            if known.get(key) != seen:
                known[key] = seen
                news.append(text)
        for gone in known.keys() - sets.keys():
            del known[gone]
        if not widths:
            news.insert(0, list(table.header))
            widths = [max(map(cell_len, column)) for column in zip(*news, strict=True)]
        for line in aligned(news, widths) if news else ():
            click.echo(line.rstrip())


async def live(api: UserAPI, namespace: str | None, *, wide: bool) -> None:
    """A table that follows the changes, on the whole terminal. Endless."""
    sets: Mapping[Key, VCPUSet] = {}
    busy: Mapping[Key, Busy] = {}
    trouble = "connecting"
    changed = asyncio.Event()

    def tell(words: str) -> None:
        nonlocal trouble
        trouble = words
        changed.set()

    async def watch() -> None:
        nonlocal sets, trouble
        async for state in follow(api, namespace, None, tell):
            sets, trouble = dict(state), ""
            changed.set()

    async def measure() -> None:
        nonlocal busy
        while True:
            await changed.wait()
            busy = await busy_of(api, sorted({key[0] for key in sets}), tell)
            changed.set()
            await asyncio.sleep(BUSY_SECONDS)

    console = terminal()
    tasks = [asyncio.create_task(watch(), name="watch"), asyncio.create_task(measure(), name="busy vCPUs")]
    try:
        with Live(console=console, auto_refresh=False, screen=True) as screen:
            while not any(task.done() for task in tasks):
                rows = [Row(each, busy.get(key)) for key, each in sorted(sets.items())]
                picture = frame(rows, trouble, console, everywhere=namespace is None, wide=wide)
                screen.update(picture, refresh=True)
                news = asyncio.ensure_future(changed.wait())
                await asyncio.wait({*tasks, news}, timeout=AGE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                changed.clear()
                await asyncio.sleep(FRAME_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


def frame(rows: Sequence[Row], trouble: str, console: Console, *, everywhere: bool, wide: bool) -> RenderableType:
    """As many sets as the terminal has lines for; those that are not Ready first, if it has not enough."""
    now, height = datetime.now(UTC), max(console.height - 1, 1)
    ready = sum(state_of(row.vcpuset)[0] is State.READY for row in rows)
    urgent = sorted(rows, key=lambda row: state_of(row.vcpuset)[0] is State.READY)
    shown = list(rows) if len(rows) <= height else urgent[:height]
    while True:
        left = f", {len(shown)} shown" if len(shown) < len(rows) else ""
        summary = f"{len(rows)} VCPUSets, {ready} Ready{left}; {now:%H:%M:%S} UTC; Ctrl-C ends"
        parts: list[RenderableType] = [Text(summary, style="bold")]
        parts += [Text(printable(trouble), style="yellow")] if trouble else []
        parts += [renderable(block) for block in status_page(shown, now, everywhere=everywhere, wide=wide)]
        picture = Group(*parts)
        needed = len(console.render_lines(picture))
        if needed <= height or len(shown) <= 1:
            return picture
        shown = urgent[: max(1, len(shown) * height // needed - 1)]
