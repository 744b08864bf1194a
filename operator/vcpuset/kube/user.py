"""The requests of `kubectl vcpuset`: VCPUSets, as they are and as they change, their Events, and their counts.

A refusal names the role that allows the request.
"""

from __future__ import annotations

import asyncio
import builtins
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
import msgspec

from vcpuset.domain.errors import APIError, Forbidden, NoAnswer, ObjectGone
from vcpuset.domain.resource import VCPUSet
from vcpuset.kube.cluster import REQUEST_SECONDS, Cluster, Scope, Unauthorized, refusal, send, unanswered, understood
from vcpuset.kube.codec import API_VERSION, GROUP, PLURAL, decode
from vcpuset.kube.quantity import millicores

__all__ = ["Busy", "Event", "UserAPI"]

WATCH_SECONDS: Final = 240
"""How long one watch lasts. The list after it also shows what the watch would have missed."""

FIELD_MANAGER: Final = "kubectl-vcpuset"
"""The writer of a field, in `metadata.managedFields`."""

_METRICS: Final = "/apis/custom.metrics.k8s.io/v1beta2"
_MERGE_PATCH: Final = "application/merge-patch+json"

Sets = Mapping[tuple[str, str], VCPUSet]
"""By namespace and name."""


@dataclass(frozen=True, slots=True)
class Busy:
    """How many vCPUs of a machine were busy, on average, in so many seconds."""

    vcpus: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Event:
    """A Kubernetes Event, as far as it is shown.

    last   when it last happened; None: not known
    count  how often
    """

    last: datetime | None
    count: int
    type: str
    reason: str
    message: str


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""


class _Snapshot(msgspec.Struct):
    metadata: _ListMetadata
    items: list[dict[str, Any]]


class _Change(msgspec.Struct):
    type: str
    object: dict[str, Any]


class _Series(msgspec.Struct, rename="camel"):
    count: int = 1
    last_observed_time: datetime | None = None


class _Event(msgspec.Struct, rename="camel"):
    """`core/v1`, which kubectl describe reads too."""

    type: str = ""
    reason: str = ""
    message: str = ""
    count: int | None = None
    series: _Series | None = None
    event_time: datetime | None = None
    last_timestamp: datetime | None = None


class _Events(msgspec.Struct):
    items: list[_Event]


class _Described(msgspec.Struct):
    name: str


class _Value(msgspec.Struct, rename="camel"):
    described_object: _Described
    value: str
    window_seconds: int = 0


class _Values(msgspec.Struct):
    items: list[_Value]


@dataclass(frozen=True)
class _Everywhere(Scope):
    """All VCPUSets, with or without a node."""

    @property
    def field_selector(self) -> str:
        return ""


class UserAPI(Cluster):
    """The API server, as a user of kubectl sees it. All methods raise APIError."""

    async def sets(self, namespace: str | None) -> builtins.list[VCPUSet]:
        """The VCPUSets of a namespace; None: of all."""
        return await self.list(_Everywhere(namespaces=() if namespace is None else (namespace,)))

    async def read(self, namespace: str, name: str) -> VCPUSet:
        """One VCPUSet. ObjectGone: there is none."""
        return decode(await self._of_set("GET", namespace, name))

    async def scale(self, namespace: str, name: str, count: int) -> None:
        """Declare a count, by the scale subresource."""
        await self._of_set("PATCH", namespace, name, "/scale", {"spec": {"replicas": count}})

    async def suspend(self, namespace: str, name: str, *, suspend: bool) -> None:
        """Set `spec.suspend`."""
        await self._of_set("PATCH", namespace, name, body={"spec": {"suspend": suspend}})

    async def events(self, vcpuset: VCPUSet) -> builtins.list[Event]:
        """The Events about a VCPUSet, oldest first."""
        path = f"/api/v1/namespaces/{vcpuset.namespace}/events"
        query = [("fieldSelector", f"involvedObject.uid={vcpuset.uid}")]
        found = understood(f"GET {path}", await self._request("GET", path, query=query), _Events).items
        return sorted(map(_event, found), key=lambda event: event.last or datetime.min.replace(tzinfo=UTC))

    async def busy(self, namespace: str, name: str = "*") -> Mapping[str, Busy]:
        """How busy the machines of a namespace are, by the name of the VCPUSet, as far as it is known.

        ObjectGone: it is not known of any, or the cluster has no metrics API.
        """
        path = f"{_METRICS}/namespaces/{namespace}/{PLURAL}.{GROUP}/{name}/busy_vcpus"
        found = understood(f"GET {path}", await self._request("GET", path), _Values).items
        return {
            each.described_object.name: Busy(value / 1000, each.window_seconds)
            for each in found
            if (value := millicores(each.value)) is not None
        }

    async def watch(self, namespace: str | None, name: str | None = None) -> AsyncGenerator[Sets]:
        """All VCPUSets of a namespace (None: of all), or one: as they are now, and again after each change. Endless."""
        query = [] if name is None else [("fieldSelector", f"metadata.name={name}")]
        path = _path(namespace)
        while True:
            try:
                answer = await self._request("GET", path, query=query)
            except ObjectGone as error:
                raise _unknown() from error
            snapshot = understood(f"GET {path}", answer, _Snapshot)
            sets = {(each.namespace, each.name): each for each in map(decode, snapshot.items)}
            yield sets
            async with aclosing(self._changes(path, query, snapshot.metadata.resource_version)) as changes:
                async for change in changes:
                    vcpuset = decode(change.object)
                    key = (vcpuset.namespace, vcpuset.name)
                    if change.type == "DELETED":
                        sets.pop(key, None)
                    else:
                        sets[key] = vcpuset
                    yield sets

    async def _changes(self, path: str, query: builtins.list[tuple[str, str]], version: str) -> AsyncGenerator[_Change]:
        """The changes since a version, until the watch ends in good order, or has to begin with a new list."""
        what = f"GET {path}?watch"
        query = [*query, ("watch", "true"), ("resourceVersion", version), ("timeoutSeconds", str(WATCH_SECONDS))]
        try:
            async with self._borrowed() as client:
                async with asyncio.timeout(REQUEST_SECONDS):
                    response = await send(client, "GET", path, query)
                async with response:
                    if response.status != 200:
                        raise refusal(what, response.status, response.headers, await response.read())
                    async for change in _lines(what, response):
                        if change.type == "ERROR":  # the version is too old: list again
                            return
                        yield change
        except TimeoutError as error:
            raise NoAnswer(f"{what}: no answer in time") from error
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise unanswered(what, error) from error
        except Forbidden as error:
            raise _with_role(error, "GET", path) from error

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: builtins.list[tuple[str, str]] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        try:
            return await super()._request(method, path, query=query, body=body, content_type=content_type)
        except Forbidden as error:
            raise _with_role(error, method, path) from error
        except Unauthorized as error:
            raise Unauthorized(f"{error}; check the user of the kubeconfig's context, or log in again") from error

    async def _of_set(
        self, method: str, namespace: str, name: str, subresource: str = "", body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        path = f"{_path(namespace, name)}{subresource}"
        query = [] if body is None else [("fieldManager", FIELD_MANAGER)]
        try:
            return await self._request(method, path, query=query, body=body, content_type=_MERGE_PATCH)
        except ObjectGone as error:
            if f'"{name}" not found' not in str(error):
                raise _unknown() from error
            remedy = f"`kubectl vcpuset status -n {namespace}` lists those that exist"
            raise ObjectGone(f"there is no VCPUSet {namespace}/{name}: {remedy}") from error


def _unknown() -> APIError:
    return APIError(f"the API server does not know {PLURAL}.{GROUP}: apply the CRD in crds/ of this version first")


def _with_role(error: Forbidden, method: str, path: str) -> Forbidden:
    """A refusal with its remedy. Kubernetes' words contain the user, the verb and the resource."""
    if path.startswith(_METRICS):
        role = "vcpuset-metrics-view, which the roles view, edit and admin contain"
    elif method != "GET":
        role = "vcpuset-edit, which the roles edit and admin contain"
    elif path.endswith("/events"):
        role = "view"
    else:
        role = "vcpuset-view, which the roles view, edit and admin contain"
    return Forbidden(f"{error}. Ask an administrator for a binding of the ClusterRole {role}")


async def _lines(what: str, response: aiohttp.ClientResponse) -> AsyncIterator[_Change]:
    loop = asyncio.get_running_loop()
    until = loop.time() + WATCH_SECONDS + REQUEST_SECONDS
    rest = b""
    while True:
        async with asyncio.timeout_at(until):
            # Not a line at a time: an object can be longer than aiohttp's longest line.
            chunk = await response.content.readany()
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in filter(None, lines):
            try:
                yield msgspec.json.decode(line, type=_Change)
            except ValueError as error:
                raise APIError(f"{what}: the response has an unexpected format: {error}") from error


def _path(namespace: str | None, name: str | None = None) -> str:
    place = "" if namespace is None else f"/namespaces/{namespace}"
    return f"/apis/{API_VERSION}{place}/{PLURAL}{'' if name is None else f'/{name}'}"


def _event(wire: _Event) -> Event:
    series = wire.series or _Series(wire.count or 1)
    return Event(
        last=series.last_observed_time or wire.last_timestamp or wire.event_time,
        count=series.count,
        type=wire.type,
        reason=wire.reason,
        message=wire.message,
    )
