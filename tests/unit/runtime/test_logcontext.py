"""Fields of log lines: who carries them, for how long, and how text shows them."""

from __future__ import annotations

import asyncio
import logging

import pytest

from vcpuset.runtime.logcontext import Field, LogContextFilter, LogfmtFormatter, current_fields, log_context

__all__: list[str] = []

pytestmark = pytest.mark.looptime


def record(message: str = "done", **extra: object) -> logging.LogRecord:
    """A record as a handler with the filter passes it on."""
    made = logging.makeLogRecord({"msg": message, "name": "it", "levelname": "INFO", **extra})
    assert LogContextFilter().filter(made)
    return made


def text(message: str = "done") -> str:
    return LogfmtFormatter("%(name)s: %(message)s").format(record(message))


def test_a_line_outside_of_a_block_has_no_fields() -> None:
    assert current_fields() == {}
    assert text() == "it: done"


def test_fields_are_attributes_of_the_record() -> None:
    with log_context(vcpuset="web", attempt=2, **{"pass": "a1"}):
        made = record()

    assert (made.__dict__["vcpuset"], made.__dict__["attempt"], made.__dict__["pass"]) == ("web", 2, "a1")


def test_a_block_inside_another_adds_to_it_and_its_own_values_count() -> None:
    with log_context(vcpuset="web", step="observe"):
        with log_context(step="plug", slot=3):
            assert current_fields() == {"vcpuset": "web", "step": "plug", "slot": 3}
        assert current_fields() == {"vcpuset": "web", "step": "observe"}
    assert current_fields() == {}


def test_fields_end_with_a_block_that_raises() -> None:
    with pytest.raises(LookupError), log_context(vcpuset="web"):
        raise LookupError
    assert current_fields() == {}


def test_what_a_call_gives_to_its_own_line_stands() -> None:
    with log_context(vcpuset="web"):
        assert record(vcpuset="db").__dict__["vcpuset"] == "db"


@pytest.mark.parametrize("name", ["name", "message", "args", "context_fields"])
def test_a_field_cannot_take_the_place_of_what_every_record_has(name: str) -> None:
    with pytest.raises(ValueError, match=name), log_context(**{name: "x"}):
        pass


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param("web-1.example", "it: done field=web-1.example", id="a word"),
        pytest.param("default/web", "it: done field=default/web", id="a path"),
        pytest.param(3, "it: done field=3", id="a number"),
        pytest.param(0, "it: done field=0", id="zero"),
        pytest.param(None, "it: done", id="no value"),
        pytest.param("", "it: done", id="empty"),
        pytest.param("two words", 'it: done field="two words"', id="a space"),
        pytest.param('a="b"', 'it: done field="a=\\"b\\""', id="quotes"),
        pytest.param("a\nb", 'it: done field="a\\nb"', id="a line break"),
        pytest.param("grün", "it: done field=grün", id="not ASCII"),
    ],
)
def test_text_shows_a_field_as_logfmt(value: str | int | None, shown: str) -> None:
    with log_context(field=value):
        assert text() == shown


def test_in_text_the_fields_stand_before_the_traceback() -> None:
    try:
        _ = dict[str, int]()["slot 3"]
    except KeyError as error:
        with log_context(vcpuset="web"):
            made = record(exc_info=(type(error), error, error.__traceback__))
    lines = LogfmtFormatter("%(message)s").format(made).splitlines()

    assert lines[0] == "done vcpuset=web"
    assert lines[-1] == "KeyError: 'slot 3'"


async def test_fields_stay_across_await_and_two_passes_at_once_do_not_see_each_other() -> None:
    seen: list[tuple[str, object]] = []

    async def work(name: str, pause: float) -> None:
        with log_context(vcpuset=name):
            for _ in range(3):
                await asyncio.sleep(pause)
                seen.append((name, current_fields()["vcpuset"]))
        assert current_fields() == {}

    await asyncio.gather(work("a", 0.2), work("b", 0.3))

    assert sorted(seen) == [("a", "a")] * 3 + [("b", "b")] * 3


async def test_tasks_that_are_made_inside_a_block_have_its_fields_and_keep_their_own_to_themselves() -> None:
    async def part(slot: int) -> dict[str, Field]:
        with log_context(slot=slot):
            await asyncio.sleep(1)
            return current_fields()

    with log_context(vcpuset="web"):
        found = await asyncio.gather(part(1), part(2))
        assert current_fields() == {"vcpuset": "web"}

    assert list(found) == [{"vcpuset": "web", "slot": 1}, {"vcpuset": "web", "slot": 2}]


async def test_a_task_that_outlives_the_block_loses_its_fields_and_not_those_of_its_own() -> None:
    over = asyncio.Event()

    async def reader() -> list[dict[str, Field]]:
        with log_context(reader="web.sock"):
            before = current_fields()
            await over.wait()
            return [before, current_fields()]

    with log_context(**{"pass": "a1"}):
        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
    with log_context(**{"pass": "a2"}):
        over.set()
        found = await task

    assert found == [{"pass": "a1", "reader": "web.sock"}, {"reader": "web.sock"}]


async def test_a_timer_that_the_block_leaves_behind_does_not_carry_its_fields() -> None:
    seen: list[dict[str, Field]] = []
    loop = asyncio.get_running_loop()
    with log_context(**{"pass": "a1"}):
        loop.call_later(1, lambda: seen.append(current_fields()))
    await asyncio.sleep(2)

    assert seen == [{}]


async def test_a_callback_of_somebody_else_that_runs_during_the_block_does_not_carry_its_fields() -> None:
    seen: list[dict[str, Field]] = []
    asyncio.get_running_loop().call_later(1, lambda: seen.append(current_fields()))
    with log_context(**{"pass": "a1"}):
        await asyncio.sleep(2)

    assert seen == [{}]


async def test_a_thread_that_is_started_for_the_block_has_its_fields() -> None:
    with log_context(vcpuset="web"):
        assert await asyncio.to_thread(current_fields) == {"vcpuset": "web"}
