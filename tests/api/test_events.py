"""Kubernetes Events: users see them, repeats are counted, and trouble with them stays theirs."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from harness.controlplane import ControlPlane
from harness.wait import until
from harness.world import User
from vcpuset.domain.resource import VCPUSet
from vcpuset.kube import recorder as recorder_module
from vcpuset.kube.cluster import Cluster, Scope
from vcpuset.kube.recorder import Recorder

WAIT = 60.0


@pytest.fixture
def sets(control_plane: ControlPlane, namespace: str) -> User:
    return User(control_plane, namespace)


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with await Cluster.connect(control_plane.kubeconfig) as connected:
        yield connected


@pytest.fixture
async def vcpuset(cluster: Cluster, sets: User) -> VCPUSet:
    await sets.create("web")
    (created,) = await cluster.list(Scope(namespaces=(sets.namespace,)))
    return created


@asynccontextmanager
async def running(recorder: Recorder) -> AsyncIterator[None]:
    task = asyncio.create_task(recorder.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})


@contextmanager
def fast_series(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(recorder_module, "SERIES_WRITE_SECONDS", 0.2)
        yield


def record(recorder: Recorder, vcpuset: VCPUSet, note: str = "2 of 4 vCPUs") -> None:
    recorder.record(vcpuset, type="Normal", reason="Plugging", action="Plug", note=note)


async def events(sets: User) -> list[dict[str, Any]]:
    """The Events of the namespace, as kubectl shows them."""
    found = await sets.control_plane.kubectl("get", "events.events.k8s.io", "--namespace", sets.namespace, "-o=json")
    items: list[dict[str, Any]] = json.loads(found.stdout)["items"]
    return items


async def until_events(sets: User, count: int) -> list[dict[str, Any]]:
    """Wait for exactly `count` Events."""

    async def enough() -> list[dict[str, Any]] | None:
        found = await events(sets)
        return found if len(found) == count else None

    return await until(enough, WAIT, f"{count} Events", interval=0.3) or []


async def test_an_event_is_shown_with_its_set(cluster: Cluster, sets: User, vcpuset: VCPUSet) -> None:
    recorder = Recorder(cluster, instance="agent-1")
    async with running(recorder):
        recorder.record(vcpuset, type="Warning", reason="MonitorBusy", action="Connect", note="another client holds it")
        (event,) = await until_events(sets, 1)
    assert (event["type"], event["reason"], event["action"]) == ("Warning", "MonitorBusy", "Connect")
    assert event["note"] == "another client holds it"
    assert (event["reportingController"], event["reportingInstance"]) == ("vcpuset.dev/operator", "agent-1")
    assert event["regarding"] == {
        "apiVersion": "vcpuset.dev/v1alpha1",
        "kind": "VCPUSet",
        "namespace": sets.namespace,
        "name": "web",
        "uid": vcpuset.uid,
        "resourceVersion": vcpuset.resource_version,
    }
    described = await sets.control_plane.kubectl("describe", "vcpuset", "web", "--namespace", sets.namespace)
    assert "another client holds it" in described.stdout


async def test_equal_events_are_counted_in_one(
    cluster: Cluster, sets: User, vcpuset: VCPUSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(cluster)
    with fast_series(monkeypatch):
        async with running(recorder):
            for _ in range(5):
                record(recorder, vcpuset)
            record(recorder, vcpuset, note="3 of 4 vCPUs")

            async def counted() -> list[dict[str, Any]] | None:
                found = await events(sets)
                complete = any(event.get("series", {}).get("count") == 5 for event in found)
                return found if complete and len(found) == 2 else None

            found = await until(counted, WAIT, "a series of 5 and another event", interval=0.3)
    assert found is not None
    by_note = {event["note"]: event for event in found}
    assert "series" not in by_note["3 of 4 vCPUs"]
    series = by_note["2 of 4 vCPUs"]["series"]
    assert series["lastObservedTime"] >= by_note["2 of 4 vCPUs"]["eventTime"]


async def test_a_series_ends_with_a_long_pause(cluster: Cluster, sets: User, vcpuset: VCPUSet) -> None:
    now = datetime.now(UTC)
    recorder = Recorder(cluster, clock=lambda: now)
    async with running(recorder):
        record(recorder, vcpuset)
        await until_events(sets, 1)
        now += timedelta(hours=1)
        record(recorder, vcpuset)
        await until_events(sets, 2)


async def test_a_series_whose_event_has_expired_begins_anew(
    cluster: Cluster, sets: User, vcpuset: VCPUSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(cluster)
    with fast_series(monkeypatch):
        async with running(recorder):
            record(recorder, vcpuset)
            (first,) = await until_events(sets, 1)
            await sets.control_plane.kubectl("delete", "events", "--all", "--namespace", sets.namespace)

            async def posted_again() -> bool:
                record(recorder, vcpuset)
                found = await events(sets)
                return bool(found) and found[0]["metadata"]["name"] != first["metadata"]["name"]

            await until(posted_again, WAIT, "a new Event", interval=0.5)


async def test_what_cannot_be_posted_is_logged_and_the_next_is_posted(
    cluster: Cluster, sets: User, vcpuset: VCPUSet, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(cluster)
    async with running(recorder):
        record(recorder, replace(vcpuset, namespace="nowhere"))
        record(recorder, vcpuset)
        await until_events(sets, 1)
    assert (
        "an Event could not be posted: POST /apis/events.k8s.io/v1/namespaces/nowhere/events: HTTP 404" in caplog.text
    )


async def test_a_long_note_is_cut_where_the_api_demands_it(cluster: Cluster, sets: User, vcpuset: VCPUSet) -> None:
    recorder = Recorder(cluster)
    async with running(recorder):
        record(recorder, vcpuset, note="€" * 1000)  # 3 bytes each
        (event,) = await until_events(sets, 1)
    assert event["note"] == "€" * 341


async def test_a_full_queue_drops_the_oldest_says_so_once_and_never_blocks(
    cluster: Cluster,
    sets: User,
    vcpuset: VCPUSet,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(recorder_module, "QUEUE_LIMIT", 3)
    recorder = Recorder(cluster)
    for number in range(10):  # nobody posts yet
        record(recorder, vcpuset, note=f"event {number}")
    assert recorder.dropped == 7
    assert caplog.text.count("Events are dropped") == 1
    async with running(recorder):
        notes = {event["note"] for event in await until_events(sets, 3)}
    assert notes == {"event 7", "event 8", "event 9"}
