"""A set without a count: the operator adopts the observed one, and whoever applies the manifest never fights a scaler.

The appliers' calls are those of kubectl, Flux and Argo CD: kubectl's own, and what the others ask of the API server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from harness.controlplane import ControlPlane
from harness.expect import HELD, RECONCILING, history, shows
from harness.faultproxy import Asked, Exchange, FaultProxy
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import count
from harness.wait import until
from harness.world import API, User, manifest

# The operator's way to the API server is served by the module's event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

OPERATOR = "vcpuset"
"""The operator's user agent."""


def adoptions(user: User, since: int = 0) -> int:
    """How often the operator has written a count in the user's namespace."""
    return len(
        [
            event
            for event in user.control_plane.audit_events(since)
            if (event.user_agent, event.subresource, event.namespace) == (OPERATOR, "scale", user.namespace)
            and event.code == 200
        ]
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultProxy]:
    """The operator's way to the API server."""
    async with FaultProxy(control_plane, tmp_path_factory.mktemp("proxy")) as way:
        yield way


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def operator(control_plane: ControlPlane, proxy: FaultProxy, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator on that way."""
    kubeconfig = proxy.kubeconfig(control_plane.kubeconfig)
    async with OperatorProcess(control_plane, kubeconfig=kubeconfig, socket_root=socket_root) as running:
        yield running


async def test_the_observed_count_is_adopted_once(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with Guest(None, smp="3,maxcpus=8", monitor_paths=[folder / "web.sock"]) as machine:
        await user.create("web", None)
        seen = await user.wait_ready("web")
        assert (seen.body["spec"]["vcpus"], seen.vcpus) == (3, 3)
        assert [each["reason"] for each in await user.events("web")] in ([], ["Adopting"])

        # Drift is corrected, and what others declare is obeyed: there is nothing more to adopt.
        await user.scale("web", 5)
        await user.wait_ready("web")
        assert await count(machine.control) == 5
        assert adoptions(user) == 1
        await until(lambda: posted(user, "Adopting"), 60, "the Event", interval=0.2)


async def posted(user: User, reason: str) -> bool:
    return reason in [each["reason"] for each in await user.events("web")]


async def test_the_observed_count_is_brought_within_the_bounds(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "web.sock"]) as machine:
        await user.create("web", None, minVCPUs=4)
        seen = await user.wait_ready("web")
        assert seen.body["spec"]["vcpus"] == seen.vcpus == await count(machine.control) == 4


async def test_a_suspended_set_reports_what_it_will_adopt(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with FaultyMonitor(folder / "web.sock", cpus=2):
        await user.create("web", None, suspend=True)
        await shows(
            user, "web", "Suspended", HELD, "set to 2, the present count, once spec.suspend is not set", vcpus=2
        )
        assert "vcpus" not in (await user.get("web")).body["spec"]
        await user.change("web", suspend=False)
        assert (await user.wait_ready("web")).body["spec"]["vcpus"] == 2


async def test_a_machine_that_cannot_be_observed_has_its_usual_reason_and_a_scaler_may_be_first(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    await user.create("web", None)
    await user.create("db", None)
    for name in ("web", "db"):
        await shows(user, name, "MonitorUnreachable", RECONCILING, vcpus=None)
    # What an autoscaler gets until then; it can write nevertheless.
    path = f"{API}/namespaces/{user.namespace}/vcpusets/web/scale"
    answer = await user.control_plane.request("GET", path)
    assert answer.status == 500
    assert 'the spec replicas field ".spec.vcpus" does not exist' in answer.body["message"]
    await user.scale("web", 5)
    async with (
        FaultyMonitor(folder / "web.sock", cpus=2) as machine,
        FaultyMonitor(folder / "db.sock", cpus=3),
    ):
        assert (await user.wait_ready("web")).vcpus == len(machine.cpus.occupied()) == 5
        assert (await user.wait_ready("db")).body["spec"]["vcpus"] == 3
    assert adoptions(user) == 1


@dataclass
class Meanwhile:
    """Something happens between the client's request and its arrival; once."""

    action: Callable[[], Awaitable[None]]
    codes: list[int | None]

    async def serve(self, exchange: Exchange) -> web.StreamResponse:
        """See `Passes`."""
        if not self.codes:
            await self.action()
        answer = await exchange.carry()
        self.codes.append(exchange.asked.code)
        return answer


async def test_a_count_that_is_written_between_report_and_adoption_is_kept(
    folder: Path, operator: OperatorProcess, proxy: FaultProxy, user: User
) -> None:
    def adopts(asked: Asked) -> bool:
        return asked.verb == "PATCH" and asked.path.endswith("/scale")

    late = Meanwhile(lambda: user.scale("web", 5), [])
    async with FaultyMonitor(folder / "web.sock", cpus=2):
        with proxy.fault(late, adopts):
            await user.create("web", None)
            seen = await user.wait_ready("web")
    assert (seen.body["spec"]["vcpus"], seen.vcpus) == (5, 5)
    assert late.codes == [409]


# --- those who apply manifests ------------------------------------------------------------------------------------


Apply = Callable[[User, dict[str, Any]], Awaitable[None]]


async def kubectl(user: User, body: dict[str, Any], *flags: str) -> None:
    await user.control_plane.kubectl("apply", "--filename=-", *flags, input=json.dumps(body))


async def client_side(user: User, body: dict[str, Any]) -> None:
    await kubectl(user, body, "--server-side=false")


async def server_side(user: User, body: dict[str, Any]) -> None:
    await kubectl(user, body, "--server-side")


async def argo_client_side(user: User, body: dict[str, Any]) -> None:
    """Argo CD's sync: kubectl's three-way patch, under its own name."""
    await kubectl(user, body, "--server-side=false", "--field-manager=argocd-controller")


async def argo_server_side(user: User, body: dict[str, Any]) -> None:
    """With the sync option ServerSideApply=true."""
    await kubectl(user, body, "--server-side", "--field-manager=argocd-controller", "--force-conflicts")


async def flux(user: User, body: dict[str, Any]) -> None:
    """Flux's kustomize-controller: a server-side dry run that shows the drift, and the same for good."""
    path = f"{API}/namespaces/{user.namespace}/vcpusets/{body['metadata']['name']}"
    query = "fieldManager=kustomize-controller&force=true"
    for more in ("&dryRun=All", ""):
        answer = await user.control_plane.request(
            "PATCH",
            f"{path}?{query}{more}",
            json.dumps(body),
            headers={"Content-Type": "application/apply-patch+yaml"},
        )
        assert answer.status in {200, 201}, answer.body


@pytest.mark.parametrize("apply", [client_side, server_side, argo_client_side, argo_server_side, flux])
async def test_a_manifest_without_a_count_never_moves_what_a_scaler_has_set(
    folder: Path, operator: OperatorProcess, user: User, apply: Apply
) -> None:
    body = manifest(user.namespace, "web", None, maxVCPUs=32)
    applied = 0

    async def apply_again() -> None:
        nonlocal applied
        # Each is a change: one that changes nothing may not reach the API server.
        await apply(user, {**body, "spec": {**body["spec"], "unplug": {"retrySeconds": 100 + applied}}})
        applied += 1

    async def again_and_again() -> None:
        while True:
            await apply_again()

    async with FaultyMonitor(folder / "web.sock", cpus=2, slots=32):
        await apply_again()
        first = await user.get("web")
        applying = asyncio.create_task(again_and_again())
        try:
            await user.wait("web", lambda seen: seen.body["spec"].get("vcpus") == 2, "the observed count")
            for vcpus in (6, 3, 9):
                await user.scale("web", vcpus)
                await until(
                    partial(_more_than, lambda: applied, applied + 1, applying), 90, "the manifest to be applied"
                )
        finally:
            applying.cancel()
            await asyncio.gather(applying, return_exceptions=True)
        assert (await user.wait_ready("web")).vcpus == 9
        declared = [seen.body["spec"].get("vcpus") for seen in await history(user, first)]
        assert [vcpus for vcpus, _ in itertools.groupby(declared) if vcpus is not None] == [2, 6, 3, 9]
        assert adoptions(user) == 1


def _more_than(count: Callable[[], int], least: int, work: asyncio.Task[None]) -> bool:
    if work.done():
        work.result()
    return count() > least


async def test_a_count_in_a_manifest_takes_the_place_of_the_adopted_one(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with FaultyMonitor(folder / "web.sock", cpus=2):
        await server_side(user, manifest(user.namespace, "web", None))
        await user.wait_ready("web")
        # The operator does not own the field, so there is no conflict.
        await server_side(user, manifest(user.namespace, "web", 4))
        assert (await user.wait_ready("web")).vcpus == 4


@pytest.mark.parametrize("apply", [client_side, server_side, argo_client_side, argo_server_side, flux])
async def test_a_count_that_leaves_the_manifest_is_replaced_by_the_present_one(
    folder: Path, operator: OperatorProcess, user: User, apply: Apply
) -> None:
    async with FaultyMonitor(folder / "web.sock", cpus=2):
        await apply(user, manifest(user.namespace, "web", 4))
        await user.wait_ready("web")
        since = user.control_plane.audit_offset()
        await apply(user, manifest(user.namespace, "web", None))
        seen = await user.wait("web", lambda seen: seen.ready and "vcpus" in seen.body["spec"], "a count")
        assert (seen.body["spec"]["vcpus"], seen.vcpus) == (4, 4)
        assert adoptions(user, since) == 1
