"""What makes `/healthz` fail, and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vcpuset.app.liveness import STUCK_SECONDS, unhealthy_reason
from vcpuset.domain.resource import UID
from vcpuset.kube.freshness import BEHIND_SECONDS, CHECK_SECONDS, Freshness
from vcpuset.runtime.workqueue import QueueStatistics

__all__: list[str] = []

IDLE = QueueStatistics()

LONG = STUCK_SECONDS + 1


@pytest.mark.parametrize(
    "queue",
    [
        pytest.param(IDLE, id="nothing to do"),
        pytest.param(replace(IDLE, failing=5000, delayed=5000, retries_total=10**6), id="no monitor answers"),
        pytest.param(
            replace(IDLE, processing=1, longest_running_seconds=10 * LONG, unfinished_seconds=10 * LONG),
            id="a pass that moves on, however long",
        ),
        pytest.param(
            replace(IDLE, depth=5000, processing=4, untaken_seconds=10 * LONG),
            id="too much for all workers",
        ),
    ],
)
def test_what_a_restart_would_not_mend_is_no_illness(queue: QueueStatistics) -> None:
    assert unhealthy_reason(queue, 4, Freshness()) is None


def test_a_pass_that_does_not_move_is_an_illness() -> None:
    assert unhealthy_reason(replace(IDLE, processing=1, longest_still_seconds=LONG), 4, Freshness()) == (
        "a reconciliation has made no progress for 181 s"
    )


def test_all_workers_occupied_by_passes_that_do_not_move_is_an_illness() -> None:
    stuck = replace(IDLE, depth=9, processing=4, longest_still_seconds=LONG, untaken_seconds=LONG)
    assert unhealthy_reason(stuck, 4, Freshness()) is not None


def test_a_set_that_waits_beside_an_idle_worker_is_an_illness() -> None:
    assert unhealthy_reason(replace(IDLE, depth=1, processing=3, untaken_seconds=LONG), 4, Freshness()) == (
        "no reconciliation has started for 181 s although a set is waiting and 1 of 4 workers are idle"
    )


PRESENT = {UID("web"): "default"}


def test_a_watch_that_brings_nothing_although_it_does_not_fail_is_an_illness() -> None:
    now = 0.0
    freshness = Freshness(monotonic=lambda: now)
    freshness.listed(PRESENT, {UID("web"): "7"})
    while now <= BEHIND_SECONDS:
        assert unhealthy_reason(IDLE, 4, freshness) is None
        now += CHECK_SECONDS
        freshness.listed(PRESENT, {})

    why = unhealthy_reason(IDLE, 4, freshness)

    assert why is not None
    assert why.startswith(
        "the watch is behind: for 270 s lists have contained changes that it has not delivered (1 sets)"
    )


def test_a_watch_that_fails_and_is_tried_again_is_no_illness() -> None:
    now = 0.0
    freshness = Freshness(lambda _: True, lambda: now)
    freshness.listed(PRESENT, {UID("web"): "7"})
    while now <= 10 * BEHIND_SECONDS:
        now += CHECK_SECONDS
        freshness.listed(PRESENT, {})
        assert unhealthy_reason(IDLE, 4, freshness) is None
    assert freshness.behind_seconds > BEHIND_SECONDS
