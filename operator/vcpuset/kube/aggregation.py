"""The requests of an aggregated API: what it serves, who may ask, and its registration with the API server."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from vcpuset.kube.cluster import Cluster, understood
from vcpuset.kube.codec import API_VERSION, KIND, PLURAL
from vcpuset.kube.readypods import ready_pods

__all__ = ["API_VERSION", "KIND", "AggregatedAPI", "HTTPPod", "PlacedSet", "StoredSecret"]

HTTP_PORT: Final = "http"
"""The name of the port, in the pods of this project, that serves health, metrics and how busy a machine is."""

_SETS: Final = f"/apis/{API_VERSION}"
_REVIEWS: Final = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
_REGISTRATIONS: Final = "/apis/apiregistration.k8s.io/v1/apiservices"


@dataclass(frozen=True)
class PlacedSet:
    """A VCPUSet, as far as it says which process manages it.

    node_name  the node whose agent does; None: the central controller
    """

    namespace: str
    name: str
    node_name: str | None


@dataclass(frozen=True)
class HTTPPod:
    """A ready pod.

    url  of its HTTP port, such as http://10.1.2.3:8080
    """

    name: str
    url: str


@dataclass(frozen=True)
class StoredSecret:
    """A Secret's entries, and the object that they are from."""

    entries: Mapping[str, bytes]
    body: Mapping[str, Any]


class _Metadata(msgspec.Struct, rename="camel"):
    name: str
    namespace: str = ""


class _SetSpec(msgspec.Struct, rename="camel"):
    node_name: str | None = None


class _Set(msgspec.Struct):
    metadata: _Metadata
    spec: _SetSpec


class _Sets(msgspec.Struct):
    items: list[_Set]


class _ConfigMap(msgspec.Struct):
    data: dict[str, str] = {}


class _Secret(msgspec.Struct):
    data: dict[str, bytes] | None = None


class _Service(msgspec.Struct):
    namespace: str = ""
    name: str = ""


class _RegistrationSpec(msgspec.Struct, rename="camel"):
    ca_bundle: bytes = b""
    service: _Service | None = None


class _Registration(msgspec.Struct):
    spec: _RegistrationSpec


class _ReviewStatus(msgspec.Struct):
    allowed: bool = False


class _Review(msgspec.Struct):
    status: _ReviewStatus


class AggregatedAPI(Cluster):
    """The API server, as an aggregated API uses it. All methods raise APIError."""

    async def read_set(self, namespace: str, name: str) -> PlacedSet:
        """A VCPUSet. ObjectGone: there is none."""
        path = f"{_SETS}/namespaces/{namespace}/{PLURAL}/{name}"
        return _placed(understood(path, await self._request("GET", path), _Set))

    async def list_sets(self, namespace: str, label_selector: str) -> list[PlacedSet]:
        """The VCPUSets of a namespace that match a label selector; if empty, all."""
        path = f"{_SETS}/namespaces/{namespace}/{PLURAL}"
        query = [("labelSelector", label_selector)] if label_selector else []
        answer = await self._request("GET", path, query=query)
        return [_placed(each) for each in understood(path, answer, _Sets).items]

    async def ready_pods(self, namespace: str, label_selector: str, node_name: str | None) -> list[HTTPPod]:
        """The ready pods of a namespace, on a node or anywhere, that have a port named `http`."""
        return [
            HTTPPod(f"{namespace}/{pod.name}", f"http://{_host(pod.address)}:{pod.ports[HTTP_PORT]}")
            for pod in await ready_pods(self, namespace, label_selector, node_name)
            if pod.address and HTTP_PORT in pod.ports
        ]

    async def read_config_map(self, namespace: str, name: str) -> Mapping[str, str]:
        """The entries of a ConfigMap. ObjectGone: there is none."""
        path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
        return understood(path, await self._request("GET", path), _ConfigMap).data

    async def read_stored_secret(self, namespace: str, name: str) -> StoredSecret:
        """A Secret that may be replaced later. ObjectGone: there is none."""
        path = f"/api/v1/namespaces/{namespace}/secrets/{name}"
        answer = await self._request("GET", path)
        return StoredSecret(understood(path, answer, _Secret).data or {}, answer)

    async def replace_secret(self, secret: StoredSecret, entries: Mapping[str, bytes]) -> None:
        """Replace the entries of a Secret. Conflict: it has changed since it was read."""
        metadata = secret.body["metadata"]
        data = {name: base64.b64encode(value).decode() for name, value in entries.items()}
        path = f"/api/v1/namespaces/{metadata['namespace']}/secrets/{metadata['name']}"
        await self._request("PUT", path, body={**secret.body, "data": data})

    async def read_registration(self, name: str) -> tuple[tuple[str, str] | None, bytes]:
        """Namespace and name of the Service that an APIService names, and its CA bundle. ObjectGone: there is none."""
        path = f"{_REGISTRATIONS}/{name}"
        spec = understood(path, await self._request("GET", path), _Registration).spec
        return None if spec.service is None else (spec.service.namespace, spec.service.name), spec.ca_bundle

    async def write_ca_bundle(self, name: str, bundle: bytes) -> None:
        """Set the CA bundle of an APIService, and nothing else of it."""
        body = {"spec": {"caBundle": base64.b64encode(bundle).decode()}}
        await self._request("PATCH", f"{_REGISTRATIONS}/{name}", body=body, content_type="application/merge-patch+json")

    async def may(self, user: Mapping[str, Any], attributes: Mapping[str, str]) -> bool:
        """Whether a user may do something, as `spec.resourceAttributes` of a SubjectAccessReview says it."""
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {**user, "resourceAttributes": attributes},
        }
        answer = await self._request("POST", _REVIEWS, body=body)
        return understood(_REVIEWS, answer, _Review).status.allowed


def _placed(wire: _Set) -> PlacedSet:
    return PlacedSet(wire.metadata.namespace, wire.metadata.name, wire.spec.node_name)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
