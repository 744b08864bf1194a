"""Load on the API server from a benchmark, and what the audit log says of the load that others make.

Times are those of the API server: when it has answered, by its own clock. What this process notices, and when, would
say more about this process, which shares two cores with all that it measures.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import msgspec

from harness.controlplane import ControlPlane
from harness.world import API, manifest

__all__ = ["Audit", "Load", "Record"]

AGENT: Final = "bench"
"""The user agent of the requests that are made here."""

CONNECTIONS: Final = 16
"""How many requests are under way at once. More make the API server no faster on two cores."""

REQUEST_SECONDS: Final = 60.0


class _Target(msgspec.Struct, frozen=True):
    resource: str = ""
    subresource: str = ""
    name: str = ""


class _Outcome(msgspec.Struct, frozen=True):
    code: int = 0


class _Line(msgspec.Struct, frozen=True, rename="camel"):
    verb: str
    stage_timestamp: datetime
    user_agent: str = ""
    object_ref: _Target = _Target()
    response_status: _Outcome = _Outcome()


@dataclass(frozen=True)
class Record:
    """A request that has changed something."""

    own: bool
    """Whether it was made by a `Load`."""
    name: str
    status: bool
    """Whether it was to the status of a set."""
    at: float
    """When it was answered, in seconds since 1970."""


class Audit:
    """The successful writes in an audit log, each told once. It reads on where it stopped: the log grows long."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._log = control_plane.audit_log
        self._read = 0
        self._decode = msgspec.json.Decoder(_Line).decode

    def news(self) -> list[Record]:
        """The writes since the last call."""
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            whole_lines, end, _ = stream.read().rpartition(b"\n")
        self._read += len(whole_lines + end)
        lines = map(self._decode, whole_lines.splitlines())
        return [
            Record(
                line.user_agent == AGENT,
                line.object_ref.name,
                line.object_ref.resource == "vcpusets" and line.object_ref.subresource == "status",
                line.stage_timestamp.timestamp(),
            )
            for line in lines
            if line.verb not in {"get", "list", "watch"} and 200 <= line.response_status.code < 300
        ]


class Load:
    """Somebody who makes and changes many sets of one namespace as fast as the API server takes them."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self._kubeconfig = control_plane.kubeconfig
        self._token = control_plane.token
        self._url = f"{control_plane.url}{API}/namespaces/{namespace}/vcpusets"
        self._namespace = namespace
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=await asyncio.to_thread(_trust, self._kubeconfig)),
            headers={"Authorization": f"Bearer {self._token}", "User-Agent": AGENT},
            timeout=aiohttp.ClientTimeout(total=None, sock_read=REQUEST_SECONDS, sock_connect=REQUEST_SECONDS),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def create(self, sets: Mapping[str, int]) -> None:
        """Make sets of so many vCPUs, each with its monitor at `<name>.sock`."""
        await asyncio.gather(
            *(self._send("POST", "", manifest(self._namespace, name, vcpus)) for name, vcpus in sets.items())
        )

    async def change(self, sets: Mapping[str, int]) -> None:
        """Declare so many vCPUs for these sets."""
        await asyncio.gather(
            *(self._send("PATCH", f"/{name}", {"spec": {"vcpus": vcpus}}) for name, vcpus in sets.items())
        )

    async def sets(self) -> Iterable[Mapping[str, Any]]:
        """All sets as they are now."""
        listed = await self._send("GET", "", None)
        found: list[Mapping[str, Any]] = listed["items"]
        return found

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert self._session is not None
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        content = None if body is None else json.dumps(body)
        async with self._session.request(
            method, self._url + path, data=content, headers={"Content-Type": kind}
        ) as answer:
            if answer.status >= 300:
                raise RuntimeError(f"{method} {self._url}{path}: {answer.status}: {await answer.text()}")
            found: Mapping[str, Any] = await answer.json()
            return found


def _trust(kubeconfig: Path) -> ssl.SSLContext:
    cluster = json.loads(kubeconfig.read_text())["clusters"][0]["cluster"]
    return ssl.create_default_context(cafile=cluster["certificate-authority"])
