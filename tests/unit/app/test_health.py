"""`/healthz`, `/readyz` and `/metrics`, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from harness.processes import free_port
from harness.wait import until
from vcpuset.app.health import serve_http

__all__: list[str] = []


class Served:
    """A server on a port of its own, and what it reports on.

    ill  why the process should be restarted; None: it is well
    """

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ill: str | None = None
        self.port = free_port()
        self.task = asyncio.create_task(
            serve_http(("127.0.0.1", self.port), ready=self.ready, ill=lambda: self.ill, exposition=self._exposition)
        )

    async def _exposition(self) -> bytes:
        return b"vcpuset_sets 4\n"

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        timeout = aiohttp.ClientTimeout(total=20)
        async with (
            aiohttp.ClientSession(timeout=timeout) as client,
            client.get(f"http://127.0.0.1:{self.port}{path}") as answer,
        ):
            return answer.status, await answer.text()

    async def listens(self) -> bool:
        """Whether it takes connections."""
        try:
            await self.get("/healthz")
        except aiohttp.ClientConnectionError:
            if self.task.done():
                self.task.result()
            return False
        return True


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    server = Served()
    await until(server.listens, 30, "the server to listen")
    yield server
    server.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await server.task


async def test_healthz_is_well_until_there_is_a_reason_for_a_restart(served: Served) -> None:
    assert await served.get("/healthz") == (200, "ok\n")

    served.ill = "a pass has been running for 181 s"

    assert await served.get("/healthz") == (500, "a pass has been running for 181 s\n")


async def test_readyz_waits_for_the_first_list(served: Served) -> None:
    assert (await served.get("/readyz"))[0] == 503

    served.ready.set()

    assert await served.get("/readyz") == (200, "ok\n")


async def test_metrics_are_what_there_is_to_show(served: Served) -> None:
    assert await served.get("/metrics") == (200, "vcpuset_sets 4\n")


async def test_another_path_is_not_found(served: Served) -> None:
    assert (await served.get("/"))[0] == 404


async def test_when_it_is_cancelled_the_port_is_free_again(served: Served) -> None:
    served.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await served.task

    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", served.port))


async def test_an_address_that_is_taken_is_an_error(served: Served) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
        await serve_http(("127.0.0.1", served.port), ready=asyncio.Event(), ill=lambda: None, exposition=asyncio.Future)

    assert caught.value.errno == errno.EADDRINUSE
