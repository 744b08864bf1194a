"""What every machine must lead to, however odd: decisions that cannot do harm, and a status that can be written."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from vcpuset.domain.assessment import assess
from vcpuset.domain.findings import Findings
from vcpuset.domain.machine import Activity, Machine
from vcpuset.domain.plan import Plan, first_fit, plan
from vcpuset.domain.requests import cpu_of, requested, still_open
from vcpuset.domain.resource import BootVCPUs, Spec, UnixMonitor, Unplug, UnplugPolicy

__all__ = ["check_decisions"]

NOW = datetime(2030, 1, 1, tzinfo=UTC)
INT32 = (1 << 31) - 1
INT64 = (1 << 63) - 1

KEPT = (Unplug(policy=UnplugPolicy.DISABLED), Unplug(boot_vcpus=BootVCPUs.KEEP))


def check_decisions(machine: Machine) -> None:
    """Plans for this machine obey the rules, whatever count is declared."""
    assert 0 <= machine.floor <= machine.vcpus <= machine.ceiling <= INT32
    if machine.slots is not None:
        assert machine.vcpus == sum(slot.vcpus for slot in machine.occupied)
        assert [slot.index for slot in machine.slots] == list(range(len(machine.slots)))
        assert all((slot.path is None) == (slot.thread_id is None) for slot in machine.slots)
    counts = {1, machine.floor, machine.vcpus - 1, machine.vcpus, machine.vcpus + 1, machine.ceiling, 4096}
    for count in sorted(counts - {0}):
        _check(count, Unplug(), machine)
    for unplug in KEPT:
        _check(1, unplug, machine)
    assert plan(Findings(spec=Spec(None, UnixMonitor("vm.sock")), machine=machine, now=NOW)) == Plan()


def _check(count: int, unplug: Unplug, machine: Machine) -> None:
    spec = Spec(count, UnixMonitor("vm.sock"), unplug=unplug)
    found = Findings(spec=spec, machine=machine, now=NOW)
    target, step = found.target, plan(found)
    assert machine.floor <= target.count <= machine.ceiling
    assert target.count <= count or machine.vcpus >= target.count, "more than declared are plugged"
    assert (target.count == count) == (target.reason is None)
    assert not (step.plug and step.unplug)
    if machine.activity is not Activity.CHANGEABLE:
        assert not step.plug
        assert not step.unplug

    chosen = first_fit(step.plug, target.count - machine.vcpus, ())
    assert all(slot.path is None for slot in chosen)
    assert machine.vcpus + sum(slot.vcpus for slot in chosen) <= max(target.count, machine.vcpus)

    assert all(slot.path is not None and slot.index != 0 for slot in step.unplug)
    assert not step.unplug or machine.vcpus - sum(slot.vcpus for slot in step.unplug) >= target.count
    assert spec.unplug.policy is UnplugPolicy.ENABLED or not step.unplug
    assert spec.unplug.boot_vcpus is BootVCPUs.UNPLUG or not any(slot.boot for slot in step.unplug)

    requests = requested((), step.unplug, NOW)
    assert len({cpu_of(request) for request in requests}) == len(step.unplug)
    assert still_open(requests, machine, NOW) == requests
    found = replace(found, requests=requests, started=NOW if requests else None)
    assert not plan(found).unplug, "requested twice"
    for request in requests:
        assert 1 <= len(request.path) <= 1024
        assert 0 <= request.thread_id <= INT64
    assert 0 < len(assess(found).message) < 32768
