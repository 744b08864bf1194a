"""The geometry of the drawings: the slots of a machine, and the counts of the last hour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from vcpuset.app.page.journal import KEPT_SECONDS, Entry
from vcpuset.domain.machine import Machine
from vcpuset.domain.requests import cpu_of
from vcpuset.domain.resource import Request

__all__ = ["HEIGHT", "Chart", "SlotMap", "ranges"]

KINDS: Final = {
    "boot": "Boot CPU",
    "plugged": "Plugged CPU",
    "pending": "Unplug pending",
    "refused": "Unplug refused",
    "free": "Free",
}

HEIGHT: Final = 100
"""Of the chart, in its own units; its width is in seconds."""

_TICK_SECONDS: Final = 600
_STEPS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


@dataclass(frozen=True)
class SlotMap:
    """The slots of a machine, in rows.

    kinds    of each slot, ascending: a key of `KINDS`
    threads  vCPUs of each slot
    columns  slots of one row
    """

    kinds: Sequence[str]
    threads: int
    columns: int

    @classmethod
    def of(cls, machine: Machine, requests: Iterable[Request]) -> SlotMap:
        """The map of a machine and of the requests for its CPUs."""
        open_requests = {cpu_of(request): request for request in requests}
        kinds = []
        for slot in machine.slots or ():
            request = None if slot.path is None else open_requests.get(cpu_of(slot))
            if slot.path is None:
                kinds.append("free")
            elif request is not None:
                kinds.append("pending" if request.in_flight else "refused")
            else:
                kinds.append("boot" if slot.boot else "plugged")
        threads = machine.slots[0].vcpus if machine.slots else 1
        return cls(kinds, threads, 16 if len(kinds) <= 256 else 64)

    @property
    def cells(self) -> list[tuple[int, int, int, str]]:
        """Number, column, row and kind of each slot."""
        return [(number, *divmod(number, self.columns)[::-1], kind) for number, kind in enumerate(self.kinds)]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return -(-len(self.kinds) // self.columns)

    @property
    def legend(self) -> list[tuple[str, str, int, str]]:
        """Of each kind: its key, its meaning, how many slots, and which."""
        found = {kind: [at for at, each in enumerate(self.kinds) if each == kind] for kind in KINDS}
        return [(kind, text, len(found[kind]), ranges(found[kind])) for kind, text in KINDS.items()]


@dataclass(frozen=True)
class Chart:
    """Two step lines over the last hour, as SVG paths in seconds by `HEIGHT`.

    since  the time of the first entry that is shown, if it began within the hour
    ticks  (percent from the left, label) and (percent from the top, label)
    """

    desired: str
    current: str
    since: datetime | None
    times: list[tuple[float, str]]
    counts: list[tuple[float, str]]

    @classmethod
    def of(cls, entries: Sequence[Entry], now: float) -> Chart:
        """The chart of a set's entries until now."""
        start = now - KEPT_SECONDS
        last = len(entries) - 1
        shown = [entry for at, entry in enumerate(entries) if at == last or entries[at + 1].at > start]
        highest = max((max(entry.desired or 0, entry.current or 0) for entry in shown), default=0)
        step = next((step for step in _STEPS if step * 4 >= highest), highest)
        top = step * max(1, -(-highest // step)) + step / 4

        def height(vcpus: float) -> float:
            return round(HEIGHT * (1 - vcpus / top), 2)

        def path(values: list[int | None]) -> str:
            words: list[str] = []
            before: int | None = None
            for entry, value in zip(shown, values, strict=True):
                x = max(0, round(entry.at - start))
                if before is not None:
                    words.append(f"H{x}")
                if value is not None:
                    words.append(f"M{x} {height(value)}" if before is None else f"V{height(value)}")
                before = value
            return " ".join(words if before is None else [*words, f"H{round(KEPT_SECONDS)}"])

        first = (int(start) // _TICK_SECONDS + 1) * _TICK_SECONDS
        return cls(
            path([entry.desired for entry in shown]),
            path([entry.current for entry in shown]),
            datetime.fromtimestamp(shown[0].at, UTC) if shown and shown[0].at > start else None,
            [
                (round((at - start) / KEPT_SECONDS * 100, 2), datetime.fromtimestamp(at, UTC).strftime("%H:%M"))
                for at in range(first, int(now), _TICK_SECONDS)
            ],
            [(height(vcpus), str(vcpus)) for vcpus in range(0, int(top) + 1, step)],
        )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words, such as 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("\N{EN DASH}".join(map(str, part)) for part in parts) or "none"
