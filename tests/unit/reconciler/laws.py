"""What must hold for every single thing that the operator does, whatever happens around it.

Checked at the moment of the deed, against the model, not against what the operator believes:

* Nothing is done while `spec.suspend` is set, nor in a run state, or a migration, in which it is unsafe.
* A CPU is plugged only while fewer are present than the target.
* The guest is asked only for as many as are too many, requests that it still has included; a request that is on the
  book as in flight may be repeated while any is wanted.
* A request is in the status before it is made; of a QEMU that was replaced, none stays there once the new one was seen.
* No CPU of one QEMU is asked for twice within the first pause, by whichever operator, nor within the longer one that
  doubling gives, unless the guest has shown since that it is there: a reset, an answer, a CPU that left, its agent.
* Ready=True is written only with the declared count just seen and, if the guest has said how many it uses, with all of
  them used when it spoke; GuestCPUsOffline only if it spoke of fewer. `status.vcpus` is always a count that was seen,
  `status.onlineVCPUs` one that the guest gave, `status.machine.uuid` that of a machine that was seen.
* The conditions stand in their order, and Reconciling and Stalled are never both True.
* A count is written only where none stands, only the one just seen within the set's bounds, and its status has it.
* A pass ends: it looks and writes a few times only, whatever the monitor shows.

And whenever nothing is to be done at once (`LawfulWorld.judge_rest`):

* A set that shows Ready=True for its generation has the declared count, unless somebody changed it since the last look.
* What the guest said last is what the status shows, and no pass is far off while something is said to go on, nor comes
  after the moment at which a time-out has to be reported or a request made again.
* Of the requests in the status, those that the operator itself recorded were sent.
* While too many CPUs are there, all have been asked for that may be, as far as that does not ask for too many.
* While a session is open, all that its events told of has been looked at.
* An OnDemand set holds the monitor only while its guest was at work within the last seconds, and never for long in one
  piece; a Persistent one always, once it could have it, or soon again where its sessions are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from typing_extensions import override

from unit.reconciler.model import Qemu
from unit.reconciler.standins import LOSS_SECONDS
from unit.reconciler.world import START, World
from vcpuset.controller import NEXT_TURN_SECONDS
from vcpuset.domain.assessment import PENDING_AFTER, TAKE_UP_TIME
from vcpuset.domain.guest import GuestCPUs
from vcpuset.domain.machine import Activity, Machine, Slot
from vcpuset.domain.requests import CPU, FIRST_PAUSE, cpu_of
from vcpuset.domain.resource import UID, BootVCPUs, Connection, Request, Unplug, VCPUSet
from vcpuset.domain.target import target_for
from vcpuset.qmp.monitors import EVENTS_TURN_SECONDS, TURN_SECONDS
from vcpuset.reconciler import POLL_SECONDS, ROUNDS
from vcpuset.reporter import PROGRESS_SECONDS
from vcpuset.runtime.workers import Done, Result

__all__ = ["LawfulWorld"]

AT_WORK_SECONDS = max(PENDING_AFTER, TAKE_UP_TIME).total_seconds() + POLL_SECONDS + 2 * NEXT_TURN_SECONDS
"""How long an OnDemand set may hold the monitor after the last sign of work."""

MOST_LOOKS = ROUNDS + 2
"""So often one pass may look at the machine, and once more for each slot that turned out to be taken."""

MOST_WRITES = ROUNDS + 2
"""So often one pass may write the status."""


@dataclass
class _Ask:
    """The last request for a CPU.

    at        when it was made; never in the future, though the clock may be set
    recorded  the time in its record
    attempts  how often it was made, as the record has it
    signs     how many signs of life the guest had given by then
    """

    at: datetime
    recorded: datetime
    operator: int
    attempts: int
    signs: int
    refused: bool = False


@dataclass(frozen=True)
class _Told:
    """What a guest said.

    about  the CPUs that there were when it spoke
    """

    process: int
    about: frozenset[CPU]
    online: int
    used_all: bool


class LawfulWorld(World):
    """A world with one machine and one set, in which every deed of the operator is judged."""

    def __init__(self, qemu: Qemu, *, vcpus: int | None) -> None:
        self.qemu = qemu
        self._asks: dict[CPU, _Ask] = {}
        self._seen: int | None = None
        self._shown: Machine | None = None
        self._working_on: VCPUSet | None = None
        self._disturbed = self._disturbed_in_pass = False
        self._seen_in_pass: set[int] = set()
        self._began = START
        self._looks_before = self._writes_before = 0
        self._process = qemu.process
        self._changes = self._news = 0
        self._about: frozenset[CPU] = frozenset()
        self._told: _Told | None = None
        self._used = 0
        self._calm = False
        self._at_work = 0.0
        self._set_back = self._clock_is_set = False
        self._cut_at = float("-inf")
        self._records: dict[tuple[CPU, datetime], int] = {}
        self._unsent: set[tuple[CPU, datetime]] = set()
        super().__init__()
        qemu.clock = lambda: self.wall
        self.machines["a.sock"] = qemu
        self.apply("web", vcpus=vcpus)

    def disturb(self) -> None:
        """Somebody else changed something, so what the operator has just seen does not hold any more."""
        self._disturbed = self._disturbed_in_pass = True

    @override
    def set_clock(self, seconds: float) -> None:
        """Nothing can have been asked for in the future, so a clock that is set back restarts the intervals."""
        super().set_clock(seconds)
        # Requests of the future count as made now, until a report of progress fixes their time.
        self._at_work = self.loop.now + (PROGRESS_SECONDS[-1] if seconds < 0 else 0)
        self._set_back |= seconds < 0
        self._clock_is_set = True
        for ask in self._asks.values():
            ask.at = min(ask.at, self.wall)

    @override
    def on_pass(self, uid: UID) -> None:
        """From here on the operator goes by what its cache holds."""
        self._working_on = self.cache.get(uid)
        self._disturbed = self._disturbed_in_pass = self._clock_is_set = False
        self._seen_in_pass = set()
        self._began = self.wall
        self._looks_before, self._writes_before = self.qemu.looks, len(self.api.writes)

    @override
    def on_result(self, uid: UID, result: Result | None) -> None:
        """Whether the operator could do what it wanted."""
        self._calm = isinstance(result, Done)
        if self._told is not None and self._told.about == self._about:
            if self._told.online > self._used:
                # The guest goes on to take up what was plugged.
                self._at_work = max(self._at_work, self.loop.now)
            self._used = self._told.online
        if isinstance(result, Done) and not self.qemu.settled:
            self._calm = False
            self._at_work = max(self._at_work, self.loop.now)

    @override
    def on_observe(self, qemu: Qemu, machine: Machine) -> None:
        """From here on the operator knows how many there are."""
        looks = self.qemu.looks - self._looks_before
        assert looks <= MOST_LOOKS + self.qemu.slots, "a pass looks and looks"
        if qemu.process != self._process:
            self._process, self._asks = qemu.process, {}
        if self._seen is not None and machine.vcpus < self._seen:
            self._at_work = max(self._at_work, self.loop.now)
        self._seen, self._shown = machine.vcpus, machine
        self._disturbed = False
        self._seen_in_pass.add(machine.vcpus)
        self._changes, self._news, self._about = qemu.changes, qemu.news, qemu.present
        self._asks = {cpu: ask for cpu, ask in self._asks.items() if cpu in qemu.present}
        for cpu, ask in self._asks.items():
            ask.refused = ask.refused or qemu.slot_of(cpu) not in qemu.latched
        if self._target() >= machine.vcpus:
            # Nothing is to be given back any more: who said no before may be asked afresh.
            self._asks = {cpu: ask for cpu, ask in self._asks.items() if not ask.refused}

    @override
    def on_plug(self, qemu: Qemu, slot: Slot) -> None:
        """Never above the target."""
        self._at_work = max(self._at_work, self.loop.now)
        self._judge_leave()
        if not self._disturbed:
            assert qemu.vcpus + slot.vcpus <= self._target(), "plugged above the target"

    @override
    def on_unplug(self, qemu: Qemu, slot: Slot) -> None:
        """Never more than is too many, never again too soon, never unrecorded."""
        self._at_work = max(self._at_work, self.loop.now)
        self._judge_leave()
        cpu = cpu_of(slot)
        surplus = qemu.vcpus - self._target()
        if not self._disturbed:
            leaving = {index for index in qemu.latched if self._counts_on(qemu, qemu.cpus[index])}
            # The guest may hold more requests than are wanted, if the target rose; another for the same CPU adds none.
            # That holds for what is on the book: whether the guest really has it nobody can know.
            on_book = {cpu_of(each) for each in self._spec().status.pending_unplugs if each.in_flight}
            repeated = slot.index in leaving or cpu in on_book
            more = qemu.threads if repeated else (len(leaving) + 1) * qemu.threads
            assert more <= surplus, f"asked for slot {slot.index} beside {leaving}, and {surplus} vCPUs are too many"

        recorded = {cpu_of(request): request for request in self.status().pending_unplugs}
        assert cpu in recorded, "asked for a CPU without a record"
        at = recorded[cpu].requested_at
        assert self._began <= at <= self.wall, "the record has an older time than this pass"
        self._unsent.discard((cpu, at))

        if (last := self._asks.get(cpu)) is not None and self._knows_of(qemu, cpu):
            unplug = self._spec().spec.unplug
            first = min(FIRST_PAUSE, timedelta(seconds=unplug.retry_seconds))
            pause = first if last.signs != qemu.signs else first * (1 << min(last.attempts - 1, 16))
            pause = min(pause, timedelta(seconds=unplug.retry_seconds))
            assert self.wall >= last.at + pause, "asked twice within the pause"
        if not qemu.legacy and not qemu.migrating:
            self._asks[cpu] = _Ask(at, at, self.operator_number, recorded[cpu].attempts, qemu.signs)

    def _judge_leave(self) -> None:
        """Whether anything may be done at all, by what was seen last."""
        assert not self._spec().spec.suspend, "a suspended set"
        assert self._shown is not None
        assert self._shown.run_state in {"running", "paused"}
        assert not self._shown.migrating

    @override
    def on_open(self, qemu: Qemu) -> None:
        """Events count from here on."""
        self._news = qemu.news

    @override
    def on_loss(self) -> None:
        """A new session is opened at once, or somewhat later if this happens often."""
        self._cut_at = self.loop.now
        self.qemu.refusals.clear()

    @override
    def restart_operator(self) -> None:
        """The successor has heard nothing."""
        self._used = 0
        self._unsent.clear()
        self.qemu.refusals.clear()
        super().restart_operator()

    @override
    def on_answer(self, qemu: Qemu, cpus: GuestCPUs) -> Callable[[], None]:
        """The guest speaks, and is heard some time later."""
        told = _Told(qemu.process, qemu.present, cpus.online, used_all=qemu.used == qemu.vcpus)
        qemu.signs += 1

        def heard() -> None:
            self._told = told

        return heard

    @override
    def on_write(self, before: VCPUSet, after: VCPUSet) -> None:
        """The status tells the truth and obeys the rules of kstatus."""
        assert len(self.api.writes) - self._writes_before < MOST_WRITES, "a pass writes and writes"
        status = after.status
        kinds = ["Ready", "Reconciling", "Stalled"]
        if self._spec().spec.guest_agent is not None:
            kinds.append("GuestAgentConnected")
        assert [condition.type for condition in status.conditions] == kinds
        true = {condition.type for condition in status.conditions[:3] if condition.status == "True"}
        assert len(true) <= 1, f"{true} are True at once"
        assert status.observed_generation == after.generation
        assert status.vcpus in {*self._seen_in_pass, before.status.vcpus}
        if "Ready" in true:
            assert self._seen_in_pass
            assert self._seen == after.spec.vcpus == status.vcpus
        self._judge_guest(before, after)
        self._judge_book(before, after)
        old = {condition.type: condition for condition in before.status.conditions}
        for condition in status.conditions:
            if condition.type in old and old[condition.type].status == condition.status:
                assert condition.last_transition_time == old[condition.type].last_transition_time

    @override
    def on_adopt(self, before: VCPUSet, count: int) -> None:
        """Only what was seen, and only where nothing else is declared."""
        assert before.spec.vcpus is None, "a count that stood was overwritten"
        assert not before.spec.suspend, "a suspended set"
        assert self._seen == before.status.vcpus
        assert self._seen is not None
        assert count == min(max(self._seen, before.spec.min_vcpus), before.spec.max_vcpus)

    def _judge_guest(self, before: VCPUSet, after: VCPUSet) -> None:
        """What the status says of the guest, the guest has said."""
        status, told = after.status, self._told
        ready, agent = status.ready, status.condition("GuestAgentConnected")
        assert ready is not None
        if agent is None:
            assert status.online_vcpus is None
            return
        assert status.online_vcpus in {None, before.status.online_vcpus, None if told is None else told.online}
        speaks = agent.status == "True"
        if ready.reason == "GuestCPUsOffline" or (ready.status == "True" and speaks):
            assert speaks
            assert told is not None
            assert self._seen is not None
            assert told.online == status.online_vcpus
            if ready.status == "True":
                assert told.online == self._seen, f"{told.online} of {self._seen} are used, and that is Ready"
                assert told.process == self._process or told.about == self._about
                assert told.used_all or told.about != self._about, "not all were used when the guest spoke"
            else:
                assert told.online < self._seen, "none is offline"

    def _judge_book(self, before: VCPUSet, after: VCPUSet) -> None:
        """The requests in the status are this machine's, and each CPU stands there once."""
        requests = after.status.pending_unplugs
        cpus = [cpu_of(request) for request in requests]
        assert len(cpus) == len(set(cpus)) <= self.qemu.slots
        known = set(before.status.pending_unplugs)
        for request in requests:
            if request not in known:
                self._at_work = max(self._at_work, self.loop.now)
                self._records.setdefault((cpu_of(request), request.requested_at), self._process)
                if request.requested_at == self.wall and request.answer is None and not self._set_back:
                    self._unsent.add((cpu_of(request), request.requested_at))
        ready = after.status.ready
        assert ready is not None
        if "Monitor" in ready.reason:
            # Not seen in this pass, or not to its end: the last report of a machine stands.
            assert requests == before.status.pending_unplugs
            return
        assert self._seen_in_pass
        assert after.status.machine_uuid == self.qemu.uuid or self._process != self.qemu.process
        if self._set_back and self.operator_number > 1:
            # Whoever was not there must believe the clock.
            return
        for request in requests:
            made_to = self._records.get((cpu_of(request), request.requested_at), self._process)
            assert made_to == self._process, f"slot {request.slot} was asked for in another QEMU"

    @override
    def run_due(self) -> None:
        """At rest again, all is as it should be."""
        super().run_due()
        self.judge_rest()

    def judge_rest(self) -> None:
        """Nothing is to be done at this moment: does the status tell the truth, and has the monitor who should?"""
        if "web" not in self.api.sets:
            return
        vcpuset, qemu = self.vcpuset(), self.qemu
        status, ready = vcpuset.status, vcpuset.status.ready
        shows = ready is not None and ready.status == "True" and ready.observed_generation == vcpuset.generation
        if shows and self._calm and self._changes == qemu.changes:
            assert qemu.vcpus == vcpuset.spec.vcpus == status.vcpus, "Ready with another count"
        if self.cache.get(vcpuset.uid) != vcpuset:
            return
        agent = status.condition("GuestAgentConnected")
        if shows and self._calm and agent is not None and agent.status == "True":
            assert self._told is not None
            assert self._told.online == status.online_vcpus, "the guest has said something else since"
        if self._calm and not self._changed_since:
            # Where `device_del` takes long, a pass that is out of time lends the monitor before the next one goes on.
            goes_on = self.qemu.seconds.get("device_del") and self.next_pass <= self.loop.now + NEXT_TURN_SECONDS
            if not self.guests_being_queried and not goes_on:
                unsent = [each for each in status.pending_unplugs if (cpu_of(each), each.requested_at) in self._unsent]
                assert unsent == [], "never sent, and said to be with the guest"
            self._judge_progress(vcpuset)
        on_demand = vcpuset.spec.connection is Connection.ON_DEMAND
        looks_again = self.next_pass <= self.loop.now + (NEXT_TURN_SECONDS if qemu.settled else POLL_SECONDS)
        for session in self.sessions:
            assert self._news == qemu.news or session.gathering or looks_again, "an event was not looked at"
            if on_demand:
                by_event_only = qemu.arch != "x86_64"
                seconds = vcpuset.spec.unplug.timeout_seconds if by_event_only else 0
                assert self.loop.now <= self._at_work + max(seconds, AT_WORK_SECONDS), "the monitor is held for nothing"
                turn = EVENTS_TURN_SECONDS if by_event_only else TURN_SECONDS
                assert self.loop.now <= session.opened_at + turn + POLL_SECONDS, "nobody else gets a turn"
        if not self.sessions and not on_demand and self._calm and qemu.reachable:
            assert self.loop.now <= self._cut_at + LOSS_SECONDS, "a Persistent set without its session"

    @property
    def _changed_since(self) -> bool:
        """Whether the machine is another than it was at the last look."""
        shown, now = self._shown, self.qemu.machine()
        return (
            shown is None
            or self._process != self.qemu.process
            or replace(shown, ost=None) != replace(now, ost=None)
            or shown.guest_accepts_unplugs != now.guest_accepts_unplugs
        )

    def _judge_progress(self, vcpuset: VCPUSet) -> None:
        """Whatever can be done has been done, and what is waited for will wake somebody."""
        machine, ready = self.qemu.machine(), vcpuset.status.ready
        target = target_for(vcpuset.spec, machine).count
        soon = self.loop.now + POLL_SECONDS + NEXT_TURN_SECONDS
        if ready is not None and ready.reason in {"Plugging", "Unplugging"}:
            waits = self.next_pass <= soon or self.guests_being_queried
            assert waits or machine.vcpus > target, f"{ready.reason}, and nobody looks"
        if vcpuset.spec.suspend or machine.activity is not Activity.CHANGEABLE or not machine.guest_accepts_unplugs:
            return
        if ready is not None and ready.reason == "Contested":
            return
        # A pass that has used up its time gives the monitor to others before the next one goes on.
        goes_on = self.next_pass <= self.loop.now + NEXT_TURN_SECONDS
        free = min((slot.vcpus for slot in machine.free), default=99)
        assert goes_on or machine.vcpus + free > target, "a CPU was not plugged"
        book = {cpu_of(each): each for each in vcpuset.status.pending_unplugs}
        with_guest = {cpu for cpu, each in book.items() if each.in_flight and cpu not in self.qemu.refusals}
        wanted = machine.vcpus - target - len(with_guest) * self.qemu.threads
        unplugging = {"Unplugging", "UnplugPending", "UnplugTimedOut"}
        if machine.vcpus > target and ready is not None and ready.reason in unplugging:
            assert self.next_pass <= self.loop.now + self._seconds_left(vcpuset), (
                "a time-out, or a repetition, is missed"
            )
        keep = vcpuset.spec.unplug.boot_vcpus is BootVCPUs.KEEP
        for slot in machine.unpluggable:
            fresh = cpu_of(slot) not in book and not (keep and slot.boot)
            # What comes while a pass sends requests is the next one's.
            later = self._disturbed_in_pass and self.next_pass <= soon
            assert not fresh or wanted < slot.vcpus or later, f"slot {slot.index} could be asked for, and nobody does"

    def _seconds_left(self, vcpuset: VCPUSet) -> float:
        """Until a time-out is to be reported or a request made again, unless the clock was set since the last look."""
        unplug, status = vcpuset.spec.unplug, vcpuset.status
        falls_due = [self._repeated_at(each, unplug) for each in status.pending_unplugs]
        if status.unplug_started_at is not None:
            falls_due.append(status.unplug_started_at + timedelta(seconds=unplug.timeout_seconds))
        left = [(at - self.wall).total_seconds() for at in falls_due if at > self.wall]
        return float("inf") if self._clock_is_set else min(left, default=float("inf")) + NEXT_TURN_SECONDS

    def _repeated_at(self, request: Request, unplug: Unplug) -> datetime:
        """When a request falls due; if the guest has given a sign of life since, that may be sooner or later."""
        ask, longest = self._asks.get(cpu_of(request)), timedelta(seconds=unplug.retry_seconds)
        if request.answer is not None or ask is None or ask.signs != self.qemu.signs:
            return request.requested_at + longest
        return request.requested_at + min(FIRST_PAUSE * (1 << min(request.attempts - 1, 16)), longest)

    def _counts_on(self, qemu: Qemu, cpu: CPU) -> bool:
        """Whether the operator must take it that this CPU, which the guest was asked for, will leave.

        Not one of the boot that the user has decided to keep since, once its request would have been repeated.
        """
        if not self._knows_of(qemu, cpu):
            return False
        unplug = self._spec().spec.unplug
        kept = unplug.boot_vcpus is BootVCPUs.KEEP and cpu[0].startswith("/machine/unattached/")
        pause = min(FIRST_PAUSE, timedelta(seconds=unplug.retry_seconds))
        return not kept or self.wall < self._asks[cpu].at + pause

    def _knows_of(self, qemu: Qemu, cpu: CPU) -> bool:
        """Whether the operator can know that the guest was asked for this CPU.

        One that comes after a crash tells the requests made to this QEMU by their times; if the clock was set back
        after QEMU had started, those look older than it.
        """
        ask = self._asks.get(cpu)
        if ask is None:
            return False
        return ask.operator == self.operator_number or not qemu.dated or ask.recorded >= qemu.since

    def _spec(self) -> VCPUSet:
        assert self._working_on is not None
        return self._working_on

    def _target(self) -> int:
        return target_for(self._spec().spec, self.qemu.machine()).count
