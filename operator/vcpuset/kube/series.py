"""Which Kubernetes Events are repeats of one another, and when their count is due to be written.

As in client-go's recorder for `events.k8s.io/v1`, equal are events of one type, action and reason about one object. The
note does not count: it holds times and numbers, so that no two would be equal. The API lets nothing of an Event change
but its `series`, so the first note stays.

Nothing here waits or sends; times are the event loop's, in seconds. Whatever is done for one event takes time that
grows with the logarithm of the number of series, or not at all.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from vcpuset.domain.resource import UID

__all__ = ["EventKey", "Occurrence", "Series", "SeriesBook"]

SERIES_SECONDS: Final = 600.0
"""How long after the last of equal events the next one belongs to the same series; client-go's old choice.

Its present six minutes are little more than the pause between two requests for a CPU that the guest refuses to give.
"""

SERIES_WRITE_SECONDS: Final = 60.0
"""How long after an Event was posted its count is written at the earliest, and again twice as long after each write."""

SERIES_WRITE_MAX_SECONDS: Final = 300.0
"""The longest pause between two writes while events go on to repeat. It has to be less than `SERIES_SECONDS`."""

SERIES_LIMIT: Final = 10_000
"""Series that are remembered; beyond it the quietest is forgotten, and begins anew as another Event."""


@dataclass(frozen=True, slots=True)
class EventKey:
    """What makes two events equal."""

    uid: UID
    type: str
    action: str
    reason: str


@dataclass(frozen=True, slots=True)
class Occurrence:
    """What the Event tells of the first of its series."""

    at: datetime
    name: str
    resource_version: str
    note: str


@dataclass(slots=True, eq=False)
class Series:
    """One Event, and how often what it tells has happened.

    event_name     chosen before it is posted, so that a second attempt cannot make a second Event
    generation     the object's, when the series began
    last, last_at  the latest occurrence: by the calendar, and in loop time
    first          None: it is posted
    count          occurrences so far
    written        how many of them the API server knows of
    failing_since  loop time of the first of failed attempts to post it
    """

    key: EventKey
    namespace: str
    event_name: str
    generation: int
    last: datetime
    last_at: float
    first: Occurrence | None
    count: int = 1
    written: int = 0
    written_at: float = 0.0
    writes: int = 0
    scheduled: bool = False
    failing_since: float | None = None


class SeriesBook:
    """The series that may still go on, and those with a count to write."""

    def __init__(self) -> None:
        # In the order of their latest occurrence, so that those that are over stand at the front.
        self._series: OrderedDict[EventKey, Series] = OrderedDict()
        # Each series stands here at most once (`scheduled`), also one that was replaced or forgotten meanwhile: its
        # last count is written all the same. Only posted ones come here: the pace of posting bounds their number.
        self._due: list[tuple[float, int, Series]] = []
        self._numbers = itertools.count()  # equal times are served in the order in which they came

    def __len__(self) -> int:
        """How many series may still go on."""
        return len(self._series)

    @property
    def unwritten(self) -> int:
        """How many series wait for their count to be written."""
        return len(self._due)

    def find(self, key: EventKey, now: float) -> Series | None:
        """The series that an event of this key belongs to now; None: it is the first of another."""
        while self._series:
            oldest = next(iter(self._series.values()))
            if now - oldest.last_at < SERIES_SECONDS:
                break
            self.forget(oldest)
        return self._series.get(key)

    def begin(self, series: Series) -> None:
        """Remember a series that has just begun, in place of an earlier one with its key."""
        self._series[series.key] = series
        self._series.move_to_end(series.key)
        if len(self._series) > SERIES_LIMIT:
            self._series.popitem(last=False)

    def repeat(self, series: Series, at: datetime, now: float) -> None:
        """Count one more occurrence."""
        series.count += 1
        series.last = at
        series.last_at = now
        self._series.move_to_end(series.key)
        self._schedule(series, now)

    def posted(self, series: Series, count: int, now: float) -> None:
        """Note that the Event exists, and with which count."""
        series.first = None
        series.written = count
        series.written_at = now
        self._schedule(series, now)

    def written(self, series: Series, count: int, now: float) -> None:
        """Note that this count was written."""
        series.written = count
        series.written_at = now
        series.writes += 1
        self._schedule(series, now)

    def put_off(self, series: Series, now: float) -> None:
        """Note that the count could not be written; it is due again as if it had been."""
        series.written_at = now
        self._schedule(series, now)

    def forget(self, series: Series) -> None:
        """Let the next event of its key begin another series."""
        if self._series.get(series.key) is series:
            del self._series[series.key]

    def due_at(self) -> float | None:
        """When the next count is to be written; None: all are."""
        return self._due[0][0] if self._due else None

    def pop_due(self, now: float) -> Series | None:
        """Take out the series whose count has been due for the longest time."""
        if not self._due or self._due[0][0] > now:
            return None
        *_, series = heapq.heappop(self._due)
        series.scheduled = False
        return series

    def _schedule(self, series: Series, now: float) -> None:
        if series.scheduled or series.first is not None or series.written == series.count:
            return
        pause = min(SERIES_WRITE_SECONDS * 2.0 ** min(series.writes, 10), SERIES_WRITE_MAX_SECONDS)
        series.scheduled = True
        heapq.heappush(self._due, (max(now, series.written_at + pause), next(self._numbers), series))
