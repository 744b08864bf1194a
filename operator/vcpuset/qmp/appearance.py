"""Noticing that a machine's monitor has appeared: another socket stands at a set's path than before.

QEMU makes its socket anew whenever it starts, so this is how a set learns of its machine's (re)start at once and not
at its next retry. It only ever saves time: whatever is missed here, the retries find.

* The kernel's events say no more than "look again": what counts is what `lstat` shows now. So an event that comes
  twice, late or not at all (the kernel's queue can overflow) does no harm, and everything is looked at anew every
  half minute.
* Exactly the folders on the way to the followed sockets are watched, each by itself. Watching recursively would follow
  the symbolic links that anybody who may write into a namespace's folder can make, to anywhere on the host, and would
  miss what is made in a fresh folder right after the folder.
* watchfiles cannot add a folder to a watch. So a folder that comes or goes restarts the whole, which costs about
  0.05 ms for each folder with the interpreter held; pauses between restarts bound what somebody who keeps making
  folders can cost the others. After each start everything is looked at, so that nothing falls into the gap.
* watchfiles runs in a thread that looks for events many times a second. That is what idling costs: less than 1 % of a
  CPU, however many folders there are; nothing while no set has a unix monitor.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vcpuset.domain.backoff import ExponentialBackoff, jittered
from vcpuset.domain.resource import UID, UnixMonitor, VCPUSet
from vcpuset.qmp.watch import Change, Watch

__all__ = ["Appearances"]

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.1
"""The least time between two looks at everything; what changes meanwhile shares the second one."""

PAUSE_SHARE = 3.0
"""The pause is at least this many times as long as the look and the restart before it took."""

LOOK_SECONDS = 30.0
"""How often everything is looked at without an event: for lost events, and mounts, which cause none."""

ROOT_SECONDS = 3.0
"""How often a socket root that is missing is looked for."""

BACKOFF = ExponentialBackoff(base_seconds=1, cap_seconds=30)
"""After how long a watch that failed is tried again."""

STABLE_SECONDS = 60.0
"""A watch that has lasted so long has recovered: its next failure is told again, and tried again soon."""

Identity = tuple[int, int, int]
"""Device, inode and time of modification in ns: inode numbers are used again, often at once."""


class Appearances:
    """Calls `appeared`, in the event loop, for each followed set at whose path another socket stands than before.

    Neither the removal of a socket nor a change of its mode is an appearance, nor what is there when a set is first
    followed: a new set gets its pass anyway.

    root   the socket root; need not exist, and may come, go and be replaced
    retry  seconds after which a watch that has failed so many times in a row is tried again
    """

    def __init__(
        self, root: Path, appeared: Callable[[UID], None], *, retry: Callable[[int], float] = BACKOFF.delay
    ) -> None:
        self._root = str(root.absolute())  # not resolved: the administrator may turn a symbolic link elsewhere
        self._appeared = appeared
        self._retry = retry
        self._paths: dict[UID, str] = {}
        self._sets: dict[str, set[UID]] = {}
        """Path of a followed socket → the sets that name it; none is empty. Also read by watchfiles' thread."""
        self._folders: dict[str, int] = {}
        """The root and the folders on the way to followed sockets → for how many sets. Also read by that thread."""
        self._seen: dict[UID, Identity | None] = {}
        """What stood at each followed set's path at the last look."""

        self._stir = asyncio.Event()
        self._stale = False  # whether everything is to be looked at
        self._touched: set[str] = set()  # else the sockets that are
        self._next_look = math.inf  # loop time at which everything becomes stale without an event
        self._not_before = -math.inf  # loop time of the earliest next look at everything

        self._watch: Watch | None = None
        self._watched: dict[str, tuple[int, int]] | None = {}
        """What `_watch` watches, with device and inode; None: that is not to be relied on any more."""
        self._failures = 0  # of watches, in a row
        self._retry_at = -math.inf
        self._root_missing = False
        self._unreadable: set[str] = set()  # folders that have been told of

    def follow(self, uid: UID, vcpuset: VCPUSet | None) -> None:
        """Follow the set's monitor as declared now; None: the set is gone. To be called at each change of a set.

        Takes some microseconds. What stands at the path at this moment is what later looks are compared with: a pass
        that begins after this call sees that or something newer.
        """
        path = None if vcpuset is None else self._path(vcpuset)
        if path == self._paths.get(uid):
            return
        self._drop(uid)
        if path is None:
            return
        self._paths[uid] = path
        self._sets.setdefault(path, set()).add(uid)
        for folder in self._way(path):
            if folder not in self._folders:
                self._want_look()
            self._folders[folder] = self._folders.get(folder, 0) + 1
        self._seen[uid] = _identity(path)  # last: from here on an event finds the path followed

    async def run(self) -> None:
        """Notice appearances until cancelled; passes on what `appeared` raises.

        A watch that fails is told of in the log and tried again. No thread and no descriptor is left behind.
        """
        loop = asyncio.get_running_loop()
        self._stale = True
        try:
            while True:
                if self._watch is not None and self._watch.over:
                    self._give_up(self._watch)
                if loop.time() >= self._next_look:
                    self._stale = True
                if self._stale and loop.time() >= self._not_before:
                    await self._look_at_all()
                elif self._touched:
                    await self._look_at_touched()
                else:
                    await self._stirred(self._not_before if self._stale else self._next_look)
        finally:
            await self._end_watch()

    def _path(self, vcpuset: VCPUSet) -> str | None:
        """Where the set's socket is to be; None: on TCP, or where `open_socket` would refuse to look."""
        match vcpuset.spec.monitor:
            case UnixMonitor(path):
                below = f"{vcpuset.namespace}/{path}"
                try:
                    below.encode()  # watchfiles takes nothing else
                except UnicodeEncodeError:
                    return None
                if "\0" in below or any(segment in {"", ".", ".."} for segment in below.split("/")):
                    return None
                return f"{self._root.rstrip('/')}/{below}"
            case _:
                return None

    def _way(self, path: str) -> Iterator[str]:
        """The folders from the root down to the one that holds `path`."""
        yield self._root
        position = path.find("/", len(self._root) + 1)
        while position >= 0:
            yield path[:position]
            position = path.find("/", position + 1)

    def _drop(self, uid: UID) -> None:
        if (path := self._paths.pop(uid, None)) is None:
            return
        del self._seen[uid]
        self._sets[path].remove(uid)
        if not self._sets[path]:
            del self._sets[path]
        for folder in self._way(path):
            self._folders[folder] -= 1
            if not self._folders[folder]:
                del self._folders[folder]
                self._unreadable.discard(folder)
                self._want_look()

    def _want_look(self) -> None:
        self._stale = True
        self._stir.set()

    async def _stirred(self, until: float) -> None:
        """Wait for something to do, or until this loop time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(None if until == math.inf else until):
                await self._stir.wait()
        self._stir.clear()

    async def _look_at_touched(self) -> None:
        touched, self._touched = self._touched, set()
        await self._look_at([(uid, self._paths[uid]) for path in touched for uid in self._sets.get(path, ())])

    async def _look_at(self, sockets: Iterable[tuple[UID, str]], folders: Iterable[str] = ()) -> _Sight:
        """Look at these sockets, those below `folders` only if there are any; tell of what has appeared."""
        asked = list(sockets)
        # In a thread: thousands take longer than the other sets should wait.
        sight = await asyncio.to_thread(_look, self._root, list(folders), [path for _, path in asked])
        for (uid, path), identity in zip(asked, sight.sockets, strict=True):
            # Not if the set has gone or names another socket since.
            if self._paths.get(uid) == path and identity != self._seen[uid]:
                self._seen[uid] = identity
                if identity is not None:
                    self._appeared(uid)
        return sight

    async def _look_at_all(self) -> None:
        """Look at everything and watch the folders that are there. What changes meanwhile makes it stale again."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self._stale = False
        self._touched.clear()
        sight = await self._look_at(self._paths.items(), self._folders)
        if sight.folders != self._watched and begun >= self._retry_at:
            await self._restart_watch(sight.folders)
            before, sight = sight, await self._look_at(self._paths.items(), self._folders)
            self._stale |= before.folders != sight.folders
        self._tell_of(sight)

        ended = loop.time()
        if self._failures and self._watch is not None and ended - self._watch.begun >= STABLE_SECONDS:
            self._failures = 0
            logger.info("sockets that appear below %s are noticed at once again", self._root)
        self._not_before = ended + max(PAUSE_SECONDS, PAUSE_SHARE * (ended - begun))
        if not self._paths:
            self._next_look = math.inf
            return
        seconds = LOOK_SECONDS if sight.root_error is None else ROOT_SECONDS
        self._next_look = ended + jittered(seconds, 0.1)
        if self._retry_at > ended:
            self._next_look = min(self._next_look, self._retry_at)

    def _tell_of(self, sight: _Sight) -> None:
        """Log what stands in the way of watching, each thing once while it lasts."""
        if (sight.root_error is not None) != self._root_missing:
            self._root_missing = not self._root_missing
            if sight.root_error is not None:
                logger.warning(
                    "the socket root %s cannot be watched: %s; make that folder, it is looked for every %.0f s",
                    self._root,
                    sight.root_error.strerror,
                    ROOT_SECONDS,
                )
            else:
                logger.info("the socket root %s is there", self._root)
        for folder in sight.unreadable - self._unreadable:
            logger.warning(
                "%s cannot be watched: let the operator's user (uid %d) read that folder; until then machines that "
                "start in it are found by the retries of their sets",
                folder,
                os.geteuid(),
            )
        self._unreadable |= sight.unreadable & self._folders.keys()

    async def _restart_watch(self, folders: dict[str, tuple[int, int]]) -> None:
        """Watch these folders and no others; returns when events are gathered, or `over` says that they will not."""
        await self._end_watch()
        self._watched = folders
        if folders:
            self._watch = Watch(folders, self._concerns, self._changed, self._stir.set)
            await self._watch.started()

    async def _end_watch(self) -> None:
        if self._watch is not None:
            self._watched = None
            await self._watch.stop()
            self._watch = None

    def _give_up(self, watch: Watch) -> None:
        """The watch has ended by itself."""
        self._watch = None
        self._watched = None
        if isinstance(watch.error, FileNotFoundError):  # a folder has gone since it was looked at
            self._stale = True
            return
        now = asyncio.get_running_loop().time()
        if now - watch.begun >= STABLE_SECONDS:
            self._failures = 0
        self._failures += 1
        self._retry_at = now + self._retry(self._failures)
        self._next_look = min(self._next_look, self._retry_at)
        logger.log(
            logging.WARNING if self._failures == 1 else logging.DEBUG,
            "sockets that appear below %s are not noticed at once, but by the retries of their sets, since watching %d "
            "folders failed: %s; if this is about a limit, raise fs.inotify.max_user_watches or "
            "fs.inotify.max_user_instances (sysctl), else see to the path that it names; tried again, ever less often",
            self._root,
            len(self._folders),
            watch.error,
        )

    def _concerns(self, _change: Change, path: str) -> bool:
        """Whether an event at this path matters; called in watchfiles' thread."""
        return path in self._sets or path in self._folders

    def _changed(self, changes: set[tuple[Change, str]]) -> None:
        for change, path in changes:
            if path in self._sets:
                self._touched.add(path)
            if path in self._folders:
                self._stale = True
                if change is not Change.modified:
                    self._watched = None  # another folder, though its inode number may be the same
        self._stir.set()


class _Sight(NamedTuple):
    """What a look has shown.

    sockets     what stands at each path asked for; None: no socket
    folders     those to be watched, with device and inode
    unreadable  those that cannot be watched
    root_error  why there is no socket root
    """

    sockets: list[Identity | None]
    folders: dict[str, tuple[int, int]]
    unreadable: set[str]
    root_error: OSError | None


def _look(root: str, folders: list[str], sockets: list[str]) -> _Sight:
    """Look at folders, given with all on the way to them, and at sockets: in real folders only, if any are given."""
    there: dict[str, tuple[int, int]] = {}
    unreadable: set[str] = set()
    entered: set[str] = set()
    root_error = None
    for folder in sorted(folders):  # so the way to a folder comes before it
        if folder != root and _parent(folder) not in entered:
            continue
        try:
            status = os.stat(root) if folder == root else os.lstat(folder)  # noqa: PTH116 - pathlib makes an object of each of thousands of paths, at each look
            if not stat.S_ISDIR(status.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
        except OSError as error:
            if folder == root:
                root_error = error
            continue
        entered.add(folder)
        if os.access(folder, os.R_OK, effective_ids=True):
            there[folder] = (status.st_dev, status.st_ino)
        else:
            unreadable.add(folder)
    seen = [_identity(path) if not folders or _parent(path) in entered else None for path in sockets]
    return _Sight(seen, there, unreadable, root_error)


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _identity(path: str) -> Identity | None:
    """What socket stands at this path; None: none that can be seen."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns) if stat.S_ISSOCK(status.st_mode) else None
