"""What one pass knows of a set and its machine, as one value: plans, assessments and reports are made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from vcpuset.domain.errors import CommandError
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Machine
from vcpuset.domain.pod import PodFindings
from vcpuset.domain.requests import CPU, cpu_of, due_at
from vcpuset.domain.resource import Request, Spec
from vcpuset.domain.target import Target, target_for

__all__ = ["Findings"]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known when a pass decides or reports.

    machine   as last observed
    requests  the open unplug requests, or those about to be sent
    now       the time of all decisions and reports
    started   when the first unplug request of this generation was made; None: none is open
    reported  the reason in the status for this generation; None: there is none
    blocked   why QEMU did not do what this pass wanted; None: it did, or nothing was wanted
    early     CPUs whose guest has shown since their requests that it may accept them now, as in `due_at`
    moved     when a CPU was last seen to leave
    reset     when the machine was last reset; None: not known
    plugged   when a CPU was last plugged, or the guest then set one online
    guest     what the guest says of these CPUs; None: it was not queried
    pod       what the machine's pod allows; None: the set names none
    """

    spec: Spec
    machine: Machine
    now: datetime
    requests: Sequence[Request] = ()
    started: datetime | None = None
    reported: str | None = None
    blocked: CommandError | None = None
    early: frozenset[CPU] = frozenset()
    moved: datetime | None = None
    reset: datetime | None = None
    plugged: datetime | None = None
    guest: GuestReport | None = None
    pod: PodFindings | None = None

    @cached_property
    def target(self) -> Target:
        """The count that the machine can reach, for the declared one."""
        return target_for(self.spec, self.machine)

    @property
    def surplus(self) -> int:
        """How many vCPUs are too many; negative: how many are missing."""
        return self.machine.vcpus - self.target.count

    @property
    def plug_to(self) -> int:
        """The count up to which vCPUs may be plugged now."""
        limit = None if self.pod is None else self.pod.sufficient_for
        return self.target.count if limit is None else min(self.target.count, limit)

    @property
    def in_flight(self) -> tuple[Request, ...]:
        """The requests that the guest may still carry out."""
        return tuple(request for request in self.requests if request.in_flight)

    def due_at(self, request: Request) -> datetime:
        """When a request may be sent again."""
        return due_at(request, self.spec.unplug, early=cpu_of(request) in self.early, moved=self.moved)

    @cached_property
    def due(self) -> frozenset[CPU]:
        """The CPUs whose requests may be sent again now."""
        return frozenset(cpu_of(request) for request in self.requests if self.due_at(request) <= self.now)
