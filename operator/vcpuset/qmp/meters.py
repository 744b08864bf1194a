"""How busy the machines are: a sample at each observation, and one more when the number is requested.

Nothing is written to the API server for this. QEMU's counters come first; only a machine without them has its guest's
agent queried.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from vcpuset.domain.busy import SHORTEST_SECONDS, Activity, Busy, Halts, Meter, Sample, Source, Used
from vcpuset.domain.machine import Machine
from vcpuset.domain.resource import UID

__all__ = ["ASK_SECONDS", "OLDEST_SECONDS", "Meters"]

ASK_SECONDS = 2.0
"""How long a request waits for a new sample. KEDA waits 3 s for the answer."""

OLDEST_SECONDS = 60.0
"""An older value is not reported: it says nothing about now."""


_AGENT = Source.GUEST_AGENT


@dataclass
class _Metered:
    """One set.

    process  of QEMU, at the last sample
    counted  whether each source has counters of that one, by its last reply
    load     the guest's load and its loop time; None: not known
    loaded   whether its agent says so, by its last reply
    asked    set at the next sample; None: no request waits for it
    """

    meter: Meter = field(default_factory=Meter)
    process: Hashable = None
    counted: dict[Source, bool] = field(default_factory=dict)
    load: tuple[float, float] | None = None
    loaded: bool = True
    asked: asyncio.Event | None = None


class Meters:
    """The meters of all sets that this process manages.

    observe  schedules an observation of a set
    clock    wall-clock time
    """

    def __init__(self, observe: Callable[[UID], None], clock: Callable[[], datetime]) -> None:
        self._observe = observe
        self._clock = clock
        self._sets: dict[UID, _Metered] = {}

    def from_monitor(self, uid: UID, machine: Machine, halts: Mapping[str, Halts] | None) -> None:
        """The counters of an observation; None: this QEMU has none."""
        self._add(uid, Source.KVM, machine, halts)

    def from_agent(self, uid: UID, machine: Machine, used: Mapping[int, Used] | None) -> None:
        """The counters of the guest's agent; None: this one has none."""
        self._add(uid, Source.GUEST_AGENT, machine, used)

    def needs_agent(self, uid: UID) -> bool:
        """Whether QEMU has no counters of this machine, and its guest's agent may have some."""
        known = self._sets.get(uid)
        return known is not None and known.counted.get(Source.KVM) is False and known.counted.get(_AGENT) is not False

    def needs_load(self, uid: UID) -> bool:
        """Whether the guest's agent may know the load of this machine."""
        known = self._sets.get(uid)
        return known is not None and known.loaded

    def load_from_agent(self, uid: UID, machine: Machine, load: float | None) -> None:
        """The load average of the last minute; None: this agent does not say."""
        known = self._of(uid, machine)
        known.loaded = load is not None
        known.load = None if load is None else (load, asyncio.get_running_loop().time())

    def demand(self, uid: UID) -> float | None:
        """How many vCPUs the guest's tasks could use, by its load; None: it is not known, or no longer."""
        known = self._sets.get(uid)
        if known is None or known.load is None or self._age(known.load[1]) > OLDEST_SECONDS:
            return None
        return known.load[0]

    def forget(self, uid: UID) -> None:
        """This process no longer manages the set."""
        if (known := self._sets.pop(uid, None)) is not None:
            _wake(known)

    def has_source(self, uid: UID) -> bool:
        """False: no source has counters, according to its last reply."""
        known = self._sets.get(uid)
        return known is None or not known.counted or any(known.counted.values())

    def last(self, uid: UID) -> Busy | None:
        """The last value; None: there is none, or it is too old."""
        known = self._sets.get(uid)
        found = None if known is None else known.meter.last
        return found if found is not None and self._age(found.at) <= OLDEST_SECONDS else None

    def all(self) -> Mapping[UID, tuple[float, float | None]]:
        """Of each set of which samples were taken: its vCPU-seconds, and as `last` its busy vCPUs now."""
        return {
            uid: (known.meter.total, None if (now := self.last(uid)) is None else now.busy)
            for uid, known in self._sets.items()
            if known.meter.sampled is not None
        }

    async def ask(self, uid: UID) -> Busy | None:
        """The last value. Unless its sample is fresh, another one is taken before, if that is possible soon."""
        known = self._sets.setdefault(uid, _Metered())
        sampled = known.meter.sampled
        if not self.has_source(uid):
            return None
        if sampled is None or self._age(sampled) >= SHORTEST_SECONDS:
            known.asked = known.asked or asyncio.Event()
            self._observe(uid)
            # Without a new sample the last value counts, for as long as it is not too old.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_SECONDS):
                    await known.asked.wait()
        return self.last(uid)

    def _add(self, uid: UID, source: Source, machine: Machine, activities: Mapping[Any, Activity] | None) -> None:
        known = self._of(uid, machine)
        known.counted[source] = activities is not None
        if activities is not None:
            at = asyncio.get_running_loop().time()
            known.meter.add(Sample(at, self._clock(), source, machine.process, machine.vcpus, activities))
            _wake(known)

    def _of(self, uid: UID, machine: Machine) -> _Metered:
        """What is known of a set, as far as it is about this QEMU."""
        known = self._sets.setdefault(uid, _Metered())
        if known.process != machine.process:
            known.process = machine.process
            known.counted.clear()
            known.load, known.loaded = None, True
        return known

    def _age(self, at: float) -> float:
        return asyncio.get_running_loop().time() - at


def _wake(known: _Metered) -> None:
    if known.asked is not None:
        known.asked.set()
        known.asked = None
