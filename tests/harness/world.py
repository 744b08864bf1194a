"""VCPUSets as a user sees them: manifests, and what the API server says of them.

`User` writes and reads through the API server over HTTP, because a kubectl process costs more than the whole of a test;
the tests of kubectl itself call `ControlPlane.kubectl`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.controlplane import ControlPlane
from harness.wait import until

__all__ = ["API", "Seen", "User", "manifest"]

API = "/apis/vcpuset.dev/v1alpha1"
WAIT_SECONDS = 90.0


def manifest(
    namespace: str,
    name: str,
    vcpus: int | None = 2,
    monitor: str | Path | tuple[str, int] | Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    connection: Literal["OnDemand", "Persistent"] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A VCPUSet; `spec` holds further fields.

    vcpus       None: left out
    monitor     a path below the namespace's folder, host and port, or `spec.monitor.tcp`; None: the path NAME.sock
    connection  `spec.monitor.connection`; None: not given
    """
    address: dict[str, Any]
    if isinstance(monitor, tuple):
        address = {"tcp": {"host": monitor[0], "port": monitor[1], "insecure": True}}
    elif isinstance(monitor, Mapping):
        address = {"tcp": dict(monitor)}
    else:
        address = {"unix": {"path": str(monitor or f"{name}.sock")}}
    if connection is not None:
        address["connection"] = connection
    metadata: dict[str, Any] = {"namespace": namespace, "name": name}
    if labels:
        metadata["labels"] = dict(labels)
    return {
        "apiVersion": "vcpuset.dev/v1alpha1",
        "kind": "VCPUSet",
        "metadata": metadata,
        "spec": {**({} if vcpus is None else {"vcpus": vcpus}), "monitor": address, **spec},
    }


@dataclass(frozen=True)
class Seen:
    """A VCPUSet as the API server returned it."""

    body: Mapping[str, Any]

    @property
    def status(self) -> Mapping[str, Any]:
        """`status`."""
        found: Mapping[str, Any] = self.body.get("status", {})
        return found

    @property
    def uid(self) -> str:
        """`metadata.uid`."""
        return str(self.body["metadata"]["uid"])

    @property
    def vcpus(self) -> int | None:
        """`status.vcpus`."""
        return self.status.get("vcpus")

    @property
    def pending(self) -> list[Mapping[str, Any]]:
        """`status.unplug.requests`."""
        return list(self.status.get("unplug", {}).get("requests") or [])

    @property
    def current(self) -> bool:
        """Whether the status is about the spec as it stands."""
        return bool(self.status.get("observedGeneration") == self.body["metadata"]["generation"])

    def condition(self, kind: str) -> Mapping[str, Any]:
        """A condition; empty if it is not there."""
        return next((each for each in self.status.get("conditions", []) if each["type"] == kind), {})

    @property
    def states(self) -> tuple[str | None, str | None, str | None]:
        """The statuses of Ready, Reconciling and Stalled."""
        ready, reconciling, stalled = (
            self.condition(kind).get("status") for kind in ("Ready", "Reconciling", "Stalled")
        )
        return ready, reconciling, stalled

    @property
    def reason(self) -> str | None:
        """The reason of Ready, if it is about the spec as it stands."""
        return self.condition("Ready").get("reason") if self.current else None

    @property
    def message(self) -> str:
        """The message of Ready."""
        return str(self.condition("Ready").get("message", ""))

    @property
    def ready(self) -> bool:
        """Whether it is Ready for the spec as it stands."""
        return self.current and self.condition("Ready").get("status") == "True"


class User:
    """Somebody who works with the VCPUSets of one namespace."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.control_plane = control_plane
        self.namespace = namespace
        self._path = f"{API}/namespaces/{namespace}/vcpusets"

    async def create(
        self,
        name: str,
        vcpus: int | None = 2,
        monitor: str | Path | tuple[str, int] | Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        **spec: Any,
    ) -> Seen:
        """Create a set, as `manifest` makes it."""
        body = manifest(self.namespace, name, vcpus, monitor, labels, **spec)
        return Seen(await self.control_plane.ok("POST", self._path, body))

    async def get(self, name: str) -> Seen:
        """A set as it is now."""
        return Seen(await self.control_plane.ok("GET", f"{self._path}/{name}"))

    async def change(self, name: str, **spec: Any) -> Seen:
        """Change fields of a set's spec (merge-patch: None removes a field)."""
        return await self.patch(name, {"spec": spec})

    async def patch(self, name: str, patch: Mapping[str, Any]) -> Seen:
        """Change a set by a merge-patch."""
        return Seen(await self.control_plane.ok("PATCH", f"{self._path}/{name}", patch))

    async def scale(self, name: str, vcpus: int) -> None:
        """Change the count by the scale subresource, as `kubectl scale` does."""
        await self.control_plane.ok("PATCH", f"{self._path}/{name}/scale", {"spec": {"replicas": vcpus}})

    async def label(self, name: str, **labels: str) -> Seen:
        """Set labels of a set."""
        return await self.patch(name, {"metadata": {"labels": labels}})

    async def touch(self, name: str) -> Seen:
        """Change a field of the spec that only the API server acts on, so that the operator observes the machine."""
        current = (await self.get(name)).body["spec"].get("maxVCPUs")
        return await self.change(name, maxVCPUs=4095 if current == 4096 else 4096)

    async def annotate(self, name: str, **annotations: str) -> Seen:
        """Set annotations of a set."""
        return await self.patch(name, {"metadata": {"annotations": annotations}})

    async def finalizers(self, name: str, *finalizers: str) -> None:
        """Give a set these finalizers and no others."""
        await self.patch(name, {"metadata": {"finalizers": finalizers}})

    async def delete(self, name: str) -> None:
        """Delete a set; it is gone at once, unless it was given a finalizer."""
        await self.control_plane.ok("DELETE", f"{self._path}/{name}")

    async def wait(self, name: str, holds: Callable[[Seen], bool], what: str, timeout: float = WAIT_SECONDS) -> Seen:
        """Wait until something holds for a set; returns the set as it was then."""
        last: Seen | None = None

        async def look() -> Seen | None:
            nonlocal last
            last = await self.get(name)
            return last if holds(last) else None

        def described() -> str:
            shown = None if last is None else json.dumps(last.status, indent=1)
            return f"{self.namespace}/{name}: {what}; its status was {shown}"

        return await until(look, timeout, described)

    async def wait_ready(self, name: str, timeout: float = WAIT_SECONDS) -> Seen:
        """Wait until a set is Ready for its spec as it stands."""
        return await self.wait(name, lambda seen: seen.ready, "Ready", timeout)

    async def wait_reason(
        self, name: str, reason: str, timeout: float = WAIT_SECONDS, *, stalled: bool = False
    ) -> Seen:
        """Wait until a set gives this reason, and Stalled is as said (for reasons that may be either)."""

        def holds(seen: Seen) -> bool:
            return seen.reason == reason and (not stalled or seen.states[2] == "True")

        return await self.wait(name, holds, f"reason {reason}", timeout)

    async def events(self, name: str) -> list[Mapping[str, Any]]:
        """The Events about a set, oldest first."""
        found = await self.control_plane.ok("GET", f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events")
        mine = [each for each in found["items"] if each["regarding"].get("name") == name]
        return sorted(mine, key=lambda each: str(each["eventTime"]))
