"""A metrics API server whose numbers a test sets: what prometheus-adapter or KEDA's adapter is in a cluster.

    async with MetricsServer(control_plane) as metrics:
        metrics.set_object(namespace, "web", "busy_vcpus", "4.1")
        metrics.set_external(namespace, "queue_messages_ready", Series("30", {"queue": "web"}))

It serves `custom.metrics.k8s.io/v1beta2`, of VCPUSets only, `external.metrics.k8s.io/v1beta1`, and
`metrics.k8s.io/v1beta1`, of pods only, over TLS, and is registered with the API server as an aggregated API. The API
server verifies its certificate, but it does not ask who calls, as one in production must: it listens on loopback, and
its numbers are no secret.
"""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from harness.aggregation import create_service, register, registration, until_served
from harness.controlplane import ControlPlane
from harness.processes import run
from harness.runnable import Runnable

__all__ = ["MetricsServer", "Series"]

CUSTOM: Final = "custom.metrics.k8s.io/v1beta2"
EXTERNAL: Final = "external.metrics.k8s.io/v1beta1"
PODS: Final = "metrics.k8s.io/v1beta1"

RESOURCE: Final = "vcpusets.vcpuset.dev"


@dataclass(frozen=True)
class Series:
    """One time series of an external metric: its value, as Kubernetes writes quantities, and its labels."""

    value: str
    labels: Mapping[str, str] = field(default_factory=dict)


class MetricsServer(Runnable):
    """Metrics for the autoscalers of a control plane; runs in the event loop that started it.

    Stop it before the control plane. A metric that has not been set is answered with 404.
    """

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._objects: dict[tuple[str, str, str], str] = {}
        self._external: dict[tuple[str, str], tuple[Series, ...]] = {}
        self._pods: dict[tuple[str, str], tuple[str, str]] = {}
        self._runner: web.AppRunner | None = None

    def set_object(self, namespace: str, vcpuset: str, metric: str, value: str) -> None:
        """Set a metric that describes a VCPUSet."""
        self._objects[namespace, vcpuset, metric] = value

    def set_external(self, namespace: str, metric: str, *series: Series) -> None:
        """Set all series of an external metric."""
        self._external[namespace, metric] = series

    def set_pod(self, namespace: str, pod: str, container: str, cpu: str) -> None:
        """Set the CPU usage of a pod's one container. It is of any pods that a client selects."""
        self._pods[namespace, pod] = container, cpu

    async def start(self) -> None:
        """Serve, register, and wait until the API server has taken both APIs up.

        Raises:
            TimeoutError: it has not within two minutes; the message has its reason.
        """
        namespace = await self._control_plane.namespace("metrics")
        tls, certificate = await self._certificate(f"metrics.{namespace}.svc")
        port = await self._serve(tls)
        await self._register(namespace, port, certificate)

    async def stop(self) -> None:
        """Take the APIs away and stop serving. Safe to call again."""
        if self._runner is None:
            return
        for api in (CUSTOM, EXTERNAL, PODS):  # first: a registered API that is not served breaks discovery
            await self._control_plane.request("DELETE", registration(api))
        await self._runner.cleanup()
        self._runner = None

    # --- making ---------------------------------------------------------------------------------------------------

    async def _certificate(self, name: str) -> tuple[ssl.SSLContext, bytes]:
        key, certificate = (self._control_plane.directory / f"metrics.{each}" for each in ("key", "crt"))
        kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        names = ["-subj", "/CN=metrics", "-addext", f"subjectAltName=DNS:{name}"]
        await run(["openssl", "req", *kind, *names, "-keyout", key, "-out", certificate])
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate, key)
        return tls, await asyncio.to_thread(certificate.read_bytes)

    async def _serve(self, tls: ssl.SSLContext) -> int:
        application = web.Application()
        application.add_routes(
            [
                web.get(f"/apis/{CUSTOM}", self._custom_resources),
                web.get(f"/apis/{CUSTOM}/namespaces/{{namespace}}/{RESOURCE}/{{name}}/{{metric}}", self._custom),
                web.get(f"/apis/{PODS}", self._pod_resources),
                web.get(f"/apis/{PODS}/namespaces/{{namespace}}/pods", self._pod_metrics),
                web.get(f"/apis/{EXTERNAL}", self._external_resources),
                web.get(f"/apis/{EXTERNAL}/namespaces/{{namespace}}/{{metric}}", self._external_values),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def _register(self, namespace: str, port: int, certificate: bytes) -> None:
        await create_service(self._control_plane, namespace, "metrics", port)
        for api in (CUSTOM, EXTERNAL, PODS):
            await register(self._control_plane, api, namespace, "metrics", port, certificate.decode())
        for api in (CUSTOM, EXTERNAL, PODS):
            await until_served(self._control_plane, api)

    # --- serving --------------------------------------------------------------------------------------------------

    async def _custom_resources(self, _: web.Request) -> web.Response:
        metrics = {metric for _, _, metric in self._objects}
        return _resources(CUSTOM, {f"{RESOURCE}/{metric}": "MetricValueList" for metric in metrics})

    async def _external_resources(self, _: web.Request) -> web.Response:
        metrics = {metric for _, metric in self._external}
        return _resources(EXTERNAL, dict.fromkeys(metrics, "ExternalMetricValueList"))

    async def _custom(self, request: web.Request) -> web.Response:
        namespace, name, metric = (request.match_info[each] for each in ("namespace", "name", "metric"))
        value = self._objects.get((namespace, name, metric))
        if value is None:
            return _not_found(request)
        item = {
            "describedObject": {
                "apiVersion": "vcpuset.dev/v1alpha1", "kind": "VCPUSet", "namespace": namespace, "name": name,
            },
            "metric": {"name": metric},
            "timestamp": _now(),
            "value": value,
        }  # fmt: skip
        return web.json_response({"kind": "MetricValueList", "apiVersion": CUSTOM, "metadata": {}, "items": [item]})

    async def _pod_resources(self, _: web.Request) -> web.Response:
        return _resources(PODS, {"pods": "PodMetrics"})

    async def _pod_metrics(self, request: web.Request) -> web.Response:
        namespace = request.match_info["namespace"]
        items = [
            {
                "metadata": {"name": pod, "namespace": namespace},
                "timestamp": _now(),
                "window": "15s",
                "containers": [{"name": container, "usage": {"cpu": cpu, "memory": "1Mi"}}],
            }
            for (place, pod), (container, cpu) in self._pods.items()
            if place == namespace
        ]
        return web.json_response({"kind": "PodMetricsList", "apiVersion": PODS, "metadata": {}, "items": items})

    async def _external_values(self, request: web.Request) -> web.Response:
        metric = request.match_info["metric"]
        series = self._external.get((request.match_info["namespace"], metric))
        if series is None:
            return _not_found(request)
        wanted = dict(pair.split("=", 1) for pair in request.query.get("labelSelector", "").split(",") if pair)
        items = [
            {"metricName": metric, "metricLabels": dict(each.labels), "timestamp": _now(), "value": each.value}
            for each in series
            if wanted.items() <= each.labels.items()
        ]
        return web.json_response(
            {"kind": "ExternalMetricValueList", "apiVersion": EXTERNAL, "metadata": {}, "items": items}
        )


def _resources(api: str, kinds: Mapping[str, str]) -> web.Response:
    resources = [
        {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get"]}
        for name, kind in sorted(kinds.items())
    ]
    return web.json_response(
        {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}
    )


def _not_found(request: web.Request) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
    return web.json_response({**status, "message": f"nobody has set {request.path}"}, status=404)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
