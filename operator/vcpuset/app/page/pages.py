"""The requests of the status page: the list, a set's page, their events, and the two files that they load."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from typing import Any, Final

from aiohttp import web
from jinja2 import DictLoader, Environment, StrictUndefined

from vcpuset.app.page.drawing import Chart, SlotMap
from vcpuset.app.page.feed import Feed
from vcpuset.app.page.journal import Journal
from vcpuset.app.page.views import STATES, Query, Row, clock_time, count, duration, scope_words
from vcpuset.domain.machine import Machine
from vcpuset.domain.report import state_of
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Scope
from vcpuset.qmp.meters import Meters

__all__ = ["ROWS", "StatusPage"]

ROWS: Final = 1000
"""The list shows at most so many rows; a filter shows the others."""

AT_ONCE: Final = 100
"""After changes of more sets than this, a browser loads the list again, and is not sent every row."""

SECURITY: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_FILES: Final = {"page.css": "text/css", "page.js": "text/javascript"}


class StatusPage:
    """The page of one process. Its files are read once.

    cache     the sets
    meters    how busy they are
    machine   a set's machine as last observed; None: never
    scope     which sets this process manages
    absence   in words: why there are none, while there are none
    """

    def __init__(
        self,
        cache: Cache,
        meters: Meters,
        machine: Callable[[UID], Machine | None],
        scope: Scope,
        absence: Callable[[], str],
    ) -> None:
        self._cache, self._meters, self._machine, self._absence = cache, meters, machine, absence
        self._feed = Feed()
        self.journal = Journal(self._feed.changed)
        folder = resources.files(__package__)
        templates = {each.name: each.read_text("utf-8") for each in folder.iterdir() if each.name.endswith(".html")}
        self._files = {name: folder.joinpath(name).read_text("utf-8") for name in _FILES}
        # All that is inserted is escaped. A template is compiled at its first use, so that the operator starts fast.
        self._jinja = Environment(
            loader=DictLoader(templates),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._jinja.filters |= {"count": count, "duration": duration, "utc": clock_time}
        self._jinja.globals |= {"scope": scope_words(scope), "version": metadata.version("vcpuset"), "states": STATES}
        # One at a time: many requests must not start many threads.
        self._writing = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """The routes, all of them to read only."""
        return [
            web.get("/", self._show_list),
            web.get("/events", self._list_events, allow_head=False),
            web.get("/sets/{namespace}/{name}", self._show_set),
            web.get("/sets/{namespace}/{name}/events", self._set_events, allow_head=False),
            *(web.get(f"/{name}", self._show_file) for name in _FILES),
        ]

    def close(self) -> None:
        """End all event streams now."""
        self._feed.close()

    async def _show_list(self, request: web.Request) -> web.Response:
        query, version = Query.of(request.query), self._feed.version
        rows = self._rows(list(self._cache))

        def write() -> str:
            found = query.select(rows)
            return self._jinja.get_template("list.html").render(
                root="",
                events=f"events?version={version}",
                query=query,
                rows=found[:ROWS],
                found=len(found),
                counts=Counter(row.state for row in rows),
                total=len(rows),
                absence=None if rows else self._absence(),
                now=datetime.now(UTC),
            )

        # With a thousand sets it takes some hundredths of a second, so a thread writes it, from a copy.
        async with self._writing:
            return _html(await asyncio.to_thread(write))

    async def _list_events(self, request: web.Request) -> web.StreamResponse:
        def render(dirty: list[UID]) -> str | None:
            sets = [vcpuset for uid in dirty if (vcpuset := self._cache.get(uid)) is not None]
            if len(sets) < len(dirty) or len(sets) > AT_ONCE:
                return None
            parts, now = self._parts(), datetime.now(UTC)
            counts = Counter(state_of(vcpuset)[0] for vcpuset in self._cache)
            numbers = "".join(parts.number(state, counts) for state in STATES)
            return _line(f"{numbers}<table>{''.join(parts.row(row, now) for row in self._rows(sets))}</table>")

        return await self._feed.serve(request, None, render)

    async def _show_set(self, request: web.Request) -> web.Response:
        if (vcpuset := self._asked(request)) is None:
            gone = self._jinja.get_template("gone.html")
            return _html(gone.render(root="../../", events="", **request.match_info), status=404)
        known = self._known(vcpuset)
        events = f"{vcpuset.name}/events?version={self._feed.version}"

        def write() -> str:
            return self._jinja.get_template("set.html").render(root="../../", events=events, **known)

        async with self._writing:
            return _html(await asyncio.to_thread(write))

    async def _set_events(self, request: web.Request) -> web.StreamResponse:
        if (vcpuset := self._asked(request)) is None:
            return web.Response(status=404, text="this operator does not manage this VCPUSet\n", headers=SECURITY)
        uid = vcpuset.uid

        def render(_: list[UID]) -> str | None:
            known = self._cache.get(uid)
            return None if known is None else _line(self._parts().live(**self._known(known)))

        return await self._feed.serve(request, uid, render)

    async def _show_file(self, request: web.Request) -> web.Response:
        name = request.path.removeprefix("/")
        headers = {**SECURITY, "Cache-Control": "no-cache"}
        return web.Response(text=self._files[name], content_type=_FILES[name], charset="utf-8", headers=headers)

    def _parts(self) -> Any:  # noqa: ANN401 - jinja2 sets a template's macros as attributes at run time, so no type has them
        return self._jinja.get_template("parts.html").module

    def _asked(self, request: web.Request) -> VCPUSet | None:
        asked = (request.match_info["namespace"], request.match_info["name"])
        return next((each for each in self._cache if (each.namespace, each.name) == asked), None)

    def _rows(self, sets: Sequence[VCPUSet]) -> list[Row]:
        found = ((vcpuset, self._meters.last(vcpuset.uid)) for vcpuset in sets)
        return [Row.of(vcpuset, None if busy is None else busy.busy) for vcpuset, busy in found]

    def _known(self, vcpuset: VCPUSet) -> dict[str, object]:
        """All that a set's page shows."""
        (row,) = self._rows([vcpuset])
        machine, entries, now = self._machine(vcpuset.uid), self.journal.of(vcpuset.uid), time.time()
        return {
            "row": row,
            "machine": machine,
            "slots": None if machine is None else SlotMap.of(machine, vcpuset.status.pending_unplugs),
            "chart": Chart.of(entries, now),
            "entries": entries[::-1],
            "now": datetime.fromtimestamp(now, UTC),
        }


def _html(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="text/html", charset="utf-8", headers=SECURITY)


def _line(text: str) -> str:
    """In one line, as an event needs it."""
    return " ".join(text.splitlines())
