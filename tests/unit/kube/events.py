"""An API server for Events that fails by script, and sets to tell of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from vcpuset.domain.errors import APIError, Conflict, ObjectGone
from vcpuset.domain.resource import UID, Spec, UnixMonitor, VCPUSet
from vcpuset.kube.recorder import Recorder

__all__ = ["Fault", "Server", "a_set", "now", "record", "running", "stopped_after"]

Fault = Callable[[str], APIError | None]


class Server:
    """The Events of an API server, and when they were asked for.

    fault  the error for a request ("POST" or "PATCH"), or None: it succeeds
    late   the error comes after the request was carried out
    """

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[float, str, str]] = []
        self.fault: Fault = lambda _: None
        self.late = False

    async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        name = event["metadata"]["name"]
        with self._request("POST", name):
            if name in self.events:
                raise Conflict(f"{name} already exists")
            self.events[name] = dict(event)

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        with self._request("PATCH", name):
            if name not in self.events:
                raise ObjectGone(name)
            self.events[name].update(patch)

    def _request(self, method: str, name: str) -> _Request:
        self.requests.append((now(), method, name))
        return _Request(self.fault(method), self.late)

    def counts(self) -> dict[str, int]:
        """How often each Event happened, by its note."""
        return {event["note"]: event.get("series", {"count": 1})["count"] for event in self.events.values()}

    def times(self, method: str) -> list[float]:
        return [at for at, each, _ in self.requests if each == method]


class _Request:
    def __init__(self, error: APIError | None, late: bool) -> None:
        self._error = error
        self._late = late

    def __enter__(self) -> None:
        if self._error is not None and not self._late:
            raise self._error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None and self._error is not None:
            raise self._error


def now() -> float:
    return asyncio.get_running_loop().time()


def a_set(number: int = 0, generation: int = 1) -> VCPUSet:
    spec = Spec(2, UnixMonitor("web.sock"))
    created = datetime(2026, 1, 2, tzinfo=UTC)
    return VCPUSet(UID(f"uid-{number}"), "default", f"web-{number}", generation, "7", created, spec)


def record(recorder: Recorder, vcpuset: VCPUSet, note: str = "2 of 4 vCPUs", reason: str = "Plugging") -> None:
    recorder.record(vcpuset, type="Normal", reason=reason, action="Reconcile", note=note)


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[Recorder]:
    recorder = Recorder(server, instance="agent-1")
    task = asyncio.create_task(recorder.run())
    try:
        yield recorder
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def stopped_after(recorder: Recorder, seconds: float) -> None:
    """Have a recorder that nobody ran yet run for so long."""
    task = asyncio.create_task(recorder.run())
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.wait({task})
