"""Lists and status writes: what the API server stores, and what each refusal becomes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness import selectors
from harness.controlplane import ControlPlane
from harness.wait import until
from harness.world import User
from vcpuset.domain.errors import APIError, Conflict, NotLeading, ObjectGone
from vcpuset.domain.machine import Answer
from vcpuset.domain.resource import UID, Condition, Request, Status, VCPUSet
from vcpuset.kube import cluster as cluster_module
from vcpuset.kube import codec
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Cluster, Scope
from vcpuset.kube.freshness import Freshness
from vcpuset.kube.sweep import sweep

WAIT = 60.0
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
FULL = Status(
    observed_generation=1,
    vcpus=4,
    min_vcpus=1,
    max_vcpus=8,
    selector="vcpuset.dev/name=web",
    unplug_started_at=NOW,
    pending_unplugs=(
        Request(3, "/machine/peripheral/vcpu3", 1234, NOW, attempts=2, answer=Answer.BUSY),
        Request(2, "/machine/peripheral/vcpu2", 1233, NOW),
    ),
    conditions=(
        Condition("Ready", "False", "UnplugPending", "the guest was asked", NOW.replace(microsecond=0), 1),
        Condition("Reconciling", "True", "UnplugPending", "the guest was asked", NOW.replace(microsecond=0), 1),
    ),
)


@pytest.fixture
def sets(control_plane: ControlPlane, namespace: str) -> User:
    return User(control_plane, namespace)


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with await Cluster.connect(control_plane.kubeconfig) as connected:
        yield connected


async def only(cluster: Cluster, namespace: str) -> VCPUSet:
    """The one set of a namespace."""
    (vcpuset,) = await cluster.list(Scope(namespaces=(namespace,)))
    return vcpuset


async def test_a_new_set_reads_as_never_observed(cluster: Cluster, sets: User) -> None:
    created = await sets.create("web")
    vcpuset = await only(cluster, sets.namespace)
    assert str(vcpuset) == f"{sets.namespace}/web"
    assert vcpuset.resource_version == created.body["metadata"]["resourceVersion"]
    assert vcpuset.status == Status(observed_generation=-1)


async def test_a_written_status_is_what_is_read_back(cluster: Cluster, sets: User) -> None:
    await sets.create("web")
    before = await only(cluster, sets.namespace)
    written = await cluster.write_status(before, FULL)
    assert written.status == FULL
    assert await only(cluster, sets.namespace) == written
    assert (written.spec, written.generation) == (before.spec, before.generation)
    assert (await sets.get("web")).status["unplug"]["requests"][1] == {
        "slot": 2,
        "path": "/machine/peripheral/vcpu2",
        "threadID": 1233,
        "requestedAt": "2026-01-02T03:04:05.678901Z",
        "attempts": 1,
    }


async def test_what_a_status_leaves_out_is_removed(cluster: Cluster, sets: User) -> None:
    await sets.create("web")
    written = await cluster.write_status(await only(cluster, sets.namespace), FULL)
    less = Status(observed_generation=1, vcpus=4)
    assert (await cluster.write_status(written, less)).status == less
    assert (await sets.get("web")).status == {"observedGeneration": 1, "vcpus": 4}


async def test_a_status_that_does_not_differ_is_not_written(cluster: Cluster, sets: User) -> None:
    await sets.create("web")
    written = await cluster.write_status(await only(cluster, sets.namespace), FULL)
    before = sets.control_plane.audit_offset()
    assert await cluster.write_status(written, FULL) is written
    # Fractions of a second in a condition are not stored, so they are no difference.
    same = replace(FULL, conditions=tuple(replace(each, last_transition_time=NOW) for each in FULL.conditions))
    assert await cluster.write_status(written, same) is written
    await sets.get("web")

    def got() -> bool:
        return any(event.name == "web" for event in sets.control_plane.audit_events(before))

    await until(got, WAIT, "the audit record of the last request")
    verbs = [event.verb for event in sets.control_plane.audit_events(before) if event.namespace == sets.namespace]
    assert verbs == ["get"]


async def test_a_status_made_from_an_older_version_is_a_conflict(cluster: Cluster, sets: User) -> None:
    await sets.create("web")
    old = await only(cluster, sets.namespace)
    await sets.change("web", vcpus=7)
    with pytest.raises(Conflict, match=r"PATCH .*/web/status: HTTP 409: .*the object has been modified"):
        await cluster.write_status(old, FULL)
    body = (await sets.get("web")).body
    assert body["spec"]["vcpus"] == 7
    assert body["status"] == {"observedGeneration": -1}


async def test_a_count_is_written_through_the_scale_subresource(cluster: Cluster, sets: User) -> None:
    await sets.create("web", vcpus=None)
    await cluster.write_count(await only(cluster, sets.namespace), 3)
    body = (await sets.get("web")).body
    assert (body["spec"]["vcpus"], body["metadata"]["generation"]) == (3, 2)


async def test_a_count_for_an_older_version_is_a_conflict(cluster: Cluster, sets: User) -> None:
    await sets.create("web", vcpus=None)
    old = await only(cluster, sets.namespace)
    await sets.scale("web", 7)
    with pytest.raises(Conflict, match=r"PATCH .*/web/scale: HTTP 409: .*the object has been modified"):
        await cluster.write_count(old, 3)
    assert (await sets.get("web")).body["spec"]["vcpus"] == 7


async def test_a_count_is_not_written_without_the_lead(cluster: Cluster, sets: User) -> None:
    def refuse() -> None:
        raise NotLeading("the lease is lost")

    await sets.create("web", vcpus=None)
    vcpuset = await only(cluster, sets.namespace)
    cluster.guard(refuse)
    with pytest.raises(NotLeading):
        await cluster.write_count(vcpuset, 3)
    assert "vcpus" not in (await sets.get("web")).body["spec"]


async def test_a_set_that_is_gone_cannot_be_written_nor_can_its_successor_by_mistake(
    cluster: Cluster, sets: User
) -> None:
    await sets.create("web")
    old = await only(cluster, sets.namespace)
    await sets.delete("web")
    with pytest.raises(ObjectGone, match=r"/web/status: HTTP 404"):
        await cluster.write_status(old, FULL)
    await sets.create("web")
    with pytest.raises(Conflict):
        await cluster.write_status(old, FULL)


async def test_a_status_that_the_schema_refuses_is_an_error_with_the_servers_words(
    cluster: Cluster, sets: User
) -> None:
    await sets.create("web")
    with pytest.raises(APIError, match=r"HTTP 422: .*status\.vcpus"):
        await cluster.write_status(await only(cluster, sets.namespace), replace(FULL, vcpus=-5))


async def test_the_label_selectors_that_the_command_line_takes_are_those_that_the_server_takes(
    cluster: Cluster,
) -> None:
    for selector in selectors.TAKEN:
        await cluster.list(Scope(label_selector=selector))
    for selector in selectors.REFUSED:
        with pytest.raises(APIError, match="HTTP 400: "):
            await cluster.list(Scope(label_selector=selector))


async def test_a_list_is_narrowed_by_the_server_and_comes_in_pages(
    cluster: Cluster, sets: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "PAGE", 2)
    for number in range(5):
        await sets.create(f"s{number}", labels={"tier": "web" if number else "none"}, nodeName="n1")
    await sets.create("elsewhere", labels={"tier": "web"}, nodeName="n2")
    other = await sets.control_plane.namespace()
    await User(sets.control_plane, other).create("other", labels={"tier": "web"}, nodeName="n1")
    here = Scope("n1", (sets.namespace,), "tier=web")
    assert {each.name for each in await cluster.list(here)} == {"s1", "s2", "s3", "s4"}
    both = replace(here, namespaces=(sets.namespace, other))
    assert {each.name for each in await cluster.list(both)} == {"s1", "s2", "s3", "s4", "other"}
    everywhere = {str(each) for each in await cluster.list(replace(here, namespaces=()))}
    assert {f"{sets.namespace}/s1", f"{other}/other"} <= everywhere
    await User(sets.control_plane, other).delete("other")


async def test_credentials_that_are_refused_are_read_again_once(
    control_plane: ControlPlane, sets: User, tmp_path: Path
) -> None:
    await sets.create("web")
    kubeconfig = tmp_path / "kubeconfig"
    good = control_plane.kubeconfig.read_text()
    kubeconfig.write_text(good.replace(control_plane.token, "expired"))
    async with await Cluster.connect(kubeconfig) as cluster:
        with pytest.raises(APIError, match=r"HTTP 401: Unauthorized \(the credentials are not accepted\)"):
            await cluster.list(Scope(namespaces=(sets.namespace,)))
        kubeconfig.write_text(good)
        scope = Scope(namespaces=(sets.namespace,))
        lists = await asyncio.gather(*(cluster.list(scope) for _ in range(8)))
        assert [[each.name for each in found] for found in lists] == [["web"]] * 8


async def test_a_server_that_is_not_there_is_an_error_with_its_address(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(control_plane.kubeconfig.read_text().replace(control_plane.url, "https://127.0.0.1:1"))
    async with await Cluster.connect(kubeconfig) as cluster:
        with pytest.raises(APIError, match=r"GET /apis/vcpuset\.dev.*127\.0\.0\.1:1"):
            await cluster.list(Scope())


async def serve(control_plane: ControlPlane, tmp_path: Path, answer: bytes | None) -> tuple[asyncio.Server, Path]:
    """A server that gives every request one answer, or none, and a kubeconfig that names it."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if answer is None:
                await reader.read()  # until the client gives up
            else:
                writer.write(answer)
                await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(control_plane.kubeconfig.read_text().replace(control_plane.url, f"http://127.0.0.1:{port}"))
    return server, kubeconfig


def ok(body: bytes) -> bytes:
    """A good answer, with any body."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def test_an_overloaded_server_says_when_to_come_back(control_plane: ControlPlane, tmp_path: Path) -> None:
    body = b'{"kind": "Status", "message": "storage is (re)initializing"}'
    head = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n" % len(body)
    server, kubeconfig = await serve(control_plane, tmp_path, head + body)
    async with server, await Cluster.connect(kubeconfig) as cluster:
        with pytest.raises(APIError, match=r"HTTP 429: storage is \(re\)initializing") as caught:
            await cluster.list(Scope())
        assert caught.value.retry_after == 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(None, r"no answer from http://127\.0\.0\.1:\d+ within 0\.5 s", id="silence"),
        pytest.param(b"", "GET /apis/vcpuset.dev", id="a closed connection"),
        pytest.param(ok(b"hello"), "the response is not a JSON object: JSON is malformed", id="no JSON"),
        pytest.param(ok(b"[]"), "is not a JSON object: Expected `object`, got `array`", id="no object"),
        pytest.param(ok(b'{"a": "\xff"}'), "is not a JSON object: 'utf-8' codec can't decode", id="no text"),
        pytest.param(ok(b'{"a":' * 5000), "is not a JSON object: maximum recursion depth exceeded", id="too deep"),
        pytest.param(ok(b"{}"), "unexpected format: .*missing required field `items`", id="nothing"),
        pytest.param(
            ok(b'{"kind": "Status", "metadata": {}, "status": "Success"}'),
            "unexpected format: .*missing required field `items`",
            id="no list",
        ),
        pytest.param(
            ok(b'{"items": null, "metadata": {}}'), "Expected `array`, got `null`.*items", id="a list of nothing"
        ),
        pytest.param(ok(b'{"items": [3], "metadata": {}}'), "Expected `object`, got `int`", id="a list of numbers"),
        pytest.param(ok(b'{"items": []}'), "missing required field `metadata`", id="a list that may go on"),
        pytest.param(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops", "HTTP 502: oops", id="a proxy's"),
    ],
)
async def test_an_answer_that_is_none_is_an_error(
    control_plane: ControlPlane,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes | None,
    words: str,
) -> None:
    if answer is None:
        monkeypatch.setattr(cluster_module, "REQUEST_SECONDS", 0.5)
    server, kubeconfig = await serve(control_plane, tmp_path, answer)
    async with server, await Cluster.connect(kubeconfig) as cluster:
        with pytest.raises(APIError, match=words):
            await cluster.list(Scope())


@pytest.mark.parametrize("body", [b"{}", b'{"metadata": 3}', b'{"metadata": {}, "spec": []}'], ids=bytes.decode)
async def test_a_status_write_that_is_answered_with_something_else_has_failed(
    control_plane: ControlPlane, cluster: Cluster, sets: User, tmp_path: Path, body: bytes
) -> None:
    await sets.create("web")
    vcpuset = await only(cluster, sets.namespace)
    server, kubeconfig = await serve(control_plane, tmp_path, ok(body))
    async with server, await Cluster.connect(kubeconfig) as other:
        with pytest.raises(APIError, match=r"PATCH .*/web/status: VCPUSet .* cannot be read"):
            await other.write_status(vcpuset, FULL)


@pytest.mark.parametrize("body", [b"{}", b'{"metadata": {}, "data": {"ca.crt": "*"}}'], ids=bytes.decode)
async def test_a_secret_that_is_none_is_an_error(control_plane: ControlPlane, tmp_path: Path, body: bytes) -> None:
    server, kubeconfig = await serve(control_plane, tmp_path, ok(body))
    async with server, await Cluster.connect(kubeconfig) as cluster:
        with pytest.raises(APIError, match=r"GET .*/secrets/tls: the response has an unexpected format"):
            await cluster.read_secret("default", "tls")


async def test_what_is_wrong_with_an_object_is_told_once_until_it_has_been_mended(
    cluster: Cluster, sets: User, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API server stores no such object, so it is made unreadable on its way in."""

    def decode(body: Mapping[str, Any]) -> VCPUSet:
        if body["spec"]["vcpus"] == 13:
            body = {**body, "metadata": {**body["metadata"], "uid": 3}}
        return codec.decode(body)

    async def listed() -> tuple[set[str], int]:
        names = {each.name for each in await cluster.list(Scope(namespaces=(sets.namespace,)))}
        return names, caplog.text.count(f"VCPUSet {sets.namespace}/odd cannot be read")

    monkeypatch.setattr(cluster_module, "decode", decode)
    await sets.create("even", vcpus=12)
    await sets.create("odd", vcpus=13)
    assert await listed() == await listed() == ({"even"}, 1)
    await sets.touch("odd")
    assert await listed() == ({"even"}, 1), "the same is wrong with the new version"
    await sets.change("odd", vcpus=12)
    assert await listed() == ({"even", "odd"}, 1)
    await sets.change("odd", vcpus=13)
    assert await listed() == ({"even"}, 2)
    await sets.delete("odd")
    assert await listed() == ({"even"}, 2)
    assert not any(cluster._reported.values())


async def test_a_sweep_fills_an_empty_cache_and_then_tells_only_what_differs(cluster: Cluster, sets: User) -> None:
    cache, changes, scope = Cache(), list[UID](), Scope(namespaces=(sets.namespace,))
    uids = {name: (await sets.create(name)).uid for name in ("stays", "changes", "goes", "moves")}
    await sweep(cluster, scope, cache, changes.append, Freshness())
    assert set(changes) == set(uids.values())
    assert len(cache) == 4

    changes.clear()
    await sets.change("changes", vcpus=5)
    await sets.change("moves", nodeName="n1")
    await sets.delete("goes")
    await sweep(cluster, scope, cache, changes.append, Freshness())
    assert sorted(changes) == sorted([uids["changes"], uids["goes"], uids["moves"]])
    assert {vcpuset.name: vcpuset.spec.vcpus for vcpuset in cache} == {"stays": 2, "changes": 5}

    changes.clear()
    await sweep(cluster, scope, cache, changes.append, Freshness())
    assert changes == []


async def test_a_set_that_comes_while_the_list_is_under_way_is_not_swept_away(
    cluster: Cluster, sets: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, changes, scope = Cache(), list[UID](), Scope(namespaces=(sets.namespace,))
    await sets.create("goes")
    await sweep(cluster, scope, cache, changes.append, Freshness())
    listed = await cluster.list(scope)

    async def slow_list(_: Scope) -> list[VCPUSet]:
        # What the watch shows meanwhile: one set comes, the listed one goes.
        await sets.create("comes")
        (comes,) = [each for each in await Cluster.list(cluster, scope) if each.name == "comes"]
        cache.put(comes)
        cache.drop(listed[0].uid)
        return listed

    monkeypatch.setattr(cluster, "list", slow_list)
    changes.clear()
    await sweep(cluster, scope, cache, changes.append, Freshness())
    assert [vcpuset.name for vcpuset in cache] == ["comes"]
    assert changes == []


async def test_a_failed_sweep_leaves_the_cache_as_it_was(cluster: Cluster, sets: User, tmp_path: Path) -> None:
    cache, scope = Cache(), Scope(namespaces=(sets.namespace,))
    await sets.create("web")
    await sweep(cluster, scope, cache, lambda _: None, Freshness())
    with pytest.raises(APIError, match="HTTP 400: "):
        await sweep(cluster, replace(scope, label_selector="==="), cache, lambda _: None, Freshness())
    assert [vcpuset.name for vcpuset in cache] == ["web"]
