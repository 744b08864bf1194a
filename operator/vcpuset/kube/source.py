"""The watch on VCPUSets: kopf as informer, and no other part of kopf.

kopf logs in, discovers, lists, watches and reconnects. Each event of its watch updates the cache and reports what
changed. kopf's handlers are not used: those for creation, update and timers write annotations and finalizers, and are
edge-triggered; and each object would have a task and a queue of its own.

kopf ends when watching fails in a way that it considers final: the resource is not served (any more), a list is
refused, the watch reports an error. Here no answer of an API server is final: kopf is restarted, with a back-off
(`vcpuset.kube.transport`), and machines are kept at their last declared count meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import kopf

# `kopf.spawn_tasks(insights=…, identity=…)` is public, but its types are not exported; neither is the watch itself.
from kopf._cogs.clients.watching import Bookmark, infinite_watch
from kopf._cogs.structs.references import Insights
from kopf._core.engines.peering import Identity

from vcpuset.domain.errors import APIError
from vcpuset.domain.resource import UID
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Scope, ignore
from vcpuset.kube.codec import GROUP, PLURAL, VERSION, InvalidObject, decode
from vcpuset.kube.freshness import Freshness
from vcpuset.kube.login import connection_info
from vcpuset.kube.transport import RetryBackoff, ThrottledTransport

__all__ = ["Source", "watch_settings"]

LOGIN_RETRY_SECONDS: Final = 5.0
"""Pause after credentials could not be read, for example while they are being replaced."""

SILENT_SECONDS: Final = 70.0
"""A watch without any data for so long is closed: the API server sends a bookmark each minute."""

AT_ONCE: Final = 64
"""How many events are processed before other tasks run, if so many have arrived: each takes some 0.2 ms."""

_log = logging.getLogger(__name__)


_REPORTED_BY_US: Final = (
    "kopf._cogs.clients.watching",
    "kopf._core.reactor.observation",
    "kopf._core.reactor.orchestration",
    "kopf._core.reactor.running",
)
"""The loggers in which kopf reports failed requests without their context, and its end with tracebacks."""


def watch_settings(scope: Scope) -> kopf.OperatorSettings:
    """kopf's settings for watching `scope` and doing nothing else."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.scanning.disabled = True  # no watch on CRDs and namespaces, and no rights needed for it
    settings.posting.enabled = False  # Events come from our own recorder
    settings.process.ultimate_exiting_timeout = None  # it would be a SIGKILL during our cleanup
    # As tuples: kopf reads the string "vcpuset.dev/vcpusets" as the name of a resource that does not exist (1.45.2).
    settings.watching.field_selectors[GROUP, PLURAL] = scope.field_selector
    if scope.label_selector:
        settings.watching.label_selectors[GROUP, PLURAL] = scope.label_selector
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = SILENT_SECONDS
    settings.watching.server_timeout = 300  # an integer: the API server rejects "300.0"
    # The gate has deadlines, and pauses that a deadline must not count.
    settings.networking.request_timeout = None
    settings.networking.error_backoffs = itertools.repeat(0.0)
    return settings


class Source:
    """Keeps `cache` up to date for one scope and calls `changed` after each change, including a deletion.

    freshness  is informed of what the watch delivers, news or not
    lists      held during each list; see `Cluster.lists`
    requested  called after each request, as by `Cluster.count`
    """

    def __init__(
        self,
        kubeconfig: Path | None,
        scope: Scope,
        cache: Cache,
        changed: Callable[[UID], None],
        freshness: Freshness,
        lists: asyncio.Lock | None = None,
        requested: Callable[[str, str], None] = ignore,
    ) -> None:
        self._kubeconfig = kubeconfig
        self._scope = scope
        self._cache = cache
        self._changed = changed
        self._freshness = freshness
        self._gate = ThrottledTransport(lists or asyncio.Lock(), self._note_list, requested)
        self._listed: set[str] = set()
        self.listed_again = asyncio.Event()
        """Set when the watch could not continue and restarted with a list: sets that were deleted meanwhile are not
        reported."""

    def is_failing(self, namespace: str) -> bool:
        """Whether the watch on a namespace fails at present, and is retried; this has been logged."""
        return self._gate.is_failing(namespace)

    async def run(self, stop: asyncio.Event, ready: asyncio.Event | None = None) -> None:
        """Watch until `stop` is set; in the main thread, SIGTERM and SIGINT set it. `ready` is set when it watches.

        Failures are logged and retried permanently. Other tasks are not touched (`kopf.operator` would cancel all that
        began after it). When cancelled, it closes its connections first.
        """
        # kopf logs each handler call as information.
        kopf_log = logging.getLogger("kopf")
        if kopf_log.level == logging.NOTSET:
            kopf_log.setLevel(logging.WARNING)
        for name in _REPORTED_BY_US:
            logging.getLogger(name).setLevel(logging.CRITICAL)

        halt = asyncio.Event()
        watching = asyncio.create_task(self._watch_for_ever(halt, stop, ready or asyncio.Event()), name="watch")
        stopping = asyncio.create_task(stop.wait(), name="watch: stop flag")
        try:
            await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            # Not cancelled but requested to end, because a cancelled kopf leaves its connections open. This takes a
            # bounded time: the handler never waits.
            halt.set()
            await asyncio.shield(watching)

    async def _watch_for_ever(self, halt: asyncio.Event, stop: asyncio.Event, ready: asyncio.Event) -> None:
        pace = RetryBackoff()
        while not halt.is_set():
            pace.began()
            try:
                await self._watch(halt, stop, ready)
            except APIError as error:
                pace.ended()
                _log.error("%s; restarting the watch in %.1f s", error, pace.wait_seconds())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pace.wait_seconds()):
                    await halt.wait()

    async def _watch(self, halt: asyncio.Event, stop: asyncio.Event, ready: asyncio.Event) -> None:
        """Run kopf until `halt` is set, or until it ends by itself, which raises an APIError."""
        insights = Insights()
        settings = watch_settings(self._scope)
        try:
            tasks = await kopf.spawn_tasks(
                registry=self._registry(),
                settings=settings,
                insights=insights,
                standalone=True,
                # For peering, which is off. kopf would use the user's name, and in a pod there may be none.
                identity=Identity("vcpuset"),
                clusterwide=not self._scope.namespaces,
                namespaces=self._scope.namespaces,
                stop_flag=halt,
                _command=self._follow(insights, settings, ready),
            )
            if threading.current_thread() is threading.main_thread():
                # Instead of kopf's handlers, which raise InvalidStateError at a second signal.
                for number in (signal.SIGTERM, signal.SIGINT):
                    asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await kopf.run_tasks(tasks, ignored=_AllTasks())
        except APIError:
            raise
        except Exception as error:
            raise APIError(f"watching VCPUSets failed: {error or repr(error)}") from error
        finally:
            await self._gate.close()

    async def _follow(self, insights: Insights, settings: kopf.OperatorSettings, ready: asyncio.Event) -> None:
        """Process what kopf's list and watch of each namespace deliver, until this is cancelled."""
        await insights.ready_resources.wait()
        await insights.ready_namespaces.wait()
        if not insights.watched_resources:
            raise APIError(
                f"the API server does not serve {PLURAL}.{VERSION}.{GROUP}: apply the CRD in crds/ of this version"
            )
        ready.set()
        streams = [
            asyncio.create_task(self._observe_all(infinite_watch(settings=settings, resource=kind, namespace=where)))
            for kind in insights.watched_resources
            for where in insights.namespaces
        ]
        try:
            await asyncio.gather(*streams)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.wait(streams)

    async def _observe_all(self, events: AsyncIterator[Bookmark | kopf.RawEvent]) -> None:
        count = 0
        async for event in events:
            if not isinstance(event, Bookmark) and event["type"] != "BOOKMARK":
                self._observe(event["type"], event["object"])
                count += 1
                if count % AT_ONCE == 0:
                    await asyncio.sleep(0)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry, id="login", backoff=LOGIN_RETRY_SECONDS)
        async def log_in(**_: object) -> kopf.AiohttpSession:
            try:
                info = await connection_info(self._kubeconfig)
            except APIError as error:
                raise kopf.LoginError(str(error)) from error
            return kopf.AiohttpSession(server=info.server, aiohttp_session=self._gate.session(info))

        # kopf discovers and watches the resources of its handlers; `_follow` takes what the watch delivers.
        @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
        async def observe(**_: object) -> None:
            """Not called."""

        return registry

    def _note_list(self, path: str) -> None:
        if path in self._listed:
            self.listed_again.set()
        self._listed.add(path)

    def _observe(self, event_type: str | None, body: Mapping[str, Any]) -> None:
        """Process one watch event. A type of None is an entry of a list.

        DELETED is sent for a deletion and for a set that has left the selection.
        """
        metadata = body["metadata"]
        uid = UID(metadata["uid"])
        gone, version = event_type == "DELETED", metadata.get("resourceVersion")
        self._freshness.brought(uid, None if gone else version)
        if event_type in {"ADDED", "MODIFIED"} and self._cache.has(uid, version):
            return  # most often what this process has written: the response was faster
        if gone:
            news = self._cache.drop(uid) is not None
        else:
            try:
                news = self._cache.put(decode(body))
            except InvalidObject as error:
                _log.error("%s", error)
                # Continuing with its previous version would apply half of it.
                news = self._cache.drop(uid) is not None
        if news:
            self._changed(uid)


class _AllTasks(Collection["asyncio.Task[Any]"]):
    """All tasks of the loop, now and later. `kopf.run_tasks` would wait for, and then cancel, all others."""

    def __contains__(self, _: object) -> bool:
        return True

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(asyncio.all_tasks())

    def __len__(self) -> int:
        return len(asyncio.all_tasks())
