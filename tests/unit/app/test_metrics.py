"""What the process shows of itself."""

from __future__ import annotations

import asyncio
import re

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from harness.cache import REPOSITORY
from vcpuset.app.metrics import QMP_COMMANDS, Metrics, measure_lag
from vcpuset.domain.resource import UID
from vcpuset.kube.freshness import Freshness
from vcpuset.runtime.workqueue import QueueStatistics

__all__: list[str] = []


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """All samples by name and label values."""
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_passes_and_queue_have_controller_runtimes_names() -> None:
    metrics = Metrics(workers=16)
    numbers = QueueStatistics(
        depth=3,
        processing=2,
        delayed=1,
        failing=0,
        adds_total=17,
        retries_total=5,
        unfinished_seconds=1.5,
        longest_running_seconds=1.25,
        longest_still_seconds=1.0,
        untaken_seconds=0.5,
    )
    metrics.watch_queue(lambda: numbers)
    metrics.watch_leadership("vcpuset-controller", lambda: True)
    metrics.waited(0.001)
    metrics.worked(0.3)
    for _ in range(6):
        metrics.started()
    for label in ("done", "requeued", "retry", "crash", "cancelled"):
        metrics.finished(label, 0.25)

    shown = samples(metrics.registry)

    assert shown["workqueue_depth/vcpuset"] == 3
    assert shown["workqueue_adds_total/vcpuset"] == 17
    assert shown["workqueue_retries_total/vcpuset"] == 5
    assert shown["workqueue_unfinished_work_seconds/vcpuset"] == 1.5
    assert shown["workqueue_longest_running_processor_seconds/vcpuset"] == 1.25
    assert shown["workqueue_queue_duration_seconds_count/vcpuset"] == 1
    assert shown["workqueue_work_duration_seconds_sum/vcpuset"] == 0.3
    assert shown["controller_runtime_active_workers/vcpuset"] == 1
    assert shown["controller_runtime_max_concurrent_reconciles/vcpuset"] == 16
    assert shown["controller_runtime_reconcile_total/vcpuset/success"] == 1
    assert shown["controller_runtime_reconcile_total/vcpuset/requeue_after"] == 1
    assert shown["controller_runtime_reconcile_total/vcpuset/error"] == 2
    assert shown["controller_runtime_reconcile_errors_total/vcpuset"] == 2
    assert shown["controller_runtime_reconcile_panics_total/vcpuset"] == 1
    assert shown["controller_runtime_reconcile_time_seconds_count/vcpuset"] == 5
    assert shown["leader_election_master_status/vcpuset-controller"] == 1
    assert shown["process_resident_memory_bytes"] > 0


def test_commands_are_counted_by_name_and_outcome() -> None:
    metrics = Metrics(workers=1)
    metrics.commanded("device_add", 0.1, "done")
    metrics.commanded("device_add", 0.2, "refused")
    metrics.commanded("device_add", 10.0, "timeout")
    metrics.commanded("query-status", 0.1, "lost")

    shown = samples(metrics.registry)

    assert shown["vcpuset_qmp_command_duration_seconds_count/device_add"] == 3
    assert shown["vcpuset_qmp_command_errors_total/device_add/refused"] == 1
    assert shown["vcpuset_qmp_command_errors_total/device_add/timeout"] == 1
    assert shown["vcpuset_qmp_command_errors_total/query-status/lost"] == 1
    assert shown["vcpuset_plugs_total/done"] == 1
    assert shown["vcpuset_plugs_total/refused"] == 1


def test_a_command_that_nobody_sends_makes_no_series() -> None:
    metrics = Metrics(workers=1)
    before = samples(metrics.registry).keys()
    metrics.commanded("quit", 1.0, "done")
    assert samples(metrics.registry).keys() == before


def test_the_commands_that_have_series_are_those_that_the_operator_sends() -> None:
    folder = REPOSITORY / "operator" / "vcpuset" / "qmp"
    text = "".join((folder / name).read_text() for name in ("queries.py", "session.py"))
    assert set(re.findall(r'Command\(\s*"([a-z_-]+)"', text)) == set(QMP_COMMANDS)


def test_requests_have_client_gos_name() -> None:
    metrics = Metrics(workers=1)
    metrics.requested("GET", "200")
    metrics.requested("PATCH", "<error>")

    shown = samples(metrics.registry)

    assert shown["rest_client_requests_total/GET/200"] == 1
    assert shown["rest_client_requests_total/PATCH/<error>"] == 1


def test_the_watch_and_the_lists_are_shown_as_they_are_when_asked() -> None:
    metrics, now = Metrics(workers=1), 0.0
    failing = False
    freshness = Freshness(lambda _: failing, lambda: now)
    metrics.watch_freshness(freshness)
    present = {UID("a"): "default"}
    freshness.listed(present, {UID("a"): "1"})
    now = 30.0
    freshness.listed(present, {})
    now, failing = 50.0, True
    freshness.listed(present, {})
    before = samples(metrics.registry)
    freshness.brought(UID("a"), "1")
    freshness.failed()
    after = samples(metrics.registry)

    assert (before["vcpuset_watch_missing"], before["vcpuset_watch_behind_seconds"]) == (1, 50)
    assert before["vcpuset_watch_silent_seconds"] == 30
    assert (after["vcpuset_watch_missing"], after["vcpuset_watch_behind_seconds"]) == (0, 0)
    assert after["vcpuset_watch_events_total"] == 1
    assert after["vcpuset_lists_total"] == 3
    assert after["vcpuset_list_errors_total"] == 1
    assert after["vcpuset_last_list_timestamp_seconds"] > 0


def test_events_that_were_not_written_are_counted() -> None:
    metrics = Metrics(workers=1)
    metrics.watch_events(lambda: 3, lambda: 4)
    shown = samples(metrics.registry)
    assert (shown["vcpuset_events_lost_total"], shown["vcpuset_events_throttled_total"]) == (3, 4)


def test_the_text_is_what_prometheus_reads_and_has_no_series_of_creation_times() -> None:
    text = Metrics(workers=1).exposition().decode()
    assert [family.name for family in text_string_to_metric_families(text)]
    assert "_created" not in text


async def test_a_loop_that_is_held_up_lags() -> None:
    seen: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    measuring = asyncio.create_task(measure_lag(seen.put_nowait))

    def hold_up() -> None:
        until = loop.time() + 2.5
        while loop.time() < until:
            pass

    await asyncio.sleep(0)
    loop.call_soon(hold_up)
    async with asyncio.timeout(60):
        first = await seen.get()
    measuring.cancel()
    await asyncio.gather(measuring, return_exceptions=True)

    assert first >= 1.0
