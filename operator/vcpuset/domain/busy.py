"""How many vCPUs of a machine were busy, from two samples of what its CPUs have done so far.

Sources, by preference:

    KVM         `query-stats`: how long the kernel kept each vCPU halted. Also counts what the host took from a vCPU.
    GuestAgent  `guest-get-cpustats`: the guest's own /proc/stat. The tenant controls it.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

__all__ = ["SHORTEST_SECONDS", "Activity", "Busy", "Halts", "Meter", "Sample", "Source", "Used"]

SHORTEST_SECONDS = 5.0
"""The shortest time between two samples that are compared. A plug or unplug keeps a guest busy for about a second: that
alone must not make an autoscaler change the count."""


class Source(enum.Enum):
    """Who counts."""

    KVM = "KVM"
    GUEST_AGENT = "GuestAgent"


class Activity(Protocol):
    """The counters of one vCPU."""

    def busy_since(self, earlier: Activity, seconds: float) -> float | None:
        """For how many of these seconds it was busy; None: the counters are another CPU's."""


@dataclass(frozen=True, slots=True)
class Halts:
    """A vCPU's counters in KVM: exits so far, seconds halted (or polling for the end of a halt), halted just now.

    A halt counts when it ends, so a vCPU that is halted all the time has the same counters at both ends.
    """

    exits: int
    halted: float
    halted_now: bool

    def busy_since(self, earlier: Activity, seconds: float) -> float | None:
        """As `Activity`."""
        if not isinstance(earlier, Halts) or self.exits < earlier.exits or self.halted < earlier.halted:
            return None
        if self.halted_now and earlier.halted_now and self.exits == earlier.exits:
            return 0.0
        return seconds - (self.halted - earlier.halted)


@dataclass(frozen=True, slots=True)
class Used:
    """A guest CPU's seconds so far that were neither idle nor waiting for I/O."""

    seconds: float

    def busy_since(self, earlier: Activity, seconds: float) -> float | None:
        """As `Activity`."""
        if not isinstance(earlier, Used) or self.seconds < earlier.seconds:
            return None
        return self.seconds - earlier.seconds


@dataclass(frozen=True)
class Sample:
    """The counters of a machine's vCPUs at one moment.

    at       monotonic seconds
    time     the same moment, UTC
    machine  the QEMU process; another one has counters of its own
    vcpus    how many vCPUs the machine had
    """

    at: float
    time: datetime
    source: Source
    machine: Hashable
    vcpus: int
    activities: Mapping[Any, Activity]


@dataclass(frozen=True)
class Busy:
    """The vCPUs that were busy between two samples, on average.

    vcpus    how many the machine had at the end
    seconds  the time between the samples
    """

    busy: float
    vcpus: int
    seconds: float
    source: Source
    at: float
    time: datetime


class Meter:
    """One set's samples.

    last     None: no two samples could be compared yet
    total    vCPU-seconds so far; only grows, whatever happens to the machine
    sampled  monotonic time of the last sample; None: there was none
    """

    def __init__(self) -> None:
        self.last: Busy | None = None
        self.total = 0.0
        self._base: Sample | None = None

    @property
    def sampled(self) -> float | None:
        """Monotonic time of the sample that the next one is compared with."""
        return None if self._base is None else self._base.at

    def add(self, sample: Sample) -> None:
        """Compare with the sample before. One that comes too soon after it is ignored."""
        base = self._base
        if base is None or (base.machine, base.source) != (sample.machine, sample.source):
            self._base = sample
            return
        seconds = sample.at - base.at
        if seconds < SHORTEST_SECONDS:
            return
        self._base = sample
        found = [
            min(max(busy, 0.0), seconds)
            for cpu, activity in sample.activities.items()
            if cpu in base.activities and (busy := activity.busy_since(base.activities[cpu], seconds)) is not None
        ]
        if found:
            self.total += sum(found)
            self.last = Busy(
                busy=sum(found) / seconds,
                vcpus=sample.vcpus,
                seconds=seconds,
                source=sample.source,
                at=sample.at,
                time=sample.time,
            )
