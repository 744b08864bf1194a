"""The pod of a VM in a real API server, whose kubelet is played: the API server does not resize pods, it records.

    async with VMPod(user, "vm", cpu="2") as pod:
        await pod.obey()

A kubelet's part is the pod's status: the size in force, the conditions of a resize, the generation that it has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from harness.wait import until
from harness.world import User

__all__ = ["CONTAINER", "VMPod", "of_pod"]

CONTAINER: Final = "qemu"
NODE: Final = "node-of-vms"
NODE_CPUS: Final = "8"
WAIT: Final = 90.0


class VMPod:
    """A running pod with one container, labelled `vm: NAME`.

    in_force        the CPU limit that the kubelet has brought into force, or the request without one

    limit, request  of its CPU; None: it has none
    resize_policy   of its CPU
    """

    def __init__(
        self,
        user: User,
        name: str,
        *,
        limit: str | None = "2",
        request: str | None = None,
        resize_policy: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.name: Final = name
        self.in_force = ""
        self._user = user
        self._path = f"/api/v1/namespaces/{user.namespace}/pods"
        resources = {
            kind: {"cpu": value, "memory": "64Mi"}
            for kind, value in (("limits", limit), ("requests", request))
            if value
        }
        container: dict[str, Any] = {"name": CONTAINER, "image": "qemu", "resources": resources}
        if resize_policy is not None:
            container["resizePolicy"] = [{"resourceName": "cpu", "restartPolicy": resize_policy}]
        self._body = {
            "metadata": {"name": name, "labels": {"vm": name, **(labels or {})}},
            "spec": {
                "nodeName": NODE,
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 0,
                "containers": [container],
            },
        }

    async def __aenter__(self) -> Self:
        await self._ask("POST", self._path.replace("/pods", "/serviceaccounts"), {"metadata": {"name": "default"}}, 409)
        # The API server refuses a size beyond the node's allocatable CPUs.
        capacity = {"cpu": NODE_CPUS, "memory": "64Gi", "pods": "110"}
        node = {"metadata": {"name": NODE}, "status": {"capacity": capacity, "allocatable": capacity}}
        await self._ask("POST", "/api/v1/nodes", node, 409)
        await self._ask("POST", self._path, self._body)
        await self.obey()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._ask("DELETE", f"{self._path}/{self.name}", None, 404)

    async def read(self) -> dict[str, Any]:
        """The pod."""
        return await self._ask("GET", f"{self._path}/{self.name}", None)

    async def resources(self) -> dict[str, str]:
        """The desired CPU, as `{"limits": …, "requests": …}`."""
        found = (await self.read())["spec"]["containers"][0]["resources"]
        return {kind: values["cpu"] for kind, values in found.items()}

    async def wait_size(self, size: str) -> None:
        """Wait until the limit is requested to be this, or the request without one."""

        async def is_it() -> bool:
            found = await self.resources()
            return found.get("limits", found.get("requests")) == size

        await until(is_it, WAIT, f"the pod {self.name} to be resized to {size}")

    async def obey(self, phase: str = "Running") -> None:
        """Bring the desired size into force."""
        pod = await self.read()
        container = pod["spec"]["containers"][0]
        resources = container["resources"]
        self.in_force = resources.get("limits", resources.get("requests", {})).get("cpu", "")
        await self._report(
            pod,
            [],
            phase=phase,
            containerStatuses=[
                {
                    "name": CONTAINER,
                    "image": "qemu",
                    "imageID": "",
                    "ready": True,
                    "restartCount": 0,
                    "resources": resources,
                    "allocatedResources": resources.get("requests", {}),
                }
            ],
        )

    async def delay(self, kind: str, reason: str, message: str) -> None:
        """Report that the desired size is not in force, by a condition."""
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        await self._report(await self.read(), [condition])

    @contextlib.asynccontextmanager
    async def obeying(self, each: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
        """Obey for as long as this lasts; `each` is called before a size is brought into force."""

        async def work() -> None:
            while True:
                pod = await self.read()
                if pod["metadata"]["generation"] != pod["status"].get("observedGeneration"):
                    each()
                    await self.obey()
                await asyncio.sleep(0.1)

        working = asyncio.create_task(work())
        try:
            yield
        finally:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working

    async def _report(self, pod: Mapping[str, Any], conditions: list[dict[str, Any]], **status: Any) -> None:
        generation = pod["metadata"]["generation"]
        since = pod["metadata"]["creationTimestamp"]
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": since}
        seen = [{**each, "observedGeneration": generation} for each in (ready, *conditions)]
        body = {
            "status": {"observedGeneration": generation, "startTime": since, "conditions": seen, **status},
        }
        await self._ask("PATCH", f"{self._path}/{self.name}/status", body)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, allowed: int = 200) -> dict[str, Any]:
        answer = await self._user.control_plane.request(method, path, body)
        assert 200 <= answer.status < 300 or answer.status == allowed, f"{method} {path}: {answer.status} {answer.body}"
        found: dict[str, Any] = answer.body
        return found


def of_pod(name: str, *, timeout: int = 60, **cpu: Any) -> dict[str, Any]:
    """`spec.pod` with the shipped defaults, and 1 CPU for each vCPU."""
    return {
        "selector": {"matchLabels": {"vm": name}},
        "container": CONTAINER,
        "cpu": {"perVCPU": 1, **cpu},
        "timeoutSeconds": timeout,
    }
