"""What kopf asks passes the gate: when failures are forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import kopf
import pytest
from aiohttp import web

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.kube import transport
from vcpuset.kube.transport import ThrottledTransport

__all__: list[str] = []

DISCOVERY = "/apis/vcpuset.dev/v1alpha1"
SETS = f"{DISCOVERY}/vcpusets"


class Server:
    """Answers everything with one HTTP status, which can be changed."""

    def __init__(self) -> None:
        self.code = 200
        self.url = ""

    async def answer(self, _: web.Request) -> web.Response:
        """The answer to every request."""
        return web.json_response({}, status=self.code)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    serving = Server()
    application = web.Application()
    application.router.add_get("/{path:.*}", serving.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    serving.url = f"http://{host}:{port}"
    yield serving
    await runner.cleanup()


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ThrottledTransport]:
    """A gate whose pauses are short."""
    monkeypatch.setattr(transport, "BACKOFF", ExponentialBackoff(base_seconds=0.001, cap_seconds=0.01))
    made = ThrottledTransport(asyncio.Lock(), lambda _: None, lambda _method, _code: None)
    yield made
    await made.close()


async def ask(session: aiohttp.ClientSession, server: Server, path: str, code: int) -> None:
    """One request that is answered so."""
    server.code = code
    async with session.get(f"{server.url}{path}") as answer:
        assert answer.status == code


@pytest.mark.parametrize("path", ["/api", "/apis", DISCOVERY])
async def test_what_kopf_asks_before_it_watches_has_not_failed_any_more_once_it_is_answered(
    server: Server, gate: ThrottledTransport, path: str
) -> None:
    session = gate.session(kopf.ConnectionInfo(server=server.url))
    for _ in range(4):
        await ask(session, server, path, 503)
    assert gate.is_failing("any")
    await ask(session, server, path, 200)
    assert not gate.is_failing("any")
    await ask(session, server, path, 503)
    assert gate.is_failing("any")


async def test_a_list_that_succeeds_says_nothing_of_the_watch_that_follows_it(
    server: Server, gate: ThrottledTransport
) -> None:
    session = gate.session(kopf.ConnectionInfo(server=server.url))
    await ask(session, server, SETS, 503)
    await ask(session, server, SETS, 200)
    assert gate.is_failing("any")
    await ask(session, server, f"{SETS}?watch=true", 200)
    assert gate.is_failing("any"), "it has not lasted"
