"""Metrics of completed changes: how long they took, and how unplug requests ended, from the changes of the cache.

The difference between two statuses shows what has happened. So passes need not report anything, and a change that an
earlier process began and this one ends is counted once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from vcpuset.domain.reasons import Reason
from vcpuset.domain.requests import cpu_of
from vcpuset.domain.resource import UID, VCPUSet

__all__ = ["History"]

_SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(slots=True)
class _Wait:
    """A change of a set's spec that the machine has not followed yet.

    since  when this process observed it, by `monotonic`
    whole  whether it was made then; otherwise it is older, and its duration is unknown
    """

    since: float
    whole: bool


class History:
    """Counts what happens to the sets.

    registry   for the metrics
    monotonic  a monotonic clock, in seconds
    """

    def __init__(self, registry: CollectorRegistry, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._convergence = Histogram(
            "vcpuset_convergence_seconds",
            "Time from the moment this process observed a spec change to Ready; of several changes in a row, only the "
            "last one counts.",
            registry=registry,
            buckets=_SECONDS,
        )
        self._unplugs = Counter(
            "vcpuset_unplugs_total",
            "Unplug requests, according to the statuses. done: the vCPU was unplugged; refused: by the guest or QEMU; "
            "timed_out: no answer within unplug.timeoutSeconds (it can still arrive).",
            ("result",),
            registry=registry,
        )
        for result in ("done", "refused", "timed_out"):
            self._unplugs.labels(result)  # a series that exists from the start has a rate
        # Only of sets that are not Ready as declared, so usually empty.
        self._waits: dict[UID, _Wait] = {}
        self._live = False

    def go_live(self) -> None:
        """The first list is complete: changes from now on are new."""
        self._live = True

    def moved(self, before: VCPUSet | None, after: VCPUSet | None) -> None:
        """The cache has a change of a set. None: it was not there before, or is no longer there."""
        if after is None:
            if before is not None:
                self._waits.pop(before.uid, None)
            return
        if before is None or before.generation != after.generation:
            self._waits[after.uid] = _Wait(self._monotonic(), whole=before is not None or self._live)
        if after.uid in self._waits and _is_ready(after):
            wait = self._waits.pop(after.uid)
            # One that was Ready when it was first observed has not converged just now.
            if wait.whole and before is not None:
                self._convergence.observe(self._monotonic() - wait.since)
        if before is not None:
            self._count_unplugs(before, after)

    def waits(self) -> dict[UID, float]:
        """The sets that are not Ready since a change of their spec; the seconds since this process observed it."""
        now = self._monotonic()
        return {uid: now - wait.since for uid, wait in self._waits.items()}

    def _count_unplugs(self, before: VCPUSet, after: VCPUSet) -> None:
        if not before.status.pending_unplugs and not after.status.pending_unplugs:
            return
        old = {cpu_of(request): request for request in before.status.pending_unplugs}
        new = {cpu_of(request): request for request in after.status.pending_unplugs}
        if before.status.machine_uuid == after.status.machine_uuid:
            over = sum(request.in_flight for cpu, request in old.items() if cpu not in new)
            fewer = (before.status.vcpus or 0) - (after.status.vcpus or 0)
            # The lesser: a request can be over because a count was raised, and a vCPU can leave without one.
            self._unplugs.labels("done").inc(max(0, min(over, fewer)))
        refused = [
            request for cpu, request in new.items() if not request.in_flight and (cpu not in old or old[cpu].in_flight)
        ]
        self._unplugs.labels("refused").inc(len(refused))
        if _timed_out(after) and not _timed_out(before):
            self._unplugs.labels("timed_out").inc(sum(request.answer is None for request in new.values()))


def _is_ready(vcpuset: VCPUSet) -> bool:
    ready = vcpuset.status.ready
    return ready is not None and ready.status == "True" and ready.observed_generation == vcpuset.generation


def _timed_out(vcpuset: VCPUSet) -> bool:
    ready = vcpuset.status.ready
    return (
        ready is not None
        and ready.reason == Reason.UNPLUG_TIMED_OUT
        and ready.observed_generation == vcpuset.generation
    )
