"""Whether the process should be started anew: what `/healthz` says.

Only what a new process would mend counts. An API server that is away, a watch that is refused, monitors that do not
answer, a queue that is long because much is to be done: none of that. An event loop that is blocked cannot answer at
all, which the prober's own timeout tells; a task that has ended ends the process without being asked (`TaskOwner`).
"""

from __future__ import annotations

from typing import Final

from vcpuset.kube.freshness import BEHIND_SECONDS, Freshness
from vcpuset.runtime.workqueue import QueueStatistics

__all__ = ["STUCK_SECONDS", "unhealthy_reason"]

STUCK_SECONDS: Final = 180.0
"""Work of which nothing was heard for so long is stuck. Each wait in a pass has a deadline, the longest 20 s, and the
end of each QMP command is heard of; so a pass over a machine that answers each of them slowly may take longer."""


def unhealthy_reason(queue: QueueStatistics, workers: int, freshness: Freshness) -> str | None:
    """Why the process should be started anew; None: it is well."""
    if queue.longest_still_seconds > STUCK_SECONDS:
        return f"a reconciliation has made no progress for {queue.longest_still_seconds:.0f} s"
    # All workers busy is a matter of load (each of them moves, or the above says so); an idle one takes what it may.
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
