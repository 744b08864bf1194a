"""The page's machine and set, driven by KEDA, and the agents that KEDA asks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from aiohttp import web

from e2e.test_autoscaler import Scaled
from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.guest import Guest, GuestOptions
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User

__all__ = [
    "AGENT",
    "BY_AGENT",
    "BY_PROMETHEUS",
    "GONE",
    "OTHER",
    "PAGE",
    "PORT",
    "SIMULATED",
    "USUAL",
    "WAIT",
    "Agents",
    "Driven",
    "Manifest",
    "load",
    "machine",
    "without_none",
]

PAGE: Final = Page(REPOSITORY / "docs" / "autoscaling.md")
SERVICE: Final = REPOSITORY / "deploy" / "parts" / "agent" / "service.yaml"

AGENT, OTHER, SIMULATED, GONE = "10.20.0.1", "10.20.0.2", "10.20.0.3", "10.20.0.4"
"""The addresses of agents: of the node that the page's set names, of another node, of none, of a node that is gone."""

USUAL: Final = (AGENT, OTHER, SIMULATED)

PORT: Final = 8080
WAIT: Final = 90.0

BY_AGENT, BY_PROMETHEUS = "web-by-busy-vcpus", "web"
"""The page's ScaledObjects."""

Manifest = dict[str, Any]


class Agents:
    """The endpoints of the agents' Service; one of them is simulated.

    numbers  what the simulated agent answers, by namespace and set; for all others it answers 404
    """

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._service = yaml.safe_load(SERVICE.read_text())
        namespace = self._service["metadata"]["namespace"]
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self.numbers: dict[tuple[str, str], float] = {}

    async def busy(self, request: web.Request) -> web.Response:
        """The simulated agent's answer."""
        number = self.numbers.get((request.match_info["namespace"], request.match_info["name"]))
        if number is None:
            return web.json_response({"reason": "NotServed", "message": "simulated"}, status=404)
        return web.json_response({"busyVCPUs": number})

    async def install(self) -> None:
        """Apply the shipped Service, with all agents but the one that is gone."""
        namespace, service = (f"--filename={SERVICE.with_name(name)}" for name in ("namespace.yaml", SERVICE.name))
        await self._control_plane.kubectl("apply", "--server-side", namespace, service)
        metadata = {"name": "agents", "labels": {"kubernetes.io/service-name": self._service["metadata"]["name"]}}
        ports = [{"name": each["name"], "port": each["port"]} for each in self._service["spec"]["ports"]]
        body = {"metadata": metadata, "addressType": "IPv4", "ports": ports, **_endpoints(USUAL)}
        await self._control_plane.ok("POST", self._path, body)

    @contextlib.asynccontextmanager
    async def endpoints(self, *addresses: str) -> AsyncIterator[None]:
        """Have these endpoints and no others."""
        await self._change(addresses)
        try:
            yield
        finally:
            await self._change(USUAL)

    async def _change(self, addresses: Sequence[str]) -> None:
        await self._control_plane.ok("PATCH", f"{self._path}/agents", _endpoints(addresses))


def _endpoints(addresses: Sequence[str]) -> Manifest:
    return {"endpoints": [{"addresses": [each], "conditions": {"ready": True}} for each in addresses]}


class Driven(Scaled):
    """The page's machine and set in one namespace, and the ScaledObject that drives it.

    busy  what the simulated agent says; None: it does not know the set
    """

    def __init__(self, user: User, folder: Path, agents: Agents) -> None:
        super().__init__(user, folder)
        self._agents = agents

    @property
    def busy(self) -> float | None:
        return self._agents.numbers.get((self.user.namespace, self.name))

    @busy.setter
    def busy(self, number: float | None) -> None:
        self._agents.numbers.pop((self.user.namespace, self.name), None)
        if number is not None:
            self._agents.numbers[self.user.namespace, self.name] = number

    def scaled_object(self, name: str, trigger: Mapping[str, str] | None = None, **spec: Any) -> Manifest:
        """The page's ScaledObject for this namespace, with other fields of the trigger and of the spec; None: without.

        KEDA refreshes the conditions every second, in place of 30.
        """
        manifest = PAGE.manifest("ScaledObject", name)
        (its,) = manifest["spec"]["triggers"]
        for field, changes in (("url", ("/default/", "/{}/")), ("query", ('"default"', '"{}"'))):
            if field in its["metadata"]:
                old, new = changes
                assert old in its["metadata"][field]
                its["metadata"][field] = its["metadata"][field].replace(old, new.format(self.user.namespace))
        its["metadata"] = without_none({**its["metadata"], **(trigger or {})})
        manifest["spec"] = without_none({**manifest["spec"], "pollingInterval": 1, **spec})
        return manifest

    async def drive(self, trigger: Mapping[str, str] | None = None, **spec: Any) -> None:
        """Apply the page's ScaledObject, and wait until the autoscaler that KEDA makes of it has a metric."""
        await self.apply(self.scaled_object(BY_AGENT, trigger, **spec))
        await self.works()

    async def works(self, name: str = BY_AGENT) -> None:
        """Wait until the autoscaler has a metric."""
        await self.says(f"keda-hpa-{name}", "ScalingActive", "True", "ValidMetricFound")

    async def fails(self, name: str = BY_AGENT) -> None:
        """Wait until the autoscaler has no metric."""
        await self.says(f"keda-hpa-{name}", "ScalingActive", "False", "FailedGetExternalMetric")

    async def annotate(self, key: str, value: str | None) -> None:
        """Set an annotation of KEDA on the ScaledObject; None: remove it."""
        annotations = {f"autoscaling.keda.sh/{key}": value}
        await self.patch({"metadata": {"annotations": annotations}})

    async def patch(self, patch: Manifest) -> None:
        """Change the ScaledObject."""
        await self.kubectl("patch", "scaledobject", BY_AGENT, "--type=merge", f"--patch={json.dumps(patch)}")

    async def reports(self, kind: str, status: str, reason: str | None = None, name: str = BY_AGENT) -> str:
        """Wait until the ScaledObject has a condition with this status and reason; returns its message."""
        path = f"/apis/keda.sh/v1alpha1/namespaces/{self.user.namespace}/scaledobjects/{name}"
        return await self.user.control_plane.until_condition(path, kind, status, reason)

    async def autoscaler_is_gone(self) -> None:
        """Wait until KEDA has deleted the autoscaler."""
        await self.user.control_plane.until_gone(self.hpa_path(f"keda-hpa-{BY_AGENT}"))

    async def autoscaler_only_adds(self) -> None:
        """Wait until KEDA has disabled scale-down."""

        async def only_adds() -> bool:
            behavior = (await self.hpa(f"keda-hpa-{BY_AGENT}"))["spec"].get("behavior", {})
            return bool(behavior.get("scaleDown", {}).get("selectPolicy") == "Disabled")

        await until(only_adds, WAIT, f"keda-hpa-{BY_AGENT} without scale-down")

    async def at_least(self, vcpus: int) -> None:
        """Wait until so many are declared."""
        await self.user.wait(
            self.name, lambda seen: bool(seen.body["spec"]["vcpus"] >= vcpus), f"spec.vcpus {vcpus} or more", WAIT
        )

    def writers(self) -> set[str]:
        """Who has changed the count by the scale subresource."""
        return {
            each.user
            for each in self.user.control_plane.audit_events(self.since)
            if (each.namespace, each.name, each.subresource) == (self.user.namespace, self.name, "scale")
            and each.is_write
            and each.code == 200
        }


def without_none(fields: Mapping[str, Any]) -> Manifest:
    """The fields that have a value."""
    return {key: value for key, value in fields.items() if value is not None}


@contextlib.asynccontextmanager
async def machine(driven: Driven, *, agent: bool = False, **spec: Any) -> AsyncIterator[Guest]:
    """A Linux guest of 2 vCPUs, and the page's set for it, changed by `spec`.

    agent  it has a guest agent, which the set names: KVM's counters are not at hand
    """
    path = driven.monitor.with_name("ga.sock")
    hardware: GuestOptions = {"smp": "2,maxcpus=64", "monitor_paths": [driven.monitor]}
    if agent:
        hardware |= {"agent": True, "agent_path": path}
        spec["guestAgent"] = {"unix": {"path": f"{driven.name}/{path.name}"}}
    async with saved_guest(**hardware) as running:
        driven.control = running.control
        await driven.create(**spec)
        yield running


async def load(guest: Guest, loops: int) -> None:
    """Have so many busy loops run in the guest, and no others."""
    await guest.shell("[ ! -f /run/load ] || kill $(cat /run/load); rm -f /run/load")
    for _ in range(loops):
        await guest.shell("(while :; do :; done) & echo $! >> /run/load")
