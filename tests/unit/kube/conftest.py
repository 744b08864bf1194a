"""Keeps pytest-asyncio from leaving an event loop behind.

It asks for the current loop before it sets its own, which makes one on Python before 3.14 when none was ever set; nobody
closes that one, and the warning hits whichever test runs when it is collected.
"""

import asyncio

asyncio.set_event_loop(None)
