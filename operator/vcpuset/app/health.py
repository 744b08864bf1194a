"""The HTTP side of the process: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

__all__ = ["serve_http"]


async def serve_http(
    address: tuple[str, int],
    *,
    ready: asyncio.Event,
    ill: Callable[[], str | None],
    exposition: Callable[[], Awaitable[bytes]],
) -> None:
    """Serve until cancelled. OSError if the address cannot be had.

    ready       set once the first list is in, or while this process stands by
    ill         why the process should be restarted; None: it is well
    exposition  the metrics in Prometheus' text format
    """

    async def healthz(_: web.Request) -> web.Response:
        why = ill()
        return web.Response(text="ok\n") if why is None else web.Response(status=500, text=f"{why}\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready.is_set() else web.Response(status=503, text="no list yet\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await exposition(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    application = web.Application()
    application.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, *address).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
