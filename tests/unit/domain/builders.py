"""Machines, requests and sets for tests, in few words: what a test does not name is ordinary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from vcpuset.domain.assessment import Assessment, assess, with_pod
from vcpuset.domain.errors import CommandError
from vcpuset.domain.findings import Findings
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Answer, Machine, Ost, Slot
from vcpuset.domain.pod import PodFindings
from vcpuset.domain.requests import CPU
from vcpuset.domain.resource import (
    UID,
    BootVCPUs,
    Connection,
    GuestAgent,
    Request,
    Spec,
    Status,
    UnixMonitor,
    Unplug,
    UnplugPolicy,
    VCPUSet,
    VMPod,
)

__all__ = [
    "NOW",
    "a_machine",
    "a_request",
    "a_set",
    "a_slot",
    "a_spec",
    "ago",
    "assessment_on",
    "findings_of",
    "thread_of",
]

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)

NEVER_REPORTED = Status()

QUIET = Ost(0, 0)
"""What `query-acpi-ospm-status` shows of a slot that nothing has happened to."""


def ago(seconds: float) -> datetime:
    """So long before `NOW`."""
    return NOW - timedelta(seconds=seconds)


def thread_of(index: int) -> int:
    """The host thread of the CPU in a slot of `a_machine`."""
    return 1000 + index


def a_slot(index: int, holds: str | None, *, threads: int = 1) -> Slot:
    """A slot that is free (None), or holds a "boot" CPU or a "plugged" one."""
    path = {
        None: None,
        "boot": f"/machine/unattached/device[{index}]",
        "plugged": f"/machine/peripheral/vcpu{index}",
    }[holds]
    return Slot(index, "cpu", {"core-id": index}, threads, path, None if path is None else thread_of(index))


def a_machine(
    *,
    boot: Iterable[int] = (0, 1),
    plugged: Iterable[int] = (),
    slots: int | None = 8,
    threads: int = 1,
    arch: str = "x86_64",
    run_state: str = "running",
    migrating: bool = False,
    ost: Mapping[int, Ost] | str | None = "quiet",
    vcpus: int | None = None,
) -> Machine:
    """A running x86 machine of eight slots with CPUs in 0 and 1, from the boot.

    slots    how many; None: a machine type without CPU hotplug
    threads  vCPUs to a slot
    ost      {}: QEMU is in its legacy mode; None: the machine has no such query
    vcpus    for a machine without slots
    """
    boot, plugged = frozenset(boot), frozenset(plugged)
    if slots is None:
        return Machine(run_state, arch, vcpus or 2, None, migrating, None)
    found = tuple(
        a_slot(index, "boot" if index in boot else "plugged" if index in plugged else None, threads=threads)
        for index in range(slots)
    )
    shown = dict.fromkeys(range(slots), QUIET) if isinstance(ost, str) else ost
    return Machine(run_state, arch, len(boot | plugged) * threads, found, migrating, shown)


def a_request(
    index: int,
    *,
    boot: bool = False,
    at: datetime = NOW,
    attempts: int = 1,
    answer: Answer | None = None,
    thread_id: int | None = None,
) -> Request:
    """A request for the CPU that `a_machine` has in this slot."""
    path = a_slot(index, "boot" if boot else "plugged").path
    assert path is not None
    return Request(index, path, thread_of(index) if thread_id is None else thread_id, at, attempts, answer)


def a_spec(
    vcpus: int | None,
    *,
    policy: UnplugPolicy = UnplugPolicy.ENABLED,
    boot_vcpus: BootVCPUs = BootVCPUs.UNPLUG,
    timeout: int = 60,
    retry: int = 300,
    suspend: bool = False,
    connection: Connection = Connection.ON_DEMAND,
    agent: GuestAgent | None = None,
    pod: VMPod | None = None,
    bounds: tuple[int, int] = (1, 4096),
) -> Spec:
    """A spec with the API's defaults; `bounds` are `minVCPUs` and `maxVCPUs`."""
    return Spec(
        vcpus,
        UnixMonitor("web.sock"),
        connection,
        agent,
        Unplug(policy, boot_vcpus, timeout, retry),
        suspend,
        pod,
        *bounds,
    )


def a_set(spec: Spec | None = None, *, generation: int = 1, status: Status = NEVER_REPORTED) -> VCPUSet:
    """A VCPUSet named default/web."""
    return VCPUSet(UID("uid-web"), "default", "web", generation, "7", ago(3600), spec or a_spec(2), status)


def findings_of(
    spec: Spec,
    machine: Machine,
    requests: Iterable[Request] = (),
    *,
    started: datetime | None = None,
    early: Iterable[CPU] = (),
    blocked: CommandError | None = None,
    reported: str | None = None,
    now: datetime = NOW,
    moved: datetime | None = None,
    reset: datetime | None = None,
    guest: GuestReport | None = None,
    plugged: datetime | None = None,
    pod: PodFindings | None = None,
) -> Findings:
    """What a pass knows at its end. `started` is by default when the earliest of the requests was made."""
    requests = tuple(requests)
    found = Findings(
        spec=spec,
        machine=machine,
        now=now,
        requests=requests,
        blocked=blocked,
        reported=reported,
        early=frozenset(early),
        moved=moved,
        reset=reset,
        guest=guest,
        plugged=plugged,
        pod=pod,
    )
    if started is None and requests:
        started = min(request.requested_at for request in requests)
    return replace(found, started=started if requests and found.surplus > 0 else None)


def assessment_on(spec: Spec, machine: Machine, requests: Iterable[Request] = (), **known: Any) -> Assessment:
    """`assess` and `with_pod` for `findings_of` these."""
    findings = findings_of(spec, machine, requests, **known)
    return with_pod(assess(findings), findings)
