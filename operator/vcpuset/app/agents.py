"""Reports the sets of nodes without an agent: only their agent writes them, so they would stay as it left them.

The central controller does this for the sets with a node that its namespaces and label selector include, so exactly
one process does it for each set. It lists the agents' pods four times in the grace period, and the sets once, or when a
node has been without a ready agent for that long. It watches neither: it would receive each status that an agent
writes, to use very few of them.

A write is conditional on the resourceVersion. If the agent writes first, the set is listed again. If this process
does, the agent's watch delivers the report, and its next reconciliation replaces it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Final

from vcpuset.domain.absence import Absences
from vcpuset.domain.backoff import jittered
from vcpuset.domain.errors import APIError, Conflict, ObjectGone
from vcpuset.domain.reasons import Reason
from vcpuset.domain.report import unserved_status
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube.cluster import Cluster, Scope
from vcpuset.kube.readypods import ready_pods
from vcpuset.kube.recorder import Recorder
from vcpuset.kube.transport import remedy

__all__ = ["Agents"]

logger = logging.getLogger(__name__)

_PODS: Final = "app.kubernetes.io/name=vcpuset,app.kubernetes.io/component=agent"

_REASON: Final = Reason.AGENT_UNAVAILABLE.value


class Agents:
    """Watches over the agents of all nodes.

    scope      the sets of nodes that it reports
    namespace  of the agents' pods
    """

    def __init__(
        self,
        cluster: Cluster,
        recorder: Recorder,
        scope: Scope,
        namespace: str,
        grace_seconds: float,
        clock: Callable[[], datetime],
    ) -> None:
        self._cluster = cluster
        self._recorder = recorder
        self._scope = scope
        self._namespace = namespace
        self._grace = grace_seconds
        self._clock = clock
        self._absences = Absences(grace_seconds)
        self._nodes: frozenset[str] = frozenset()
        """Those that sets name, by the last list of sets."""
        self._reported: frozenset[UID] = frozenset()
        """The sets whose status says that there is no agent, by the last list and the writes since."""
        self._overdue: frozenset[str] = frozenset()
        """The nodes that have been dealt with."""
        self._list_at = 0.0
        self._failure = ""

    @property
    def unserved(self) -> int:
        """How many sets are reported at present."""
        return len(self._reported)

    async def run(self) -> None:
        """Look after the sets, for ever. Failures are logged, each once, and retried."""
        while True:
            try:
                await self._look()
                self._failure = ""
            except APIError as error:
                self._list_at = 0.0
                if str(error) != self._failure:
                    logger.warning("reporting the VCPUSets of nodes without an agent: %s%s", error, remedy(error))
                    self._failure = str(error)
            await asyncio.sleep(jittered(self._grace / 4, 0.1))

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        sets = await self._list(now) if now >= self._list_at else None
        pods = await ready_pods(self._cluster, self._namespace, _PODS) if self._nodes else []
        self._absences.observe(self._nodes, {pod.node_name for pod in pods}, now)
        overdue = self._absences.overdue(now)
        if sets is None and overdue - self._overdue:
            sets = await self._list(now)
        if sets is not None:
            await self._report([each for each in sets if each.node_name in overdue], now)
        for node in sorted(self._overdue - overdue):
            logger.info("node %s: its VCPUSets are no longer reported as %s", node, _REASON)
            self._list_at = 0.0  # for the number of reported sets
        self._overdue = overdue

    async def _list(self, now: float) -> list[VCPUSet]:
        sets = [each for each in await self._cluster.list(self._scope) if each.node_name and not each.deleting]
        self._nodes = frozenset(each.node_name for each in sets if each.node_name)
        self._list_at = now + self._grace if sets else now  # an empty list costs little
        return sets

    async def _report(self, sets: list[VCPUSet], now: float) -> None:
        """Report the sets of overdue nodes that are not reported yet, unless their agent has answered a report."""
        answered = {
            each.node_name for each in sets if each.uid in self._reported and not _is_reported(each) and each.node_name
        }
        for node in answered:
            self._absences.answered(node, now)
        due = [each for each in sets if each.node_name not in answered]
        self._reported = frozenset(each.uid for each in due if _is_reported(each))
        written: Counter[str] = Counter()
        for vcpuset in due:
            assert vcpuset.node_name is not None
            try:
                news = await self._write(vcpuset)
            except (Conflict, ObjectGone):
                self._list_at = 0.0  # it has changed since the list
                continue
            self._absences.reported(vcpuset.node_name)
            self._reported |= {vcpuset.uid}
            written[vcpuset.node_name] += news
        for node, count in sorted((+written).items()):
            logger.warning("node %s has no ready agent: %d VCPUSets reported as %s", node, count, _REASON)

    async def _write(self, vcpuset: VCPUSet) -> bool:
        """Write the report of one set; False: it was there."""
        status = unserved_status(vcpuset, self._clock())
        if status == vcpuset.status:
            return False
        written = await self._cluster.write_conditions(vcpuset, status)
        if not _is_reported(vcpuset) and written.status.ready is not None:
            self._recorder.record(
                written, type="Warning", reason=_REASON, action="Reconcile", note=written.status.ready.message
            )
        return True


def _is_reported(vcpuset: VCPUSet) -> bool:
    return vcpuset.status.ready is not None and vcpuset.status.ready.reason == _REASON
