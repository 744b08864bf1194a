"""Kubernetes Events (`events.k8s.io/v1`), what `kubectl describe` and `kubectl events` show.

Events are for people and may be lost: recording never waits and never fails, and posting goes on behind a bounded
queue at a limited pace. Equal events within ten minutes are one Event with a `series` that counts them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, Final, Literal

from vcpuset.domain.errors import ObjectGone, VCPUSetError
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube.cluster import Cluster
from vcpuset.kube.codec import API_VERSION, KIND

__all__ = ["Recorder"]

QUEUE_LIMIT: Final = 1000
"""Events that wait to be posted; when full, the oldest are dropped."""

PACE_SECONDS: Final = 0.05
"""Pause between two requests, so that many sets that fail together do not flood the API server."""

SERIES_SECONDS: Final = 600.0
"""How long after the last of equal events the next one belongs to the same series."""

SERIES_WRITE_SECONDS: Final = 60.0
"""How often the count of a series is written at most."""

SERIES_LIMIT: Final = 1024
"""Series that are remembered; a forgotten one begins anew as another Event."""

CONTROLLER: Final = "vcpuset.dev/operator"
"""`reportingController`."""

_NOTE_BYTES: Final = 1024  # the API's limits
_INSTANCE_CHARACTERS: Final = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Key:
    """What makes two events equal. The API takes no change of an Event but of its series, so the note is in it."""

    uid: UID
    type: str
    reason: str
    action: str
    note: str


@dataclass(frozen=True, slots=True)
class _Occurrence:
    key: _Key
    namespace: str
    name: str
    resource_version: str
    at: datetime


@dataclass(slots=True)
class _Series:
    """An Event that was posted: `count` and `last` are what happened, `write_at` (loop time) when to say so."""

    namespace: str
    event_name: str
    last: datetime
    written_at: float
    count: int = 1
    write_at: float | None = None


class Recorder:
    """Posts Events about VCPUSets. `run` has to run, else they are only queued."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        instance: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`instance` is the `reportingInstance`, by default the host's (in a pod: the pod's) name."""
        self._cluster = cluster
        self._instance = (instance or socket.gethostname())[:_INSTANCE_CHARACTERS]
        self._clock = clock
        self._waiting: deque[_Occurrence] = deque()
        self._wake = asyncio.Event()
        self._series: OrderedDict[_Key, _Series] = OrderedDict()
        self.dropped = 0
        """How many events were dropped because the queue was full."""

    def record(
        self,
        vcpuset: VCPUSet,
        *,
        type: Literal["Normal", "Warning"],  # noqa: A002 - the API's word
        reason: str,
        action: str,
        note: str,
    ) -> None:
        """Report that something happened to `vcpuset`. Returns at once.

        Args:
            vcpuset: what it is about.
            type: Warning for what somebody should look at.
            reason: why, one CamelCase word.
            action: what the operator did, one CamelCase word.
            note: the same for people; cut after 1024 bytes.
        """
        if len(self._waiting) >= QUEUE_LIMIT:
            self._waiting.popleft()
            if not self.dropped:
                _log.warning("Events are dropped, the oldest first: more than %d wait to be posted", QUEUE_LIMIT)
            self.dropped += 1
        note = note.encode()[:_NOTE_BYTES].decode(errors="ignore")
        key = _Key(vcpuset.uid, type, reason, action, note)
        self._waiting.append(_Occurrence(key, vcpuset.namespace, vcpuset.name, vcpuset.resource_version, self._clock()))
        self._wake.set()

    async def run(self) -> None:
        """Post what is recorded. Ends only by cancellation; what waits then is lost."""
        while True:
            await self._until_work()
            try:
                if self._waiting:
                    await self._post(self._waiting.popleft())
                else:
                    await self._write_due_series()
            except VCPUSetError as error:
                _log.warning("an Event could not be posted: %s", error)
            await asyncio.sleep(PACE_SECONDS)

    async def _until_work(self) -> None:
        """Return when an event waits or the count of a series is due."""
        self._wake.clear()
        if self._waiting:
            return
        due = min((series.write_at for series in self._series.values() if series.write_at is not None), default=None)
        try:
            async with asyncio.timeout_at(due):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _post(self, occurrence: _Occurrence) -> None:
        series = self._series.get(occurrence.key)
        if series is not None and (occurrence.at - series.last).total_seconds() < SERIES_SECONDS:
            series.count += 1
            series.last = occurrence.at
            series.write_at = series.written_at + SERIES_WRITE_SECONDS
            return
        name = f"{occurrence.name}.{token_hex(8)}"
        await self._cluster.post_event(occurrence.namespace, self._event(occurrence, name))
        self._series[occurrence.key] = _Series(
            occurrence.namespace, name, occurrence.at, asyncio.get_running_loop().time()
        )
        self._series.move_to_end(occurrence.key)
        if len(self._series) > SERIES_LIMIT:
            self._series.popitem(last=False)

    async def _write_due_series(self) -> None:
        now = asyncio.get_running_loop().time()
        for key, series in tuple(self._series.items()):
            if series.write_at is None or series.write_at > now:
                continue
            series.write_at = None
            series.written_at = now
            patch = {"series": {"count": series.count, "lastObservedTime": _micro_time(series.last)}}
            try:
                await self._cluster.patch_event(series.namespace, series.event_name, patch)
            except ObjectGone:
                del self._series[key]  # expired; the next one is a new Event
            return

    def _event(self, occurrence: _Occurrence, name: str) -> dict[str, Any]:
        key = occurrence.key
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": occurrence.namespace},
            "eventTime": _micro_time(occurrence.at),
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance,
            "type": key.type,
            "reason": key.reason,
            "action": key.action,
            "note": key.note,
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": occurrence.namespace,
                "name": occurrence.name,
                "uid": key.uid,
                "resourceVersion": occurrence.resource_version,
            },
        }


def _micro_time(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
