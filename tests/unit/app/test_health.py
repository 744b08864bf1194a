"""`/healthz`, `/readyz` and `/metrics`, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from harness.processes import free_port
from unit.app.pages import Pages
from vcpuset.app.health import serve_http
from vcpuset.domain.errors import VCPUSetError

__all__: list[str] = []


class Served:
    """A server on a port of its own, and what it reports on.

    unhealthy_reason  why the process should be restarted; None: it is healthy
    """

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.unhealthy_reason: str | None = None
        self.port = free_port()

    def serving(self) -> contextlib.AbstractAsyncContextManager[None]:
        """While this is open, it is served."""
        address = ("127.0.0.1", self.port)
        return serve_http(
            address,
            ready=self.ready,
            unhealthy_reason=lambda: self.unhealthy_reason,
            exposition=self._exposition,
            busy=self._busy,
            page=Pages().page,
        )

    async def _busy(self, namespace: str, name: str) -> tuple[int, dict[str, Any]]:
        return 404, {"reason": "NotServed", "message": f"{namespace}/{name}"}

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


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    server = Served()
    async with server.serving():
        yield server


async def test_healthz_is_well_until_there_is_a_reason_for_a_restart(served: Served) -> None:
    assert await served.get("/healthz") == (200, "ok\n")

    served.unhealthy_reason = "a pass has been running for 181 s"

    assert await served.get("/healthz") == (500, "a pass has been running for 181 s\n")


async def test_what_is_busy_is_asked_for_by_namespace_and_name(served: Served) -> None:
    status, body = await served.get("/v1/namespaces/team-a/vcpusets/web/busy")
    assert (status, json.loads(body)) == (404, {"reason": "NotServed", "message": "team-a/web"})


async def test_readyz_waits_for_the_first_list(served: Served) -> None:
    assert (await served.get("/readyz"))[0] == 503

    served.ready.set()

    assert await served.get("/readyz") == (200, "ok\n")


async def test_metrics_are_what_there_is_to_show(served: Served) -> None:
    assert await served.get("/metrics") == (200, "vcpuset_sets 4\n")


async def test_another_path_is_not_found(served: Served) -> None:
    assert (await served.get("/metric"))[0] == 404


async def test_when_it_ends_the_port_is_free_again() -> None:
    server = Served()
    async with server.serving():
        assert (await server.get("/healthz"))[0] == 200

    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", server.port))


async def test_an_address_that_is_taken_is_an_error_with_the_remedy(served: Served) -> None:
    with pytest.raises(VCPUSetError) as caught:
        await served.serving().__aenter__()

    assert str(caught.value) == (
        f"cannot listen on --http-address 127.0.0.1:{served.port}: Address already in use; set another address with "
        "--http-address, or an empty one to disable HTTP"
    )


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.1", "192.0.2.1:0: Cannot assign requested address;"),
        ("2001:db8::1", "[2001:db8::1]:0: "),
        ("..", "..:0: "),
    ],
)
async def test_an_address_that_is_not_of_this_host_is_an_error(host: str, words: str) -> None:
    serving = serve_http(
        (host, 0),
        ready=asyncio.Event(),
        unhealthy_reason=lambda: None,
        exposition=asyncio.Future,
        busy=lambda *_: asyncio.Future(),
        page=Pages().page,
    )
    with pytest.raises(VCPUSetError) as caught:
        await serving.__aenter__()

    assert words in str(caught.value)
