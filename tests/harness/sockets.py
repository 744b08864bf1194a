"""The sockets of a QEMU as seen from outside: whether they are up, and one that is made for it."""

from __future__ import annotations

import socket
from pathlib import Path

__all__ = ["LONGEST_PATH", "listener", "listening", "option_value"]

LONGEST_PATH = 107
"""How many bytes the path of a unix socket may have."""

ACCEPTS_CONNECTIONS = "00010000"
"""__SO_ACCEPTCON, as /proc/net/unix shows it."""


def listening() -> set[str]:
    """The paths of all unix sockets of this machine that accept connections.

    Connecting to find out would take the place of a monitor's first client.
    """
    table = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace")
    # Num RefCount Protocol Flags Type St Inode Path
    rows = (line.split(None, 7) for line in table.splitlines())
    return {row[7] for row in rows if len(row) == 8 and row[3] == ACCEPTS_CONNECTIONS}


def listener(port: int) -> socket.socket:
    """A listening socket for QEMU to inherit: one that QEMU makes would not share the port with its `ReservedPort`."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    made.listen(1)
    return made


def option_value(path: Path | str) -> str:
    """A path, or other text, as part of a QEMU option, where a comma would begin the next one."""
    return str(path).replace(",", ",,")
