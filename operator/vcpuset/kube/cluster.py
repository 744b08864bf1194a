"""Our own requests to the API server: for VCPUSets, their status and count, for Events, a Lease, and Secrets.

kopf does the watching and nothing else, because its patches know no resourceVersion. Each request has a deadline and
fails with an `APIError`; nothing is retried here, except once with fresh credentials after a 401: the callers know
whether the request still makes sense later.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp
import msgspec
from kubernetes.aio.client.api_client import ApiClient

from vcpuset.domain.errors import APIError, Conflict, Forbidden, NoAnswer, ObjectGone, Rejected, Unavailable
from vcpuset.domain.resource import Status, VCPUSet
from vcpuset.kube.codec import (
    API_VERSION,
    GROUP,
    PLURAL,
    InvalidObject,
    decode,
    encode_conditions,
    encode_status,
)
from vcpuset.kube.login import load_configuration

__all__ = [
    "LONGEST_RETRY_AFTER",
    "NO_ANSWER",
    "USER_AGENT",
    "Cluster",
    "Scope",
    "Unauthorized",
    "ignore",
    "refusal",
    "send",
    "unanswered",
    "understood",
]

REQUEST_SECONDS: Final = 10.0
"""Deadline of one request, from connecting to the last byte of the response."""

AT_ONCE: Final = 64
"""How many objects of a list are decoded before other tasks run: each takes some 0.05 ms."""

PAGE: Final = 500
"""Objects per page of a list; client-go's choice."""

LIST_ATTEMPTS: Final = 5
"""How often a list starts again because the API server has forgotten its position (HTTP 410, after some minutes)."""

LONGEST_RETRY_AFTER: Final = 30.0
"""The longest accepted Retry-After, in seconds, of an API server that is overloaded or starting."""

USER_AGENT: Final = "vcpuset"
"""The client in the API server's audit log."""

NO_ANSWER: Final = "<error>"
"""Instead of an HTTP status if there was no response; as in client-go."""

_MERGE_PATCH: Final = "application/merge-patch+json"
_STRATEGIC_MERGE_PATCH: Final = "application/strategic-merge-patch+json"
_LEASES: Final = "coordination.k8s.io/v1"

_NO_JSON: Final = (ValueError, RecursionError)
"""What msgspec raises for bytes that are not JSON: its own errors, those of UTF-8, and too many brackets."""

_log = logging.getLogger(__name__)

_Wire = TypeVar("_Wire")


class _ListMetadata(msgspec.Struct):
    token: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    items: list[dict[str, Any]]
    metadata: _ListMetadata


class _Items(msgspec.Struct):
    items: list[dict[str, Any]]


class _Secret(msgspec.Struct):
    metadata: dict[str, Any]
    data: dict[str, bytes] | None = None


class _Expired(APIError):
    """HTTP 410: the position in the list is no longer known."""


class Unauthorized(APIError):
    """HTTP 401: the credentials are not accepted (any more)."""


@dataclass(frozen=True)
class Scope:
    """Which VCPUSets this operator manages. The API server selects them.

    node_name       those of this node; None: those without a node
    namespaces      only in these; empty: in all
    label_selector  only those that match, in kubectl's syntax; None: all
    of_nodes        those of all nodes instead, which the agents manage
    """

    node_name: str | None = None
    namespaces: tuple[str, ...] = ()
    label_selector: str | None = None
    of_nodes: bool = False

    @property
    def field_selector(self) -> str:
        """`spec.nodeName=` without a name selects the sets without a node."""
        return "spec.nodeName!=" if self.of_nodes else f"spec.nodeName={self.node_name or ''}"


class Cluster:
    """One API server. Close it, or use it as an asynchronous context manager."""

    def __init__(self, client: ApiClient, kubeconfig: Path | None, context: str | None = None) -> None:
        self.kubeconfig: Final = kubeconfig
        self._context = context
        self._client = client
        self._users: Counter[ApiClient] = Counter()
        """Requests in progress; one client, and after a new login the previous one while it is in use."""
        self._login = asyncio.Lock()
        self.lists: Final = asyncio.Lock()
        """Held during each list: any other list of the same objects takes it too."""
        self._permit: Callable[[], None] | None = None
        self._requested: Callable[[str, str], None] = ignore
        self._reported: dict[Scope, set[str]] = {}
        """The errors of objects in the last list of a scope: each is logged once, not at each list."""

    @classmethod
    async def connect(cls, kubeconfig: Path | None, context: str | None = None) -> Self:
        """Find the credentials. Nothing is sent yet.

        context  of the kubeconfig; None: its current one

        Raises:
            APIError: there are none; with the remedy.
        """
        return cls(await _make_client(kubeconfig, context), kubeconfig, context)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def guard(self, permit: Callable[[], None]) -> None:
        """From now on call `permit` before a status, a count or an Event is written; what it raises is raised."""
        self._permit = permit

    def count(self, requested: Callable[[str, str], None]) -> None:
        """From now on call `requested` after each request, with the method and the HTTP status, or `NO_ANSWER`."""
        self._requested = requested

    async def close(self) -> None:
        """Close the connections. Requests in progress fail."""
        await _close(self._client)

    async def list(self, scope: Scope) -> builtins.list[VCPUSet]:
        """All sets of the scope. Objects that cannot be decoded are logged, once, and skipped.

        Raises:
            APIError: also when the API server does not know VCPUSets.
        """
        bodies: builtins.list[Mapping[str, Any]] = []
        for namespace in scope.namespaces or (None,):
            bodies += await self._list(namespace, scope)
        understood: builtins.list[VCPUSet] = []
        wrong: set[str] = set()
        for number, body in enumerate(bodies):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)  # thousands of objects would block the event loop
            try:
                understood.append(decode(body))
            except InvalidObject as error:
                wrong.add(str(error))
        for words in sorted(wrong - self._reported.get(scope, set())):
            _log.error("%s", words)
        self._reported[scope] = wrong
        return understood

    async def write_status(self, vcpuset: VCPUSet, status: Status) -> VCPUSet:
        """Make `status` the status of `vcpuset`, if that is still the latest version; return the new version.

        Without a difference nothing is sent, and `vcpuset` itself is returned. After a failure other than the two named
        the write may have happened nevertheless.

        Raises:
            Conflict: the object has changed since.
            ObjectGone: it does not exist (any more).
            APIError: anything else.
        """
        patch = encode_status(status)
        return vcpuset if patch == encode_status(vcpuset.status) else await self._patch_status(vcpuset, patch)

    async def write_conditions(self, vcpuset: VCPUSet, status: Status) -> VCPUSet:
        """As `write_status`, for the conditions alone: the other fields stay as they are stored."""
        patch = encode_conditions(status)
        if patch == encode_conditions(vcpuset.status):
            return vcpuset
        return await self._patch_status(vcpuset, {"conditions": patch})

    async def _patch_status(self, vcpuset: VCPUSet, patch: Mapping[str, Any]) -> VCPUSet:
        body = {"metadata": {"resourceVersion": vcpuset.resource_version}, "status": patch}
        path = f"{_path(API_VERSION, PLURAL, vcpuset.namespace)}/{vcpuset.name}/status"
        self._require_permit()
        answer = await self._request("PATCH", path, body=body, content_type=_MERGE_PATCH)
        try:
            return decode(answer)
        except InvalidObject as error:
            raise APIError(f"PATCH {path}: {error}") from error

    async def write_count(self, vcpuset: VCPUSet, count: int) -> None:
        """Make `count` the declared count of `vcpuset`, by the scale subresource, if that is still the latest version.

        The watch brings the new version.

        Raises:
            Conflict: the object has changed since.
            ObjectGone: it does not exist (any more).
            APIError: anything else; it may have been written nevertheless.
        """
        body = {"metadata": {"resourceVersion": vcpuset.resource_version}, "spec": {"replicas": count}}
        path = f"{_path(API_VERSION, PLURAL, vcpuset.namespace)}/{vcpuset.name}/scale"
        self._require_permit()
        await self._request("PATCH", path, body=body, content_type=_MERGE_PATCH)

    async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        """Create an `events.k8s.io/v1` Event.

        Raises:
            APIError: it may have been created nevertheless.
        """
        self._require_permit()
        await self._request("POST", _path("events.k8s.io/v1", "events", namespace), body=event)

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Merge `patch` into an Event.

        Raises:
            ObjectGone: it has expired; the API server keeps Events for an hour.
            APIError: anything else.
        """
        path = f"{_path('events.k8s.io/v1', 'events', namespace)}/{name}"
        self._require_permit()
        await self._request("PATCH", path, body=patch, content_type=_MERGE_PATCH)

    async def read_secret(self, namespace: str, name: str) -> dict[str, bytes]:
        """The current entries of a Secret.

        Raises:
            ObjectGone: there is none.
            Forbidden: this process may not read it.
            APIError: anything else.
        """
        path = f"/api/v1/namespaces/{namespace}/secrets/{name}"
        return understood(f"GET {path}", await self._request("GET", path), _Secret).data or {}

    async def list_pods(
        self, namespace: str, selector: str, node_name: str | None = None
    ) -> builtins.list[Mapping[str, Any]]:
        """The pods with these labels, on a node or anywhere.

        Raises:
            Forbidden: this process may not list pods there.
            APIError: anything else.
        """
        path = f"/api/v1/namespaces/{namespace}/pods"
        query = [("labelSelector", selector)]
        if node_name is not None:
            query.append(("fieldSelector", f"spec.nodeName={node_name}"))
        return builtins.list(understood(f"GET {path}", await self._request("GET", path, query=query), _Items).items)

    async def resize_pod(self, namespace: str, name: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Apply a strategic merge patch to `pods/resize`; returns the pod.

        Raises:
            Rejected: the size is not valid, or (Forbidden) exceeds a quota, or this process may not do it.
            Conflict: another pod has this name now.
            ObjectGone: there is no such pod.
            APIError: anything else; it may have been resized nevertheless.
        """
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/resize"
        self._require_permit()
        return await self._request("PATCH", path, body=patch, content_type=_STRATEGIC_MERGE_PATCH)

    def _require_permit(self) -> None:
        if self._permit is not None:
            self._permit()

    # --- leases ---------------------------------------------------------------------------------------------------

    async def read_lease(self, namespace: str, name: str) -> dict[str, Any]:
        """The current `coordination.k8s.io/v1` Lease.

        Raises:
            ObjectGone: there is none.
            APIError: anything else.
        """
        return await self._request("GET", f"{_path(_LEASES, 'leases', namespace)}/{name}")

    async def create_lease(self, namespace: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Create a Lease.

        Raises:
            Conflict: it exists already.
            APIError: it may have been created nevertheless; `ObjectGone`: there is no such namespace.
        """
        body = {"apiVersion": _LEASES, "kind": "Lease", "metadata": {"name": name}, "spec": spec}
        return await self._request("POST", _path(_LEASES, "leases", namespace), body=body)

    async def replace_lease(
        self, namespace: str, name: str, lease: Mapping[str, Any], spec: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Replace the `spec` of `lease`, if that is still its latest version; return the new version.

        Raises:
            Conflict: it has changed since it was read.
            ObjectGone: it no longer exists.
            APIError: anything else; it may have been written nevertheless.
        """
        path = f"{_path(_LEASES, 'leases', namespace)}/{name}"
        return await self._request("PUT", path, body={**lease, "spec": spec})

    # --- lists ----------------------------------------------------------------------------------------------------

    async def _list(self, namespace: str | None, scope: Scope) -> builtins.list[Mapping[str, Any]]:
        for attempt in range(1, LIST_ATTEMPTS + 1):
            try:
                return await self._list_pages(namespace, scope)
            except _Expired:
                # The token in the response would continue with a later state: a set that moved could be missed.
                if attempt == LIST_ATTEMPTS:
                    raise
            except ObjectGone as error:
                raise APIError(
                    f"the API server does not know {PLURAL}.{GROUP}: apply the CRD in crds/ of this version first"
                ) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _list_pages(self, namespace: str | None, scope: Scope) -> builtins.list[Mapping[str, Any]]:
        query = [("limit", str(PAGE)), ("fieldSelector", scope.field_selector)]
        if scope.label_selector:
            query.append(("labelSelector", scope.label_selector))
        bodies: builtins.list[Mapping[str, Any]] = []
        path = _path(API_VERSION, PLURAL, namespace)
        token = ""
        while True:
            page_query = [*query, ("continue", token)] if token else query
            async with self.lists:
                page = understood(f"GET {path}", await self._request("GET", path, query=page_query), _Page)
            bodies += page.items
            token = page.metadata.token
            if not token:
                return bodies

    # --- requests -------------------------------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: builtins.list[tuple[str, str]] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        what = f"{method} {path}"
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                try:
                    async with self._borrowed() as client:
                        return await self._try(client, method, path, query or [], body, content_type)
                except Unauthorized:
                    await self._log_in_again(client)
                async with self._borrowed() as client:
                    return await self._try(client, method, path, query or [], body, content_type)
        except TimeoutError as error:
            host = self._client.configuration.host
            raise NoAnswer(f"{what}: no answer from {host} within {REQUEST_SECONDS:g} s") from error
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise unanswered(what, error) from error

    async def _try(
        self,
        client: ApiClient,
        method: str,
        path: str,
        query: builtins.list[tuple[str, str]],
        body: Mapping[str, Any] | None,
        content_type: str,
    ) -> dict[str, Any]:
        """One request and its response: an object, as for all requests here."""
        what, code = f"{method} {path}", NO_ANSWER
        try:
            response = await send(client, method, path, query, body, content_type)
            status, headers, raw = response.status, response.headers, await response.read()
            code = str(status)
        finally:
            self._requested(method, code)
        if not 200 <= status < 300:
            raise refusal(what, status, headers, raw)
        try:
            return msgspec.json.decode(raw, type=dict[str, Any])
        except _NO_JSON as error:
            raise APIError(f"{what}: the response is not a JSON object: {error}") from error

    async def _log_in_again(self, refused: ApiClient) -> None:
        """Replace a client whose credentials were refused by one with newly read credentials."""
        async with self._login:
            if self._client is refused:  # otherwise another request has done it meanwhile
                self._client = await _make_client(self.kubeconfig, self._context)
                if not self._users[refused]:
                    del self._users[refused]
                    await _close(refused)

    @contextlib.asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[ApiClient]:
        """The client for one request. The last request on a replaced one closes it."""
        client = self._client
        self._users[client] += 1
        try:
            yield client
        finally:
            self._users[client] -= 1
            if client is not self._client and not self._users[client]:
                del self._users[client]
                await _close(client)


async def _make_client(kubeconfig: Path | None, context: str | None) -> ApiClient:
    client = ApiClient(await load_configuration(kubeconfig, context))
    client.user_agent = USER_AGENT
    return client


async def _close(client: ApiClient) -> None:
    untyped: Any = client
    await untyped.close()


def ignore(_method: str, _code: str) -> None:
    """The default of `count`."""


def _path(api_version: str, plural: str, namespace: str | None) -> str:
    return (
        f"/apis/{api_version}/{plural}" if namespace is None else f"/apis/{api_version}/namespaces/{namespace}/{plural}"
    )


async def send(
    client: ApiClient,
    method: str,
    path: str,
    query: list[tuple[str, str]],
    body: Mapping[str, Any] | None = None,
    content_type: str = "application/json",
) -> aiohttp.ClientResponse:
    """The response to one request, with a body to be read, by the untyped layer below the generated API classes.

    Those would add a model class per kind and a second parse, and otherwise only know the path.
    """
    untyped: Any = client
    request = await untyped.param_serialize(
        method,
        path,
        query_params=query,
        header_params={"Accept": "application/json", "Content-Type": content_type},
        body=body,
        auth_settings=["BearerToken"],
    )
    response: aiohttp.ClientResponse = (await untyped.call_api(*request)).response
    return response


def understood(what: str, answer: Mapping[str, Any], kind: type[_Wire]) -> _Wire:
    """The needed part of a response. APIError: it is missing; a proxy may respond for the API server, with anything."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise APIError(f"{what}: the response has an unexpected format: {error}") from error


def unanswered(what: str, error: Exception) -> APIError:
    """Why a request had no response, other than time, as one of our errors."""
    cut = isinstance(error, aiohttp.ClientConnectionError) and not isinstance(error, aiohttp.ClientSSLError)
    return (Unavailable if cut else APIError)(f"{what}: {error or repr(error)}")


def refusal(what: str, code: int, headers: Mapping[str, str], raw: bytes) -> APIError:
    """An error response of the API server as one of our errors: the only place that reads HTTP status codes."""
    try:
        reason = str(msgspec.json.decode(raw)["message"])
    except (*_NO_JSON, KeyError, TypeError):
        reason = raw[:500].decode(errors="replace").strip()
    message = f"{what}: HTTP {code}: {reason}"
    match code:
        case 401:
            return Unauthorized(f"{message} (the credentials are not accepted)")
        case 403:
            return Forbidden(message)
        case 400 | 413 | 422:
            return Rejected(message)
        case 404:
            return ObjectGone(message)
        case 409:
            return Conflict(message)
        case 410:
            return _Expired(message)
        case 429 | 502 | 503:
            # A server that starts has no storage for custom resources yet; other 429 are for too many requests.
            starts = code != 429 or "initializing" in reason
            retry_after = headers.get("Retry-After", "")
            pause = min(float(retry_after), LONGEST_RETRY_AFTER) if retry_after.isdecimal() else 0.0
            return (Unavailable if starts else APIError)(message, retry_after=pause)
        case _:
            return APIError(message)
