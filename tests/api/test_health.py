"""`/healthz` and `/readyz` of a whole operator when its watch is silent or refused, and when the API server is away.

The operator runs within the test, with its times made short: by its own, a watch is given up after some minutes.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.apifaults import Ends, Freeze, InTurn, Refuse
from harness.controlplane import ControlPlane
from harness.faultproxy import Asked, FaultProxy, Passes
from harness.processes import free_port
from harness.wait import until
from harness.world import User
from vcpuset.app import liveness, operator
from vcpuset.app.settings import Settings
from vcpuset.controller import Controller
from vcpuset.runtime.workers import Done

__all__: list[str] = []

WAIT = 120.0

SWEEP_SECONDS = 1
BEHIND_SECONDS = 4.0


class Running:
    """An operator in this process."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = Settings(
            namespaces=(namespace,),
            http_address=("127.0.0.1", port),
            kubeconfig=kubeconfig,
            sweep_seconds=SWEEP_SECONDS,
        )
        self.task = asyncio.create_task(operator.run(settings))

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0: nobody listens yet."""
        if self.task.done():
            self.task.result()
        timeout = aiohttp.ClientTimeout(total=30)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as client, client.get(f"{self.url}{path}") as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientConnectionError:
            return 0, ""

    async def is_ready(self) -> bool:
        """Whether it has listed the sets."""
        return (await self.get("/readyz"))[0] == 200

    async def metric(self, name: str) -> float:
        """A metric, summed over its labels."""
        _, text = await self.get("/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        )


@asynccontextmanager
async def running(kubeconfig: Path, namespace: str) -> AsyncIterator[Running]:
    """An operator that is ready, until the end of the block."""
    process = Running(kubeconfig, namespace)
    try:
        await until(process.is_ready, WAIT, "the operator to be ready")
        yield process
    finally:
        if not process.task.done():
            signal.raise_signal(signal.SIGTERM)
        await asyncio.wait({process.task}, timeout=WAIT)
    process.task.result()


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some seconds in place of some minutes."""
    monkeypatch.setattr(liveness, "BEHIND_SECONDS", BEHIND_SECONDS)


def is_watch(asked: Asked) -> bool:
    return asked.watch


async def test_a_watch_that_freezes_while_lists_succeed_is_an_illness_until_it_recovers(
    control_plane: ControlPlane, namespace: str, user: User, tmp_path: Path
) -> None:
    async with (
        FaultProxy(control_plane, tmp_path) as proxy,
        running(proxy.kubeconfig(control_plane.kubeconfig), namespace) as process,
    ):
        await user.create("zero", 2, "zero.sock")
        await user.wait_reason("zero", "InvalidMonitor")
        assert await process.get("/healthz") == (200, "ok\n")

        with proxy.fault(Freeze(), where=is_watch):
            proxy.cut(where=is_watch)

            async def is_frozen() -> bool:
                return any(asked.watch and asked.code == 200 and asked.ended is None for asked in proxy.requests)

            await until(is_frozen, WAIT, "a watch that is frozen")
            await user.create("one", 2, "one.sock")

            async def is_ill() -> bool:
                return (await process.get("/healthz"))[0] == 500

            await until(is_ill, WAIT, "/healthz to fail")
            assert "the watch is behind" in (await process.get("/healthz"))[1]
            assert await process.metric("vcpuset_watch_missing") == 1
            assert await process.is_ready()
            # What the watch does not bring comes by the lists.
            await user.wait_reason("one", "InvalidMonitor")

        proxy.cut(where=is_watch)

        async def is_well() -> bool:
            return await process.get("/healthz") == (200, "ok\n")

        await until(is_well, WAIT, "/healthz to be well again")
        assert await process.metric("vcpuset_watch_missing") == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(Refuse(403), "the roles in deploy/ grant the required permissions", id="no-right-to-watch"),
        pytest.param(InTurn([Refuse(500), Refuse(503)]), "HTTP 50", id="server-errors"),
        pytest.param(Ends(), "ended in less than", id="ends-at-once"),
    ],
)
async def test_a_watch_that_fails_and_is_tried_again_is_no_illness_and_the_lists_bring_the_news(
    control_plane: ControlPlane,
    namespace: str,
    user: User,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: Passes,
    words: str,
) -> None:
    async with (
        FaultProxy(control_plane, tmp_path) as proxy,
        running(proxy.kubeconfig(control_plane.kubeconfig), namespace) as process,
    ):
        await user.create("zero", 2, "zero.sock")
        await user.create("goes", 2, "goes.sock")
        await user.wait_reason("zero", "InvalidMonitor")
        await user.wait_reason("goes", "InvalidMonitor")

        with proxy.fault(fault, where=is_watch):
            proxy.cut(where=is_watch)

            async def is_told() -> bool:
                return any(
                    record.name == "vcpuset.kube.transport" and words in record.getMessage()
                    for record in caplog.records
                )

            await until(is_told, WAIT, "the failed watch in the log")
            if isinstance(fault, Refuse):
                assert f'code="{fault.code}"' in (await process.get("/metrics"))[1]
            await user.create("one", 2, "one.sock")
            await user.delete("goes")
            await user.wait_reason("one", "InvalidMonitor")
            lists = await process.metric("vcpuset_lists_total")
            said: set[tuple[int, str]] = set()

            async def has_lasted() -> bool:
                said.add(await process.get("/healthz"))
                return (
                    await process.metric("vcpuset_lists_total") - lists >= 3 * BEHIND_SECONDS / SWEEP_SECONDS
                    and await process.metric("vcpuset_sets") == 2
                )

            await until(has_lasted, WAIT, "the fault to last for longer than a watch may be behind")
            assert said == {(200, "ok\n")}

        async def is_up_to_date() -> bool:
            return await process.metric("vcpuset_watch_missing") == 0

        await user.create("two", 2, "two.sock")
        await user.wait_reason("two", "InvalidMonitor")
        await until(is_up_to_date, WAIT, "the watch to bring what it owed")
        assert await process.get("/healthz") == (200, "ok\n")


async def test_an_api_server_that_is_away_is_no_illness_and_does_not_end_readiness(
    control_plane: ControlPlane, namespace: str, user: User, tmp_path: Path
) -> None:
    async with (
        FaultProxy(control_plane, tmp_path) as proxy,
        running(proxy.kubeconfig(control_plane.kubeconfig), namespace) as process,
    ):
        await user.create("one", 2, "one.sock")
        await user.wait_reason("one", "InvalidMonitor")
        said: set[tuple[int, str]] = set()

        async def has_failed() -> bool:
            said.update([await process.get("/healthz"), await process.get("/readyz")])
            return await process.metric("vcpuset_list_errors_total") >= 2

        proxy.block()
        await user.create("two", 2, "two.sock")
        await until(has_failed, WAIT, "two lists to fail")
        assert said == {(200, "ok\n")}
        proxy.unblock()

        async def knows_both() -> bool:
            return await process.metric("vcpuset_sets") == 2 and await process.metric("vcpuset_watch_missing") == 0

        await until(knows_both, WAIT, "the second set to be known, by the watch too")
        status, text = await process.get("/metrics")
        assert status == 200
        assert re.search(r'rest_client_requests_total\{code="<error>",method="GET"\} [1-9]', text)
        assert await process.get("/healthz") == (200, "ok\n")


async def test_an_operator_without_sets_is_well(control_plane: ControlPlane, namespace: str) -> None:
    async with running(control_plane.kubeconfig, namespace) as process:

        async def has_listed() -> bool:
            return await process.metric("vcpuset_lists_total") >= 2 * BEHIND_SECONDS / SWEEP_SECONDS

        await until(has_listed, WAIT, "lists for longer than a watch may be behind")
        assert await process.get("/healthz") == (200, "ok\n")


async def test_a_pass_that_is_stuck_is_an_illness(
    control_plane: ControlPlane, namespace: str, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = asyncio.Event()

    async def hang(*_: object) -> Done:
        await released.wait()
        return Done()

    monkeypatch.setattr(Controller, "reconcile", hang)
    monkeypatch.setattr(liveness, "STUCK_SECONDS", 1.0)
    async with running(control_plane.kubeconfig, namespace) as process:
        assert await process.get("/healthz") == (200, "ok\n")
        await user.create("one", 2, "one.sock")

        async def is_ill() -> bool:
            return "a reconciliation has made no progress for" in (await process.get("/healthz"))[1]

        await until(is_ill, WAIT, "/healthz to fail")
        released.set()

        async def is_well() -> bool:
            return await process.get("/healthz") == (200, "ok\n")

        await until(is_well, WAIT, "/healthz to be well again")
