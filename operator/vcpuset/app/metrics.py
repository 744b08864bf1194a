"""Prometheus metrics, with controller-runtime's names where it has one for the same thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vcpuset.runtime.workers import Label
from vcpuset.runtime.workqueue import QueueStatistics

__all__ = ["Metrics"]

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

_CONTROLLER = "vcpuset"


class Metrics:
    """The metrics of one process; it watches the work queue and its workers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("controller",)
        self._queued = Histogram(
            "workqueue_queue_duration_seconds",
            "Time that a key waited in the queue.",
            ("name",),
            registry=self.registry,
            buckets=_SECONDS,
        ).labels(_CONTROLLER)
        self._worked = Histogram(
            "workqueue_work_duration_seconds",
            "Time that a key was worked on.",
            ("name",),
            registry=self.registry,
            buckets=_SECONDS,
        ).labels(_CONTROLLER)
        self._passes = Counter(
            "controller_runtime_reconcile_total",
            "Passes, by result.",
            ("controller", "result"),
            registry=self.registry,
        )
        for result in get_args(Label):
            self._passes.labels(_CONTROLLER, result)  # a series that is there from the start has a rate
        self._seconds = Histogram(
            "controller_runtime_reconcile_time_seconds",
            "Time that a pass took.",
            labels,
            registry=self.registry,
            buckets=_SECONDS,
        ).labels(_CONTROLLER)
        self._active = Gauge(
            "controller_runtime_active_workers", "Passes under way.", labels, registry=self.registry
        ).labels(_CONTROLLER)

    def watch_queue(self, statistics: Callable[[], QueueStatistics]) -> None:
        """Show the queue's own numbers, read when they are asked for."""
        self.registry.register(_Queue(statistics))

    def watch_sets(self, count: Callable[[], int]) -> None:
        """Show how many sets this process serves."""
        Gauge("vcpuset_sets", "VCPUSets that this operator serves.", registry=self.registry).set_function(count)

    def watch_leadership(self, name: str, leading: Callable[[], bool]) -> None:
        """Show whether this process holds the lease `name`."""
        Gauge(
            "leader_election_master_status",
            "1: this process is the leader; 0: it stands by.",
            ("name",),
            registry=self.registry,
        ).labels(name).set_function(lambda: float(leading()))

    def watch_events(self, lost: Callable[[], int], throttled: Callable[[], int]) -> None:
        """Show how many Kubernetes Events were not written."""
        self.registry.register(
            _Counter("vcpuset_events_lost", "Kubernetes Events lost: too many waited, or they were not taken.", lost)
        )
        self.registry.register(
            _Counter("vcpuset_events_throttled", "Kubernetes Events left out: their set had too many.", throttled)
        )

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    # QueueObserver

    def waited(self, seconds: float) -> None:
        """A key was handed out so many seconds after it was added."""
        self._queued.observe(seconds)

    def worked(self, seconds: float) -> None:
        """A key was given back so many seconds after it was handed out."""
        self._worked.observe(seconds)

    # WorkerObserver

    def started(self) -> None:
        """A pass began."""
        self._active.inc()

    def finished(self, label: Label, seconds: float) -> None:
        """A pass ended."""
        self._active.dec()
        self._passes.labels(_CONTROLLER, label).inc()
        self._seconds.observe(seconds)


class _Counter(Collector):
    """A counter that is kept elsewhere."""

    def __init__(self, name: str, text: str, value: Callable[[], int]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        yield CounterMetricFamily(self._name, self._text, self._value())


class _Queue(Collector):
    """The work queue's numbers, which it keeps itself."""

    def __init__(self, statistics: Callable[[], QueueStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """One reading of all of them."""
        now = self._statistics()
        for family, name, text, value in (
            (GaugeMetricFamily, "workqueue_depth", "Keys that wait for a worker.", now.depth),
            (CounterMetricFamily, "workqueue_adds", "Keys that became due so far.", now.adds_total),
            (CounterMetricFamily, "workqueue_retries", "Keys added after a failure so far.", now.retries_total),
            (
                GaugeMetricFamily,
                "workqueue_unfinished_work_seconds",
                "Time that the keys in work have been there, summed.",
                now.unfinished_seconds,
            ),
            (
                GaugeMetricFamily,
                "workqueue_longest_running_processor_seconds",
                "Time that the oldest key in work has been there.",
                now.longest_running_seconds,
            ),
        ):
            metric = family(name, text, labels=["name"])
            metric.add_metric([_CONTROLLER], value)
            yield metric
