"""The HTTP side of the process: `/healthz`, `/readyz`, `/metrics`, how busy a machine is, and the status page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from vcpuset.app.page.pages import StatusPage
from vcpuset.runtime.listening import serving

__all__ = ["serve_http"]


@contextlib.asynccontextmanager
async def serve_http(
    address: tuple[str, int],
    *,
    ready: asyncio.Event,
    unhealthy_reason: Callable[[], str | None],
    exposition: Callable[[], Awaitable[bytes]],
    busy: Callable[[str, str], Awaitable[tuple[int, dict[str, Any]]]],
    page: StatusPage,
) -> AsyncIterator[None]:
    """Serve as long as the context is open. Raises VCPUSetError if the address cannot be served.

    ready             set once the first list is in, or while this process stands by
    unhealthy_reason  why the process should be restarted; None: it is healthy
    exposition        the metrics in Prometheus' text format
    busy              HTTP status and JSON about the set with this namespace and name
    page              its streams end with the context
    """

    async def healthz(_: web.Request) -> web.Response:
        why = unhealthy_reason()
        return web.Response(text="ok\n") if why is None else web.Response(status=500, text=f"{why}\n")

    async def readyz(_: web.Request) -> web.Response:
        return (
            web.Response(text="ok\n")
            if ready.is_set()
            else web.Response(status=503, text="the first list has not succeeded yet\n")
        )

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await exposition(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def busy_vcpus(request: web.Request) -> web.Response:
        status, answer = await busy(request.match_info["namespace"], request.match_info["name"])
        return web.json_response(answer, status=status)

    routes = [
        web.get("/healthz", healthz),
        web.get("/readyz", readyz),
        web.get("/metrics", metrics),
        web.get("/v1/namespaces/{namespace}/vcpusets/{name}/busy", busy_vcpus),
        *page.routes(),
    ]
    remedy = "set another address with --http-address, or an empty one to disable HTTP"
    async with serving(routes, address, "--http-address", remedy):
        try:
            yield
        finally:
            page.close()
