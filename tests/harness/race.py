"""Something that somebody else does all the time while a test looks on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["again_and_again"]


@contextmanager
def again_and_again(action: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Do it in a thread, without a pause, until the block ends; yields how often it was done. It is never cut short."""
    stop, done = threading.Event(), 0

    def repeat() -> None:
        nonlocal done
        while not stop.is_set():
            action()
            done += 1

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield lambda: done
    finally:
        stop.set()
        thread.join()
