"""Metrics of the process for Prometheus, with the names of controller-runtime and client-go where they have one.

The number of series is fixed: no label contains what users write. Metrics of the sets themselves are in `history`
(completed changes) and `collectors` (the current state).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, Final, assert_never

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vcpuset.kube.cluster import NO_ANSWER
from vcpuset.kube.freshness import Freshness
from vcpuset.qmp.session import Outcome
from vcpuset.runtime.workers import Label
from vcpuset.runtime.workqueue import QueueStatistics

__all__ = ["QMP_COMMANDS", "Metrics", "measure_lag"]

_SECONDS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

_CONTROLLER: Final = "vcpuset"

LAG_SECONDS: Final = 1.0
"""The interval at which the event loop's lag is measured."""

QMP_COMMANDS: Final = (
    "device_add",
    "device_del",
    "query-acpi-ospm-status",
    "query-chardev",
    "query-cpus-fast",
    "query-hotpluggable-cpus",
    "query-migrate",
    "query-stats",
    "query-status",
    "query-uuid",
)
"""All commands that the operator sends: the label `command` has no other values."""

_METHODS: Final = ("GET", "PATCH", "POST", "PUT")


class Metrics:
    """The metrics of one process.

    Passes, QMP commands and requests are reported here when they end; counts kept elsewhere are read at each scrape.
    """

    def __init__(self, *, workers: int) -> None:
        # Otherwise each counter and histogram has a second series with its creation time.
        untyped: Any = prometheus_client
        untyped.disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("vcpuset_build", "The version of the operator.", registry=self.registry).info(
            {"version": metadata.version("vcpuset")}
        )

        labels = ("controller",)
        self._queued = self._histogram(
            "workqueue_queue_duration_seconds", "How long items waited in the queue.", ("name",)
        ).labels(_CONTROLLER)
        self._worked = self._histogram(
            "workqueue_work_duration_seconds", "How long items took to process.", ("name",)
        ).labels(_CONTROLLER)
        self._passes = self._counter(
            "controller_runtime_reconcile_total", "Reconciliations, by result.", (*labels, "result")
        )
        for result in ("success", "requeue_after", "error"):
            self._passes.labels(_CONTROLLER, result)  # a series that exists from the start has a rate
        self._errors = self._counter(
            "controller_runtime_reconcile_errors_total", "Reconciliations that failed and are retried.", labels
        ).labels(_CONTROLLER)
        self._panics = self._counter(
            "controller_runtime_reconcile_panics_total",
            "Reconciliations that ended with an unexpected exception; they are retried.",
            labels,
        ).labels(_CONTROLLER)
        self._seconds = self._histogram(
            "controller_runtime_reconcile_time_seconds", "How long reconciliations took.", labels
        ).labels(_CONTROLLER)
        self._active = self._gauge("controller_runtime_active_workers", "Reconciliations in progress.", labels).labels(
            _CONTROLLER
        )
        self._gauge(
            "controller_runtime_max_concurrent_reconciles", "Maximum number of concurrent reconciliations.", labels
        ).labels(_CONTROLLER).set(workers)

        self._requests = self._counter(
            "rest_client_requests_total",
            "Requests to the API server, by HTTP status; <error>: no response.",
            ("method", "code"),
        )
        for method in _METHODS:
            self._requests.labels(method, NO_ANSWER)

        self._commands = self._histogram(
            "vcpuset_qmp_command_duration_seconds",
            "Time until QEMU answered a QMP command, or until the command timed out. Queries are sent together: each "
            "counts from the answer before.",
            ("command",),
        )
        self._failures = self._counter(
            "vcpuset_qmp_command_errors_total",
            "Failed QMP commands. refused: QEMU returned an error; timeout: no answer in time; lost: connection lost.",
            ("command", "error"),
        )
        self._by_command = {command: self._commands.labels(command) for command in QMP_COMMANDS}
        self._plugs = self._counter(
            "vcpuset_plugs_total",
            "Attempts to plug a vCPU. done: success; refused: QEMU returned an error.",
            ("result",),
        )
        for result in ("done", "refused"):
            self._plugs.labels(result)
        self._lag = self._histogram(
            "vcpuset_event_loop_lag_seconds", "How late the event loop runs a timer, measured once a second.", ()
        )

    def _histogram(self, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=_SECONDS)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def watch_queue(self, statistics: Callable[[], QueueStatistics]) -> None:
        """Export the queue's statistics, read at each scrape."""
        self.registry.register(_Queue(statistics))

    def watch_leadership(self, name: str, leading: Callable[[], bool]) -> None:
        """Export whether this process holds the lease `name`."""
        self._gauge(
            "leader_election_master_status", "1: this process is the leader; 0: it is a standby.", ("name",)
        ).labels(name).set_function(lambda: float(leading()))

    def watch_agents(self, unserved: Callable[[], int]) -> None:
        """Export how many sets of nodes have no agent."""
        self._gauge(
            "vcpuset_sets_without_agent",
            "VCPUSets of nodes that the central controller reports as AgentUnavailable.",
            (),
        ).set_function(unserved)

    def watch_events(self, lost: Callable[[], int], throttled: Callable[[], int]) -> None:
        """Export how many Kubernetes Events were not written."""
        self._read(
            "vcpuset_events_lost_total",
            "Kubernetes Events lost because the queue was full or the API server rejected them.",
            lost,
        )
        self._read(
            "vcpuset_events_throttled_total", "Kubernetes Events dropped by the rate limit of their VCPUSet.", throttled
        )

    def watch_freshness(self, freshness: Freshness) -> None:
        """Export what the watch and the lists deliver."""
        self._read("vcpuset_watch_events_total", "Objects delivered by the watch.", lambda: freshness.events)
        self._read("vcpuset_lists_total", "Successful lists of all VCPUSets.", lambda: freshness.lists)
        self._read("vcpuset_list_errors_total", "Failed lists of all VCPUSets.", lambda: freshness.failures)
        self._gauge(
            "vcpuset_last_list_timestamp_seconds", "Unix time of the last successful list; 0: none yet.", ()
        ).set_function(lambda: freshness.listed_at)
        self._gauge(
            "vcpuset_watch_missing", "VCPUSets with changes that a list contained and the watch has not delivered.", ()
        ).set_function(lambda: len(freshness.missing))
        self._gauge(
            "vcpuset_watch_behind_seconds",
            "How long lists have contained changes that the watch does not deliver while the API server responds; 0: "
            "none.",
            (),
        ).set_function(lambda: freshness.behind_seconds)
        self._gauge(
            "vcpuset_watch_silent_seconds",
            "The part of vcpuset_watch_behind_seconds in which the watch did not fail; above 240, /healthz fails.",
            (),
        ).set_function(lambda: freshness.silent_seconds)

    def _read(self, name: str, text: str, value: Callable[[], int]) -> None:
        self.registry.register(_Counter(name, text, value))

    def exposition(self) -> bytes:
        """All of them in Prometheus' text format; takes some milliseconds."""
        return generate_latest(self.registry)

    # QueueObserver

    def waited(self, seconds: float) -> None:
        """A key was handed out so many seconds after it was added."""
        self._queued.observe(seconds)

    def worked(self, seconds: float) -> None:
        """A key was done so many seconds after it was handed out."""
        self._worked.observe(seconds)

    # WorkerObserver

    def started(self) -> None:
        """A pass began."""
        self._active.inc()

    def finished(self, label: Label, seconds: float) -> None:
        """A pass ended."""
        self._active.dec()
        self._seconds.observe(seconds)
        match label:
            case "done":
                self._passes.labels(_CONTROLLER, "success").inc()
            case "requeued":
                self._passes.labels(_CONTROLLER, "requeue_after").inc()
            case "retry" | "crash":
                self._passes.labels(_CONTROLLER, "error").inc()
                self._errors.inc()
                if label == "crash":
                    self._panics.inc()
            case "cancelled":
                pass  # the process ends
            case _:
                assert_never(label)

    # Callbacks of the packages kube and qmp.

    def requested(self, method: str, code: str) -> None:
        """A request to the API server has ended, with this HTTP status or `NO_ANSWER`."""
        self._requests.labels(method, code).inc()

    def commanded(self, command: str, seconds: float, outcome: Outcome) -> None:
        """A QMP command has ended."""
        if command not in self._by_command:
            return  # a test compares the two lists; labels only have known values
        self._by_command[command].observe(seconds)
        if outcome != "done":
            self._failures.labels(command, outcome).inc()
        if command == "device_add" and outcome in {"done", "refused"}:
            self._plugs.labels(outcome).inc()

    def lagged(self, seconds: float) -> None:
        """The event loop was so late."""
        self._lag.observe(seconds)


async def measure_lag(lagged: Callable[[float], None]) -> None:
    """Report once a second, permanently, how late the event loop runs a timer."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        lagged(max(0.0, loop.time() - due))


class _Counter(Collector):
    """A counter that is kept elsewhere."""

    def __init__(self, name: str, text: str, value: Callable[[], int]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        yield CounterMetricFamily(self._name, self._text, self._value())


class _Queue(Collector):
    """The work queue's statistics."""

    def __init__(self, statistics: Callable[[], QueueStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """One reading of all of them."""
        now = self._statistics()
        for family, name, text, value in (
            (GaugeMetricFamily, "workqueue_depth", "Items that wait for a worker.", now.depth),
            (CounterMetricFamily, "workqueue_adds", "Items added to the queue.", now.adds_total),
            (CounterMetricFamily, "workqueue_retries", "Items added after a failure.", now.retries_total),
            (
                GaugeMetricFamily,
                "workqueue_unfinished_work_seconds",
                "Total time that the items in progress have been processed so far.",
                now.unfinished_seconds,
            ),
            (
                GaugeMetricFamily,
                "workqueue_longest_running_processor_seconds",
                "Time that the oldest item in progress has been processed so far.",
                now.longest_running_seconds,
            ),
        ):
            metric = family(name, text, labels=["name"])
            metric.add_metric([_CONTROLLER], value)
            yield metric
