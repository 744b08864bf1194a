"""Kubernetes Events (`events.k8s.io/v1`), what `kubectl describe` and `kubectl events` show.

Events are for people and may be lost: recording never waits and never fails, and posting goes on behind a bounded
queue at a limited pace. With thousands of sets that is not enough to keep them readable, so

* equal events are one Event with a `series` that counts them (`vcpuset.kube.series`);
* each set has a token bucket for new Events, so that one that is never quiet neither floods the API server nor pushes
  the others' Events out of the queue. Counting goes on without tokens;
* an API server that is away is tried again for some minutes, and told of in the log once, not per Event.

What is lost all the same is counted, and told of once per episode.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, Final, Literal, Protocol

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.domain.errors import APIError, Conflict, ObjectGone, Rejected
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube.codec import API_VERSION, KIND
from vcpuset.kube.series import EventKey, Occurrence, Series, SeriesBook
from vcpuset.kube.tokenbucket import TokenBuckets

__all__ = ["EventSink", "Recorder"]

QUEUE_LIMIT: Final = 5000
"""New Events that wait to be posted; when full, the oldest are dropped. Posting so many takes 4 minutes."""

PACE_SECONDS: Final = 0.05
"""Pause between two requests, so that many sets that fail together do not flood the API server."""

BURST: Final = 25
"""New Events that one set may have at once; client-go's number."""

REFILL_SECONDS: Final = 300.0
"""After so long a set may have one new Event more; client-go's number."""

OBJECTS_LIMIT: Final = 10_000
"""Sets whose token buckets are remembered; a forgotten bucket is full."""

BACKOFF: Final = ExponentialBackoff(base_seconds=1, cap_seconds=15)
"""The pause after a failed request. It is for all Events: most often it is the API server that is not there. New Events
go first afterwards, so that one that is refused again and again holds up none."""

GIVE_UP_SECONDS: Final = 600.0
"""How long after the first failed attempt to post an Event it is given up."""

QUIET_SECONDS: Final = 300.0
"""Trouble that comes back sooner than this is the same episode, and is not told of again."""

CONTROLLER: Final = "vcpuset.dev/operator"
"""`reportingController`."""

_NOTE_BYTES: Final = 1024  # the API's limits
_INSTANCE_CHARACTERS: Final = 128

_log = logging.getLogger(__name__)


class EventSink(Protocol):
    """Where Events go: a `vcpuset.kube.cluster.Cluster`."""

    async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        """Create an Event. Raises `Conflict` if there is one of that name, `ObjectGone` if there is no namespace."""

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Merge a patch into an Event. Raises `ObjectGone` if there is none of that name."""


class Recorder:
    """Posts Events about VCPUSets. `run` has to run, else they are only queued."""

    def __init__(
        self,
        cluster: EventSink,
        *,
        instance: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`instance` is the `reportingInstance`, by default the host's (in a pod: the pod's) name."""
        self._cluster = cluster
        self._instance = (instance or socket.gethostname())[:_INSTANCE_CHARACTERS]
        self._clock = clock
        self._buckets: TokenBuckets[UID] = TokenBuckets(burst=BURST, refill_seconds=REFILL_SECONDS, limit=OBJECTS_LIMIT)
        self._book = SeriesBook()
        self._waiting: deque[Series] = deque()
        self._again: deque[Series] = deque()
        """Those that failed. Together with `_waiting` not more than `QUEUE_LIMIT`."""
        self._wake = asyncio.Event()
        self._counts_turn = False
        self._failures = 0
        self._away = _Episode()
        self._away_told = False
        self._losses = _Episode()
        self._overflow = _Episode()
        self.dropped = 0
        """How many events were lost because the queue was full, or because the API server did not take them."""
        self.throttled = 0
        """How many events were lost because their set had too many."""

    @property
    def waiting(self) -> int:
        """How many new Events wait to be posted."""
        return len(self._waiting) + len(self._again)

    def record(
        self,
        vcpuset: VCPUSet,
        *,
        type: Literal["Normal", "Warning"],  # noqa: A002 - a field of events.k8s.io/v1
        reason: str,
        action: str,
        note: str,
    ) -> None:
        """Report that something happened to `vcpuset`. Returns at once; needs a running event loop.

        Args:
            vcpuset: what it is about.
            type: Warning for what somebody should look at.
            reason: why, one CamelCase word.
            action: what the operator did, one CamelCase word.
            note: the same for people; cut after 1024 bytes.
        """
        now = asyncio.get_running_loop().time()
        key = EventKey(vcpuset.uid, type, action, reason)
        series = self._book.find(key, now)
        # What happens to another declared state is no repeat, and the old note would be wrong about it. client-go
        # compares the object's resourceVersion for that; ours changes with each status write.
        new = series is None or series.generation != vcpuset.generation
        if new and self._buckets.take(vcpuset.uid, now):
            note = note.encode()[:_NOTE_BYTES].decode(errors="ignore")
            self._begin(vcpuset, key, note, now)
        elif series is not None:
            # Also a new one that there is no token for: better counted under an old note than lost.
            self._book.repeat(series, self._clock(), now)
        else:
            self.throttled += 1
            if self._buckets.refuse(vcpuset.uid) == 1:
                _log.warning(
                    "%s: dropping Events: rate limit exceeded (burst %d, then one every %.0f s); first dropped: %s: %s",
                    vcpuset,
                    BURST,
                    REFILL_SECONDS,
                    reason,
                    note,
                )
        self._wake.set()

    async def run(self) -> None:
        """Post what is recorded. Ends only by cancellation; what waits then is lost."""
        while True:
            await self._until_work()
            series = self._next()
            pause = PACE_SECONDS if series is None else await self._send(series)
            await asyncio.sleep(pause)

    def _begin(self, vcpuset: VCPUSet, key: EventKey, note: str, now: float) -> None:
        if self.waiting >= QUEUE_LIMIT:
            oldest = (self._again or self._waiting).popleft()
            self._book.forget(oldest)
            self.dropped += oldest.count
            if self._overflow.begins(now):
                _log.warning("dropping the oldest Events: more than %d are waiting to be posted", QUEUE_LIMIT)
        at = self._clock()
        series = Series(
            key,
            vcpuset.namespace,
            f"{vcpuset.name}.{token_hex(8)}",
            vcpuset.generation,
            last=at,
            last_at=now,
            first=Occurrence(at, vcpuset.name, vcpuset.resource_version, note),
        )
        self._book.begin(series)
        self._waiting.append(series)

    async def _until_work(self) -> None:
        """Return when an event waits or the count of a series is due."""
        self._wake.clear()
        if self.waiting:
            return
        try:
            async with asyncio.timeout_at(self._book.due_at()):
                await self._wake.wait()
        except TimeoutError:
            return

    def _next(self) -> Series | None:
        """What to send: new Events and counts by turns, as neither may keep the other from being seen."""
        now = asyncio.get_running_loop().time()
        self._counts_turn = not self._counts_turn
        if self._counts_turn and (due := self._book.pop_due(now)) is not None:
            return due
        if self.waiting:
            return (self._waiting or self._again).popleft()
        return self._book.pop_due(now)

    async def _send(self, series: Series) -> float:
        """Bring the API server up to date about a series; returns how long to pause then."""
        try:
            if series.first is not None:
                await self._post(series, series.first)
            else:
                await self._write_count(series)
        except (ObjectGone, Rejected) as error:
            # Waiting does not help: the namespace or a posted Event is gone, or Events may not be written.
            self._book.forget(series)
            if series.first is not None:
                self._lose(series, error)
        except APIError as error:
            return self._fail(series, error)
        self._failures = 0
        if self._away_told:
            self._away_told = False
            _log.info("posting Events succeeds again; lost so far: %d", self.dropped)
        return PACE_SECONDS

    async def _post(self, series: Series, first: Occurrence) -> None:
        count = series.count  # it can grow meanwhile
        try:
            await self._cluster.post_event(series.namespace, self._event(series, first, count))
        except Conflict:
            # An attempt that got no answer has made it after all. With which count is not known.
            count = 1
        self._book.posted(series, count, asyncio.get_running_loop().time())

    async def _write_count(self, series: Series) -> None:
        count = series.count
        await self._cluster.patch_event(series.namespace, series.event_name, {"series": _series(count, series.last)})
        self._book.written(series, count, asyncio.get_running_loop().time())

    def _fail(self, series: Series, error: APIError) -> float:
        now = asyncio.get_running_loop().time()
        if series.first is None:
            self._book.put_off(series, now)
        elif series.failing_since is None:
            series.failing_since = now
            self._again.append(series)
        elif now - series.failing_since < GIVE_UP_SECONDS:
            self._again.append(series)
        else:
            self._book.forget(series)
            self._lose(series, error)
        if self._away.begins(now):
            self._away_told = True
            _log.warning("posting Events failed, retrying: %s", error)
        self._failures += 1
        return max(BACKOFF.delay(self._failures, error.longest_pause), error.retry_after)

    def _lose(self, series: Series, error: APIError) -> None:
        self.dropped += series.count
        if self._losses.begins(asyncio.get_running_loop().time()):
            _log.warning("an Event was lost, because it could not be posted: %s", error)

    def _event(self, series: Series, first: Occurrence, count: int) -> dict[str, Any]:
        event: dict[str, Any] = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": series.event_name, "namespace": series.namespace},
            "eventTime": _micro_time(first.at),
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance,
            "type": series.key.type,
            "reason": series.key.reason,
            "action": series.key.action,
            "note": first.note,
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": series.namespace,
                "name": first.name,
                "uid": series.key.uid,
                "resourceVersion": first.resource_version,
            },
        }
        if count > 1:
            event["series"] = _series(count, series.last)
        return event


class _Episode:
    """Trouble that is told of when it begins, and then no more until it has stayed away for `QUIET_SECONDS`."""

    def __init__(self) -> None:
        self._last: float | None = None

    def begins(self, now: float) -> bool:
        """Note the trouble; returns whether it is to be told of."""
        begins = self._last is None or now - self._last > QUIET_SECONDS
        self._last = now
        return begins


def _series(count: int, last: datetime) -> dict[str, Any]:
    return {"count": count, "lastObservedTime": _micro_time(last)}


def _micro_time(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
