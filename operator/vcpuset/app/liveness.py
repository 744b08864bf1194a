"""Whether the process should be restarted, for `/healthz`.

Only what a new process would fix counts: not an API server that is away, a watch that is refused, monitors that do not
answer, or a queue that is long because there is much work. A blocked event loop cannot answer at all, and the probe
times out; a task that has ended ends the process by itself (`TaskOwner`).
"""

from __future__ import annotations

from typing import Final

from vcpuset.kube.freshness import BEHIND_SECONDS, Freshness
from vcpuset.runtime.workqueue import QueueStatistics

__all__ = ["STUCK_SECONDS", "unhealthy_reason"]

STUCK_SECONDS: Final = 180.0
"""Work without progress for so long is stuck. Each wait in a pass has a deadline, the longest 20 s, and the end of each
QMP command is progress; so a pass over a machine that answers each of them slowly may take longer."""


def unhealthy_reason(queue: QueueStatistics, workers: int, freshness: Freshness) -> str | None:
    """Why the process should be restarted; None: it is healthy."""
    if queue.longest_still_seconds > STUCK_SECONDS:
        return f"a reconciliation has made no progress for {queue.longest_still_seconds:.0f} s"
    # All workers busy is only load (each of them progresses, or the check above fails); an idle one takes what it may.
    if queue.untaken_seconds > STUCK_SECONDS and queue.processing < workers:
        idle = workers - queue.processing
        return (
            f"no reconciliation has started for {queue.untaken_seconds:.0f} s although a set is waiting and {idle} of "
            f"{workers} workers are idle"
        )
    if freshness.silent_seconds > BEHIND_SECONDS:
        return (
            f"the watch is behind: for {freshness.silent_seconds:.0f} s lists have contained changes "
            f"that it has not delivered ({len(freshness.missing)} sets), although it did not fail"
        )
    return None
