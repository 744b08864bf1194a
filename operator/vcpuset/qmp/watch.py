"""watchfiles in a thread: which of these folders' entries have changed.

watchfiles' own `awatch` would not do: it sets up the watch in the event loop, does not say when it has done so, and
keeps its thread for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection

from watchfiles import Change, watch

__all__ = ["Change", "Watch"]

STEP_MILLISECONDS = 20
"""How often the thread looks for events. One is passed on after one to two steps."""

DEBOUNCE_MILLISECONDS = 50
"""For how long, at most, events are gathered while more of them come."""

# It would tell of each batch of events, whoever causes them.
logging.getLogger("watchfiles").setLevel(logging.WARNING)


class Watch:
    """Watches folders, each by itself and not what is below them, from its making until `stop`.

    To be made in an event loop. Setting up takes about 0.05 ms for each folder, with the interpreter held.

    concerns  which events matter; called in the thread
    changed   told of those, in the event loop
    ended     called there if the thread ends by itself
    error     why it has
    begun     loop time since which events are gathered; until then, when the watch was made
    """

    def __init__(
        self,
        folders: Collection[str],
        concerns: Callable[[Change, str], bool],
        changed: Callable[[set[tuple[Change, str]]], None],
        ended: Callable[[], None],
    ) -> None:
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self.begun = self._loop.time()
        self._folders = list(folders)
        self._concerns = concerns
        self._changed = changed
        self._ended = ended
        self._asked = False
        self._stopping = False
        self._started = asyncio.Event()
        self._over = asyncio.Event()
        # A daemon: nothing that goes wrong here may keep the process from ending.
        self._thread = threading.Thread(target=self._gather, name="socket appearances", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the thread has ended."""
        return self._over.is_set()

    async def started(self) -> None:
        """Wait until events are gathered, or the watch is over."""
        await self._started.wait()

    async def stop(self) -> None:
        """End the thread: takes one or two steps. If the wait is cancelled, the thread ends all the same."""
        self._stopping = True
        await self._over.wait()
        self._thread.join()

    def is_set(self) -> bool:
        """Whether to stop: watchfiles asks in each step, for the first time when everything is being watched."""
        if not self._asked:
            self._asked = True
            self._tell(self._begin)
        return self._stopping

    def _gather(self) -> None:
        """The thread."""
        try:
            for changes in watch(
                *self._folders,
                watch_filter=self._concerns,
                debounce=DEBOUNCE_MILLISECONDS,
                step=STEP_MILLISECONDS,
                stop_event=self,
                rust_timeout=0,
                debug=False,
                raise_interrupt=False,
                force_polling=False,
                recursive=False,
                ignore_permission_denied=False,
            ):
                self._tell(self._changed, changes)
        except BaseException as error:  # noqa: BLE001 - told in the log; a panic in Rust is no Exception
            self.error = error
        self._tell(self._end)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call this in the event loop; if that is closed, nobody is left to be told."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _begin(self) -> None:
        self.begun = self._loop.time()
        self._started.set()

    def _end(self) -> None:
        self._over.set()
        self._started.set()
        self._ended()
