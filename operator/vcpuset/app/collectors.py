"""The sets as Prometheus metrics: read from the cache at each scrape, so passes report nothing here.

Some series exist for each set, so their number is limited: with more sets than a limit none of them is exported, and
`vcpuset_set_series` is 0. The aggregates over all sets always exist; use these for alerts.

With thousands of sets the text takes some tenths of a second to write, so a thread writes it, from a copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.qmp.meters import Meters

__all__ = ["UNREPORTED", "SetCollector", "Snapshot", "state_of"]

UNREPORTED: Final = "Unreported"
"""Instead of a reason: this process, or an earlier one, has not reported on the current spec yet."""

_STATES: Final = {reason.value: reason.states for reason in Reason}


class Snapshot:
    """A collector of the sets' metrics at one moment.

    sets   those that this process manages
    waits  for those that are not Ready since a change of their spec: for how long, in seconds
    limit  up to so many sets, series of single sets are exported; 0: never, and `vcpuset_set_series` is absent
    now    wall-clock time
    busy   vCPU-seconds so far, and busy vCPUs now (None: not known), of the sets that were ever sampled
    """

    def __init__(
        self,
        sets: Iterable[VCPUSet],
        waits: Mapping[UID, float],
        limit: int,
        now: datetime,
        busy: Mapping[UID, tuple[float, float | None]],
    ) -> None:
        self._sets = tuple(sets)
        self._waits = waits
        self._limit = limit
        self._now = now
        self._busy = busy

    def collect(self) -> Iterator[Metric]:
        """The families, those of single sets last."""
        states = [state_of(vcpuset) for vcpuset in self._sets]
        unmatched = [self._not_ready_seconds(vcpuset) for vcpuset in self._sets]
        yield from _summed(states, unmatched)
        if not self._limit:
            return
        shown = len(self._sets) <= self._limit
        family = GaugeMetricFamily(
            "vcpuset_set_series",
            "1: each VCPUSet has its own series; 0: there are more sets than --metrics-set-limit. "
            "Absent with --metrics-set-limit=0.",
        )
        family.add_metric([], float(shown))
        yield family
        if shown:
            yield from self._single(states, unmatched)

    def _single(self, states: list[tuple[State, str]], unmatched: list[float]) -> Iterator[Metric]:
        of_set = ["namespace", "name"]
        for name, text, value in _SINGLE:
            family = GaugeMetricFamily(name, text, labels=of_set)
            for vcpuset in self._sets:
                if (number := value(vcpuset)) is not None:
                    family.add_metric([vcpuset.namespace, vcpuset.name], number)
            yield family
        seconds = GaugeMetricFamily("vcpuset_not_ready_seconds", _UNMATCHED, labels=of_set)
        state = GaugeMetricFamily(
            "vcpuset_state",
            "Always 1: the state of the set and the reason of its conditions.",
            labels=[*of_set, "state", "reason"],
        )
        for vcpuset, (which, reason), since in zip(self._sets, states, unmatched, strict=True):
            seconds.add_metric([vcpuset.namespace, vcpuset.name], since)
            state.add_metric([vcpuset.namespace, vcpuset.name, which.value, reason], 1)
        yield seconds
        yield state
        total = CounterMetricFamily("vcpuset_busy_seconds", _BUSY_SECONDS, labels=of_set)
        gauge = GaugeMetricFamily("vcpuset_busy_vcpus", _BUSY_VCPUS, labels=of_set)
        for vcpuset in self._sets:
            if (busy := self._busy.get(vcpuset.uid)) is not None:
                total.add_metric([vcpuset.namespace, vcpuset.name], busy[0])
                if busy[1] is not None:
                    gauge.add_metric([vcpuset.namespace, vcpuset.name], busy[1])
        yield total
        yield gauge

    def _not_ready_seconds(self, vcpuset: VCPUSet) -> float:
        ready = vcpuset.status.ready
        if ready is None:
            return max(0.0, (self._now - vcpuset.created_at).total_seconds())
        if ready.status != "True":
            return max(0.0, (self._now - ready.last_transition_time).total_seconds())
        # Ready, but perhaps for an earlier spec.
        return 0.0 if ready.observed_generation == vcpuset.generation else self._waits.get(vcpuset.uid, 0.0)


class SetCollector:
    """Writes the metrics of the sets.

    sets   those that this process manages
    waits  as in `Snapshot`
    meters of the same sets
    limit  as in `Snapshot`
    """

    def __init__(
        self,
        sets: Callable[[], Iterable[VCPUSet]],
        waits: Callable[[], Mapping[UID, float]],
        meters: Meters,
        limit: int,
    ) -> None:
        self._sets, self._waits, self._meters, self._limit = sets, waits, meters, limit
        # One at a time: frequent scrapes must not start more and more threads.
        self._writing = asyncio.Lock()

    async def exposition(self) -> bytes:
        """All of them in Prometheus' text format. The event loop is not blocked meanwhile."""
        async with self._writing:
            registry = CollectorRegistry()
            busy = self._meters.all()
            registry.register(Snapshot(self._sets(), self._waits(), self._limit, datetime.now(UTC), busy))
            return await asyncio.to_thread(generate_latest, registry)


_UNMATCHED: Final = (
    "Seconds since the set was last Ready, according to its status; 0: it is Ready; for a new set, its age."
)


_BUSY_SECONDS: Final = (
    "vCPU-seconds that the machine's vCPUs were busy, since this process manages it: by KVM's counters, or else by the "
    "guest agent's. Absent without either."
)

_BUSY_VCPUS: Final = (
    "The vCPUs that were busy between the last two samples, on average. Absent if there are none of the last minute."
)


def _pending(vcpuset: VCPUSet) -> float:
    return float(sum(request.in_flight for request in vcpuset.status.pending_unplugs))


_SINGLE: Final[tuple[tuple[str, str, Callable[[VCPUSet], float | None]], ...]] = (
    ("vcpuset_desired_vcpus", "spec.vcpus, if set and readable.", lambda vcpuset: vcpuset.spec.vcpus),
    ("vcpuset_current_vcpus", "status.vcpus, once known.", lambda vcpuset: vcpuset.status.vcpus),
    ("vcpuset_online_vcpus", "status.onlineVCPUs, while known.", lambda vcpuset: vcpuset.status.online_vcpus),
    ("vcpuset_pending_unplugs", "Unplug requests that the guest may still complete.", _pending),
)


def state_of(vcpuset: VCPUSet) -> tuple[State, str]:
    """The set's state and reason. A report about an earlier spec does not count."""
    ready = vcpuset.status.ready
    if ready is None or ready.observed_generation != vcpuset.generation:
        return State.RECONCILING, UNREPORTED
    if ready.status == "True":
        return State.READY, ready.reason
    if ready.status == "Unknown":
        return State.UNKNOWN, ready.reason
    for state in (State.RECONCILING, State.STALLED):
        if (condition := vcpuset.status.condition(state.value)) is not None and condition.status == "True":
            return state, ready.reason
    return State.HELD, ready.reason


def _summed(states: list[tuple[State, str]], unmatched: list[float]) -> Iterator[Metric]:
    # All possible ones, so that a series does not begin with the first failure.
    counts = {(state, reason): 0 for reason, possible in _STATES.items() for state in possible}
    counts[State.RECONCILING, UNREPORTED] = 0
    longest = dict.fromkeys((State.RECONCILING, State.STALLED, State.HELD), 0.0)
    for (state, reason), seconds in zip(states, unmatched, strict=True):
        known = reason if (state, reason) in counts else UNREPORTED  # written by a later version
        counts[state, known] = counts.get((state, known), 0) + 1
        if state in longest:
            longest[state] = max(longest[state], seconds)
    sets = GaugeMetricFamily(
        "vcpuset_sets", "VCPUSets that this operator manages, by state and reason.", labels=["state", "reason"]
    )
    for (state, reason), count in counts.items():
        sets.add_metric([state.value, reason], count)
    yield sets
    oldest = GaugeMetricFamily(
        "vcpuset_longest_not_ready_seconds",
        "The highest vcpuset_not_ready_seconds of all sets in this state; 0: none.",
        labels=["state"],
    )
    for state, seconds in longest.items():
        oldest.add_metric([state.value], seconds)
    yield oldest
