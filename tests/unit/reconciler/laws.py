"""What must hold for every single thing that the operator does, whatever happens around it.

Checked at the moment of the deed, against the model, not against what the operator believes:

* A CPU is plugged only while fewer are present than the target.
* The guest is asked only for as many as are too many, requests that it still has included; a request that is on the
  book as in flight may be repeated while any is wanted.
* A request is in the status before it is made.
* No CPU is asked for twice within its interval, by whichever operator: `retrySeconds`, or `timeoutSeconds` if the
  operator that asks cannot know that the first request was made.
* Ready=True is written only with the declared count just seen, and `status.vcpus` is always a count that was seen.
* The conditions stand in their order, and Reconciling and Stalled are never both True.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from unit.reconciler.model import Qemu
from unit.reconciler.world import World
from vcpuset.domain.machine import Machine, Slot
from vcpuset.domain.plan import goal
from vcpuset.domain.requests import CPU, cpu_of
from vcpuset.domain.resource import UID, VCPUSet

__all__ = ["LawfulWorld"]


@dataclass
class _Ask:
    """The last request for a CPU.

    known  the operator that made it has had QEMU's reply to it; else it may not have been made
    """

    at: datetime
    operator: int
    known: bool = False
    refused: bool = False


class LawfulWorld(World):
    """A world with one machine and one set, in which every deed of the operator is judged."""

    def __init__(self, qemu: Qemu, *, vcpus: int) -> None:
        self.qemu = qemu
        self._asks: dict[CPU, _Ask] = {}
        self._seen: int | None = None
        self._working_on: VCPUSet | None = None
        self._disturbed = False
        super().__init__()
        self.machines["a.sock"] = qemu
        self.apply("web", vcpus=vcpus)

    def disturb(self) -> None:
        """Somebody else changed something, so what the operator has just seen does not hold any more."""
        self._disturbed = True

    def set_clock(self, seconds: float) -> None:
        """Nothing can have been asked for in the future, so a clock that is set back starts the intervals anew."""
        super().set_clock(seconds)
        for ask in self._asks.values():
            ask.at = min(ask.at, self.wall)

    def on_pass(self, uid: UID) -> None:
        """From here on the operator goes by what its cache holds."""
        self._working_on = self.cache.get(uid)
        self._disturbed = False

    def on_observe(self, qemu: Qemu, machine: Machine) -> None:
        """From here on the operator knows how many there are."""
        self._seen = machine.vcpus
        self._disturbed = False
        self._asks = {cpu: ask for cpu, ask in self._asks.items() if cpu in qemu.present}
        for cpu, ask in self._asks.items():
            ask.refused = ask.refused or qemu.slot_of(cpu) not in qemu.latched
        if self._target() >= machine.vcpus:
            # Nothing is to be given back any more: who said no before may be asked afresh.
            self._asks = {cpu: ask for cpu, ask in self._asks.items() if not ask.refused}

    def on_plug(self, qemu: Qemu, slot: Slot) -> None:
        """Never above the target."""
        if not self._disturbed:
            assert qemu.vcpus + slot.vcpus <= self._target(), "plugged above the target"

    def on_unplug(self, qemu: Qemu, slot: Slot) -> None:
        """Never more than is too many, never again too soon, never unrecorded."""
        cpu = cpu_of(slot)
        if cpu not in qemu.present:
            return
        surplus = qemu.vcpus - self._target()
        if not self._disturbed:
            leaving = {index for index in qemu.latched if qemu.cpus[index] in self._asks}
            # The guest may hold more requests than are wanted, if the target rose; another for the same CPU adds none.
            # That holds for what is on the book: whether the guest really has it nobody can know.
            on_book = {cpu_of(each) for each in self._spec().status.pending_unplugs if each.in_flight}
            repeated = slot.index in leaving or cpu in on_book
            more = qemu.threads if repeated else (len(leaving) + 1) * qemu.threads
            assert more <= surplus, f"asked for slot {slot.index} beside {leaving}, and {surplus} vCPUs are too many"

        stored = self.vcpuset()
        recorded = {cpu_of(request): request for request in stored.status.pending_unplugs}
        assert cpu in recorded, "asked for a CPU without a record"
        assert recorded[cpu].requested_at == self.wall, "the record has an older time than the request"

        if (last := self._asks.get(cpu)) is not None:
            unplug = self._spec().spec.unplug
            seconds = unplug.retry_seconds
            if last.operator != self.operator_number or not last.known:
                seconds = min(seconds, unplug.timeout_seconds)
            assert self.wall >= last.at + timedelta(seconds=seconds), "asked twice within the interval"
        if not qemu.legacy and not qemu.migrating:
            self._asks[cpu] = _Ask(self.wall, self.operator_number)

    def on_unplug_taken(self, slot: Slot) -> None:
        """From here on the operator knows that the request was made."""
        if (ask := self._asks.get(cpu_of(slot))) is not None:
            ask.known = True

    def on_write(self, before: VCPUSet, after: VCPUSet) -> None:
        """The status tells the truth and obeys the rules of kstatus."""
        status = after.status
        assert [condition.type for condition in status.conditions] == ["Ready", "Reconciling", "Stalled"]
        true = {condition.type for condition in status.conditions if condition.status == "True"}
        assert len(true) <= 1, f"{true} are True at once"
        assert status.observed_generation == after.generation
        assert status.vcpus in {self._seen, before.status.vcpus}
        if "Ready" in true:
            assert self._seen == after.spec.vcpus == status.vcpus
        cpus = [cpu_of(request) for request in status.pending_unplugs]
        assert len(cpus) == len(set(cpus)) <= self.qemu.slots
        old = {condition.type: condition for condition in before.status.conditions}
        for condition in status.conditions:
            if condition.type in old and old[condition.type].status == condition.status:
                assert condition.last_transition_time == old[condition.type].last_transition_time

    def _spec(self) -> VCPUSet:
        assert self._working_on is not None
        return self._working_on

    def _target(self) -> int:
        return goal(self._spec().spec, self.qemu.machine()).count
