"""When each VCPUSet has a pass, and what follows: the handler of the work queue."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from datetime import datetime
from secrets import token_hex

from vcpuset.domain.assessment import Assessment, RequeuePolicy
from vcpuset.domain.backoff import jittered
from vcpuset.domain.contest import Contest
from vcpuset.domain.errors import APIError, Conflict, ObjectGone, VCPUSetError
from vcpuset.domain.resource import UID, Connection
from vcpuset.kube.cache import Cache
from vcpuset.kube.pods import Pods
from vcpuset.memory import Memory
from vcpuset.ownership import Ownership
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.monitors import Monitors
from vcpuset.reconciler import POLL_SECONDS, Later, Pass, Services
from vcpuset.reporter import Reporter
from vcpuset.runtime.logcontext import log_context
from vcpuset.runtime.workers import Done, Result, Retry

__all__ = ["Controller"]

logger = logging.getLogger(__name__)

NEXT_TURN_SECONDS = 0.02
"""The pause between two sessions with a monitor that is needed for long. Other clients in the queue come first."""


class Controller:
    """Brings the machine of a VCPUSet to its declared count, one pass at a time.

    The work queue hands a set to one pass at a time, so nothing here is locked.
    """

    def __init__(
        self,
        *,
        cache: Cache,
        reporter: Reporter,
        monitors: Monitors,
        guests: Guests,
        pods: Pods,
        enqueue: Callable[[UID], None],
        resync_seconds: float,
        others_wait: Callable[[], bool],
        clock: Callable[[], datetime],
        node_name: str | None = None,
    ) -> None:
        self._services = Services(
            cache,
            reporter,
            monitors,
            guests,
            pods,
            Ownership(cache, enqueue),
            enqueue=enqueue,
            others_wait=others_wait,
            clock=clock,
        )
        self._resync_seconds = resync_seconds
        self._node_name = node_name
        self._memories: dict[UID, Memory] = {}

    def changed(self, uid: UID) -> None:
        """The cache has a new version of this set (or has dropped it); called for every such change."""
        # Before the sets that wait for its monitor: it may have a session to close.
        self._services.enqueue(uid)
        if (vcpuset := self._services.cache.get(uid)) is None:
            self._services.ownership.release(uid)
        else:
            self._services.ownership.changed(vcpuset)

    async def reconcile(self, uid: UID) -> Result:
        """One pass. Raises no expected error; the result says when the next pass follows."""
        vcpuset = self._services.cache.get(uid) or self._services.cache.terminating(uid)
        if vcpuset is None or vcpuset.deleting:
            # Deleted, or managed by another operator now: the machine stays as it is.
            self._services.ownership.release_machine(uid)
            await self._services.guests.forget(uid)
            await self._services.monitors.forget(uid)
            self._services.pods.forget(uid)
            # It may have been deleted while a pass was waiting for its socket, and that pass claimed it afterwards.
            self._services.ownership.release(uid)
        if vcpuset is None:
            self._services.ownership.forget(uid)
            self._memories.pop(uid, None)
            return Done()
        memory = self._memories.setdefault(uid, Memory(Contest(self._resync_seconds)))
        fields = {"vcpuset": vcpuset.name, "node": self._node_name, "pass": token_hex(4)}
        with log_context(namespace=vcpuset.namespace, **fields):
            try:
                return await self._result(Pass(self._services, vcpuset, memory))
            finally:
                self._services.ownership.tried(uid)

    async def _result(self, work: Pass) -> Result:
        uid, on_demand = work.uid, work.vcpuset.spec.connection is Connection.ON_DEMAND
        try:
            assessment = await work.run()
        except Later:
            return Done(requeue_after=POLL_SECONDS)
        except ObjectGone:
            # The watch, or at the latest the sweep, will report the same. If not, the 404 was temporary.
            if on_demand:
                await self._services.monitors.release(uid)
            return Done(requeue_after=jittered(self._resync_seconds, 0.1))
        except APIError as error:
            # Nothing is lost: the next pass starts from the machine and from the newest object. But it may be late, and
            # others may need the monitor.
            if not isinstance(error, Conflict):
                logger.warning("%s; retrying", error)
            if on_demand:
                await self._services.monitors.release(uid)
            return Retry(error, at_least=error.retry_after, at_most=error.longest_pause)
        if on_demand:
            if assessment.policy is not RequeuePolicy.HOLD:
                await self._services.monitors.release(uid)
            elif await self._services.monitors.end_turn(uid):
                # The report has all that this session received; the next one should miss as little as possible.
                return Done(requeue_after=NEXT_TURN_SECONDS)
        return self._requeue(assessment, work.memory)

    def _requeue(self, assessment: Assessment, memory: Memory) -> Result:
        match assessment.policy:
            case RequeuePolicy.RETRY:
                return Retry(VCPUSetError(f"{assessment.reason}: {assessment.message}"))
            case RequeuePolicy.HOLD | RequeuePolicy.POLL:
                seconds = POLL_SECONDS
            case RequeuePolicy.RESYNC if memory.resynced:
                seconds = jittered(self._resync_seconds, 0.1)
            case RequeuePolicy.RESYNC:
                # All sets have their first pass when the operator starts; their later ones are spread.
                seconds = random.uniform(0, self._resync_seconds)  # noqa: S311 - spreads observations over time; an attacker gains nothing by a guess
                memory.resynced = True
        if assessment.due is not None:
            seconds = min(seconds, max(0.0, (assessment.due - self._services.clock()).total_seconds()))
        return Done(requeue_after=seconds)
