"""Kubernetes Events (`events.k8s.io/v1`), what `kubectl describe` and `kubectl events` show.

Events are for people and may be lost: recording never waits and never fails, and one task posts them from a bounded
queue, at a limited rate. So that they remain readable when many sets fail,

* equal Events are one Event with a `series` that counts them. As in client-go, Events of one type, action and reason
  about one object are equal. Notes contain times and numbers; the first one is kept, because only `series` of an Event
  can change;
* each set has a token bucket for new Events, as in client-go. Repeats are counted without tokens;
* a failure is logged once per episode, not per Event. Lost Events are counted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, Final, Literal, Protocol

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.domain.errors import APIError, Conflict, ObjectGone, Rejected
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube.codec import API_VERSION, KIND

__all__ = ["EventSink", "Recorder"]

QUEUE_LIMIT: Final = 5000
"""New Events that wait to be posted; when full, the oldest are dropped. Posting all of them takes 4 minutes."""

PACE_SECONDS: Final = 0.05
"""Pause between two requests, so that many sets that fail together do not flood the API server."""

BURST: Final = 25
REFILL_SECONDS: Final = 300.0
"""How many new Events one set may have at once, and the time until one more; client-go's numbers."""

SERIES_SECONDS: Final = 600.0
"""How long after the last of equal Events the next one is counted with them; as client-go's original value."""

WRITE_SECONDS: Final = 60.0
"""How long after a repeat the count is written, including the repeats of this time."""

REMEMBERED: Final = 10_000
"""How many series and token buckets are remembered; beyond it the least recently used ones are dropped."""

BACKOFF: Final = ExponentialBackoff(base_seconds=1, cap_seconds=15)
"""The pause after a failed request. It is for all Events: usually the API server is away."""

GIVE_UP_SECONDS: Final = 600.0
"""How long after the first failed attempt to post an Event it is dropped."""

QUIET_SECONDS: Final = 600.0
"""A failure that returns sooner is the same episode, and is not logged again."""

_log = logging.getLogger(__name__)


class EventSink(Protocol):
    """The API server: a `vcpuset.kube.cluster.Cluster`."""

    async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None: ...
    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None: ...


@dataclass(slots=True, eq=False)
class _Series:
    """One Event, and how often it happened. Times are the event loop's, except `last`.

    name           the Event's, chosen before it is posted, so that a retry cannot create a second Event
    generation     the set's, when the series began
    event          the Event without its count; None: it was posted
    last, last_at  the latest occurrence
    queued         it will be posted, or its count written
    failing_since  when posting first failed
    """

    key: tuple[UID, str, str, str]
    namespace: str
    name: str
    generation: int
    event: dict[str, Any] | None
    last: str
    last_at: float
    count: int = 1
    queued: bool = True
    failing_since: float = math.inf


class Recorder:
    """Posts Events about VCPUSets. Without `run` they are only queued."""

    def __init__(self, cluster: EventSink, *, instance: str | None = None) -> None:
        """`instance` is the `reportingInstance`, by default the host's (in a pod: the pod's) name."""
        self._cluster = cluster
        self._instance = (instance or socket.gethostname())[:128]  # the API's limit
        self._series: OrderedDict[tuple[UID, str, str, str], _Series] = OrderedDict()
        """In the order of their latest occurrence."""
        self._full_at: OrderedDict[UID, float] = OrderedDict()
        """When the token bucket of each set is full again."""
        self._new: deque[_Series] = deque()
        self._counts: deque[_Series] = deque()
        self._wake = asyncio.Event()
        self._failures = 0
        self._outage_logged = False
        self._troubles: OrderedDict[tuple[str, UID | None], float] = OrderedDict()
        self.dropped = 0
        """How many Events were lost because the queue was full, or because the API server rejected them."""
        self.throttled = 0
        """How many Events were lost because their set had too many."""

    def record(
        self,
        vcpuset: VCPUSet,
        *,
        type: Literal["Normal", "Warning"],  # noqa: A002 - reason, action, note and type are named as the fields of events.k8s.io/v1
        reason: str,
        action: str,
        note: str,
    ) -> None:
        """Record that something happened to `vcpuset`. Returns at once; needs a running event loop.

        `reason` (why) and `action` (what the operator did) are one CamelCase word each. Notes have at most 1024 bytes.
        """
        now = asyncio.get_running_loop().time()
        while self._series and now - next(iter(self._series.values())).last_at >= SERIES_SECONDS:
            self._series.popitem(last=False)
        key = (vcpuset.uid, type, action, reason)
        series = self._series.get(key)
        # An Event about another generation is no repeat, and the old note would be wrong about it. client-go compares
        # the object's resourceVersion for that; ours changes with each status write.
        new = series is None or series.generation != vcpuset.generation
        if new and self._take_token(vcpuset.uid, now):
            at, name = _micro_time(), f"{vcpuset.name}.{token_hex(8)}"
            event = {
                "apiVersion": "events.k8s.io/v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": vcpuset.namespace},
                "eventTime": at,
                "reportingController": "vcpuset.dev/operator",
                "reportingInstance": self._instance,
                "type": type,
                "reason": reason,
                "action": action,
                "note": note.encode()[:1024].decode(errors="ignore"),
                "regarding": {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "namespace": vcpuset.namespace,
                    "name": vcpuset.name,
                    "uid": vcpuset.uid,
                    "resourceVersion": vcpuset.resource_version,
                },
            }
            series = _Series(key, vcpuset.namespace, name, vcpuset.generation, event, at, now)
            _remember(self._series, key, series)
            self._queue(self._new, series)
        elif series is not None:
            # Also a new one without a token: better counted with an old note than lost.
            series.count += 1
            series.last, series.last_at = _micro_time(), now
            self._series.move_to_end(key)
            if not series.queued:
                self._write_later(series)
        else:
            self.throttled += 1
            self._warn(
                "%s: dropping Events: rate limit exceeded (burst %d, then one every %.0f s); first dropped: %s: %s",
                *(vcpuset, BURST, REFILL_SECONDS, reason, note),
                about=vcpuset.uid,
            )

    async def run(self) -> None:
        """Post what is recorded. Ends only by cancellation; queued Events are lost then."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._new or self._counts:
                # Alternately, so that neither can block the other.
                for queue in (self._new, self._counts):
                    if queue:
                        await self._send(queue.popleft())

    def _take_token(self, uid: UID, now: float) -> bool:
        full_at = max(self._full_at.get(uid, now), now)
        if round(full_at - now) > (BURST - 1) * REFILL_SECONDS:  # rounded, because sums of floats are not exact
            return False
        _remember(self._full_at, uid, full_at + REFILL_SECONDS)
        return True

    def _queue(self, queue: deque[_Series], series: _Series) -> None:
        queue.append(series)
        self._wake.set()
        if len(self._new) > QUEUE_LIMIT:
            words = "dropping the oldest Events: more than %d are waiting to be posted"
            self._lose(self._new.popleft(), QUEUE_LIMIT, words)

    def _write_later(self, series: _Series) -> None:
        """Write the count after a while, also if the series is replaced or forgotten meanwhile."""
        series.queued = True
        asyncio.get_running_loop().call_later(WRITE_SECONDS, self._queue, self._counts, series)

    async def _send(self, series: _Series) -> None:
        """Post an Event, or write its count, and pause."""
        count = series.count  # it can grow meanwhile
        patch = {"series": {"count": count, "lastObservedTime": series.last}}
        try:
            try:
                if series.event is None:
                    await self._cluster.patch_event(series.namespace, series.name, patch)
                else:
                    await self._cluster.post_event(series.namespace, series.event | (patch if count > 1 else {}))
            except Conflict:
                count = 1  # an attempt without a response has created it; with which count is not known
            series.event, series.queued = None, False
            if series.count != count:
                self._write_later(series)
        except (ObjectGone, Rejected) as error:
            # Waiting does not help: the namespace or a posted Event is gone, or Events may not be written.
            self._lose(series, error)
        except APIError as error:
            await self._fail(series, error)
            return
        self._failures = 0
        if self._outage_logged:
            self._outage_logged = False
            _log.info("posting Events succeeds again; lost so far: %d", self.dropped)
        await asyncio.sleep(PACE_SECONDS)

    async def _fail(self, series: _Series, error: APIError) -> None:
        now = asyncio.get_running_loop().time()
        series.failing_since = min(series.failing_since, now)
        self._failures += 1
        self._outage_logged |= self._warn("posting Events failed, retrying: %s", error)
        await asyncio.sleep(max(BACKOFF.delay(self._failures, error.longest_pause), error.retry_after))
        if series.event is None:
            self._write_later(series)
        elif now - series.failing_since < GIVE_UP_SECONDS:
            self._queue(self._new, series)  # behind the others: one that is rejected repeatedly must not delay them
        else:
            self._lose(series, error)

    def _lose(
        self, series: _Series, cause: object, message: str = "an Event was lost, because it could not be posted: %s"
    ) -> None:
        """The next equal Event starts a new series. Of one that was posted, only the rest of its count is lost."""
        if self._series.get(series.key) is series:
            del self._series[series.key]
        if series.event is not None:
            self.dropped += series.count
            self._warn(message, cause)

    def _warn(self, message: str, *values: object, about: UID | None = None) -> bool:
        """Log a failure if its episode begins; returns whether it does."""
        now = asyncio.get_running_loop().time()
        begins = now - self._troubles.get((message, about), -math.inf) > QUIET_SECONDS
        _remember(self._troubles, (message, about), now)
        if begins:
            _log.warning(message, *values)
        return begins


def _remember(table: OrderedDict[Any, Any], key: object, value: object) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > REMEMBERED:
        table.popitem(last=False)


def _micro_time() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
