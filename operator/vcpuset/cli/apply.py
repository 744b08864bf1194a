"""`vcpuset apply`: the operator's own reconciliation of one VCPUSet, from a file, without a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vcpuset.cli.manifests import Manifest
from vcpuset.cli.observation import Given
from vcpuset.cli.outcome import Exit, exit_status
from vcpuset.cli.record import LocalSet, RecordFailed
from vcpuset.controller import Controller
from vcpuset.domain.assessment import Assessment
from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.domain.credentials import Credentials, NoCredentials
from vcpuset.domain.findings import Findings
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import UID, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.pods import Pods
from vcpuset.kube.recorder import Recorder
from vcpuset.memory import Memory
from vcpuset.qmp import files
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.monitors import Monitors
from vcpuset.reporter import Reporter
from vcpuset.runtime.workers import Done, Result, run_workers
from vcpuset.runtime.workqueue import WorkQueue

__all__ = ["Applied", "apply"]

_BACKOFF: Final = ExponentialBackoff(base_seconds=0.25, cap_seconds=5)
"""Shorter than the operator's: a user waits."""

_RESYNC_SECONDS: Final = 60.0
_GRACE_SECONDS: Final = 10.0
"""As for the operator."""

_SETTLE_SECONDS: Final = 1.0
"""How long the end waits for a file system call that is no longer needed; a mount can hang."""

_NO_CREDENTIALS: Final = (
    "apply reads no Secrets: pass a directory with ca.crt, tls.crt and tls.key with --tls-credentials"
)

_IN_PROGRESS: Final = frozenset({Reason.PLUGGING, Reason.ADOPTING})
"""The command itself is at work, and does not wait for a guest."""


@dataclass(frozen=True)
class Applied:
    """How it ended.

    document       the set with its status, as kubectl prints it
    assessment     the last one; None: there is none yet
    in_flight  whether the guest may still carry out unplug requests
    """

    status: Exit
    document: dict[str, Any]
    assessment: Assessment | None
    in_flight: bool


class _Reporter(Reporter):
    """Also tells what it would only write later, or not at all because it has not changed."""

    def __init__(self, local: LocalSet, cache: Cache, enqueue: Callable[[UID], None]) -> None:
        super().__init__(cache, local, Recorder(local), _clock, enqueue)
        self.heard: Callable[[Assessment], None] = lambda _: None

    async def report(
        self,
        vcpuset: VCPUSet,
        assessment: Assessment,
        memory: Memory,
        findings: Findings | None = None,
        *,
        must: bool = False,
    ) -> VCPUSet:
        """As `Reporter.report`."""
        self.heard(assessment)
        return await super().report(vcpuset, assessment, memory, findings, must=must)


async def apply(
    manifest: Manifest,
    socket_root: Path | None,
    credentials: Credentials | None,
    *,
    wait: bool,
    seconds: float,
    tell: Callable[[Assessment], None],
) -> Applied:
    """Reconcile the machine of a set until it is Ready or cannot be, for at most so many seconds.

    wait  also wait for the guest, and for a machine that cannot be changed now
    tell  called with each assessment

    The first cancellation ends this in good order: the reconciliation in progress is completed, and all requests that
    were sent are in the record. Raises RecordFailed, and OSError that `tell` has raised, likewise.
    """
    queue: WorkQueue[UID] = WorkQueue(_BACKOFF, slow_at_once=1)
    cache = Cache()

    def changed(vcpuset: VCPUSet) -> None:
        cache.put(vcpuset)
        controller.changed(vcpuset.uid)

    local = LocalSet(manifest, changed)
    store = NoCredentials(_NO_CREDENTIALS) if credentials is None else Given(credentials)
    monitors = Monitors(socket_root, queue.add, networks=None, credentials=store)
    guests = Guests(socket_root, queue.add)
    reporter = _Reporter(local, cache, queue.add)
    controller = Controller(
        cache=cache,
        reporter=reporter,
        monitors=monitors,
        guests=guests,
        pods=Pods(local),
        enqueue=queue.add,
        resync_seconds=_RESYNC_SECONDS,
        others_wait=lambda: False,
        clock=_clock,
    )
    last: Assessment | None = None
    reported = False
    failure: RecordFailed | OSError | None = None
    status = Exit.NOT_YET

    def heard(assessment: Assessment) -> None:
        nonlocal failure, last, reported
        last, reported = assessment, True
        try:
            tell(assessment)
        except OSError as error:  # nothing reads the output, or a disk is full: only the pass in progress is completed
            failure = failure or error
            queue.shut_down()

    async def reconcile(uid: UID) -> Result:
        nonlocal failure, status, reported
        reported = False
        try:
            result = await controller.reconcile(uid)
        except RecordFailed as error:
            failure = error
            queue.shut_down()
            return Done()
        if reported and last is not None:
            # Otherwise the next one reports it: this one waits for the guest's agent, or CPUs came or went.
            status = exit_status(last.state)
            if status is not Exit.NOT_YET or not (wait or last.reason in _IN_PROGRESS):
                queue.shut_down()
        return result

    reporter.heard = heard
    changed(local.vcpuset)
    timer = asyncio.get_running_loop().call_later(seconds, queue.shut_down)
    try:
        with _without_log():
            working = asyncio.ensure_future(run_workers(queue, reconcile, count=1, grace_seconds=_GRACE_SECONDS))
            try:
                await asyncio.shield(working)
            except asyncio.CancelledError:
                queue.shut_down()
                await working
                status = Exit.INTERRUPTED if status is Exit.NOT_YET else status
    finally:
        timer.cancel()
        await guests.close()
        await monitors.close()
        await files.settle(_SETTLE_SECONDS)
    if failure is not None:
        raise failure
    in_flight = any(request.in_flight for request in local.vcpuset.status.pending_unplugs)
    return Applied(status, local.document(), last, in_flight)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Without the operator's lines about its reports: they are printed. Defects are still logged."""
    log = logging.getLogger("vcpuset")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _clock() -> datetime:
    return datetime.now(UTC)
