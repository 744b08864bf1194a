"""Writes the status of a set, and its count if it has none, and reports changes once, in an Event and in the log.

A status is written when it differs from the known one. Progress of a change is written at growing intervals, so that a
change of less than three seconds costs a fixed number of writes, however many CPUs it plugs or unplugs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Literal, Protocol

from vcpuset.domain.assessment import Assessment
from vcpuset.domain.errors import Rejected
from vcpuset.domain.findings import Findings
from vcpuset.domain.reasons import Reason
from vcpuset.domain.report import AGENT, is_progress, status_of
from vcpuset.domain.resource import UID, Status, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.recorder import Recorder
from vcpuset.memory import Memory

__all__ = ["Reporter", "SetWriter"]

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = (3.0, 10.0, 30.0)
"""How long after a status write progress is written."""

_PROGRESS = frozenset({Reason.PLUGGING, Reason.UNPLUGGING, Reason.UNPLUG_PENDING})
"""No Event is needed: its end is reported, or what blocks it."""

_UNTROUBLED = _PROGRESS | {Reason.ADOPTING}
"""Nothing was wrong, so that its end is no news."""


class SetWriter(Protocol):
    """The API server: a `vcpuset.kube.cluster.Cluster`, whose methods these are."""

    async def write_status(self, vcpuset: VCPUSet, status: Status) -> VCPUSet: ...
    async def write_count(self, vcpuset: VCPUSet, count: int) -> None: ...


class Reporter:
    """Writes statuses and posts Events.

    enqueue  called with a set whose object had other changes in the response to a write
    """

    def __init__(
        self,
        cache: Cache,
        cluster: SetWriter,
        recorder: Recorder,
        clock: Callable[[], datetime],
        enqueue: Callable[[UID], None],
    ) -> None:
        self._cache = cache
        self._cluster = cluster
        self._recorder = recorder
        self._clock = clock
        self._enqueue = enqueue

    async def report(
        self,
        vcpuset: VCPUSet,
        assessment: Assessment,
        memory: Memory,
        findings: Findings | None = None,
        *,
        must: bool = False,
    ) -> VCPUSet:
        """Bring the status up to date if it is not; returns the set as it stands now. Raises APIError.

        findings  None: the machine was not observed
        must      write progress too, instead of in a later pass
        """
        if assessment.reason is not Reason.ADOPTING:
            memory.not_adopted = None
        elif memory.not_adopted is not None:
            assessment = replace(assessment, message=f"{assessment.message} It was refused: {memory.not_adopted}")
        status = status_of(vcpuset, assessment, findings, self._clock())
        if status == vcpuset.status:
            return vcpuset
        now = asyncio.get_running_loop().time()
        progress = is_progress(vcpuset.status, status, assessment.policy)
        pause = PROGRESS_SECONDS[min(memory.progress, len(PROGRESS_SECONDS) - 1)]
        if progress and not must and now < memory.written_at + pause:
            return vcpuset
        with self._cache.expecting(vcpuset.uid, status):
            written = await self._cluster.write_status(vcpuset, status)
            # It may be gone meanwhile: the watch can report that before this response. And the response can be the
            # first with a field that the watch leaves out, because it began before the definition was upgraded.
            known = self._cache.get(vcpuset.uid) or self._cache.terminating(vcpuset.uid)
            if known is not None and self._cache.put(written):
                self._enqueue(vcpuset.uid)
        memory.written_at = now
        memory.progress = memory.progress + 1 if progress else 0
        self._announce(written, vcpuset.status, assessment, memory)
        return written

    async def adopt(self, vcpuset: VCPUSet, memory: Memory) -> None:
        """Make the reported count the declared one, within the bounds. Raises APIError; Conflict: one may stand now.

        A refusal is in the next report: a policy can refuse the first attempt because it does not know the set yet.
        """
        try:
            await self._cluster.write_count(vcpuset, vcpuset.spec.within_bounds(vcpuset.status.vcpus or 0))
        except Rejected as error:
            memory.not_adopted = str(error)
            raise
        memory.not_adopted = None

    def _announce(self, vcpuset: VCPUSet, before: Status, assessment: Assessment, memory: Memory) -> None:
        """Report a change once, in the log and as an Event, not at each attempt."""
        ready, old = vcpuset.status.ready, before.ready
        assert ready is not None
        changed = old is None or (old.reason, old.status) != (ready.reason, ready.status)
        converged = assessment.reason is Reason.CONVERGED
        done = converged and memory.carried_out
        if changed or done:
            level = logging.WARNING if assessment.event_type == "Warning" else logging.INFO
            logger.log(level, "%s: %s", assessment.reason, assessment.message)
        # Converged is news after a change was carried out, or after something was wrong.
        recovered = converged and old is not None and old.reason not in _UNTROUBLED
        if done or (changed and assessment.reason not in _PROGRESS and (not converged or recovered)):
            self._post(vcpuset, assessment.event_type, assessment.reason, "Reconcile", assessment.message)
        if converged:
            memory.carried_out = False
        self._announce_agent(vcpuset, before)

    def _announce_agent(self, vcpuset: VCPUSet, before: Status) -> None:
        agent, old = vcpuset.status.condition(AGENT), before.condition(AGENT)
        if agent is None or agent.status == "Unknown":
            return
        if old is not None and (old.reason, old.status) == (agent.reason, agent.status):
            return
        good = agent.status == "True"
        logger.log(logging.INFO if good else logging.WARNING, "GuestAgent%s: %s", agent.reason, agent.message)
        if not good or (old is not None and old.status == "False"):
            self._post(
                vcpuset, "Normal" if good else "Warning", f"GuestAgent{agent.reason}", "QueryGuest", agent.message
            )

    def _post(self, vcpuset: VCPUSet, kind: Literal["Normal", "Warning"], reason: str, action: str, note: str) -> None:
        self._recorder.record(vcpuset, type=kind, reason=reason, action=action, note=note)
