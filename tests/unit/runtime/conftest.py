"""Settings of the tests on virtual time."""

from __future__ import annotations

import asyncio

__all__: list[str] = []


def pytest_configure() -> None:
    """Keep looptime 0.9 from making an event loop that nobody closes.

    It asks the policy for a loop before every test, also where none is running; unless the loop was set
    before, to nothing, Python answers by making one.
    """
    asyncio.set_event_loop(None)
