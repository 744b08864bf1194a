"""What the fuzz tests of monitor and agent share: cases from a seed, a watch over what they leave behind, the loop.

Every other case comes from a seed that is fixed, the others from that of the run (`harness.effort`).

VCPUSET_TEST_EXAMPLES=100000     so many wrong replies of each kind
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from harness.effort import SEED, scaled
from qmp.peer import Step
from qmp.recordings import Message

__all__ = ["EXAMPLES", "Case", "Distort", "feed", "settled"]

EXAMPLES = int(os.environ.get("VCPUSET_TEST_EXAMPLES", "0"))
SEEDS = ("vcpuset", str(SEED))

Distort = Callable[[Random, Message], list[Step]]
"""What is sent in place of a message."""


@dataclass
class Case:
    """One conversation.

    distort   makes the replies wrong that are to be so
    fed       how many were
    about     which ones, for a person
    outcomes  what came of each operation: a value or an error, by its type
    """

    kind: str
    number: int
    distort: Distort
    fed: int = 0
    about: str = ""
    outcomes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = Random(f"{SEEDS[self.number % 2]} {self.kind} {self.number}")


class Watch:
    """Sees what nobody else would: what is left behind, and errors that went nowhere."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self.reports.append(str(context)))
        self._handler = logging.Handler(logging.ERROR)
        self._handler.emit = lambda record: self.reports.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(self._handler)
        logging.getLogger("vcpuset").addHandler(self._handler)
        # Warnings are expected, and pytest would keep every one: the measure of memory would be of that.
        logging.getLogger("vcpuset").propagate = False
        self._tasks = asyncio.all_tasks()
        gc.collect()
        self._open = open_files()

    def check(self) -> None:
        """Nothing is left of the conversations so far."""
        assert asyncio.all_tasks() == self._tasks
        assert not self.reports
        assert open_files() == self._open

    def close(self) -> None:
        """Look no more."""
        logging.getLogger("vcpuset").propagate = True
        logging.getLogger("vcpuset").removeHandler(self._handler)
        logging.getLogger().removeHandler(self._handler)


def open_files() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def blocks() -> int:
    """How many blocks of memory Python has handed out and not got back."""
    gc.collect()
    return sys.getallocatedblocks()


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def feed(
    kind: str, distort: Distort, wanted: int, hold: Callable[[Case], Coroutine[None, None, None]]
) -> set[str]:
    """Hold conversations until so many wrong replies were fed; returns what came of them.

    Nothing may be left behind of any, and the second half must not need more memory than the first. Caches of
    Python grow too, but not for long: then as many replies are fed again, and only what goes on growing fails.
    """
    wanted = EXAMPLES or max(100, scaled(wanted))  # fewer may miss an ending that the tests expect
    endings: set[str] = set()
    watch = Watch()
    number = 0

    async def hold_many(fed: int) -> None:
        nonlocal number
        while fed > 0:
            case = Case(kind, number, distort)
            try:
                await hold(case)
                if number % 50 == 0:
                    watch.check()
            except BaseException as error:
                error.add_note(f"VCPUSET_TEST_SEED={SEED}, kind {kind}, case {number}: {case.about}")
                error.add_note("\n".join(watch.reports))
                raise
            endings.update(case.outcomes)
            fed -= case.fed
            number += 1
        watch.check()

    try:
        await hold_many(wanted // 2)
        for _ in range(3):
            before = number, blocks(), resident()
            await hold_many(wanted - wanted // 2)
            # What one conversation left behind would be there many times.
            grown = blocks() - before[1], resident() - before[2]
            allowed = 300 + 0.05 * (number - before[0]), 16 << 20
            if grown[0] < allowed[0] and grown[1] < allowed[1]:
                break
        else:
            pytest.fail(
                f"blocks and bytes of memory grew by {grown} in {number - before[0]} conversations, again and again"
            )
    finally:
        watch.close()
    return endings


async def settled(work: Awaitable[object]) -> object:
    """What it returns, or the error that it raises."""
    try:
        return await work
    except Exception as error:  # noqa: BLE001 - judged by the caller
        return error
