"""VCPUSet objects for tests: built, stored and changed through plain requests, some milliseconds each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.controlplane import ControlPlane

__all__ = ["VCPUSets", "manifest"]


def manifest(name: str, labels: Mapping[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    """A valid VCPUSet of 2 vCPUs with a unix monitor; `spec` overrides fields of its spec."""
    return {
        "apiVersion": "vcpuset.dev/v1alpha1",
        "kind": "VCPUSet",
        "metadata": {"name": name, "labels": dict(labels or {})},
        "spec": {"vcpus": 2, "monitor": {"unix": {"path": f"{name}.sock"}}, **spec},
    }


@dataclass(frozen=True)
class VCPUSets:
    """The VCPUSets of one namespace. Every method fails if the API server refuses."""

    control_plane: ControlPlane
    namespace: str

    @property
    def path(self) -> str:
        """The collection's path below the API server's address."""
        return f"/apis/vcpuset.dev/v1alpha1/namespaces/{self.namespace}/vcpusets"

    async def create(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        **spec: Any,
    ) -> dict[str, Any]:
        """Store a new one and return it as stored."""
        return await self._request("POST", self.path, manifest(name, labels, **spec))

    async def get(self, name: str) -> dict[str, Any]:
        """The object as stored."""
        return await self._request("GET", f"{self.path}/{name}")

    async def change(self, name: str, **spec: Any) -> dict[str, Any]:
        """Set fields of the spec; None removes one. Returns the object as stored."""
        body = await self.get(name)
        body["spec"] = {key: value for key, value in {**body["spec"], **spec}.items() if value is not None}
        return await self._request("PUT", f"{self.path}/{name}", body)

    async def label(self, name: str, **labels: str) -> dict[str, Any]:
        """Replace the labels."""
        body = await self.get(name)
        body["metadata"]["labels"] = labels
        return await self._request("PUT", f"{self.path}/{name}", body)

    async def delete(self, name: str) -> None:
        """Delete one."""
        await self._request("DELETE", f"{self.path}/{name}")

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        answer = await self.control_plane.request(method, path, body)
        if answer.status >= 300:
            raise AssertionError(f"{method} {path}: {answer.status} {answer.body}")
        parsed: dict[str, Any] = answer.body
        return parsed
