"""Our own requests to the API server: list VCPUSets, write their status, post Events, hold a Lease, read a Secret.

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

from vcpuset.domain.errors import APIError, Conflict, Forbidden, ObjectGone, Rejected, Unavailable
from vcpuset.domain.resource import Status, VCPUSet
from vcpuset.kube.codec import API_VERSION, GROUP, PLURAL, InvalidObject, decode, encode_status
from vcpuset.kube.login import load_configuration

__all__ = ["LONGEST_RETRY_AFTER", "NO_ANSWER", "USER_AGENT", "Cluster", "Scope", "refusal", "unanswered", "unheard"]

REQUEST_SECONDS: Final = 10.0
"""Deadline of one request, from connecting to the last byte of the answer."""

PAGE: Final = 500
"""Objects per answer of a list; client-go's choice."""

LIST_ATTEMPTS: Final = 5
"""How often a list begins anew because the API server has forgotten where it was (HTTP 410, after some minutes)."""

LONGEST_RETRY_AFTER: Final = 30.0
"""For so many seconds an API server that is overloaded, or still starting, may ask to be left alone. It is tried again
then, though it ask for more: no other pause is longer."""

USER_AGENT: Final = "vcpuset"
"""Who asks, in the API server's audit log."""

NO_ANSWER: Final = "<error>"
"""In place of an HTTP status where there was none; client-go's word."""

_MERGE_PATCH: Final = "application/merge-patch+json"
_LEASES: Final = "coordination.k8s.io/v1"

_NO_JSON: Final = (ValueError, RecursionError)
"""What msgspec raises for bytes that are no JSON: its own errors, those of UTF-8, and too many brackets."""

_log = logging.getLogger(__name__)

_Wire = TypeVar("_Wire")


class _ListMetadata(msgspec.Struct):
    token: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    items: list[dict[str, Any]]
    metadata: _ListMetadata


class _Secret(msgspec.Struct):
    metadata: dict[str, Any]
    data: dict[str, bytes] | None = None


class _Expired(APIError):
    """HTTP 410: the point to go on from is no longer known."""


class _Unauthorized(APIError):
    """HTTP 401: the credentials are not, or no longer, accepted."""


@dataclass(frozen=True)
class Scope:
    """Which VCPUSets this operator serves. The API server does the selecting.

    node_name       those of this node; None: those without a node
    namespaces      only in these; empty: in all
    label_selector  only those that match, in kubectl's syntax; None: all
    """

    node_name: str | None = None
    namespaces: tuple[str, ...] = ()
    label_selector: str | None = None

    @property
    def field_selector(self) -> str:
        """`spec.nodeName=` with nothing behind it selects the sets that have none."""
        return f"spec.nodeName={self.node_name or ''}"


class Cluster:
    """One API server. Close it, or use it as an asynchronous context manager."""

    def __init__(self, client: ApiClient, kubeconfig: Path | None) -> None:
        self.kubeconfig: Final = kubeconfig
        self._client = client
        self._users: Counter[ApiClient] = Counter()
        """Requests under way; one client, and after a new login the one before for as long as it is in use."""
        self._login = asyncio.Lock()
        self.lists: Final = asyncio.Lock()
        """Held while a list is asked for and read: whoever else lists the same objects takes it too."""
        self._permit: Callable[[], None] | None = None
        self._requested: Callable[[str, str], None] = unheard
        self._reported: set[str] = set()
        """What was wrong with objects of the last list: it is told once, not at each list."""

    @classmethod
    async def connect(cls, kubeconfig: Path | None) -> Self:
        """Find the credentials. Nothing is sent yet.

        Raises:
            APIError: there are none; says what to do.
        """
        return cls(await _make_client(kubeconfig), kubeconfig)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def guard(self, permit: Callable[[], None]) -> None:
        """From now on call `permit` before a status or an Event is written; what it raises is raised to the writer."""
        self._permit = permit

    def count(self, requested: Callable[[str, str], None]) -> None:
        """From now on call `requested` after each request, with the method and the HTTP status, or `NO_ANSWER`."""
        self._requested = requested

    async def close(self) -> None:
        """Close the connections. Requests that are under way fail."""
        await _close(self._client)

    async def list(self, scope: Scope) -> builtins.list[VCPUSet]:
        """All sets of the scope. Objects that cannot be decoded are logged, once, and left out.

        Raises:
            APIError: also when the API server does not know VCPUSets.
        """
        bodies: builtins.list[Mapping[str, Any]] = []
        for namespace in scope.namespaces or (None,):
            bodies += await self._list(namespace, scope)
        understood: builtins.list[VCPUSet] = []
        wrong: set[str] = set()
        for body in bodies:
            try:
                understood.append(decode(body))
            except InvalidObject as error:
                wrong.add(str(error))
        for words in sorted(wrong - self._reported):
            _log.error("%s", words)
        self._reported = wrong
        return understood

    async def write_status(self, vcpuset: VCPUSet, status: Status) -> VCPUSet:
        """Make `status` the status of `vcpuset`, if that is still the latest version; return the new version.

        Without a difference nothing is sent, and `vcpuset` itself returned. After a failure other than the two named
        the write may have happened all the same.

        Raises:
            Conflict: the object has changed since.
            ObjectGone: it does not exist (any more).
            APIError: anything else.
        """
        patch = encode_status(status)
        if patch == encode_status(vcpuset.status):
            return vcpuset
        body = {"metadata": {"resourceVersion": vcpuset.resource_version}, "status": patch}
        path = f"{_path(API_VERSION, PLURAL, vcpuset.namespace)}/{vcpuset.name}/status"
        self._ask_leave()
        answer = await self._request("PATCH", path, body=body, content_type=_MERGE_PATCH)
        try:
            return decode(answer)
        except InvalidObject as error:
            raise APIError(f"PATCH {path}: {error}") from error

    async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        """Create an `events.k8s.io/v1` Event.

        Raises:
            APIError: it may have been created all the same.
        """
        self._ask_leave()
        await self._request("POST", _path("events.k8s.io/v1", "events", namespace), body=event)

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Merge `patch` into an Event.

        Raises:
            ObjectGone: the API server has forgotten it; it keeps Events for an hour.
            APIError: anything else.
        """
        path = f"{_path('events.k8s.io/v1', 'events', namespace)}/{name}"
        self._ask_leave()
        await self._request("PATCH", path, body=patch, content_type=_MERGE_PATCH)

    async def read_secret(self, namespace: str, name: str) -> dict[str, bytes]:
        """The entries of a Secret as it is now.

        Raises:
            ObjectGone: there is none.
            Forbidden: this process may not read it.
            APIError: anything else.
        """
        path = f"/api/v1/namespaces/{namespace}/secrets/{name}"
        return _understood(f"GET {path}", await self._request("GET", path), _Secret).data or {}

    def _ask_leave(self) -> None:
        if self._permit is not None:
            self._permit()

    # --- leases ---------------------------------------------------------------------------------------------------

    async def read_lease(self, namespace: str, name: str) -> dict[str, Any]:
        """A `coordination.k8s.io/v1` Lease as it is now.

        Raises:
            ObjectGone: there is none.
            APIError: anything else.
        """
        return await self._request("GET", f"{_path(_LEASES, 'leases', namespace)}/{name}")

    async def create_lease(self, namespace: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Create a Lease.

        Raises:
            Conflict: there is one already.
            APIError: it may have been created all the same; `ObjectGone`: there is no such namespace.
        """
        body = {"apiVersion": _LEASES, "kind": "Lease", "metadata": {"name": name}, "spec": spec}
        return await self._request("POST", _path(_LEASES, "leases", namespace), body=body)

    async def replace_lease(
        self, namespace: str, name: str, lease: Mapping[str, Any], spec: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Give `lease` another `spec`, if that is still its latest version; return the new version.

        Raises:
            Conflict: it has changed since it was read.
            ObjectGone: it does not exist any more.
            APIError: anything else; it may have been written all the same.
        """
        path = f"{_path(_LEASES, 'leases', namespace)}/{name}"
        return await self._request("PUT", path, body={**lease, "spec": spec})

    # --- lists ----------------------------------------------------------------------------------------------------

    async def _list(self, namespace: str | None, scope: Scope) -> builtins.list[Mapping[str, Any]]:
        for attempt in range(1, LIST_ATTEMPTS + 1):
            try:
                return await self._list_pages(namespace, scope)
            except _Expired:
                # The token that the answer carries would go on with a later state: a set that moved could be missed.
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
            asked = [*query, ("continue", token)] if token else query
            async with self.lists:
                page = _understood(f"GET {path}", await self._request("GET", path, query=asked), _Page)
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
                except _Unauthorized:
                    await self._log_in_again(client)
                async with self._borrowed() as client:
                    return await self._try(client, method, path, query or [], body, content_type)
        except TimeoutError as error:
            host = self._client.configuration.host
            raise APIError(f"{what}: no answer from {host} within {REQUEST_SECONDS:g} s") from error
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
        """One request and what came of it: an object, as every answer of an API server to what is asked here."""
        what, code = f"{method} {path}", NO_ANSWER
        try:
            status, headers, raw = await _send(client, method, path, query, body, content_type)
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
        """Put a client with credentials read anew in place of one whose credentials were refused."""
        async with self._login:
            if self._client is refused:  # else another request has done it meanwhile
                self._client = await _make_client(self.kubeconfig)
                if not self._users[refused]:
                    del self._users[refused]
                    await _close(refused)

    @contextlib.asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[ApiClient]:
        """The client for one request. The last request on one that was replaced closes it."""
        client = self._client
        self._users[client] += 1
        try:
            yield client
        finally:
            self._users[client] -= 1
            if client is not self._client and not self._users[client]:
                del self._users[client]
                await _close(client)


async def _make_client(kubeconfig: Path | None) -> ApiClient:
    client = ApiClient(await load_configuration(kubeconfig))
    client.user_agent = USER_AGENT
    return client


async def _close(client: ApiClient) -> None:
    untyped: Any = client
    await untyped.close()


def unheard(_method: str, _code: str) -> None:
    """Nobody counts."""


def _path(api_version: str, plural: str, namespace: str | None) -> str:
    return (
        f"/apis/{api_version}/{plural}" if namespace is None else f"/apis/{api_version}/namespaces/{namespace}/{plural}"
    )


async def _send(
    client: ApiClient,
    method: str,
    path: str,
    query: list[tuple[str, str]],
    body: Mapping[str, Any] | None,
    content_type: str,
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of the answer to one request, through the untyped layer below the generated API classes.

    Those would add a model class per kind and a second parse; what they know beyond it is the path.
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
    response = await untyped.call_api(*request)
    return response.status, response.headers, await response.read()


def _understood(what: str, answer: Mapping[str, Any], kind: type[_Wire]) -> _Wire:
    """What is needed of an answer. APIError: it is not there; a proxy may answer for the API server, with anything."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise APIError(f"{what}: the response has an unexpected format: {error}") from error


def unanswered(what: str, error: Exception) -> APIError:
    """What kept a request from being answered, other than time, as one of our errors."""
    cut = isinstance(error, aiohttp.ClientConnectionError) and not isinstance(error, aiohttp.ClientSSLError)
    return (Unavailable if cut else APIError)(f"{what}: {error or repr(error)}")


def refusal(what: str, code: int, headers: Mapping[str, str], raw: bytes) -> APIError:
    """The API server's refusal as one of our errors: the only place that reads HTTP status codes."""
    try:
        reason = str(msgspec.json.decode(raw)["message"])
    except (*_NO_JSON, KeyError, TypeError):
        reason = raw[:500].decode(errors="replace").strip()
    message = f"{what}: HTTP {code}: {reason}"
    match code:
        case 401:
            return _Unauthorized(f"{message} (the credentials are not accepted)")
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
            # A server that starts has no storage for custom resources yet; other 429 are for who asks too often.
            starts = code != 429 or "initializing" in reason
            asked = headers.get("Retry-After", "")
            pause = min(float(asked), LONGEST_RETRY_AFTER) if asked.isdecimal() else 0.0
            return (Unavailable if starts else APIError)(message, retry_after=pause)
        case _:
            return APIError(message)
