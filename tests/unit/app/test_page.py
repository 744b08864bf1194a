"""The status page over a real socket: what it shows, that nothing in it is a command, and its events."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser

import aiohttp
import pytest

from harness.wait import until
from unit.app.pages import Pages
from unit.domain.builders import a_machine, a_request
from vcpuset.app.page import feed
from vcpuset.app.page import pages as page_module
from vcpuset.app.page.pages import AT_ONCE, ROWS
from vcpuset.domain import busy
from vcpuset.domain.busy import Used
from vcpuset.domain.machine import Answer
from vcpuset.domain.reasons import State
from vcpuset.kube.cluster import Scope

__all__: list[str] = []

WAIT = 30.0

EVIL = """<script>alert(1)</script>"'&\r\nevent: x\n\ndata: y"""


@dataclass(frozen=True)
class Answered:
    """One answer."""

    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def names(self) -> list[str]:
        """The names of the listed sets, in order."""
        return re.findall(r'<a href="sets/[^/]+/([^"]+)">', self.body)

    def cells(self, name: str) -> list[str]:
        """The words in the cells of a listed set's row, but for its name."""
        row = re.search(rf'<tr id="set-uid-[a-z-]+-{name}">.*?</tr>', self.body, re.DOTALL)
        assert row is not None, self.body
        found = re.findall(r"<td[^>]*>(.*?)</td>", row[0], re.DOTALL)
        return [html.unescape(re.sub(r"<[^>]+>", "", each)) for each in found]


class Stream:
    """An open stream of events. `read` has the fields of its next message, but for comments."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer

    async def read(self) -> dict[str, str]:
        async with asyncio.timeout(WAIT):
            while True:
                fields: dict[str, str] = {}
                while line := (await self.answer.content.readline()).decode():
                    if line == "\n":
                        break
                    name, _, value = line.rstrip("\n").partition(": ")
                    fields[name] = value
                else:
                    raise EOFError
                if {"data", "event"} & fields.keys():
                    return fields

    async def comment(self) -> str:
        async with asyncio.timeout(WAIT):
            while not (line := (await self.answer.content.readline()).decode()).startswith(":"):
                pass
            return line


class Reader:
    """Somebody with a browser."""

    def __init__(self, pages: Pages, client: aiohttp.ClientSession) -> None:
        self._pages, self._client = pages, client

    async def get(self, path: str, method: str = "GET") -> Answered:
        async with self._client.request(method, f"{self._pages.url}{path}") as answer:
            return Answered(answer.status, dict(answer.headers), await answer.text())

    @contextlib.asynccontextmanager
    async def stream(self, path: str, version: str | None = None) -> AsyncIterator[Stream]:
        """The events of a page that shows the present state, or that of a version."""
        known = self._pages.page._feed.version if version is None else version
        async with self._client.get(f"{self._pages.url}{path}?version={known}") as answer:
            assert answer.status == 200, await answer.text()
            yield Stream(answer)


@pytest.fixture
async def pages() -> AsyncIterator[Pages]:
    found = Pages()
    async with found.serving():
        yield found


@pytest.fixture
async def reader(pages: Pages) -> AsyncIterator[Reader]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), connector=connector) as client:
        yield Reader(pages, client)


# --- the list ---------------------------------------------------------------------------------------------------------


async def test_each_set_is_a_row_with_its_counts_state_and_reason(
    pages: Pages, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy, "SHORTEST_SECONDS", 1.0)
    vcpuset = pages.put("web", 6, 4, State.RECONCILING, "Plugging", online=3)
    loop, machine = asyncio.get_running_loop(), a_machine(boot=range(4))
    pages.meters.from_agent(vcpuset.uid, machine, {0: Used(10.0), 1: Used(10.0)})
    await until(lambda: loop.time() > _sampled(pages) + 1, WAIT, "a second after the first sample")
    pages.meters.from_agent(vcpuset.uid, machine, {0: Used(1000.0), 1: Used(1000.0)})

    cells = (await reader.get("/")).cells("web")

    assert cells[:7] == ["Reconciling", "6", "4", "3", "2.0", "Plugging", cells[6]]
    assert re.fullmatch(r"\d+ d \d+ h|\d+ h \d\d min", cells[6]), "since the time of the condition"


def _sampled(pages: Pages) -> float:
    (known,) = pages.meters._sets.values()
    assert known.meter.sampled is not None
    return known.meter.sampled


async def test_what_is_not_known_is_a_dash(pages: Pages, reader: Reader) -> None:
    pages.put("web", None, None)
    assert (await reader.get("/")).cells("web")[1:5] == ["\N{EN DASH}"] * 4


async def test_what_needs_somebody_comes_first(pages: Pages, reader: Reader) -> None:
    pages.put("a")
    pages.put("b", state=State.RECONCILING, reason="Plugging")
    pages.put("c", state=State.STALLED, reason="UnplugRefused")
    pages.put("d", namespace="alpha")
    assert (await reader.get("/")).names == ["c", "b", "d", "a"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        pytest.param("?sort=current", ["a", "b", "c"], id="ascending"),
        pytest.param("?sort=-current", ["b", "a", "c"], id="descending, what is not known last"),
        pytest.param("?sort=-name", ["c", "b", "a"], id="by name"),
        pytest.param("?sort=since", ["c", "a", "b"], id="the latest first"),
        pytest.param("?state=Stalled", ["c"], id="one state"),
        pytest.param("?q=unplug", ["c"], id="a reason"),
        pytest.param("?q=DEFAULT/b+ready", ["b"], id="all words, in any case"),
        pytest.param("?q=nothing", [], id="none"),
        pytest.param("?sort=pod&state=Odd", ["c", "a", "b"], id="what is not valid is ignored"),
    ],
)
async def test_the_list_is_sorted_and_filtered_by_its_address(
    pages: Pages, reader: Reader, query: str, names: list[str]
) -> None:
    pages.put("a", current=2, since=100)
    pages.put("b", current=10, since=1000)
    pages.put("c", current=None, state=State.STALLED, reason="UnplugRefused", since=10)
    found = await reader.get(f"/{query}")
    assert found.names == names
    assert ("No VCPUSet matches" in found.body) is (not names)


async def test_a_process_without_sets_says_why_and_a_list_says_whose_sets_they_are() -> None:
    pages = Pages(Scope("node-1", ("team-a",), "shard=2"))
    async with pages.serving(), aiohttp.ClientSession() as client:
        found = await Reader(pages, client).get("/")
    assert "There are no VCPUSets." in found.body
    assert "Node node-1 · namespace team-a · shard=2" in found.body


async def test_a_thousand_sets_are_shown_and_of_more_the_first_thousand(pages: Pages, reader: Reader) -> None:
    for number in range(ROWS + 1):
        pages.put(f"vm-{number:04}")
    found = await reader.get("/")
    assert found.names == [f"vm-{number:04}" for number in range(ROWS)]
    assert f"The first {ROWS} of {ROWS + 1}." in found.body
    assert (await reader.get("/?q=1000")).names == ["vm-1000"]


# --- one set ----------------------------------------------------------------------------------------------------------


async def test_a_sets_page_has_its_counts_reason_message_and_remedy(pages: Pages, reader: Reader) -> None:
    pages.put("web", 3, 6, State.STALLED, "UnplugRefused", "The guest refused.", online=5)
    found = await reader.get("/sets/default/web")
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", found.body))
    assert figures == {
        "Desired": "3",
        "Current": "6",
        "Online in the guest": "5",
        "Busy": "\N{EN DASH}",
        "Possible": "1\N{EN DASH}8",
    }
    for text in ("The guest refused.", "or declare more vCPUs.", "has not observed the machine yet"):
        assert text in found.body


async def test_each_slot_is_drawn_by_what_it_holds(pages: Pages, reader: Reader) -> None:
    machine = a_machine(boot=(0, 1), plugged=(2, 3, 4), slots=20)
    requests = (a_request(3), a_request(4, answer=Answer.BUSY, attempts=3), a_request(2, thread_id=7))
    pages.put("web", 2, 5, machine=machine, requests=requests)
    found = await reader.get("/sets/default/web")
    drawn = re.findall(r'<use href="#(\w+)" x="(\d+)" y="(\d+)"', found.body)
    assert [kind for kind, *_ in drawn] == ["boot", "boot", "plugged", "pending", "refused", *["free"] * 15]
    assert drawn[16][1:] == ("34", "23"), "the seventeenth begins the second row"
    legend = re.findall(r'</svg>([^<]+)</th><td class="number">(\d+)</td><td>(.*?)</td>', found.body)
    assert [(count, which) for _, count, which in legend] == [
        ("2", "0\N{EN DASH}1"),
        ("1", "2"),
        ("1", "3"),
        ("1", "4"),
        ("15", "5\N{EN DASH}19"),
    ]
    assert "device busy (_OST 0x82)" in found.body
    assert "none yet" in found.body


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        pytest.param(a_machine(slots=None), "its type does not support CPU hotplug", id="none"),
        pytest.param(a_machine(threads=8), "Each slot is a core of 8 vCPUs.", id="cores"),
        pytest.param(a_machine(run_state="paused"), "the machine is paused", id="paused"),
    ],
)
async def test_a_machine_that_is_special_is_described(
    pages: Pages, reader: Reader, machine: object, words: str
) -> None:
    pages.put("web", machine=machine)  # type: ignore[arg-type]
    assert words in (await reader.get("/sets/default/web")).body


async def test_a_machine_with_the_most_slots_is_drawn(pages: Pages, reader: Reader) -> None:
    pages.put("web", machine=a_machine(slots=4096))
    found = await reader.get("/sets/default/web")
    assert found.body.count('<use href="#free"') == 4095, "and one in the legend"
    assert "2\N{EN DASH}4095" in found.body


async def test_transitions_are_listed_the_latest_first(pages: Pages, reader: Reader) -> None:
    pages.put("web", 2, 2)
    pages.put("web", 6, 2, State.RECONCILING, "Plugging", "2 vCPUs present, 6 declared.")
    pages.put("web", 6, 6)
    found = await reader.get("/sets/default/web")
    rows = re.findall(r'data-label="Desired">(.*?)</td><td[^>]*>(.*?)</td><td class="words"><b>(.*?)</b>', found.body)
    assert rows == [("6", "6", "Converged"), ("6", "2", "Plugging"), ("2", "2", "Converged")]
    assert "2 vCPUs present, 6 declared." in found.body


async def test_a_set_that_is_not_managed_here_is_not_found(pages: Pages, reader: Reader) -> None:
    pages.put("web")
    for path in ("/sets/default/db", "/sets/team-a/web", "/sets/default/db/events", "/sets/default", "/page.html"):
        assert (await reader.get(path)).status == 404, path


# --- security ---------------------------------------------------------------------------------------------------------


class Strict(HTMLParser):
    """Collects what could run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Scripts, styles and handlers that are not in the page's own two files."""
        known = dict(attrs)
        if (tag == "script" and not (known.get("src") or "").endswith("page.js")) or tag in {"style", "iframe"}:
            self.found.append(tag)
        self.found += [name for name in known if name.startswith("on") or name == "style"]


async def test_no_text_of_users_or_machines_is_markup(pages: Pages, reader: Reader) -> None:
    pages.put(EVIL, state=State.STALLED, reason=EVIL, message=EVIL, machine=a_machine(run_state=EVIL))
    for path in ("/", "/?q=%22%3E%3Cscript%3E&sort=name", f"/sets/default/{_quoted(EVIL)}", "/sets/%3Cscript%3E/x"):
        found = await reader.get(path)
        assert found.status in {200, 404}
        parser = Strict()
        parser.feed(found.body)
        assert parser.found == [], path
        assert "<script>" not in found.body


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


async def test_a_message_with_line_ends_cannot_forge_an_event(pages: Pages, reader: Reader) -> None:
    pages.put("web")
    async with reader.stream("/sets/default/web/events") as stream:
        pages.put("web", state=State.STALLED, reason="UnplugRefused", message=EVIL)
        message = await stream.read()
        assert message.keys() == {"id", "data"}
        assert "&lt;script&gt;" in message["data"]


@pytest.mark.parametrize("path", ["/", "/sets/default/web", "/sets/default/db", "/page.css", "/page.js"])
async def test_pages_may_load_nothing_from_elsewhere_and_run_nothing_of_their_own_text(
    pages: Pages, reader: Reader, path: str
) -> None:
    pages.put("web")
    headers = (await reader.get(path)).headers
    policy = dict(each.strip().split(" ", 1) for each in headers["Content-Security-Policy"].split(";"))
    assert policy.pop("img-src") == "data:"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"


async def test_all_links_are_relative_so_that_a_proxy_may_add_a_prefix(pages: Pages, reader: Reader) -> None:
    pages.put("web")
    for path in ("/", "/sets/default/web", "/sets/default/db"):
        links = re.findall(r'(?:href|src|action|data-events)="([^"]*)"', (await reader.get(path)).body)
        assert links
        assert [link for link in links if re.match(r"/|https?:", link)] == []


@pytest.mark.parametrize("path", ["/", "/sets/default/web", "/page.css"])
async def test_a_page_can_be_asked_for_by_head_and_not_written_to(pages: Pages, reader: Reader, path: str) -> None:
    pages.put("web")
    head = await reader.get(path, "HEAD")
    assert (head.status, head.body) == (200, "")
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        refused = await reader.get(path, method)
        assert (refused.status, refused.headers["Allow"]) == (405, "GET,HEAD")


async def test_a_request_that_is_not_http_is_refused_without_a_traceback_in_the_log(
    pages: Pages, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(pages.url.rpartition(":")[2])
    for request in ("GET / HTTP/1.1\r\n\r\n", "GET * HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02"):
        incoming, outgoing = await asyncio.open_connection("127.0.0.1", port)
        outgoing.write(request.encode())
        async with asyncio.timeout(WAIT):
            assert b" 400 " in await incoming.readline()
        outgoing.close()
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


@pytest.mark.parametrize("path", ["/events", "/sets/default/web/events"])
async def test_events_have_no_head(pages: Pages, reader: Reader, path: str) -> None:
    pages.put("web")
    assert (await reader.get(path, "HEAD")).status == 405


# --- events -----------------------------------------------------------------------------------------------------------


async def test_a_changed_set_is_sent_as_its_row_with_the_counts_of_the_states(pages: Pages, reader: Reader) -> None:
    pages.put("db")
    pages.put("web")
    async with reader.stream("/events") as stream:
        pages.put("web", 4, 2, State.RECONCILING, "Plugging")
        message = await stream.read()
    assert re.findall(r'<tr id="(.*?)"', message["data"]) == ["set-uid-default-web"]
    assert '<b id="number-Ready">1</b>' in message["data"]
    assert '<b id="number-Reconciling">1</b>' in message["data"]


async def test_a_sets_page_is_told_of_its_own_set_only(pages: Pages, reader: Reader) -> None:
    pages.put("db")
    pages.put("web")
    async with reader.stream("/sets/default/web/events") as stream:
        pages.put("db", 4, 2, State.RECONCILING, "Plugging")
        pages.put("web", 8, 2, State.RECONCILING, "Plugging")
        data = (await stream.read())["data"]
    assert data.startswith('<div id="live"')
    assert "<dd>8</dd>" in data


async def test_a_change_is_rendered_once_however_many_pages_are_open(
    pages: Pages, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.put("web")
    rendered: list[str] = []

    def counted(text: str) -> str:
        rendered.append(text)
        return text

    monkeypatch.setattr(page_module, "_line", counted)
    async with contextlib.AsyncExitStack() as stack:
        paths = ["/events"] * 3 + ["/sets/default/web/events"] * 3
        streams = [await stack.enter_async_context(reader.stream(path)) for path in paths]
        pages.put("web", 4)
        received = {(await stream.read())["data"] for stream in streams}
    assert len(received) == 2, "the row, and what is on the set's page"
    assert len(rendered) == 2


async def test_a_change_that_the_page_does_not_show_is_not_sent(pages: Pages, reader: Reader) -> None:
    pages.put("web")
    async with reader.stream("/events") as stream:
        pages.put("web")
        pages.put("db", 7)
        assert re.findall(r'<tr id="(.*?)"', (await stream.read())["data"]) == ["set-uid-default-db"]


async def test_many_changes_at_once_and_a_set_that_is_gone_need_the_whole_list(pages: Pages, reader: Reader) -> None:
    sets = [pages.put(f"vm-{number}") for number in range(AT_ONCE + 1)]
    async with reader.stream("/events") as stream:
        for number in range(AT_ONCE + 1):
            pages.put(f"vm-{number}", 4)
        assert (await stream.read())["event"] == "reload"
        pages.cache.drop(sets[0].uid)
        assert (await stream.read())["event"] == "reload"


async def test_a_page_of_an_older_state_is_told_at_once_and_one_of_this_state_is_not(
    pages: Pages, reader: Reader
) -> None:
    pages.put("web")
    old = pages.page._feed.version
    pages.put("web", 4)
    async with reader.stream("/events", old) as stream:
        message = await stream.read()
        assert (message["event"], message["id"]) == ("reload", pages.page._feed.version)
    async with reader.stream("/events") as stream:
        pages.put("web", 5)
        assert "event" not in await stream.read()


async def test_a_stream_without_changes_has_a_heartbeat(
    pages: Pages, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT_SECONDS", 0.01)
    async with reader.stream("/events") as stream:
        assert await stream.comment() == ": \n"


async def test_there_are_not_more_streams_than_the_limit_and_one_that_ends_makes_room(
    pages: Pages, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LISTENERS", 2)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(reader.stream("/events"))
        async with reader.stream("/events"):
            refused = await reader.get("/events")
            assert (refused.status, refused.headers["Retry-After"]) == (503, "30")

        async def admitted() -> bool:
            async with reader._client.get(f"{pages.url}/events") as answer:
                return answer.status == 200

        await until(admitted, WAIT, "room for another stream")


async def test_a_reader_that_takes_nothing_is_dropped(
    pages: Pages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(feed, "PAUSE_SECONDS", 0.0)
    caplog.set_level("INFO")
    pages.put("web", machine=a_machine(slots=4096))
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", int(pages.url.rpartition(":")[2])))
        await loop.sock_sendall(slow, b"GET /sets/default/web/events HTTP/1.1\r\nHost: x\r\n\r\n")
        counts = iter(range(1, 10**9))

        def dropped() -> bool:
            pages.put("web", next(counts))
            return "did not take its events" in caplog.text

        await until(dropped, WAIT, "the slow reader to be dropped")
        assert not pages.page._feed._listeners


async def test_streams_end_with_the_server_at_once_and_no_new_one_begins(reader: Reader, pages: Pages) -> None:
    async with reader.stream("/events") as one, reader.stream("/events") as other:
        pages.page.close()
        for stream in (one, other):
            with pytest.raises(EOFError):
                await stream.read()
        assert (await reader.get("/events")).status == 503
    assert not pages.page._feed._listeners


async def test_a_stream_sends_nothing_that_a_page_cannot_parse(pages: Pages, reader: Reader) -> None:
    pages.put("web", message=json.dumps({"a": "\u2028\x0b\x85"}))
    async with reader.stream("/sets/default/web/events") as stream:
        pages.put("web", 4, message="\u2028\x0b\x85 end")
        assert "end" in (await stream.read())["data"]
