"""Words for people."""

from __future__ import annotations

from datetime import datetime

from vcpuset.domain.resource import TCPMonitor, UnixMonitor, Unsupported, VCPUSet

__all__ = ["age", "count", "monitor", "printable"]

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def printable(text: str) -> str:
    """A text of QEMU, a guest or a file, without terminal control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def age(since: datetime, now: datetime) -> str:
    """The time since then as kubectl shows it, with at most two units: 45s, 5m10s, 3h, 2d4h."""
    seconds = max(0, int((now - since).total_seconds()))
    for place, (size, unit) in enumerate(_UNITS):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            # Of ten hours or days, and from ten minutes on, the smaller unit is no news.
            if whole >= 10 or place + 1 == len(_UNITS) or not (part := rest // _UNITS[place + 1][0]):
                return f"{whole}{unit}"
            return f"{whole}{unit}{part}{_UNITS[place + 1][1]}"
    return "0s"


def count(vcpus: int | None) -> str:
    """A count in a table; a dash if it is not known."""
    return "-" if vcpus is None else str(vcpus)


def monitor(vcpuset: VCPUSet) -> str:
    """The set's monitor; of a spec that this version does not support, why it has none."""
    match vcpuset.spec.monitor:
        case UnixMonitor(path):
            return f"{vcpuset.namespace}/{path}"
        case TCPMonitor(host, port):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case Unsupported(message):
            return message
