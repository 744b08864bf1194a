"""The Lease on a real API server: who gets it, when it changes hands, and how its holder learns that it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.controlplane import ControlPlane
from harness.faultproxy import FaultProxy
from harness.wait import until
from vcpuset.domain.errors import NotLeading
from vcpuset.kube.cluster import Cluster
from vcpuset.kube.lease import Leadership, since_boot

__all__: list[str] = []

WAIT = 60.0
LEASES = "/apis/coordination.k8s.io/v1/namespaces"


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with await Cluster.connect(control_plane.kubeconfig) as connected:
        yield connected


class Clock:
    """The clock of one process: the host's, moved on by hand."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return since_boot() + self.ahead


class Lease:
    """The Lease of one test, as somebody sees it who may do everything."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.namespace = namespace
        self._control_plane = control_plane
        self._path = f"{LEASES}/{namespace}/leases"

    async def get(self) -> dict[str, Any]:
        """All of it."""
        answer = await self._control_plane.request("GET", f"{self._path}/test")
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.body
        return found

    async def uid(self) -> str | None:
        """What tells it from another one of the same name; None: there is none."""
        answer = await self._control_plane.request("GET", f"{self._path}/test")
        return str(answer.body["metadata"]["uid"]) if answer.status == 200 else None

    async def spec(self) -> dict[str, Any]:
        """Its spec."""
        spec: dict[str, Any] = (await self.get())["spec"]
        return spec

    async def create(self, **spec: object) -> None:
        """Make it."""
        body = {"metadata": {"name": "test"}, "spec": spec}
        answer = await self._control_plane.request("POST", self._path, body)
        assert answer.status == 201, answer

    async def change(self, **parts: object) -> None:
        """Merge these parts into it, by force."""
        answer = await self._control_plane.request("PATCH", f"{self._path}/test", parts)
        assert answer.status == 200, answer

    async def delete(self) -> None:
        """Remove it."""
        answer = await self._control_plane.request("DELETE", f"{self._path}/test")
        assert answer.status == 200, answer


@pytest.fixture
def lease(control_plane: ControlPlane, namespace: str) -> Lease:
    return Lease(control_plane, namespace)


@pytest.fixture
def candidate(cluster: Cluster, lease: Lease) -> Callable[..., Leadership]:
    """Makes candidates. Renewals are frequent; how long a lease lasts each test says, if it matters."""

    def made(identity: str, **more: Any) -> Leadership:
        options: dict[str, Any] = {"lease_seconds": 600, "renew_seconds": 300.0, "retry_seconds": 0.05, **more}
        return Leadership(options.pop("cluster", cluster), lease.namespace, "test", identity, **options)

    return made


class Standby:
    """A candidate that waits for the lease."""

    def __init__(self, leadership: Leadership) -> None:
        self.heard = asyncio.Event()
        self.task = asyncio.create_task(leadership.acquire(self.heard))

    async def waits(self) -> None:
        """Return when it has seen that somebody else has the lease."""
        await asyncio.wait_for(self.heard.wait(), WAIT)
        assert not self.task.done()

    async def leads(self) -> None:
        """Return when it has the lease."""
        await asyncio.wait_for(self.task, WAIT)

    async def end(self) -> None:
        """It waits no more."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def take(leadership: Leadership) -> None:
    """Have a candidate get a lease that is free."""
    await Standby(leadership).leads()


def moment(text: str) -> datetime:
    """A time as the API server writes it."""
    return datetime.fromisoformat(text)


async def test_the_first_of_two_makes_the_lease_and_the_second_waits(
    lease: Lease, candidate: Callable[..., Leadership]
) -> None:
    first, second = candidate("first"), candidate("second")
    await take(first)
    standby = Standby(second)
    await standby.waits()

    assert (first.leading, second.leading) == (True, False)
    first.require()
    with pytest.raises(NotLeading, match=f"lease {lease.namespace}/test has not been renewed in time"):
        second.require()
    spec = await lease.spec()
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("first", 600, 0)
    assert spec["acquireTime"] == spec["renewTime"]
    assert abs(moment(spec["renewTime"]) - datetime.now(UTC)) < timedelta(minutes=5)
    await standby.end()


async def test_a_lease_that_is_given_back_is_taken_without_waiting_for_its_end(
    lease: Lease, candidate: Callable[..., Leadership]
) -> None:
    first, second = candidate("first"), candidate("second")
    await take(first)
    standby = Standby(second)
    await standby.waits()

    await first.release()
    assert not first.leading
    await standby.leads()

    spec = await lease.spec()
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("second", 600, 1)


async def test_nobody_gives_back_what_another_one_holds(lease: Lease, candidate: Callable[..., Leadership]) -> None:
    first, second = candidate("first"), candidate("second")
    await take(first)
    standby = Standby(second)
    await standby.waits()
    await standby.end()

    await second.release()

    assert (await lease.spec())["holderIdentity"] == "first"


@pytest.mark.parametrize("hours", [-2, 2], ids=["behind", "ahead"])
async def test_a_holder_whose_host_has_another_time_is_waited_for_all_the_same(
    lease: Lease, candidate: Callable[..., Leadership], hours: int
) -> None:
    theirs = (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    await lease.create(holderIdentity="other", leaseDurationSeconds=300, acquireTime=theirs, renewTime=theirs)
    clock = Clock()
    leadership = candidate("mine", lease_seconds=15, renew_seconds=10.0, clock=clock)
    standby = Standby(leadership)
    await standby.waits()

    # The length is the holder's own, measured from when its last sign of life was seen.
    clock.ahead = 200
    standby.heard.clear()
    await standby.waits()
    # A new sign of life, and the time begins again.
    await lease.change(spec={"renewTime": (moment(theirs) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")})
    for _ in range(2):  # The first try may have begun before.
        standby.heard.clear()
        await standby.waits()
    clock.ahead = 400
    standby.heard.clear()
    await standby.waits()
    assert (await lease.spec())["holderIdentity"] == "other"

    clock.ahead = 600
    await standby.leads()

    assert (await lease.spec())["holderIdentity"] == "mine"


async def test_a_holder_renews_and_leaves_what_others_wrote_into_the_lease(
    lease: Lease, candidate: Callable[..., Leadership]
) -> None:
    leadership = candidate("mine")
    await take(leadership)
    before = await lease.spec()
    keeping = asyncio.create_task(leadership.keep())
    await lease.change(metadata={"labels": {"team": "a"}})

    async def renewed() -> bool:
        now = await lease.get()
        return bool(now["spec"]["renewTime"] > before["renewTime"] and now["metadata"]["labels"] == {"team": "a"})

    await until(renewed, WAIT, "a renewal of the labelled lease")
    assert {**await lease.spec(), "renewTime": None} == {**before, "renewTime": None}
    assert not keeping.done()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_lease_that_was_deleted_is_made_again(lease: Lease, candidate: Callable[..., Leadership]) -> None:
    leadership = candidate("mine")
    await take(leadership)
    uid = await lease.uid()
    keeping = asyncio.create_task(leadership.keep())
    await lease.delete()

    async def is_back() -> bool:
        return await lease.uid() not in {None, uid}

    await until(is_back, WAIT, "the lease to be back")
    assert leadership.leading
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_lease_that_somebody_took_by_force_is_lost_at_once(
    lease: Lease, candidate: Callable[..., Leadership]
) -> None:
    leadership = candidate("mine")
    await take(leadership)
    await lease.change(spec={"holderIdentity": "thief"})

    with pytest.raises(NotLeading, match=r"/test was taken by thief$"):
        await asyncio.wait_for(leadership.keep(), WAIT)

    assert not leadership.leading
    await leadership.release()
    assert (await lease.spec())["holderIdentity"] == "thief"


async def test_whoever_slept_through_its_deadline_leads_no_more_though_nobody_told_it(
    lease: Lease, candidate: Callable[..., Leadership]
) -> None:
    """A suspended host: the clock has gone on, the process has not."""
    clock = Clock()
    leadership = candidate("mine", clock=clock)
    await take(leadership)
    leadership.require()

    clock.ahead = 301

    with pytest.raises(NotLeading):
        leadership.require()
    with pytest.raises(NotLeading, match="could not be renewed within 300 s: the process was stopped"):
        await asyncio.wait_for(leadership.keep(), WAIT)
    assert (await lease.spec())["holderIdentity"] == "mine"


async def test_a_holder_that_was_stopped_while_it_took_the_lease_does_not_lead(
    lease: Lease, candidate: Callable[..., Leadership]
) -> None:
    """Its time runs from before the request: how long the answer has been there, nobody knows."""

    class Jumping(Clock):
        """Each look at it is 400 s later than the one before."""

        def __call__(self) -> float:
            self.ahead += 400
            return super().__call__()

    leadership = candidate("mine", clock=Jumping())
    standby = Standby(leadership)
    await standby.waits()
    with pytest.raises(NotLeading):
        leadership.require()
    assert (await lease.spec())["holderIdentity"] == "mine"
    await standby.end()


async def test_a_holder_that_is_cut_off_gives_up_before_anybody_may_take_over(
    control_plane: ControlPlane, lease: Lease, candidate: Callable[..., Leadership], tmp_path: Path
) -> None:
    async with (
        FaultProxy(control_plane, tmp_path) as proxy,
        await Cluster.connect(proxy.kubeconfig(control_plane.kubeconfig)) as far,
    ):
        cut_off = candidate("cut off", cluster=far, renew_seconds=10.0)
        await take(cut_off)
        keeping = asyncio.create_task(cut_off.keep())
        before = await lease.spec()
        await until(lambda: _is_newer(lease, before), WAIT, "a renewal")
        proxy.block()
        # No deadline but its own ends this.
        with pytest.raises(NotLeading, match="could not be renewed within 10 s: the API server did not answer"):
            await asyncio.wait_for(keeping, WAIT)
        assert not cut_off.leading
        await cut_off.release()  # says that it could not, and does not hang
        assert (await lease.spec())["holderIdentity"] == "cut off"


async def _is_newer(lease: Lease, before: dict[str, Any]) -> bool:
    return bool((await lease.spec())["renewTime"] > before["renewTime"])


async def test_who_may_not_read_the_lease_is_told_what_grants_it(
    control_plane: ControlPlane, lease: Lease, candidate: Callable[..., Leadership], caplog: pytest.LogCaptureFixture
) -> None:
    await control_plane.kubectl("create", "serviceaccount", "nobody", "-n", lease.namespace)
    rights = await control_plane.service_account_kubeconfig(lease.namespace, "nobody")
    with caplog.at_level(logging.WARNING):
        async with await Cluster.connect(rights) as cluster:
            standby = Standby(candidate("nobody", cluster=cluster))
            await until(lambda: caplog.text, WAIT, "a warning")
            await standby.end()
    assert not standby.heard.is_set(), "a standby without rights is not ready"
    assert "cannot get resource" in caplog.text
    assert "the Role vcpuset-leader-election in deploy/ grants the required permissions" in caplog.text


async def test_in_a_namespace_that_is_not_there_a_standby_goes_on_trying(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    leadership = Leadership(
        cluster, "nowhere", "test", "mine", lease_seconds=15, renew_seconds=10.0, retry_seconds=0.01
    )
    with caplog.at_level(logging.WARNING):
        standby = Standby(leadership)
        await until(lambda: caplog.text, WAIT, "a warning")
    assert 'namespaces "nowhere" not found' in caplog.text
    assert not standby.task.done()
    await standby.end()
