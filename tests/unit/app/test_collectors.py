"""How the sets are, as metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from unit.domain.builders import NOW, a_request, a_set, a_spec, ago
from vcpuset.app.collectors import SetCollector, Snapshot
from vcpuset.domain.machine import Answer
from vcpuset.domain.reasons import Reason
from vcpuset.domain.report import UNREPORTED
from vcpuset.domain.resource import UID, Condition, Status, VCPUSet
from vcpuset.qmp.meters import Meters

__all__: list[str] = []


def named(name: str, state: str, reason: str, *, since: float = 0.0, generation: int = 1, **status: object) -> VCPUSet:
    """A set in a state since so many seconds; of an earlier generation than its spec if `generation` is 0."""
    conditions = tuple(
        Condition(kind, "True" if kind == state else "False", reason, "…", ago(since), generation)
        for kind in ("Ready", "Reconciling", "Stalled")
    )
    reported = replace(Status(generation, 2, conditions=conditions), **status)  # type: ignore[arg-type]
    return replace(a_set(a_spec(4), status=reported), name=name, uid=UID(name))


def shown(
    *sets: VCPUSet,
    waits: Mapping[UID, float] | None = None,
    limit: int = 100,
    busy: Mapping[UID, tuple[float, float | None]] | None = None,
) -> dict[tuple[str, ...], float]:
    """All samples, by name and label values."""
    registry = CollectorRegistry()
    registry.register(Snapshot(sets, waits or {}, limit, NOW, busy or {}))
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_each_set_has_its_counts() -> None:
    requests = (a_request(1), a_request(2, answer=Answer.IN_PROGRESS), a_request(3, answer=Answer.BUSY))
    seen = shown(named("web", "Reconciling", "UnplugPending", vcpus=6, online_vcpus=5, pending_unplugs=requests))

    assert seen["vcpuset_desired_vcpus", "default", "web"] == 4
    assert seen["vcpuset_current_vcpus", "default", "web"] == 6
    assert seen["vcpuset_online_vcpus", "default", "web"] == 5
    assert seen["vcpuset_pending_unplugs", "default", "web"] == 2
    assert seen["vcpuset_state", "default", "web", "Reconciling", "UnplugPending"] == 1


def test_what_is_not_known_has_no_series() -> None:
    seen = shown(a_set(a_spec(4)))
    assert ("vcpuset_current_vcpus", "default", "web") not in seen
    assert ("vcpuset_online_vcpus", "default", "web") not in seen
    assert seen["vcpuset_desired_vcpus", "default", "web"] == 4


@pytest.mark.parametrize(
    ("vcpuset", "seconds"),
    [
        pytest.param(named("web", "Ready", "Converged", since=500), 0, id="it matches"),
        pytest.param(named("web", "Reconciling", "Plugging", since=500), 500, id="it has not since it was last ready"),
        pytest.param(named("web", "Stalled", "UnplugTimedOut", since=500), 500, id="stalled"),
        pytest.param(named("web", "Held", "Suspended", since=500), 500, id="suspended"),
        pytest.param(named("web", "Stalled", "UnplugTimedOut", since=-500), 0, id="the clock was set back"),
        pytest.param(named("web", "Ready", "Converged", since=500, generation=0), 70, id="changed since"),
        pytest.param(replace(a_set(), uid=UID("web")), 3600, id="never looked at"),
    ],
)
def test_a_set_is_unmatched_since_it_was_last_as_declared(vcpuset: VCPUSet, seconds: float) -> None:
    assert shown(vcpuset, waits={UID("web"): 70.0})["vcpuset_not_ready_seconds", "default", "web"] == seconds


def test_sums_name_every_reason_from_the_start() -> None:
    seen = shown()
    assert {reason for name, *labels in seen if name == "vcpuset_sets" for reason in labels[1:]} == {
        *Reason,
        UNREPORTED,
    }
    assert set(seen.values()) == {0.0, 1.0}
    assert seen["vcpuset_set_series",] == 1
    assert seen["vcpuset_longest_not_ready_seconds", "Stalled"] == 0


def test_sums_count_the_sets_by_state_and_reason() -> None:
    seen = shown(
        named("a", "Ready", "Converged"),
        named("b", "Ready", "Converged"),
        named("c", "Ready", "Converged", generation=0),
        named("d", "Reconciling", "UnplugRefused", since=20),
        named("e", "Stalled", "UnplugRefused", since=90),
        named("f", "Stalled", "MonitorConflict", since=30),
        named("g", "Held", "Suspended", since=4000),
        named("h", "Stalled", "OfALaterVersion"),
    )
    assert seen["vcpuset_sets", "Ready", "Converged"] == 2
    assert seen["vcpuset_sets", "Reconciling", UNREPORTED] == 1
    assert seen["vcpuset_sets", "Reconciling", "UnplugRefused"] == 1
    assert seen["vcpuset_sets", "Stalled", "UnplugRefused"] == 1
    assert seen["vcpuset_sets", "Held", "Suspended"] == 1
    assert sum(value for (name, *_), value in seen.items() if name == "vcpuset_sets") == 8
    assert seen["vcpuset_longest_not_ready_seconds", "Stalled"] == 90
    assert seen["vcpuset_longest_not_ready_seconds", "Held"] == 4000


def test_with_more_sets_than_the_limit_only_sums_are_shown() -> None:
    sets = [named(f"vm-{number}", "Stalled", "MonitorConflict", since=60) for number in range(3)]
    within, beyond = shown(*sets, limit=3), shown(*sets, limit=2)

    assert ("vcpuset_state", "default", "vm-1", "Stalled", "MonitorConflict") in within
    assert not any("vm-1" in key for key in beyond)
    assert (within["vcpuset_set_series",], beyond["vcpuset_set_series",]) == (1, 0)
    assert beyond["vcpuset_sets", "Stalled", "MonitorConflict"] == 3
    assert beyond["vcpuset_longest_not_ready_seconds", "Stalled"] == 60


def test_who_wants_no_series_of_single_sets_is_not_told_that_they_are_left_out() -> None:
    seen = shown(named("web", "Ready", "Converged"), limit=0)
    assert ("vcpuset_set_series",) not in seen
    assert not any("web" in key for key in seen)
    assert seen["vcpuset_sets", "Ready", "Converged"] == 1


def test_no_set_has_more_than_eight_series() -> None:
    """Five thousand sets are forty thousand series: what one more would cost is to be thought of before."""
    seen = shown(named("web", "Ready", "Converged", online_vcpus=2), busy={UID("web"): (7.5, 1.5)})
    assert sum("web" in key for key in seen) == 8


def test_busy_vcpus_that_are_not_known_are_absent_and_their_total_stays() -> None:
    web, db, vm = (named(name, "Ready", "Converged") for name in ("web", "db", "vm"))
    seen = shown(web, db, vm, busy={web.uid: (7.5, 1.5), db.uid: (3.0, None), UID("gone"): (1.0, 1.0)})
    totals = {key[2]: value for key, value in seen.items() if key[0] == "vcpuset_busy_seconds_total"}
    assert totals == {"web": 7.5, "db": 3.0}
    assert {key[2]: value for key, value in seen.items() if key[0] == "vcpuset_busy_vcpus"} == {"web": 1.5}


async def test_the_text_is_that_of_the_sets_at_hand() -> None:
    sets: list[VCPUSet] = []
    collector = SetCollector(lambda: sets, dict, Meters(lambda _: None, lambda: NOW), 10)
    before = (await collector.exposition()).decode()
    sets.append(named("web", "Ready", "Converged"))
    after = (await collector.exposition()).decode()

    assert "default" not in before
    names = {sample.labels.get("name") for family in text_string_to_metric_families(after) for sample in family.samples}
    assert "web" in names
