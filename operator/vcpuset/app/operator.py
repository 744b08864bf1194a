"""The wiring of all parts: one event loop, one work queue; everything else only adds keys to the queue.

With leader election all of this waits until the process is the leader. When it loses the lease, all of it ends, and the
process is a standby again with new instances of everything, as if it had just been started: so no outdated state is
left. Exiting instead would be simpler, but each restart is delayed longer, and with an API server that is unavailable
from time to time no replica would work for minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from vcpuset.app.agents import Agents
from vcpuset.app.busy import busy
from vcpuset.app.collectors import SetCollector
from vcpuset.app.health import serve_http
from vcpuset.app.history import History
from vcpuset.app.liveness import unhealthy_reason
from vcpuset.app.metrics import Metrics, measure_lag
from vcpuset.app.page.pages import StatusPage
from vcpuset.app.settings import Settings
from vcpuset.controller import Controller
from vcpuset.domain.backoff import ExponentialBackoff, jittered
from vcpuset.domain.errors import APIError, NotLeading
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Cluster, Scope
from vcpuset.kube.credentials import Secrets
from vcpuset.kube.freshness import CHECK_SECONDS, Freshness
from vcpuset.kube.lease import Leadership, own_identity
from vcpuset.kube.pods import Pods
from vcpuset.kube.recorder import Recorder
from vcpuset.kube.source import Source
from vcpuset.kube.sweep import sweep
from vcpuset.kube.transport import RetryBackoff, remedy
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.meters import Meters
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Outcome
from vcpuset.qmp.watcher import SocketWatcher
from vcpuset.reporter import Reporter
from vcpuset.runtime.tasks import TaskOwner
from vcpuset.runtime.workers import run_workers
from vcpuset.runtime.workqueue import WorkQueue

__all__ = ["keep_from_collector", "raise_file_limit", "run"]

logger = logging.getLogger(__name__)

BACKOFF = ExponentialBackoff(base_seconds=0.25, cap_seconds=30)
"""The back-off of a set. A booting guest is observed early; a monitor that stays away costs little."""

SLOW_SHARE = 3 / 4
"""The part of the workers that sets with slow passes may occupy. The others are for sets whose monitors answer."""

GRACE_SECONDS = 10.0
"""How long passes may continue after the stop was requested; longer than one slow QMP command takes."""


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises if a part of the operator fails, so that it is restarted.

    VCPUSetError: there are no credentials (APIError), or the HTTP address cannot be served. TaskEndedError: a part
    failed.
    """
    raise_file_limit()
    stop = asyncio.Event()
    # From the start, because nothing else would end it while it waits for an API server that is away: the first process
    # of a container ignores a signal without a handler. (`Source.run` sets the same handlers again.)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    while not stop.is_set():
        try:
            await _run_once(settings, stop)
        except NotLeading as error:
            logger.warning("%s; stopped changing machines, now a standby", error)
    logger.info("stopped")


async def _run_once(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop` is set, or the lead is lost (NotLeading)."""
    async with await Cluster.connect(settings.kubeconfig) as cluster, TaskOwner(close_seconds=GRACE_SECONDS) as owner:
        serving = asyncio.create_task(_serve(settings, cluster, owner, stop), name="operator")
        failing = asyncio.ensure_future(owner.wait())
        try:
            await asyncio.wait({serving, failing}, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                stop.set()
            await serving
            if failing.done():
                await failing
        finally:
            failing.cancel()


def raise_file_limit() -> None:
    """Allow this process as many open files as it may have: a kept monitor is one, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_from_collector() -> None:
    """Exclude all current objects, the program and the sets, from Python's cyclic garbage collector.

    It would traverse them repeatedly, and block the event loop meanwhile: with 5,000 sets for a third of a second.
    Reference counts still free them, and the call of the next leader frees what this one has left in cycles.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def _serve(settings: Settings, cluster: Cluster, owner: TaskOwner, stop: asyncio.Event) -> None:
    """Wire everything, work until `stop` is set, and release every monitor and the lease."""
    scope = Scope(settings.node_name, settings.namespaces, settings.label_selector)
    metrics = Metrics(workers=settings.workers)
    cluster.count(metrics.requested)
    queue: WorkQueue[UID] = WorkQueue(BACKOFF, metrics, slow_at_once=max(1, int(settings.workers * SLOW_SHARE)))
    metrics.watch_queue(queue.statistics)
    history = History(metrics.registry)

    def moved(before: VCPUSet | None, after: VCPUSet | None) -> None:
        history.moved(before, after)
        page.journal.moved(before, after)
        if before is not None and (after is None or after.generation != before.generation):
            # A new spec, or none: its author may have fixed what failed, and need not wait behind all slow sets. Other
            # changes do not pass the others: a status, an annotation, an event.
            queue.renew(before.uid)

    cache = Cache(moved)
    freshness = Freshness(lambda namespace: source.is_failing(namespace))
    metrics.watch_freshness(freshness)
    recorder = Recorder(cluster)
    metrics.watch_events(lambda: recorder.dropped, lambda: recorder.throttled)
    leadership = _leadership(settings, cluster)
    permit: Callable[[], None] | None = None
    if leadership is not None and settings.leader_election is not None:
        permit = leadership.require
        cluster.guard(permit)
        metrics.watch_leadership(settings.leader_election.name, lambda: leadership.leading)

    def commanded(uid: UID, command: str, seconds: float, outcome: Outcome) -> None:
        metrics.commanded(command, seconds, outcome)
        queue.touch(uid)

    def another_socket(uid: UID) -> None:
        # Another QEMU or none, so how long the passes over the old one took is void.
        queue.renew(uid)
        queue.add(uid)

    watcher = None if settings.socket_root is None else SocketWatcher(settings.socket_root, another_socket)

    def clock() -> datetime:
        return datetime.now(UTC)

    meters = Meters(queue.add, clock)
    collector = SetCollector(lambda: cache, history.waits, meters, settings.metrics_set_limit)
    monitors = Monitors(
        settings.socket_root,
        queue.add,
        networks=settings.networks,
        credentials=Secrets(cluster),
        permit=permit,
        commanded=commanded,
        meters=meters,
        watcher=watcher,
    )
    guests = Guests(settings.socket_root, queue.add, permit=permit, meters=meters)

    ready = asyncio.Event()

    def absence() -> str:
        if leadership is not None and not leadership.leading:
            return "This replica is a standby. Another one is the leader and manages the VCPUSets; its page shows them."
        return "This operator manages no VCPUSets." if ready.is_set() else "The VCPUSets have not been listed yet."

    page = StatusPage(cache, meters, monitors.machine, scope, absence)

    controller = Controller(
        cache=cache,
        reporter=Reporter(cache, cluster, recorder, clock, queue.add),
        monitors=monitors,
        guests=guests,
        pods=Pods(cluster),
        enqueue=queue.add,
        resync_seconds=settings.resync_seconds,
        others_wait=lambda: queue.waiting > 0,
        clock=clock,
        node_name=settings.node_name,
    )

    def changed(uid: UID) -> None:
        controller.changed(uid)
        if watcher is not None:
            watcher.follow(uid, cache.get(uid))

    if watcher is not None:
        owner.spawn(watcher.run(), "watcher of sockets")
    source = Source(settings.kubeconfig, scope, cache, changed, freshness, cluster.lists, metrics.requested)

    def unhealthy() -> str | None:
        return unhealthy_reason(queue.statistics(), settings.workers, freshness)

    async def exposition() -> bytes:
        return metrics.exposition() + await collector.exposition()

    http: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
    if settings.http_address is not None:
        http = serve_http(
            settings.http_address,
            ready=ready,
            unhealthy_reason=unhealthy,
            exposition=exposition,
            busy=partial(busy, cache, meters),
            page=page,
        )
        owner.spawn(measure_lag(metrics.lagged), "event loop's lag")
    owner.spawn(recorder.run(), "event recorder")

    agents: Agents | None = None
    if settings.agent_namespace is not None:
        of_nodes = replace(scope, of_nodes=True)
        agents = Agents(cluster, recorder, of_nodes, settings.agent_namespace, settings.agent_grace_seconds, clock)
        metrics.watch_agents(lambda: agents.unserved)

    def list_sets() -> Coroutine[None, None, None]:
        return sweep(cluster, scope, cache, changed, freshness)

    async def work() -> None:
        # The first list comes before the first pass: only a full list shows the older one of two sets with one monitor.
        if not await _unless_stopped(stop, _insist(list_sets, "first list"), "first list"):
            return
        keep_from_collector()
        history.go_live()
        ready.set()
        logger.info("managing %d VCPUSets (%s)", len(cache), scope.field_selector)
        owner.spawn(_sweep_for_ever(list_sets, settings.sweep_seconds, source.listed_again, freshness), "sweep")
        owner.spawn(
            run_workers(
                queue, controller.reconcile, count=settings.workers, grace_seconds=GRACE_SECONDS, observer=metrics
            ),
            "workers",
        )
        if agents is not None:
            owner.spawn(agents.run(), "agents")
        try:
            await source.run(stop)
        finally:
            queue.shut_down()
            await owner.finish("workers")
            await guests.close()
            await monitors.close()

    async with http:
        if leadership is None:
            await work()
        else:
            await _lead(leadership, work, owner, ready, stop)


def _leadership(settings: Settings, cluster: Cluster) -> Leadership | None:
    election = settings.leader_election
    if election is None:
        return None
    return Leadership(
        cluster,
        election.namespace,
        election.name,
        own_identity(),
        lease_seconds=election.lease_seconds,
        renew_seconds=election.renew_seconds,
        retry_seconds=election.retry_seconds,
    )


async def _lead(
    leadership: Leadership,
    work: Callable[[], Coroutine[None, None, None]],
    owner: TaskOwner,
    ready: asyncio.Event,
    stop: asyncio.Event,
) -> None:
    """Be a standby, work once this process is the leader, and release the lease when the work has ended.

    Raises NotLeading when the lease is lost meanwhile; all work has ended then. A standby is `ready`, because it could
    take over, and a rollout waits for that.
    """
    if not await _unless_stopped(stop, leadership.acquire(ready), "standby"):
        await leadership.release()  # it may have come at the last moment
        return
    ready.clear()
    working = asyncio.create_task(work(), name="work")
    keeping = asyncio.create_task(leadership.keep(), name="leadership")
    await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        # Work in progress is cancelled where it is; `require` already refuses anything that it would still send.
        working.cancel()
        await owner.aclose()
        await asyncio.gather(working, return_exceptions=True)
        await keeping
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await leadership.release()
    await working


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[None, None, None], name: str) -> bool:
    """Do `work`, and raise what it raises; False: `stop` was set before it was done, and it was cancelled."""
    working = asyncio.create_task(work, name=name)
    stopping = asyncio.create_task(stop.wait(), name=f"{name}: stop flag")
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
        return not stop.is_set()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.wait({working, stopping})


async def _sweep_for_ever(
    list_sets: Callable[[], Awaitable[None]], seconds: float, listed_again: asyncio.Event, freshness: Freshness
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + jittered(seconds, 0.1)
        while not listed_again.is_set() and (left := due - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, CHECK_SECONDS)):
                    await listed_again.wait()
            if freshness.missing:
                # The watch has not delivered a change in its time: the list delivers it.
                break
        listed_again.clear()
        await _insist(list_sets, "sweep")


async def _insist(list_sets: Callable[[], Awaitable[None]], what: str) -> None:
    """List the sets, with retries for as long as the API server is away."""
    pace = RetryBackoff()
    while True:
        try:
            await list_sets()
        except APIError as error:
            pause = pace.failed(error)
            logger.warning("%s: %s%s; retrying in %.1f s", what, error, remedy(error), pause)
            await asyncio.sleep(pause)
        else:
            return
