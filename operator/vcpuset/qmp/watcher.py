"""Triggers a pass when a machine's monitor has appeared, disappeared or been replaced: for a set whose socket is
another one than in its last pass, at once and not at its next retry or resync.

QEMU creates its socket when it starts and removes it when it ends. This only saves time: a later pass finds what is
missed here.

* An event of the kernel (inotify) only says where to observe. What counts is which socket `stat` returns then, so an
  event that comes twice, late or not at all does no harm; everything is observed every half minute anyway.
* Each folder on the way to a followed socket is watched separately. An observation opens these folders one by one as a
  pass does (`sockets`), follows no symbolic link, and watches each one that it opened: so the watched folders are the
  current ones, whatever has been created, moved or replaced.
* Events are collected for a short while before anything is observed. A QEMU that is restarted at once triggers one
  pass, and endless events do not block the event loop.
* Everything that may hang with a file system, including watches, is called in threads (`files`), one namespace at a
  time.
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from inotify_simple import INotify, flags, parse_events

from vcpuset.domain.backoff import jittered
from vcpuset.domain.errors import InvalidMonitor, MonitorUnreachable
from vcpuset.domain.resource import UID, UnixMonitor, VCPUSet
from vcpuset.qmp import files
from vcpuset.qmp.sockets import Stamp, bad_segment, below, descend, stamp_of

__all__ = ["SocketWatcher"]

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 0.1
"""How long events are collected before the observation."""

OBSERVE_SECONDS = 30.0
"""How often everything is observed without an event: for lost events, for mounts, which cause none, and for folders
that could not be watched."""

SOON_SECONDS = 3.0
"""The same while there is no socket root, and the minimum time between two observations of everything."""

FOLDERS_AT_ONCE = 64
"""How many folders are observed by one call in a thread. A local file system takes about 20 µs for each."""

READ_BYTES = 64 * 1024
"""How much of the kernel's queue of events is read at once. After an overflow everything is observed."""

_EVENTS = (
    flags.CREATE
    | flags.DELETE
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.ATTRIB  # a folder may be accessible now
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
)

_LIMITS = {errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""After these no folder can be watched at all."""


class SocketWatcher:
    """Calls `changed`, in the event loop, for each followed set with another socket at its path than in its last pass,
    or without one.

    Paths are below the root, without a "/" at either end; the root's own is "".

    root  the socket root; need not exist, and may appear, disappear and be replaced
    """

    def __init__(self, root: Path, changed: Callable[[UID], None]) -> None:
        self._root = root.absolute()  # not resolved: the administrator may change a symbolic link
        self._changed = changed
        self._paths: dict[UID, str] = {}
        self._sets: dict[str, set[UID]] = {}
        """Path of a followed socket → the sets that name it; none is empty."""
        self._names: dict[str, set[str]] = {}
        """Folder → the names of the followed sockets in it; none is empty."""
        self._below: dict[str, set[str]] = {}
        """The root and every folder on the way to a followed socket → those of `_names` at or below it."""
        self._found: dict[UID, Stamp | None] = {}
        """What the last pass of each set found, or was triggered for."""
        self._observed: dict[str, Stamp | None] = {}
        """Path of a followed socket → what was there when it was last observed."""

        self._inotify: INotify | None = None
        self._watches: dict[str, int] = {}
        """Folder → its watch."""
        self._watched: dict[int, set[str]] = {}
        """The reverse: a folder can have two paths, by a bind mount or for a moment after a rename."""
        self._limited: set[str] = set()
        """Folders that are not watched because a limit of the kernel is reached."""
        self._refused: set[str] = set()
        """Folders that are not watched for another reason."""

        self._stir = asyncio.Event()
        self._dirty: dict[str, set[str]] = {}
        """Namespace → the folders in it to observe."""
        self._observing: dict[str, list[str]] = {}
        """Namespace → the folders in it that are being observed."""
        self._last = self._next = -math.inf  # loop times of the observation of everything

    def follow(self, uid: UID, vcpuset: VCPUSet | None) -> None:
        """Follow the set's monitor as now declared; None: the set is gone. Call it at each change of a set."""
        path = None if vcpuset is None else _path(vcpuset)
        if path == self._paths.get(uid):
            return
        self._drop(uid)
        if path is None:
            return
        folder, _, name = path.rpartition("/")
        self._paths[uid] = path
        self._sets.setdefault(path, set()).add(uid)
        self._names.setdefault(folder, set()).add(name)
        for way in _ways(folder):
            self._below.setdefault(way, set()).add(folder)
        self._touch({folder})

    def found(self, vcpuset: VCPUSet, stamp: Stamp | None) -> None:
        """A pass of this set has found this socket; None: no socket, or none that can be reached."""
        uid, path = vcpuset.uid, self._paths.get(vcpuset.uid)
        if path is None or path != _path(vcpuset):
            return
        first = uid not in self._found
        self._found[uid] = stamp
        # Only then: later changes cause events, and a pass that cannot see what is visible here must not cause endless
        # observations.
        if first and self._observed.get(path, stamp) != stamp:
            self._touch({path.rpartition("/")[0]})

    def shows(self, vcpuset: VCPUSet, stamp: Stamp) -> bool:
        """Whether the last pass has found this socket, and the last observation of its folder too."""
        path = self._paths.get(vcpuset.uid)
        return (
            path is not None
            and path == _path(vcpuset)
            and stamp == self._found.get(vcpuset.uid) == self._observed.get(path)
        )

    async def run(self) -> None:
        """Report changes until cancelled; raises what `changed` raises, in a group. Leaves no descriptor open."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as observations:
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(self._next):
                            await self._stir.wait()
                    await asyncio.sleep(SETTLE_SECONDS)
                    self._stir.clear()
                    self._read_events()
                    if loop.time() >= self._next:
                        self._observe_all()
                    if self._dirty and self._inotify is None:
                        self._start()
                    for namespace in self._dirty.keys() - self._observing.keys():
                        folders = sorted(self._dirty.pop(namespace))
                        self._observing[namespace] = folders
                        observations.create_task(self._observe(namespace, folders))
        finally:
            if self._inotify is not None:
                loop.remove_reader(self._inotify.fileno())
                self._inotify.close()

    def _drop(self, uid: UID) -> None:
        self._found.pop(uid, None)
        if (path := self._paths.pop(uid, None)) is None:
            return
        self._sets[path].remove(uid)
        if self._sets[path]:
            return
        del self._sets[path]
        self._observed.pop(path, None)
        folder, _, name = path.rpartition("/")
        self._names[folder].remove(name)
        if self._names[folder]:
            return
        del self._names[folder]
        for way in _ways(folder):
            self._below[way].remove(folder)
            if not self._below[way]:
                del self._below[way]
                self._watch(way, None)
                self._limited.discard(way)
                self._refused.discard(way)

    def _touch(self, folders: Iterable[str]) -> None:
        """Schedule observations of these folders."""
        for folder in folders:
            self._dirty.setdefault(folder.partition("/")[0], set()).add(folder)
            self._stir.set()

    def _observe_all(self) -> None:
        self._touch(self._names)
        self._last = asyncio.get_running_loop().time()
        self._next = self._last + jittered(SOON_SECONDS if "" in self._refused else OBSERVE_SECONDS, 0.1)

    def _start(self) -> None:
        """Start the kernel's events, if possible; the watched folders are observed after that."""
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            self._note("", error)
        else:
            asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._readable)

    def _read_events(self) -> None:
        if self._inotify is None:
            return
        with contextlib.suppress(BlockingIOError):
            for event in parse_events(os.read(self._inotify.fileno(), READ_BYTES)):
                self._take(event.wd, event.mask, event.name)
        asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._inotify is not None
        asyncio.get_running_loop().remove_reader(self._inotify.fileno())  # until they are read
        self._stir.set()

    def _take(self, watch: int, mask: int, name: str) -> None:
        """One event; it is about the folder itself if there is no name."""
        if mask & flags.Q_OVERFLOW:
            self._next = min(self._next, self._last + SOON_SECONDS)
            return
        folders = self._watched.get(watch)
        if folders is None:
            if not mask & flags.IGNORED:
                # Of a watch that an observation in progress has just created: it may have seen the state before.
                for observed in self._observing.values():
                    self._touch(observed)
            return
        for folder in folders:
            path = f"{folder}/{name}".strip("/")
            if path in self._sets:
                self._touch({folder})
            self._touch(self._below.get(path, ()))
        if mask & flags.IGNORED:  # the kernel has removed the watch
            for folder in self._watched.pop(watch):
                del self._watches[folder]

    async def _observe(self, namespace: str, folders: list[str]) -> None:
        """Observe folders of one namespace. If one hangs, its thread is lost; the others are observed again."""
        lane = below(self._root, namespace)
        try:
            for start in range(0, len(folders), FOLDERS_AT_ONCE):
                wanted = {
                    folder: list(self._names[folder])
                    for folder in folders[start : start + FOLDERS_AT_ONCE]
                    if folder in self._names and not files.hangs(lane, below(self._root, folder))
                }
                if not wanted:
                    continue
                found = dict(self._found)
                try:
                    sight = await files.call(lane, lane, partial(_observe, self._root, wanted, self._inotify))
                except MonitorUnreachable:
                    self._touch(each for each in wanted if not files.hangs(lane, below(self._root, each)))
                else:
                    self._learn(wanted, sight, found)
        finally:
            del self._observing[namespace]
            self._stir.set()

    def _learn(self, wanted: dict[str, list[str]], sight: _Sight, found: dict[UID, Stamp | None]) -> None:
        """Apply the result of an observation.

        found  what the passes had found when it began
        """
        for way in {way for folder in wanted for way in _ways(folder)}:
            self._watch(way, sight.watches.get(way))
            if way not in self._below:  # no set has a socket there any more
                self._watch(way, None)
            elif self._inotify is not None or way in sight.errors:
                self._note(way, sight.errors.get(way))
        for folder, names in wanted.items():
            for path in (f"{folder}/{name}" for name in names):
                stamp = sight.sockets.get(path)
                if path in self._sets:
                    self._observed[path] = stamp
                for uid in self._sets.get(path, ()):
                    if self._found.get(uid, stamp) == stamp:  # Before the first pass, one is due anyway.
                        continue
                    if self._found[uid] is found.get(uid):
                        self._found[uid] = stamp
                        self._changed(uid)
                    else:  # A pass has found it meanwhile, perhaps after this observation.
                        self._touch({folder})

    def _watch(self, folder: str, watch: int | None) -> None:
        """Record the watch of a folder; one that is no longer needed is removed."""
        before = self._watches.pop(folder, None)
        if watch is not None:
            self._watches[folder] = watch
            self._watched.setdefault(watch, set()).add(folder)
        if before is None or before == watch:
            return
        self._watched[before].remove(folder)
        if not self._watched[before]:
            del self._watched[before]
            assert self._inotify is not None
            # This may release the folder in the kernel, and so use its file system.
            _ = files.THREADS.start(partial(_unwatch, self._inotify, before))

    def _note(self, folder: str, error: OSError | None) -> None:
        """Log why a folder cannot be watched, each reason once while it lasts."""
        limited = error is not None and error.errno in _LIMITS
        were_limited = bool(self._limited)
        (self._limited.add if limited else self._limited.discard)(folder)
        if limited and not were_limited:
            logger.warning(
                "cannot watch sockets below %s, so changes are only detected by retries and resyncs: %s; raise "
                "fs.inotify.max_user_watches or fs.inotify.max_user_instances (sysctl); retrying every %.0f s",
                self._root,
                error,
                OBSERVE_SECONDS,
            )
        elif were_limited and not self._limited:
            logger.info("watching sockets below %s again", self._root)

        refused = error is not None and not limited
        if refused == (folder in self._refused):
            return
        (self._refused.add if refused else self._refused.discard)(folder)
        if folder:
            if refused:
                logger.warning(
                    "cannot watch %s (%s): give the operator's user (uid %d) read permission on that directory; "
                    "until then, machines that start or stop in it are only detected by retries and resyncs",
                    below(self._root, folder),
                    error and error.strerror,
                    os.geteuid(),
                )
        elif refused:
            self._next = min(self._next, self._last + SOON_SECONDS)
            logger.warning(
                "cannot watch the socket root %s: %s; create that directory; retrying every %.0f s",
                self._root,
                error and error.strerror,
                SOON_SECONDS,
            )
        else:
            logger.info("the socket root %s exists now", self._root)


def _path(vcpuset: VCPUSet) -> str | None:
    """The path of the set's socket; None: on TCP, or a path that a pass would reject."""
    match vcpuset.spec.monitor:
        case UnixMonitor(path):
            segments = (vcpuset.namespace, *path.split("/"))
            return None if any(map(bad_segment, segments)) else "/".join(segments)
        case _:
            return None


def _ways(folder: str) -> Iterator[str]:
    """The root, and the folders from there down to this one."""
    yield ""
    position = folder.find("/")
    while position >= 0:
        yield folder[:position]
        position = folder.find("/", position + 1)
    yield folder


@dataclass
class _Sight:
    """The result of an observation.

    watches  the folders that are watched now
    errors   why others are not
    sockets  the sockets at the wanted paths
    """

    watches: dict[str, int] = field(default_factory=dict)
    errors: dict[str, OSError] = field(default_factory=dict)
    sockets: dict[str, Stamp] = field(default_factory=dict)


def _observe(root: Path, wanted: dict[str, list[str]], inotify: INotify | None, place: files.Place) -> _Sight:
    """Watch these folders and those on the way to them, then find the sockets in them. Called in a thread."""
    sight = _Sight()

    def watch(folder: str, descriptor: int) -> None:
        if inotify is not None and folder not in sight.watches and folder not in sight.errors:
            try:
                sight.watches[folder] = inotify.add_watch(f"/proc/self/fd/{descriptor}", _EVENTS)
            except OSError as error:
                sight.errors[folder] = error

    for folder, names in wanted.items():
        try:
            here = descend(root, folder.split("/"), place, watch)
        except (InvalidMonitor, MonitorUnreachable) as error:
            # There is no such folder, or a pass reports what is wrong with it; the root is reported only here.
            if place.path == str(root) and isinstance(error.__cause__, OSError):
                sight.errors[""] = error.__cause__
            continue
        try:
            for name in names:
                place.path = below(root, f"{folder}/{name}")
                with contextlib.suppress(OSError):
                    status = os.stat(name, dir_fd=here, follow_symlinks=False)
                    if stat.S_ISSOCK(status.st_mode):
                        sight.sockets[f"{folder}/{name}"] = stamp_of(status)
        finally:
            os.close(here)
    return sight


def _unwatch(inotify: INotify, watch: int) -> None:
    # Already gone with its folder, or closed meanwhile with all watches.
    with contextlib.suppress(OSError, ValueError):
        inotify.rm_watch(watch)
