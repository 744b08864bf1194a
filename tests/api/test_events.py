"""Kubernetes Events: users see them, repeats are counted, and trouble with them stays theirs."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from harness.controlplane import ControlPlane
from harness.processes import free_port
from harness.wait import until
from harness.world import User
from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube import recorder as recorder_module
from vcpuset.kube.cluster import Cluster, Scope
from vcpuset.kube.recorder import BURST, Recorder

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
        patched.setattr(recorder_module, "WRITE_SECONDS", 0.2)
        yield


def record(recorder: Recorder, vcpuset: VCPUSet, note: str = "2 of 4 vCPUs", reason: str = "Plugging") -> None:
    recorder.record(vcpuset, type="Normal", reason=reason, action="Plug", note=note)


async def events(sets: User) -> list[dict[str, Any]]:
    """The Events of the namespace, as kubectl shows them."""
    found = await sets.control_plane.kubectl("get", "events.events.k8s.io", "--namespace", sets.namespace, "-o=json")
    items: list[dict[str, Any]] = json.loads(found.stdout)["items"]
    return items


@asynccontextmanager
async def relay(port: int, url: str) -> AsyncIterator[None]:
    """Pass on, byte by byte, what comes to a port to the API server at `url`."""
    there = urlsplit(url)

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                sink.write(piece)
                await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(there.hostname, there.port)
        await asyncio.gather(copy(reader, onward_writer), copy(onward_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()


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


async def test_equal_events_are_counted_in_one_whatever_their_notes(
    cluster: Cluster, sets: User, vcpuset: VCPUSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(cluster)
    with fast_series(monkeypatch):
        async with running(recorder):
            record(recorder, vcpuset)
            (posted,) = await until_events(sets, 1)
            for number in range(4):
                record(recorder, vcpuset, note=f"look {number}")
            record(recorder, vcpuset, reason="Converged", note="4 vCPUs")

            async def counted() -> list[dict[str, Any]] | None:
                found = await events(sets)
                complete = any(event.get("series", {}).get("count") == 5 for event in found)
                return found if complete and len(found) == 2 else None

            found = await until(counted, WAIT, "a series of 5 and another event", interval=0.3)
    assert found is not None
    by_note = {event["note"]: event for event in found}
    assert "series" not in by_note["4 vCPUs"]
    series = by_note["2 of 4 vCPUs"]["series"]
    assert series["lastObservedTime"] >= by_note["2 of 4 vCPUs"]["eventTime"] == posted["eventTime"]


async def test_events_that_repeated_before_they_were_posted_come_with_their_count(
    cluster: Cluster, sets: User, vcpuset: VCPUSet
) -> None:
    recorder = Recorder(cluster)
    for _ in range(3):  # nobody posts yet
        record(recorder, vcpuset)
    async with running(recorder):
        (event,) = await until_events(sets, 1)
    assert event["series"]["count"] == 3


async def test_the_same_about_a_changed_spec_is_another_event(cluster: Cluster, sets: User, vcpuset: VCPUSet) -> None:
    recorder = Recorder(cluster)
    async with running(recorder):
        record(recorder, vcpuset, note="2 vCPUs")
        record(recorder, replace(vcpuset, generation=vcpuset.generation + 1), note="4 vCPUs")
        assert {event["note"] for event in await until_events(sets, 2)} == {"2 vCPUs", "4 vCPUs"}


async def test_a_series_ends_with_a_long_pause(
    cluster: Cluster, sets: User, vcpuset: VCPUSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "SERIES_SECONDS", 0.0)
    recorder = Recorder(cluster)
    async with running(recorder):
        record(recorder, vcpuset)
        await until_events(sets, 1)
        record(recorder, vcpuset)
        await until_events(sets, 2)


async def test_a_set_that_is_never_quiet_has_a_burst_of_events_and_the_others_have_theirs(
    cluster: Cluster, sets: User, vcpuset: VCPUSet, caplog: pytest.LogCaptureFixture
) -> None:
    await sets.create("quiet")
    (quiet,) = [each for each in await cluster.list(Scope(namespaces=(sets.namespace,))) if each.name == "quiet"]
    recorder = Recorder(cluster)
    async with running(recorder):
        for number in range(200):
            record(recorder, vcpuset, reason=f"Reason{number}")
        record(recorder, quiet)
        found = await until_events(sets, BURST + 1)
    assert [event["regarding"]["name"] for event in found].count("quiet") == 1
    assert recorder.throttled == 200 - BURST
    assert caplog.text.count("dropping Events: rate limit exceeded") == 1


async def test_events_are_posted_when_an_api_server_that_did_not_answer_is_back(
    control_plane: ControlPlane,
    sets: User,
    vcpuset: VCPUSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its port refuses connections at first; then a relay to the real one listens there."""
    monkeypatch.setattr(recorder_module, "BACKOFF", ExponentialBackoff(0.1, cap_seconds=0.5))
    caplog.set_level(logging.INFO, "vcpuset")
    port = free_port()
    kubeconfig = tmp_path / "kubeconfig"
    here = f"https://127.0.0.1:{port}"
    kubeconfig.write_text(control_plane.kubeconfig.read_text().replace(control_plane.url, here))
    assert here in kubeconfig.read_text()
    async with await Cluster.connect(kubeconfig) as cluster:
        recorder = Recorder(cluster)
        async with running(recorder):
            record(recorder, vcpuset)
            await until(lambda: "posting Events failed" in caplog.text, WAIT, "a warning")
            async with relay(port, control_plane.url):
                await until_events(sets, 1)
                await until(lambda: "posting Events succeeds again" in caplog.text, WAIT, "the end of the episode")
    assert caplog.text.count("posting Events failed") == 1
    assert recorder.dropped == 0


async def test_a_series_whose_event_has_expired_begins_again(
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
        record(recorder, replace(vcpuset, namespace="nowhere", uid=UID("another")))
        record(recorder, vcpuset)
        await until_events(sets, 1)
    assert "it could not be posted: POST /apis/events.k8s.io/v1/namespaces/nowhere/events: HTTP 404" in caplog.text


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
        record(recorder, vcpuset, note=f"event {number}", reason=f"Reason{number}")
    assert recorder.dropped == 7
    assert caplog.text.count("dropping the oldest Events") == 1
    async with running(recorder):
        notes = {event["note"] for event in await until_events(sets, 3)}
    assert notes == {"event 7", "event 8", "event 9"}
