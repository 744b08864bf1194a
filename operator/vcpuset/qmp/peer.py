"""The kernel's information about a connection: the process or host at the other end, and both addresses.

A process is identified by the inode of its pidfd (Linux 6.9 and newer), also across containers, where its process id
means nothing. Older kernels only report the process id, which is 0 for a process of another container.

Neither identifies a machine by itself: one process can listen for many machines (libvirt creates the sockets of all its
machines, a relay forwards connections), and a host runs many.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import struct
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

__all__ = ["UNKNOWN", "Link", "Peer", "address", "peer_of"]

Link = tuple[tuple[str, int], tuple[str, int]]
"""A TCP connection by the addresses and ports of its two ends, QEMU's first: unique at any time."""

_SO_PEERPIDFD: Final = 77
"""Linux 6.5; Python has no constant for it."""

_CREDENTIALS: Final = struct.Struct("3i")
"""`struct ucred`: process id, user, group."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection.

    host     its address; None: this host
    process  the process that listens, of this host; None: not known
    link     the connection; None: it is not on TCP
    """

    host: str | None = None
    process: Hashable | None = None
    link: Link | None = None


UNKNOWN: Final = Peer()
"""Nothing is known of the other end."""


def peer_of(connection: socket.socket) -> Peer:
    """The other end of a connected socket."""
    if connection.family == socket.AF_UNIX:
        return Peer(process=_process(connection))
    here, there = (address(*end[:2]) for end in (connection.getsockname(), connection.getpeername()))
    return Peer(host=None if here[0] == there[0] else there[0], link=(there, here))


def address(host: str, port: int) -> tuple[str, int]:
    """One spelling of an address: a dual-stack socket reports IPv4 addresses as IPv6.

    Raises ValueError if the host is no address.
    """
    found = ipaddress.ip_address(host)
    return (str(getattr(found, "ipv4_mapped", None) or found), port)


def _process(connection: socket.socket) -> Hashable | None:
    try:
        descriptor = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass  # an older kernel, or the process has ended
    else:
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if status.st_dev != _anonymous_device():
            return ("pidfd", status.st_ino)
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process_id = _CREDENTIALS.unpack(credentials)[0]
    return ("pid", process_id) if process_id > 0 else None


@functools.cache
def _anonymous_device() -> int:
    """The device of kernel objects without an inode of their own; before Linux 6.9 also of pidfds."""
    descriptor = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
