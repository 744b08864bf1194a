"""Commands sent together: the order in which replies are read, and what is not read again."""

import json
from pathlib import Path

import pytest
from qemu.qmp import ExecInterruptedError, ExecuteError, Message

from harness.faulty import FaultyMonitor
from qmp.sessions import Connect
from vcpuset.qmp.exchange import Command, Exchange
from vcpuset.qmp.replies import Malformed


class Reader:
    """Reads numbers, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, result: object) -> int:
        self.times += 1
        if not isinstance(result, int):
            raise Malformed("no number")
        return result


def line(ident: str, **reply: object) -> bytes:
    return json.dumps({**reply, "id": ident}).encode() + b"\r\n"


def feed(exchange: Exchange, *lines: bytes) -> None:
    """As the client does."""
    for each in lines:
        if not exchange.repeats(each):
            message = json.loads(each)
            exchange.take(message["id"], Message(message))


async def test_a_result_with_the_same_text_is_not_read_again() -> None:
    read = Reader()
    query = Command("query", read=read)
    for number, (value, times) in enumerate([(1, 1), (1, 1), (2, 2), (2, 2), (1, 3)]):
        exchange = Exchange([query], [f"id#{number}"])
        feed(exchange, line(f"id#{number}", **{"return": value}))
        await exchange.wait()
        assert (exchange.results, read.times) == ([value], times)


async def test_a_reply_to_another_command_is_no_repetition() -> None:
    query = Command("query", read=Reader())
    feed(Exchange([query], ["id#1"]), line("id#1", **{"return": 1}))
    exchange = Exchange([query], ["id#2"])
    feed(exchange, line("id#1", **{"return": 1}), line("", **{"return": 1}), line("id#22", **{"return": 1}))
    assert (exchange.over, exchange.results) == (False, [])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)], ids=str)
async def test_results_are_in_the_order_of_the_commands_whatever_that_of_the_replies(order: tuple[int, ...]) -> None:
    queries = [Command("query", read=Reader()) for _ in range(3)]
    for turn in range(2):  # the second time all are known
        exchange = Exchange(queries, [f"id#{turn}{number}" for number in range(3)])
        feed(exchange, *(line(f"id#{turn}{number}", **{"return": number}) for number in order))
        await exchange.wait()
        assert (exchange.results, len(exchange.seconds), exchange.failure) == ([0, 1, 2], 3, None)


async def test_the_first_failure_ends_it_and_the_results_before_it_are_kept() -> None:
    queries = [Command("query", read=Reader()) for _ in range(3)]
    exchange = Exchange(queries, ["a", "b", "c"])
    error = {"class": "GenericError", "desc": "no"}
    feed(exchange, line("a", **{"return": 1}), line("c", **{"return": 3}), line("b", error=error))
    await exchange.wait()
    assert exchange.results == [1]
    assert isinstance(exchange.failure, ExecuteError)
    feed(exchange, line("b", **{"return": 2}))
    exchange.put_nowait(ExecInterruptedError("lost"))
    assert (exchange.results, type(exchange.failure)) == ([1], ExecuteError)


async def test_an_error_that_means_no_result_is_none_and_a_result_after_it_is_read() -> None:
    read = Reader()
    query = Command("query", read=read, optional=lambda error: error.error_class == "CommandNotFound")
    error = {"class": "CommandNotFound", "desc": "no"}
    outcomes = []
    replies: list[dict[str, object]] = [{"return": 1}, {"error": error}, {"return": 1}]
    for number, reply in enumerate(replies):
        exchange = Exchange([query], [f"id#{number}"])
        feed(exchange, line(f"id#{number}", **reply))
        outcomes += exchange.results
    assert (outcomes, read.times) == ([1, None, 1], 2)


@pytest.mark.looptime
async def test_each_reply_has_its_time_from_the_one_before() -> None:
    exchange = Exchange([Command("query"), Command("query")], ["a", "b"])
    exchange._loop.call_later(9, feed, exchange, line("a", **{"return": 1}))
    exchange._loop.call_later(18, feed, exchange, line("b", **{"return": 2}))
    await exchange.wait(10)
    assert (exchange.results, exchange.seconds) == ([1, 2], [9, 9])
    exchange = Exchange([Command("query"), Command("query")], ["a", "b"])
    exchange._loop.call_later(1, feed, exchange, line("a", **{"return": 1}))
    await exchange.wait(10)
    assert (exchange.results, exchange.seconds) == ([1], [1, 10])
    assert isinstance(exchange.failure, TimeoutError)


async def test_a_machine_that_did_not_change_is_the_same_value(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        session = await connect(monitor.path)
        machine = await session.observe()
        assert await session.observe() is machine
        await session.plug(machine.free[0])
        changed = await session.observe()
        assert changed.vcpus == machine.vcpus + 1
        assert await session.observe() is changed


async def test_the_slots_show_the_threads_of_new_cpus_at_the_old_paths(
    namespace_folder: Path, connect: Connect
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        session = await connect(monitor.path)
        before = await session.observe()
        slots = monitor.cpus.query_hotpluggable_cpus({})
        monitor.cpus.boot(2)  # the kernel gives them other threads
        assert monitor.cpus.query_hotpluggable_cpus({}) == slots
        after = await session.observe()
        assert [slot.path for slot in after.occupied] == [slot.path for slot in before.occupied]
        assert {slot.thread_id for slot in after.occupied}.isdisjoint(slot.thread_id for slot in before.occupied)
