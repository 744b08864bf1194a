"""The process: it serves the API with the present certificate to the present front proxy, until SIGTERM or SIGINT.

Both are read again every few seconds. If one has changed, a new listener takes over the address, and the old one ends
with all of its connections: none outlives the CA that has let it in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

import aiohttp
from aiohttp import web

from vcpuset.domain.backoff import jittered
from vcpuset.domain.errors import ObjectGone, VCPUSetError
from vcpuset.kube.aggregation import AggregatedAPI
from vcpuset.metricsapi.access import Access
from vcpuset.metricsapi.api import REGISTRATION, MetricsAPI
from vcpuset.metricsapi.certificates import Certificate, CertificateSource, Files, OwnCertificate, server_context
from vcpuset.metricsapi.frontproxy import CONFIG_MAP, FrontProxy, InvalidFrontProxy
from vcpuset.metricsapi.settings import Settings
from vcpuset.metricsapi.sources import Sources
from vcpuset.runtime.listening import SERVER_LOG, cannot_listen, serving
from vcpuset.runtime.tasks import TaskOwner

__all__ = ["REREAD_SECONDS", "run"]

REREAD_SECONDS: Final = 10.0
"""The interval at which the certificate and the front proxy's identity are read, plus or minus 10 %."""

GRACE_SECONDS: Final = 10.0
"""How long requests in progress may continue; longer than a pod may take to answer."""

_log = logging.getLogger(__name__)


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        APIError: there are no credentials.
        VCPUSetError: an address cannot be served.
        TaskEndedError: a part failed.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with (
        await AggregatedAPI.connect(settings.kubeconfig) as cluster,
        # Pods can set no cookies, and their answers are not decompressed: a short one could become very long.
        aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, headers={"Accept-Encoding": "identity"}
        ) as session,
        contextlib.AsyncExitStack() as stack,
    ):
        sources = Sources(cluster, session, (settings.agent_namespace, settings.controller_namespace))
        listener = Listener(await _bind(settings.address), cluster, Access(cluster), sources)
        stack.push_async_callback(listener.close)
        if settings.health_address is not None:
            await stack.enter_async_context(_serve_health(settings.health_address, listener.ready))
        owner = await stack.enter_async_context(TaskOwner(close_seconds=GRACE_SECONDS))
        owner.spawn(_keep_current(cluster, _source(cluster, settings), listener), "listener")
        stopping, failing = asyncio.create_task(stop.wait()), asyncio.create_task(owner.wait())
        try:
            await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                await failing
        finally:
            stopping.cancel()
            failing.cancel()
            await asyncio.gather(stopping, failing, return_exceptions=True)
    _log.info("stopped")


class Listener:
    """Serves the API on one address, with a certificate and to a front proxy that may be replaced.

    ready  set as soon as it serves
    """

    def __init__(self, bound: socket.socket, cluster: AggregatedAPI, access: Access, sources: Sources) -> None:
        self.ready = asyncio.Event()
        self._socket = bound
        """Kept until the end: while listeners replace each other, no connection is refused."""
        self._cluster = cluster
        self._access = access
        self._sources = sources
        self._served: tuple[Certificate, FrontProxy] | None = None
        self._runner: web.AppRunner | None = None

    async def serve(self, certificate: Certificate, front_proxy: FrontProxy) -> None:
        """Serve with these from now on.

        Raises:
            CertificateUnavailable: they cannot be used. What was served before continues.
        """
        if self._served == (certificate, front_proxy):
            return
        context = server_context(certificate, front_proxy.ca)
        before, self._runner = self._runner, await self._start(context, front_proxy)
        self._served = (certificate, front_proxy)
        self.ready.set()
        _log.info("serving%s", ", with a new certificate or to a new front proxy" if before else "")
        if before is not None:
            await before.cleanup()

    async def close(self) -> None:
        """Accept no more connections, and finish the requests in progress."""
        self._socket.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _start(self, context: ssl.SSLContext, front_proxy: FrontProxy) -> web.AppRunner:
        application = MetricsAPI(self._cluster, self._access, self._sources, front_proxy).application()
        runner = web.AppRunner(application, access_log=None, logger=SERVER_LOG, shutdown_timeout=GRACE_SECONDS)
        await runner.setup()
        await web.SockSite(runner, self._socket.dup(), ssl_context=context).start()
        return runner


async def _bind(address: tuple[str, int]) -> socket.socket:
    """A socket that listens on an address. Raises VCPUSetError if that cannot be done."""
    host, port = address
    try:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server((str(where[0]), port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        raise cannot_listen(address, "--address", "set another address with --address", error) from error


async def _keep_current(cluster: AggregatedAPI, source: CertificateSource, listener: Listener) -> None:
    """Read the certificate and the front proxy's identity again and again; each new failure is logged once.

    Without the one, a change of the other takes effect nevertheless.
    """
    certificate: Certificate | None = None
    front_proxy: FrontProxy | None = None
    logged: set[str] = set()
    while True:
        failures: set[str] = set()
        try:
            front_proxy = await _read_front_proxy(cluster)
        except VCPUSetError as error:
            failures.add(str(error))
        try:
            certificate = await source.current()
        except VCPUSetError as error:
            failures.add(str(error))
        if certificate is not None and front_proxy is not None:
            try:
                await listener.serve(certificate, front_proxy)
            except VCPUSetError as error:
                failures.add(str(error))
        for failure in sorted(failures - logged):
            what = "still serving what was current before" if listener.ready.is_set() else "not serving yet"
            _log.error("%s; %s", failure, what)
        logged = failures
        await asyncio.sleep(jittered(REREAD_SECONDS if listener.ready.is_set() else 1.0, 0.1))


async def _read_front_proxy(cluster: AggregatedAPI) -> FrontProxy:
    try:
        return FrontProxy.of(await cluster.read_config_map(*CONFIG_MAP))
    except ObjectGone as error:
        raise InvalidFrontProxy(f"there is no ConfigMap {'/'.join(CONFIG_MAP)}, which the API server writes") from error


def _source(cluster: AggregatedAPI, settings: Settings) -> CertificateSource:
    if settings.files is not None:
        return Files(settings.files)
    return OwnCertificate(cluster, REGISTRATION, settings.namespace, settings.service, lambda: datetime.now(UTC))


@contextlib.asynccontextmanager
async def _serve_health(address: tuple[str, int], ready: asyncio.Event) -> AsyncIterator[None]:
    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if ready.is_set():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="there is no certificate or no front proxy yet; the log has the cause\n")

    routes = [web.get("/healthz", healthz), web.get("/readyz", readyz)]
    remedy = "set another address with --health-address, or an empty one to disable it"
    async with serving(routes, address, "--health-address", remedy):
        yield
