"""`/healthz`, `/readyz` and `/metrics`, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.processes import free_port
from harness.wait import until
from vcpuset.app.health import serve_http
from vcpuset.app.metrics import Metrics
from vcpuset.runtime.workqueue import QueueStatistics

__all__: list[str] = []


class Served:
    """A server on a port of its own, and what it reports on.

    ill  why the process should be restarted; None: it is well
    """

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.ready = asyncio.Event()
        self.ill: str | None = None
        self.port = free_port()
        self.task = asyncio.create_task(
            serve_http(("127.0.0.1", self.port), self.metrics, ready=self.ready, ill=lambda: self.ill)
        )

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        timeout = aiohttp.ClientTimeout(total=20)
        async with (
            aiohttp.ClientSession(timeout=timeout) as client,
            client.get(f"http://127.0.0.1:{self.port}{path}") as answer,
        ):
            return answer.status, await answer.text()

    async def listens(self) -> bool:
        """Whether it takes connections."""
        try:
            await self.get("/healthz")
        except aiohttp.ClientConnectionError:
            if self.task.done():
                self.task.result()
            return False
        return True


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    server = Served()
    await until(server.listens, 30, "the server to listen")
    yield server
    server.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await server.task


async def test_healthz_is_well_until_there_is_a_reason_for_a_restart(served: Served) -> None:
    assert await served.get("/healthz") == (200, "ok\n")

    served.ill = "a pass has been running for 181 s"

    assert await served.get("/healthz") == (500, "a pass has been running for 181 s\n")


async def test_readyz_waits_for_the_first_list(served: Served) -> None:
    assert (await served.get("/readyz"))[0] == 503

    served.ready.set()

    assert await served.get("/readyz") == (200, "ok\n")


async def test_another_path_is_not_found(served: Served) -> None:
    assert (await served.get("/"))[0] == 404


async def test_when_it_is_cancelled_the_port_is_free_again(served: Served) -> None:
    served.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await served.task

    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", served.port))


async def test_an_address_that_is_taken_is_an_error(served: Served) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
        await serve_http(("127.0.0.1", served.port), Metrics(), ready=asyncio.Event(), ill=lambda: None)

    assert caught.value.errno == errno.EADDRINUSE


async def _samples(served: Served) -> dict[str, float]:
    status, text = await served.get("/metrics")
    assert status == 200
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_have_controller_runtimes_names(served: Served) -> None:
    numbers = QueueStatistics(
        depth=3,
        processing=2,
        delayed=1,
        failing=0,
        adds_total=17,
        retries_total=5,
        unfinished_seconds=1.5,
        longest_running_seconds=1.25,
    )
    served.metrics.watch_queue(lambda: numbers)
    served.metrics.watch_sets(lambda: 4)
    served.metrics.watch_leadership("vcpuset-controller", lambda: True)
    served.metrics.waited(0.001)
    served.metrics.worked(0.3)
    served.metrics.started()
    served.metrics.started()
    served.metrics.finished("done", 0.25)

    samples = await _samples(served)

    assert samples["workqueue_depth/vcpuset"] == 3
    assert samples["workqueue_adds_total/vcpuset"] == 17
    assert samples["workqueue_retries_total/vcpuset"] == 5
    assert samples["workqueue_unfinished_work_seconds/vcpuset"] == 1.5
    assert samples["workqueue_longest_running_processor_seconds/vcpuset"] == 1.25
    assert samples["workqueue_queue_duration_seconds_count/vcpuset"] == 1
    assert samples["workqueue_work_duration_seconds_sum/vcpuset"] == 0.3
    assert samples["controller_runtime_active_workers/vcpuset"] == 1
    assert samples["controller_runtime_reconcile_total/vcpuset/done"] == 1
    assert samples["controller_runtime_reconcile_total/vcpuset/crash"] == 0
    assert samples["controller_runtime_reconcile_time_seconds_count/vcpuset"] == 1
    assert samples["vcpuset_sets"] == 4
    assert samples["leader_election_master_status/vcpuset-controller"] == 1


async def test_numbers_of_the_queue_are_read_when_they_are_asked_for(served: Served) -> None:
    sets = 1
    served.metrics.watch_sets(lambda: sets)
    before = (await _samples(served))["vcpuset_sets"]
    sets = 2

    assert (before, (await _samples(served))["vcpuset_sets"]) == (1, 2)
