"""The HTTP API `custom.metrics.k8s.io/v1beta2`: what it serves, and to whom.

It has two metrics of VCPUSets, `busy_vcpus` and `demand_vcpus`. There is no version v1beta1: kube-controller-manager
does not need it, and each version needs an APIService of its own.

Responses never contain a value that is not current: what is not known is 404.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import UTC
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from vcpuset.domain.errors import APIError, Forbidden, ObjectGone, Rejected
from vcpuset.kube.aggregation import API_VERSION, KIND, AggregatedAPI, PlacedSet
from vcpuset.metricsapi.access import Access
from vcpuset.metricsapi.frontproxy import FrontProxy, User, common_names
from vcpuset.metricsapi.sources import Reading, Sources, UnknownValue

__all__ = ["GROUP", "REGISTRATION", "VERSION", "MetricsAPI"]

GROUP: Final = "custom.metrics.k8s.io"
VERSION: Final = "v1beta2"
REGISTRATION: Final = f"{VERSION}.{GROUP}"
"""The name of the APIService."""

BUSY: Final = "busy_vcpus"
DEMAND: Final = "demand_vcpus"
METRICS: Final = (BUSY, DEMAND)
LOAD_SECONDS: Final = 60
"""What a load average of a minute is about."""

RESOURCE: Final = "vcpusets.vcpuset.dev"

_ROOT: Final = f"/apis/{GROUP}/{VERSION}"
_ALL: Final = "*"
_NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""Only such names are put into paths of requests to the API server and to the operator's pods."""

_REASONS: Final = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed",
    503: "ServiceUnavailable",
}  # fmt: skip

_USER: Final = web.RequestKey("user", User)

_log = logging.getLogger(__name__)


class _Refused(Exception):
    """A response with an error: HTTP status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class MetricsAPI:
    """The application for one front proxy; another front proxy needs another application."""

    def __init__(self, cluster: AggregatedAPI, access: Access, sources: Sources, front_proxy: FrontProxy) -> None:
        self._cluster = cluster
        self._access = access
        self._sources = sources
        self._front_proxy = front_proxy

    def application(self) -> web.Application:
        """The application, for a listener with a `server_context` for the CA of this front proxy."""
        application = web.Application(middlewares=[self._answer_errors, self._authenticate])
        application.add_routes(
            [
                web.get(_ROOT, self._resources, allow_head=False),
                web.get(
                    f"{_ROOT}/namespaces/{{namespace}}/{RESOURCE}/{{name}}/{{metric}}", self._values, allow_head=False
                ),
            ]
        )
        return application

    # --- middleware -----------------------------------------------------------------------------------------------

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except _Refused as error:
            return _status(error.status, str(error))
        except web.HTTPException as error:
            return _status(error.status, f"{request.path}: {error.reason}")

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Only the front proxy is let in. The TLS handshake has verified its certificate, but not its name."""
        transport = request.transport
        certificate = None if transport is None else transport.get_extra_info("peercert")
        names = common_names(certificate)
        user = self._front_proxy.user(names, request.headers) if certificate else None
        if user is None:
            _log.warning("refused a request of %s with the certificate of %s", request.remote, names)
            raise _Refused(401, "only the API server's front proxy is let in, and it must name a user")
        request[_USER] = user
        return await handler(request)

    # --- resources ------------------------------------------------------------------------------------------------

    async def _resources(self, _: web.Request) -> web.Response:
        """Discovery, which is also the API server's health check. It is the same for everyone."""
        resources = [
            {
                "name": f"{RESOURCE}/{metric}",
                "singularName": "",
                "namespaced": True,
                "kind": "MetricValueList",
                "verbs": ["get"],
            }
            for metric in METRICS
        ]
        return web.json_response(
            {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": f"{GROUP}/{VERSION}",
                "resources": resources,
            }
        )

    async def _values(self, request: web.Request) -> web.Response:
        namespace, name, metric = (request.match_info[each] for each in ("namespace", "name", "metric"))
        if metric not in METRICS:
            raise _Refused(404, f"there is no metric {metric[:100]!r} of {RESOURCE}, only {' and '.join(METRICS)}")
        if _NAMESPACE.fullmatch(namespace) is None or (name != _ALL and _NAME.fullmatch(name) is None):
            raise _Refused(404, f"{RESOURCE} cannot have this namespace or name")
        try:
            await self._authorize(request[_USER], namespace, name, metric)
            if request.query.get("metricLabelSelector"):
                raise _Refused(404, f"{metric} has no labels: leave out metric.selector")
            if name == _ALL:
                sets = await self._cluster.list_sets(namespace, request.query.get("labelSelector", ""))
                readings = await self._sources.read_all(sets)
                items = [item for placed, reading in readings.items() if (item := _item(placed, metric, reading))]
                if not items:
                    raise _Refused(404, f"{metric} is not known of any of these {len(sets)} VCPUSets in {namespace}")
            else:
                placed = await self._cluster.read_set(namespace, name)
                if (item := _item(placed, metric, await self._sources.read(placed))) is None:
                    why = "no guest agent (spec.guestAgent, version 10.0) says what the guest's load is"
                    raise _Refused(404, f"{metric} of VCPUSet {namespace}/{name} is not known: {why}")
                items = [item]
        except UnknownValue as error:
            raise _Refused(404, f"{metric} of VCPUSet {namespace}/{name} is not known: {error}") from error
        except ObjectGone as error:
            raise _Refused(404, f"there is no VCPUSet {namespace}/{name}") from error
        except Rejected as error:
            if isinstance(error, Forbidden):  # not the user, but this process
                raise _Refused(503, str(error)) from error
            raise _Refused(400, str(error)) from error
        except APIError as error:
            _log.warning("%s: %s", request.path, error)
            raise _Refused(503, str(error)) from error
        return web.json_response(
            {
                "kind": "MetricValueList",
                "apiVersion": f"{GROUP}/{VERSION}",
                "metadata": {},
                "items": items,
            }
        )

    async def _authorize(self, user: User, namespace: str, name: str, metric: str) -> None:
        allowed = await self._access.allowed(
            user, verb="get", group=GROUP, version=VERSION, resource=RESOURCE, subresource=metric,
            namespace=namespace, name=name,
        )  # fmt: skip
        if not allowed:
            raise _Refused(403, f"{user.name} may not get {RESOURCE}/{metric} of {GROUP} in namespace {namespace}")


def _item(placed: PlacedSet, metric: str, reading: Reading) -> Mapping[str, Any] | None:
    """A MetricValue, with the time of the sample; None: this metric is not known."""
    value, seconds = (reading.busy, reading.seconds) if metric == BUSY else (reading.demand, LOAD_SECONDS)
    if value is None:
        return None
    return {
        "describedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": placed.namespace,
            "name": placed.name,
        },
        "metric": {"name": metric},
        "timestamp": reading.time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "windowSeconds": round(seconds),
        "value": f"{round(value * 1000)}m",
    }


def _status(code: int, message: str) -> web.Response:
    """Kubernetes' Status."""
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": _REASONS.get(code, ""),
        "code": code,
    }
    return web.json_response(body, status=code)
