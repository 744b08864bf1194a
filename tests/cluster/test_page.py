"""The status page in Chromium: what only a browser shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from harness.browser import Tab, browser
from harness.wait import until
from unit.app.pages import Pages
from unit.domain.builders import a_machine, a_request
from vcpuset.domain.machine import Answer
from vcpuset.domain.reasons import State
from vcpuset.domain.resource import UID

__all__: list[str] = []

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT = 30.0

LIST, SET = "/", "/sets/default/web"

_CONTRASTS = """
(() => {
  const number = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = color => number(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if ((number(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const seen = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const symbol = element.matches("symbol [class]:not(.cut)");
    const shape = symbol || element.matches("path.current, path.desired, line.current, line.desired");
    if (!(own || shape) || !(symbol || element.getClientRects().length)) continue;
    const style = getComputedStyle(element);
    const drawn = [style.fill, style.stroke].find(paint => paint.startsWith("rgb"));
    const color = element instanceof SVGElement ? drawn : style.color;
    const place = symbol ? document.querySelector("table, .states a") : element;
    const [a, b] = [light(color), light(behind(place))].sort((x, y) => y - x);
    seen.push([(a + 0.05) / (b + 0.05), own ? 4.5 : 3, element.outerHTML.slice(0, 120)]);
  }
  return seen;
})()
"""
"""Of each text and each meaningful shape: its contrast, the minimum of WCAG 2.2 AA, and its HTML."""


@dataclass
class Shown:
    """A page with VCPUSets, and a browser."""

    pages: Pages
    tab: Tab

    async def go(self, path: str) -> None:
        """Load a page, and wait until changes would be shown."""
        await self.tab.go(f"{self.pages.url}{path}")
        await until(lambda: self.tab.value("link.textContent === 'Live'"), WAIT, "the page to be live")

    def expected(self, status: str) -> None:
        """Forget the problems with this HTTP status, which the test has caused."""
        self.tab.problems[:] = [each for each in self.tab.problems if status not in each]

    async def wait(self, expression: str, what: str) -> None:
        """Wait until a JavaScript expression is true."""
        await until(lambda: self.tab.value(expression), WAIT, what)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab() -> AsyncIterator[Tab]:
    """A browser for all tests, because it takes a second to start."""
    async with browser() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def shown(tab: Tab) -> AsyncIterator[Shown]:
    """A page with a set of each state, one of them in the middle of an unplug, and names as long as they may be."""
    await tab.emulate(1280)
    tab.problems.clear()
    pages = Pages()
    machine = a_machine(boot=(0, 1), plugged=(2, 3, 4), slots=64)
    pages.put("web", 6, 6, machine=machine)
    pages.put(
        "web",
        2,
        5,
        State.STALLED,
        "UnplugRefused",
        "The guest refused: " + "/a/path/of/words/without/any/space" * 4,
        online=5,
        machine=machine,
        requests=(a_request(3), a_request(4, answer=Answer.BUSY)),
    )
    pages.put("n" * 253, 4096, 4, State.RECONCILING, "MonitorUnreachable", namespace="m" * 63, since=400_000)
    pages.put("db", 4, 2, State.HELD, "Suspended", online=2)
    pages.put("api", since=7000)
    pages.put("build", None, None, State.UNKNOWN, "AgentUnavailable")
    async with pages.serving():
        yield Shown(pages, tab)
        assert tab.problems == [], "errors, or something that the page's own policy has blocked"
        await tab.go("about:blank")


async def test_a_phone_shows_every_page_without_scrolling_sideways_and_a_wide_window_too(shown: Shown) -> None:
    for path in (LIST, SET, f"/sets/{'m' * 63}/{'n' * 253}", "/sets/default/none?"):
        for width in (320, 390, 768, 900, 1280):
            await shown.tab.emulate(width)
            await shown.tab.go(f"{shown.pages.url}{path}")
            wide = await shown.tab.value("document.documentElement.scrollWidth")
            assert wide <= width, f"{path} at {width} pixels"
            shown.expected("404")


@pytest.mark.parametrize("dark", [pytest.param(False, id="light"), pytest.param(True, id="dark")])
async def test_all_text_and_all_shapes_stand_out(shown: Shown, dark: bool) -> None:
    await shown.tab.emulate(1000, dark=dark)
    for path in (LIST, f"{LIST}?state=Ready&q=nothing", SET):
        await shown.go(path)
        found = await shown.tab.value(_CONTRASTS)
        assert len(found) > 10
        assert [each for each in found if each[0] < each[1]] == [], path
    page = await shown.tab.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert page is dark


async def test_everything_is_reached_by_keys_and_what_has_the_focus_is_marked(shown: Shown) -> None:
    await shown.go(LIST)
    reached: list[str] = []
    while not reached or reached[-1] != "set-uid-default-api":
        await shown.tab.press("Tab")
        reached.append(
            await shown.tab.value("(e => e.closest('tr')?.id || e.id || e.textContent.trim())(document.activeElement)")
        )
        assert await shown.tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid", reached
        assert len(reached) < 40, reached
    assert "q" in reached
    assert {"set-uid-default-web", "set-uid-default-db"} <= set(reached)

    await shown.tab.press("Enter")
    await shown.wait("location.pathname === '/sets/default/api'", "the set's page")


async def test_the_list_is_filtered_while_typing_and_keeps_what_was_typed(shown: Shown) -> None:
    await shown.go(LIST)
    await shown.tab.value("document.getElementById('q').focus()")
    for key in "web":
        await shown.tab.press(key)
    is_filtered = "location.search === '?q=web' && document.querySelectorAll('.sets tbody tr').length === 1"
    await shown.wait(is_filtered, "one row")
    assert await shown.tab.value("[document.activeElement.id, document.activeElement.value].join()") == "q,web"


async def test_a_column_is_sorted_by_its_link_in_either_direction(shown: Shown) -> None:
    await shown.go(LIST)
    for direction in ("ascending", "descending"):
        await shown.tab.value("document.querySelector('thead a[href*=current]').focus()")
        await shown.tab.press("Enter")
        await shown.wait(f"document.querySelector('[aria-sort]')?.ariaSort === '{direction}'", direction)


async def test_a_change_is_shown_where_the_reader_is_and_takes_nothing_from_them(shown: Shown) -> None:
    await shown.go(LIST)
    await shown.tab.value("window.mine = true; document.querySelector('#set-uid-default-db a').focus()")
    shown.pages.put("db", 9, 9, online=9)
    await shown.wait("document.getElementById('set-uid-default-db').textContent.includes('Converged')", "the change")
    assert await shown.tab.value("document.getElementById('number-Ready').textContent") == "2"
    assert await shown.tab.value("document.activeElement.closest('tr')?.id") == "set-uid-default-db"

    shown.pages.put("a-new-one")
    await shown.wait("document.getElementById('set-uid-default-a-new-one') !== null", "a new set")
    shown.pages.cache.drop(shown.pages.put("api", 5).uid)
    await shown.wait("document.getElementById('set-uid-default-api') === null", "a set that is gone")
    assert await shown.tab.value("window.mine"), "it was never loaded again"


async def test_one_sets_page_follows_its_slots_and_transitions(shown: Shown) -> None:
    await shown.go(SET)
    machine = a_machine(boot=(0, 1), plugged=(2, 3), slots=64)
    shown.pages.put("web", 2, 4, State.RECONCILING, "UnplugPending", machine=machine, requests=(a_request(3),))
    await shown.wait("document.querySelector('.transitions td b').textContent === 'UnplugPending'", "the transition")
    assert await shown.tab.value("document.querySelectorAll('.map use[href=\"#refused\"]').length") == 0
    assert await shown.tab.value("document.querySelectorAll('.map use[href=\"#plugged\"]').length") == 1

    shown.pages.cache.drop(UID("uid-default-web"))
    is_gone = "document.querySelector('h1')?.textContent === 'Not managed' && document.readyState === 'complete'"
    await shown.wait(is_gone, "the set to be gone, and the script of that page to have run")
    shown.pages.put("web")
    await shown.tab.value("void reload()")
    await shown.wait("document.querySelector('h1')?.textContent === 'web'", "the set to be back")
    shown.expected("404")


async def test_a_page_that_has_lost_its_operator_says_so(shown: Shown) -> None:
    await shown.go(LIST)
    shown.pages.page.close()
    await shown.wait("link.textContent.startsWith('Not connected')", "the loss")
    assert not await shown.tab.value("link.classList.contains('live')")
    shown.expected("503")


@pytest.mark.parametrize(
    ("still", "name"), [pytest.param(False, "changed", id="motion"), pytest.param(True, "none", id="reduced-motion")]
)
async def test_a_change_is_animated_only_for_those_who_want_motion(shown: Shown, still: bool, name: str) -> None:
    await shown.tab.emulate(1000, still=still)
    await shown.go(LIST)
    shown.pages.put("db", 9, 9)
    changed = "[...document.querySelectorAll('tr.changed')]"
    await shown.wait(f"{changed}.some(row => getComputedStyle(row).animationName === '{name}')", "a changed row")
