"""The watch: which sets it shows, what it survives, how it ends, and that it writes nothing."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.controlplane import ControlPlane
from harness.wait import until
from harness.world import User
from vcpuset.domain.errors import APIError
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube import codec, source
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Cluster, Scope
from vcpuset.kube.freshness import Freshness
from vcpuset.kube.source import Source
from vcpuset.kube.sweep import sweep

WAIT = 60.0
"""Seconds that anything may take on a loaded machine; each takes milliseconds."""


class Watch:
    """A running source, and what it said."""

    def __init__(self, kubeconfig: Path, scope: Scope) -> None:
        self.cache = Cache()
        self.changes: list[UID] = []
        self.stop = asyncio.Event()
        self.ready = asyncio.Event()
        self.source = Source(kubeconfig, scope, self.cache, self.changes.append, Freshness())
        self.task = asyncio.create_task(self.source.run(self.stop, self.ready))

    @property
    def names(self) -> set[str]:
        """The names of the sets in the cache."""
        return {vcpuset.name for vcpuset in self.cache}

    async def until_names(self, *names: str) -> None:
        """Wait until exactly these sets are in the cache."""

        def shown() -> bool:
            if self.task.done():
                self.task.result()
            return self.names == set(names)

        await until(shown, WAIT, lambda: f"the cache to hold {set(names)} instead of {self.names}")


@asynccontextmanager
async def watching(kubeconfig: Path, scope: Scope) -> AsyncIterator[Watch]:
    """A source that watches, until the end of the block."""
    watch = Watch(kubeconfig, scope)
    ready = asyncio.create_task(watch.ready.wait())
    try:
        async with asyncio.timeout(WAIT):
            await asyncio.wait({watch.task, ready}, return_when=asyncio.FIRST_COMPLETED)
            if watch.task.done():
                watch.task.result()
        yield watch
    finally:
        ready.cancel()
        watch.stop.set()
        await asyncio.wait({watch.task}, timeout=WAIT)
    assert watch.task.result() is None


@pytest.fixture
def sets(control_plane: ControlPlane, namespace: str) -> User:
    return User(control_plane, namespace)


@pytest.fixture
def second(sets: User) -> Callable[[], Awaitable[User]]:
    """Makes another namespace."""

    async def make() -> User:
        return User(sets.control_plane, await sets.control_plane.namespace())

    return make


async def test_without_a_node_only_sets_without_a_node_are_shown(sets: User) -> None:
    await sets.create("before")
    await sets.create("elsewhere", nodeName="n1")
    async with watching(sets.control_plane.kubeconfig, Scope(namespaces=(sets.namespace,))) as watch:
        await sets.create("after")
        await watch.until_names("before", "after")


async def test_a_set_that_moves_between_nodes_leaves_one_agent_and_comes_to_the_other(sets: User) -> None:
    created = await sets.create("web", nodeName="n1")
    kubeconfig, here = sets.control_plane.kubeconfig, (sets.namespace,)
    async with (
        watching(kubeconfig, Scope("n1", here)) as first,
        watching(kubeconfig, Scope("n2", here)) as second,
        watching(kubeconfig, Scope(None, here)) as central,
    ):
        await first.until_names("web")
        first.changes.clear()
        await sets.change("web", nodeName="n2")
        await first.until_names()
        await second.until_names("web")
        assert first.changes == [created.uid]

        await sets.change("web", nodeName=None)
        await second.until_names()
        await central.until_names("web")

        await sets.change("web", nodeName="n1")
        await first.until_names("web")


async def test_a_set_shows_only_while_its_labels_match(sets: User) -> None:
    scope = Scope(namespaces=(sets.namespace,), label_selector="tier in (web, cache)")
    await sets.create("one", labels={"tier": "web"})
    await sets.create("two", labels={"tier": "database"})
    async with watching(sets.control_plane.kubeconfig, scope) as watch:
        await watch.until_names("one")
        await sets.label("two", tier="cache")
        await sets.label("one", tier="none")
        await watch.until_names("two")


async def test_only_the_named_namespaces_are_shown(sets: User, second: Callable[[], Awaitable[User]]) -> None:
    other, third = await second(), await second()
    for place, name in ((sets, "one"), (other, "two"), (third, "three")):
        await place.create(name)
    scope = Scope(namespaces=(sets.namespace, other.namespace))
    async with watching(sets.control_plane.kubeconfig, scope) as watch:
        await watch.until_names("one", "two")
        await third.create("four")
        await other.create("five")
        await watch.until_names("one", "two", "five")
    await other.delete("two")
    await other.delete("five")
    await third.delete("three")
    await third.delete("four")


async def test_each_change_is_told_once_and_so_is_the_end(sets: User) -> None:
    node = sets.namespace  # nobody else's
    async with watching(sets.control_plane.kubeconfig, Scope(node)) as watch:
        uid = UID((await sets.create("web", nodeName=node)).uid)
        await watch.until_names("web")
        assert watch.changes == [uid]

        await sets.change("web", vcpus=5)
        await until(lambda: len(watch.changes) == 2, WAIT, "the second change")
        stored = watch.cache.get(uid)
        assert stored is not None
        assert (stored.spec.vcpus, stored.generation) == (5, 2)

        await sets.delete("web")
        await watch.until_names()
        assert watch.changes == [uid] * 3


async def test_a_deleted_set_is_not_served_while_a_finalizer_keeps_its_object_and_its_status_can_be_written(
    sets: User,
) -> None:
    kubeconfig, scope = sets.control_plane.kubeconfig, Scope(namespaces=(sets.namespace,))
    uid = UID((await sets.create("web")).uid)
    await sets.finalizers("web", "example.com/held")
    async with await Cluster.connect(kubeconfig) as cluster, watching(kubeconfig, scope) as watch:
        await watch.until_names("web")
        watch.changes.clear()
        await sets.delete("web")
        await watch.until_names()
        assert watch.changes == [uid]

        found = Cache()
        await sweep(cluster, scope, found, watch.changes.append, Freshness())
        assert list(found) == []
        deleted = watch.cache.terminating(uid)
        assert deleted is not None
        assert deleted == found.terminating(uid)
        written = await cluster.write_status(deleted, replace(deleted.status, vcpus=1))
        assert (await sets.get("web")).vcpus == 1
        assert written.deleting

        await sets.finalizers("web")
        await until(lambda: watch.cache.terminating(uid) is None, WAIT, "the object to go")
        await sweep(cluster, scope, found, watch.changes.append, Freshness())
        assert found.versions() == {}


async def test_what_the_cache_knows_from_a_list_is_no_news(sets: User) -> None:
    scope = Scope(namespaces=(sets.namespace,))
    await sets.create("known")
    async with (
        await Cluster.connect(sets.control_plane.kubeconfig) as cluster,
        watching(sets.control_plane.kubeconfig, scope) as watch,
    ):
        await watch.until_names("known")
        told = len(watch.changes)
        await sweep(cluster, scope, watch.cache, watch.changes.append, Freshness())
        assert len(watch.changes) == told == 1


async def test_own_status_writes_labels_and_annotations_are_no_news_but_a_status_write_of_others_is(
    sets: User,
) -> None:
    kubeconfig = sets.control_plane.kubeconfig
    await sets.create("web")
    async with (
        await Cluster.connect(kubeconfig) as cluster,
        watching(kubeconfig, Scope(namespaces=(sets.namespace,))) as watch,
    ):
        await watch.until_names("web")
        watch.changes.clear()
        (vcpuset,) = watch.cache

        def brought(version: str) -> bool:
            known = watch.cache.get(vcpuset.uid)
            return known is not None and known.resource_version == version

        # The watch can be faster than the answer.
        status = replace(vcpuset.status, vcpus=1)
        with watch.cache.expecting(vcpuset.uid, status):
            written = await cluster.write_status(vcpuset, status)
            await until(lambda: brought(written.resource_version), WAIT, "the status write, by the watch")
        await sets.annotate("web", note="x")
        noted = (await sets.label("web", tier="x")).body["metadata"]["resourceVersion"]
        await until(lambda: brought(noted), WAIT, "the label, by the watch")
        assert watch.changes == []

        noted_set = watch.cache.get(vcpuset.uid)
        assert noted_set is not None
        newest = await cluster.write_status(noted_set, replace(status, vcpus=99))
        await until(lambda: watch.changes == [vcpuset.uid], WAIT, "news of a write by another")
        assert watch.cache.get(vcpuset.uid) == newest


async def test_watching_writes_nothing(sets: User) -> None:
    before = sets.control_plane.audit_offset()
    node = sets.namespace
    async with watching(sets.control_plane.kubeconfig, Scope(node)) as watch:
        for name in ("one", "two", "three"):
            await sets.create(name, nodeName=node)
        await sets.change("two", vcpus=3)
        await sets.delete("three")
        await watch.until_names("one", "two")
    # The watch is recorded when it has ended, after all that it could have written.
    mine = f"fieldSelector=spec.nodeName%3D{node}"

    def watch_recorded() -> bool:
        events = sets.control_plane.audit_events(before)
        return any(event.verb == "watch" and mine in event.request_uri for event in events)

    await until(watch_recorded, WAIT, "the audit record of the watch")
    writes = [event.verb for event in sets.control_plane.audit_events(before) if event.is_write]
    assert sorted(writes) == ["create", "create", "create", "delete", "patch"]  # this test's own
    body = (await sets.get("two")).body
    assert "annotations" not in body["metadata"]
    assert "finalizers" not in body["metadata"]


async def test_an_object_that_cannot_be_understood_is_logged_and_the_rest_goes_on(
    sets: User, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API server stores none, so the object is made unreadable on its way in."""

    def decode(body: Mapping[str, Any]) -> VCPUSet:
        if body["spec"]["vcpus"] == 13:
            body = {**body, "metadata": {**body["metadata"], "generation": None}}
        return codec.decode(body)

    monkeypatch.setattr(source, "decode", decode)
    async with watching(sets.control_plane.kubeconfig, Scope(namespaces=(sets.namespace,))) as watch:
        await sets.create("odd", vcpus=13)
        await sets.create("even", vcpus=12)
        await watch.until_names("even")
        await until(lambda: "metadata.generation: Expected `int`, got `null`" in caplog.text, WAIT, "the log entry")
        assert f"{sets.namespace}/odd" in caplog.text
        await sets.change("odd", vcpus=12)
        await watch.until_names("even", "odd")
        # What was understood before and is not now is not served as it was before.
        await sets.change("odd", vcpus=13)
        await watch.until_names("even")


async def test_the_log_stays_quiet_and_is_not_reconfigured(sets: User, caplog: pytest.LogCaptureFixture) -> None:
    handlers = list(logging.getLogger().handlers)
    with caplog.at_level(logging.INFO):
        async with watching(sets.control_plane.kubeconfig, Scope(namespaces=(sets.namespace,))) as watch:
            await sets.create("web")
            await watch.until_names("web")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("kopf")] == []
    assert logging.getLogger().handlers == handlers


async def test_tasks_of_others_outlive_the_watch(sets: User) -> None:
    done = asyncio.Event()
    async with watching(sets.control_plane.kubeconfig, Scope(namespaces=(sets.namespace,))):
        other = asyncio.create_task(done.wait())
    assert not other.done()
    done.set()
    assert await other


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_watch_and_a_second_one_does_no_harm(sets: User, number: signal.Signals) -> None:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with watching(sets.control_plane.kubeconfig, Scope(namespaces=(sets.namespace,))) as watch:
        os.kill(os.getpid(), number)
        await until(watch.stop.is_set, WAIT, "the stop flag")
        os.kill(os.getpid(), number)
        async with asyncio.timeout(WAIT):
            await watch.task
    assert problems == []


async def test_a_cancelled_watch_leaves_no_task_and_no_connection(sets: User) -> None:
    before = asyncio.all_tasks()
    watch = Watch(sets.control_plane.kubeconfig, Scope(namespaces=(sets.namespace,)))
    await asyncio.wait_for(watch.ready.wait(), WAIT)
    watch.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch.task
    await until(lambda: asyncio.all_tasks() <= before, WAIT, "kopf's tasks to end")


async def test_credentials_that_are_refused_are_read_again_until_they_are_accepted(
    sets: User, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await sets.create("web")
    good = sets.control_plane.kubeconfig.read_text()
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(good.replace(sets.control_plane.token, "expired"))
    watch = Watch(kubeconfig, Scope(namespaces=(sets.namespace,)))
    await until(lambda: "HTTP 401: Unauthorized (the credentials are not accepted)" in caplog.text, WAIT, "the refusal")
    kubeconfig.write_text(good)
    await watch.until_names("web")
    watch.stop.set()
    await asyncio.wait_for(watch.task, WAIT)


async def test_credentials_that_are_not_there_yet_are_awaited(
    sets: User, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await sets.create("web")
    kubeconfig = tmp_path / "kubeconfig"
    watch = Watch(kubeconfig, Scope(namespaces=(sets.namespace,)))
    await until(lambda: f"there is no kubeconfig {kubeconfig}" in caplog.text, WAIT, "the failed login in the log")
    kubeconfig.write_text(sets.control_plane.kubeconfig.read_text())
    await watch.until_names("web")
    watch.stop.set()
    await asyncio.wait_for(watch.task, WAIT)


async def test_a_missing_definition_is_awaited_and_the_log_says_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    async with ControlPlane() as bare:
        watch = Watch(bare.kubeconfig, Scope())
        remedy = "the API server does not serve vcpusets.v1alpha1.vcpuset.dev: apply the CRD in crds/ of this version"
        await until(lambda: caplog.text.count(remedy) >= 2, WAIT, "the remedy in the log, at the second attempt too")
        assert not watch.ready.is_set()
        await bare.install_crd()
        sets = User(bare, await bare.namespace())
        await sets.create("web")
        await watch.until_names("web")
        assert watch.ready.is_set()

        # It goes, and its objects with it; and it comes back.
        await bare.kubectl("delete", "crd", "vcpusets.vcpuset.dev")
        await watch.until_names()
        seen = caplog.text.count(remedy)
        await until(lambda: caplog.text.count(remedy) > seen, WAIT, "the remedy in the log once more")
        await bare.install_crd()
        await sets.create("database")
        await watch.until_names("database")
        watch.stop.set()
        await asyncio.wait_for(watch.task, WAIT)


async def test_the_watch_and_the_sweep_survive_a_restart_of_the_api_server() -> None:
    """One API server of its own, for all that restarting one can show."""
    async with ControlPlane() as own:
        await own.install_crd()
        sets = User(own, await own.namespace())
        for name in ("stays", "goes"):
            await sets.create(name)
        async with await Cluster.connect(own.kubeconfig) as cluster, watching(own.kubeconfig, Scope()) as watch:
            await watch.until_names("stays", "goes")
            await own.stop_apiserver(kill=True)  # politely it would wait for the watch
            with pytest.raises(APIError):
                await cluster.list(Scope())
            await own.start_apiserver()

            async def created() -> bool:
                try:
                    await sets.create("comes")
                except AssertionError:  # "storage is (re)initializing"
                    return False
                return True

            await until(created, WAIT, "the API server to take objects again")
            await watch.until_names("stays", "goes", "comes")

            # A deletion that no watch has seen: a cache that holds what is no more.
            gone = next(vcpuset for vcpuset in watch.cache if vcpuset.name == "goes")
            watch.stop.set()
            await asyncio.wait_for(watch.task, WAIT)
            await sets.delete("goes")
            watch.changes.clear()
            await sweep(cluster, Scope(), watch.cache, watch.changes.append, Freshness())
            assert watch.names == {"stays", "comes"}
            assert watch.changes == [gone.uid]

            await own.kubectl("delete", "crd", "vcpusets.vcpuset.dev")

            async def refusal() -> str:
                try:
                    await cluster.list(Scope())
                except APIError as error:
                    return str(error)
                return ""  # served for a moment longer than it is there

            refused = await until(refusal, WAIT, "the list to be refused")
            assert "does not know vcpusets.vcpuset.dev: apply the CRD in crds/" in refused
            assert watch.names == {"stays", "comes"}
