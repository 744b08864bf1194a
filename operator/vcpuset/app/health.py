"""The HTTP side of the process: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from vcpuset.app.metrics import Metrics

__all__ = ["serve_http"]


async def serve_http(
    address: tuple[str, int], metrics: Metrics, *, ready: asyncio.Event, ill: Callable[[], str | None]
) -> None:
    """Serve until cancelled. OSError if the address cannot be had.

    ready  set once the first list is in, or while this process stands by
    ill    why the process should be restarted; None: it is well
    """

    async def healthz(_: web.Request) -> web.Response:
        why = ill()
        return web.Response(text="ok\n") if why is None else web.Response(status=500, text=f"{why}\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready.is_set() else web.Response(status=503, text="no list yet\n")

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})

    application = web.Application()
    application.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", exposition)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, *address).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
