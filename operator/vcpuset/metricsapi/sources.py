"""How busy a machine is, asked of the process that manages its VCPUSet; nothing is kept.

That is the agent of `spec.nodeName`, or the leader of the central controllers. Only it knows the VCPUSet: all ready
pods that may be it are asked, and the others (standbys, controllers of other VCPUSets) answer that they do not manage
it. So no Lease is read, and a leader that has just lost it is not believed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final

import aiohttp
import msgspec

from vcpuset.domain.errors import APIError, VCPUSetError
from vcpuset.kube.aggregation import AggregatedAPI, HTTPPod, PlacedSet

__all__ = ["ASK_SECONDS", "Reading", "Sources", "UnknownValue"]

ASK_SECONDS: Final = 5.0
"""How long to wait for the answer of a pod. It may take a sample first, for at most 2 s."""

_PODS: Final = "app.kubernetes.io/name=vcpuset"
"""The pods of this project in the namespaces of the agents and of the controllers."""

_LONGEST_ANSWER: Final = 64 * 1024

_AT_ONCE: Final = 64
"""For how many sets of one request pods are asked at the same time."""

_log = logging.getLogger(__name__)


class UnknownValue(VCPUSetError):
    """No process reports how busy the machine is; the message has the reason."""


@dataclass(frozen=True)
class Reading:
    """How many vCPUs were busy, on average, in the seconds before a time.

    demand  how many the guest's tasks could use, by its load average of a minute; None: its agent does not say
    """

    busy: float
    seconds: float
    time: datetime
    demand: float | None = None


class _Busy(msgspec.Struct, rename="camel"):
    busy_vcpus: Annotated[float, msgspec.Meta(ge=0)] = msgspec.field(name="busyVCPUs")
    window_seconds: Annotated[float, msgspec.Meta(ge=0)]
    time: Annotated[datetime, msgspec.Meta(tz=True)]
    demand_vcpus: Annotated[float, msgspec.Meta(ge=0)] | None = msgspec.field(default=None, name="demandVCPUs")


class _Why(msgspec.Struct):
    reason: str
    message: str


_UNREACHABLE: Final = "Unreachable"

_RANKS: Final = {_UNREACHABLE: 1, "NotServed": 2}
"""Of several reasons, the one of the process that manages the set is told; it has none of these."""


class Sources:
    """Finds the processes and asks them.

    namespaces  of the agents, and of the controllers
    """

    def __init__(self, cluster: AggregatedAPI, session: aiohttp.ClientSession, namespaces: tuple[str, str]) -> None:
        self._cluster = cluster
        self._session = session
        self._agents, self._controllers = namespaces

    async def read(self, placed: PlacedSet) -> Reading:
        """How busy the machine of a VCPUSet is.

        Raises:
            UnknownValue: no process reports it.
        """
        return await self._ask(placed, await self._pods(placed.node_name))

    async def read_all(self, sets: Iterable[PlacedSet]) -> Mapping[PlacedSet, Reading]:
        """The same of several, of those of which it is known."""
        wanted = list(sets)
        nodes = list({each.node_name for each in wanted})
        pods = dict(zip(nodes, await asyncio.gather(*map(self._pods, nodes)), strict=True))
        turns = asyncio.Semaphore(_AT_ONCE)

        async def ask(placed: PlacedSet) -> Reading:
            async with turns:
                return await self._ask(placed, pods[placed.node_name])

        found = await asyncio.gather(*map(ask, wanted), return_exceptions=True)
        readings: dict[PlacedSet, Reading] = {}
        for placed, reading in zip(wanted, found, strict=True):
            if isinstance(reading, Reading):
                readings[placed] = reading
            elif not isinstance(reading, UnknownValue):
                raise reading
        return readings

    async def _pods(self, node_name: str | None) -> list[HTTPPod] | UnknownValue:
        """The pods that may manage the sets of a node (or of none); or why they cannot be found."""
        namespace = self._controllers if node_name is None else self._agents
        place = f"namespace {namespace}" if node_name is None else f"namespace {namespace} on node {node_name}"
        try:
            pods = await self._cluster.ready_pods(namespace, _PODS, node_name)
        except APIError as error:
            return UnknownValue(f"the pods in {place} cannot be listed: {error}")
        return pods or UnknownValue(f"no pod of the operator is ready in {place}")

    async def _ask(self, placed: PlacedSet, pods: list[HTTPPod] | UnknownValue) -> Reading:
        if isinstance(pods, UnknownValue):
            raise pods
        asking = [asyncio.create_task(self._ask_one(placed, pod)) for pod in pods]
        try:
            reasons: list[_Why] = []
            for answering in asyncio.as_completed(asking):
                answer = await answering
                if isinstance(answer, Reading):
                    return answer
                reasons.append(answer)
            raise UnknownValue(min(reasons, key=lambda each: _RANKS.get(each.reason, 0)).message)
        finally:
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _ask_one(self, placed: PlacedSet, pod: HTTPPod) -> Reading | _Why:
        url = f"{pod.url}/v1/namespaces/{placed.namespace}/vcpusets/{placed.name}/busy"
        try:
            async with asyncio.timeout(ASK_SECONDS), self._session.get(url, allow_redirects=False) as got:
                raw = b""
                async for part in got.content.iter_any():
                    raw += part
                    if len(raw) > _LONGEST_ANSWER:
                        break
            if got.status == 200:
                busy = msgspec.json.decode(raw, type=_Busy)
                return Reading(busy.busy_vcpus, busy.window_seconds, busy.time, busy.demand_vcpus)
            if got.status == 404:
                return msgspec.json.decode(raw, type=_Why)
        except TimeoutError:
            words = f"does not answer within {ASK_SECONDS:g} s"
        except (aiohttp.ClientError, OSError) as error:
            words = f"cannot be reached: {error}"
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            words = f"answered with something else than how busy a machine is: {error}"
        else:
            words = f"answered with HTTP status {got.status}"
        _log.warning("%s/%s: pod %s %s", placed.namespace, placed.name, pod.name, words)
        return _Why(_UNREACHABLE, f"pod {pod.name} {words}")
