"""From the path in a VCPUSet to a socket to connect to; `tcp.py` does the same for host and port.

A unix monitor is named by a path below `<socket root>/<namespace>/`, and users who may write into that folder need not
be trusted with those of other namespaces. So no name is resolved twice and no symbolic link is followed:

1. The folders are opened one by one, each relative to the descriptor of the one before, with `O_PATH | O_NOFOLLOW`.
2. The socket is opened in the same way. `O_PATH` opens the inode without using it: a FIFO cannot block, a device
   does not react.
3. The connection goes through `/proc/self/fd/<descriptor>`, which leads to that inode whatever its name means then. It
   is also shorter than the 107 bytes of a socket address, however long the path is.

Only `local_socket` follows links: a path that the local user typed needs no restriction.

Each of these calls can hang with its file system: the event loop only uses `find_socket`, `find_local_socket` and
`UnixEndpoint.reach`, which make them in threads (`files`).

The socket root itself belongs to the administrator and may be a symbolic link. Hard links cannot be detected: a user
who can create one to another namespace's socket reaches it. Linux refuses that to all but the socket's owner and root
(`fs.protected_hardlinks`, on by default); both names have one identity, so that `MonitorConflict` is reported.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import warnings
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from vcpuset.domain.errors import InvalidMonitor, MonitorUnreachable
from vcpuset.qmp import files
from vcpuset.qmp.files import Place
from vcpuset.qmp.tcp import TCPEndpoint

__all__ = [
    "Endpoint",
    "Stamp",
    "UnixEndpoint",
    "bad_segment",
    "below",
    "descend",
    "find_local_socket",
    "find_socket",
    "local_socket",
    "open_socket",
    "stamp_of",
]

Stamp = tuple[int, int, int]
"""Identifies the socket at a path: device, inode and time of modification in ns. Inode numbers are reused."""

_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


class UnixEndpoint:
    """A unix socket found by `open_socket`. It owns a file descriptor: close it, or use it in a `with` block.

    An open session no longer needs it.

    identity  device and inode of the socket; unique only while the endpoint is open
    made_at   when the socket was created (its mtime, which only its owner can change later), UTC; None: not known
    stamp     identifies this socket among all that were ever at its path
    """

    def __init__(self, descriptor: int, status: os.stat_result, name: str, lane: str, path: str) -> None:
        self.identity = (status.st_dev, status.st_ino)
        self.made_at = _time(status.st_mtime)
        self.stamp = stamp_of(status)
        self._descriptor = descriptor
        self._name = name
        self._lane = lane
        self._path = path
        self._connection: socket.socket | OSError | None = None

    def __str__(self) -> str:
        return self._name

    @property
    def route(self) -> Hashable:
        """What a session opened here is connected through; another route needs another session."""
        return self.identity

    async def reach(self) -> socket.socket:
        """What `connect` returns or raises, or MonitorUnreachable: the file system does not answer."""
        connection, self._connection = self._connection, None
        if isinstance(connection, OSError):
            raise connection
        if connection is not None:
            return connection
        return await files.call(self._lane, self._path, lambda _: self.connect(), socket.socket.close)

    def connect(self) -> socket.socket:
        """A non-blocking socket connected to exactly this inode.

        Never waits for the listener: a unix connect either succeeds at once or fails. Raises OSError, with EAGAIN
        (BlockingIOError) if the listener's queue is full because others wait for a busy monitor.
        """
        if self._descriptor < 0:
            raise OSError(errno.EBADF, "the endpoint has been closed")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            # Not loop.sock_connect(): it treats EAGAIN as "in progress" and then reports success.
            connection.connect(f"/proc/self/fd/{self._descriptor}")
        except BaseException:
            connection.close()
            raise
        return connection

    def connect_early(self) -> None:
        """Let `reach` have what `connect` returns or raises now. A thread's turn costs more than a connection."""
        try:
            self._connection = self.connect()
        except OSError as error:
            self._connection = error

    def close(self) -> None:
        """Close the descriptor, and a connection that was not used; may be called again."""
        if isinstance(self._connection, socket.socket):
            self._connection.close()
        self._connection = None
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            warnings.warn(f"{self} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()


Endpoint = UnixEndpoint | TCPEndpoint


def below(root: Path, path: str) -> str:
    """The absolute form of a path below the root."""
    return f"{str(root).rstrip('/')}/{path}" if path else str(root)


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a socket."""
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


async def find_socket(
    root: Path, namespace: str, path: str, field: str = "spec.monitor.unix.path", *, connect: bool = False
) -> UnixEndpoint:
    """What `open_socket` returns or raises, or MonitorUnreachable: a file system on the way does not answer.

    connect  it will be connected to, most likely
    """

    def found(place: Place) -> UnixEndpoint:
        endpoint = open_socket(root, namespace, path, field, place)
        if connect:
            endpoint.connect_early()
        return endpoint

    return await files.call(below(root, namespace), below(root, f"{namespace}/{path}"), found, UnixEndpoint.close)


async def find_local_socket(path: Path) -> UnixEndpoint:
    """What `local_socket` returns or raises, or MonitorUnreachable: its file system does not answer."""
    return await files.call(str(path), str(path), lambda _: local_socket(path), UnixEndpoint.close)


def open_socket(
    root: Path, namespace: str, path: str, field: str = "spec.monitor.unix.path", place: Place | None = None
) -> UnixEndpoint:
    """The socket at `path` below the folder of `namespace` in the socket root; `field` is where the path was given.

    Raises InvalidMonitor if the path is not acceptable, there is a symbolic link anywhere below the root, or it leads
    to something else than a socket; MonitorUnreachable if a part of it is missing or may not be opened. Does not use
    the socket: whether QEMU listens is found by `Session.open`.
    """
    name = f"{namespace}/{path}"
    if bad_segment(namespace):
        raise InvalidMonitor(f"{namespace!r} cannot be the name of a namespace's directory")
    if path.startswith("/"):
        raise InvalidMonitor(f"{field} {path!r} is absolute: it must be relative to the namespace's directory")
    segments = path.split("/")
    for segment in segments:
        if reason := bad_segment(segment):
            raise InvalidMonitor(f"{field} {path!r} {reason}")

    here = descend(root, (namespace, *segments[:-1]), place)
    try:
        if place is not None:
            place.path = below(root, name)
        found = _open_beneath(here, segments[-1], name)
    finally:
        os.close(here)
    try:
        status = _require(found, stat.S_IFSOCK, name)
    except BaseException:
        os.close(found)
        raise
    return UnixEndpoint(found, status, name, below(root, namespace), below(root, name))


def descend(
    root: Path,
    folders: Sequence[str],
    place: Place | None = None,
    visit: Callable[[str, int], object] = lambda _path, _descriptor: None,
) -> int:
    """A descriptor of the last of these folders, each of which is in the one before, and the first in the root.

    visit  called with each folder's path below the root and its descriptor, the root's first

    Raises as `open_socket` does.
    """
    place = place or Place(str(root))
    place.path = str(root)
    try:
        here = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MonitorUnreachable(f"the socket root {root} cannot be opened: {error.strerror}") from error
    try:
        walked = ""
        visit(walked, here)
        for folder in folders:
            walked = f"{walked}/{folder}" if walked else folder
            place.path = below(root, walked)
            opened = _open_beneath(here, folder, walked)
            os.close(here)
            here = opened
            _require(here, stat.S_IFDIR, walked)
            visit(walked, here)
    except BaseException:
        os.close(here)
        raise
    return here


def local_socket(path: Path) -> UnixEndpoint:
    """The socket at any path, for the user of this process, who is trusted: symbolic links are followed.

    Raises InvalidMonitor if the path leads to something else than a socket; MonitorUnreachable if it leads to nothing,
    or may not be resolved.
    """
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MonitorUnreachable(
            f"there is no {path}: start QEMU with its socket there, or correct the path"
        ) from error
    except PermissionError as error:
        raise MonitorUnreachable(
            f"{path} may not be accessed: run this as a user with search permission on its directory"
        ) from error
    except (OSError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise MonitorUnreachable(f"{path} cannot be opened: {words}") from error
    status = os.fstat(found)
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFSOCK:
        os.close(found)
        raise InvalidMonitor(
            f"{path} is {_KINDS.get(kind, 'something else')}, not a socket: specify the socket that QEMU creates"
        )
    return UnixEndpoint(found, status, str(path), str(path), str(path))


def bad_segment(segment: str) -> str | None:
    """What is wrong with one part of a path; None: nothing."""
    if segment == "":
        return "has an empty segment"
    if segment in {".", ".."}:
        return f"has a segment {segment!r}: it must not leave the namespace's directory"
    if "/" in segment or "\0" in segment:
        return "has a character that no file name can hold"
    try:
        encoded = os.fsencode(segment)
    except UnicodeEncodeError:
        return "has a character that no file name can hold"
    return "has a segment of more than 255 bytes" if len(encoded) > 255 else None


def _open_beneath(folder: int, segment: str, name: str) -> int:
    """Descriptor of one entry of an open folder; of a symbolic link itself, not its target."""
    try:
        return os.open(segment, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise MonitorUnreachable(
            f"there is no {name} below the socket root (yet): check that QEMU is running"
        ) from error
    except PermissionError as error:
        raise MonitorUnreachable(
            f"{name} below the socket root may not be opened: give the operator's user (uid {os.geteuid()}) search"
            " permission on its directory"
        ) from error
    except OSError as error:
        limit = "; raise the operator's limit of open files" if error.errno in {errno.EMFILE, errno.ENFILE} else ""
        raise MonitorUnreachable(f"{name} below the socket root cannot be opened: {error.strerror}{limit}") from error


def _time(seconds: float) -> datetime | None:
    """A file's time; None: its owner has set one that Python cannot represent."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _require(descriptor: int, kind: int, name: str) -> os.stat_result:
    """The status of an open file, which must be of this kind."""
    try:
        status = os.fstat(descriptor)
    except OSError as error:  # on a network file system it may be gone by now
        raise MonitorUnreachable(f"{name} below the socket root cannot be examined: {error.strerror}") from error
    found = stat.S_IFMT(status.st_mode)
    if found != kind:
        raise InvalidMonitor(
            f"{name} below the socket root is {_KINDS.get(found, 'something else')}, not {_KINDS[kind]}"
        )
    return status
