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

from harness.effort import LONG, SEED, scaled
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

    Nothing may be left behind of any, and the second half must not need more memory than the first.
    """
    wanted = EXAMPLES or scaled(wanted)
    fed = number = 0
    halfway: tuple[int, int, int] | None = None
    endings: set[str] = set()
    watch = Watch()
    try:
        while fed < wanted:
            case = Case(kind, number, distort)
            try:
                await hold(case)
                if number % 50 == 0:
                    watch.check()
            except BaseException as error:
                error.add_note(f"VCPUSET_TEST_SEED={SEED}, kind {kind}, case {number}: {case.about}")
                error.add_note("\n".join(watch.reports))
                raise
            endings |= set(case.outcomes)
            fed += case.fed
            number += 1
            if halfway is None and fed >= wanted // 2:
                halfway = number, blocks(), resident()
        watch.check()
    finally:
        watch.close()
    assert fed >= wanted
    assert halfway is not None
    # What one conversation left behind would be there many times; Python's own caches take a little, most at first, so
    # that a short run says less.
    whole = bool(LONG or EXAMPLES)
    assert blocks() - halfway[1] < (300 if whole else 2000) + 0.05 * (number - halfway[0])
    assert resident() - halfway[2] < (16 if whole else 64) << 20
    return endings


async def settled(work: Awaitable[object]) -> object:
    """What it returns, or the error that it raises."""
    try:
        return await work
    except Exception as error:  # noqa: BLE001 - judged by the caller
        return error
