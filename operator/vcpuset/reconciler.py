"""One level-triggered pass: observe a machine, decide, act, observe again, report.

A pass knows nothing of what woke it: a changed spec, an event of QEMU, a timer and a restart of the operator are all
the same. What a successor must know, the unplug requests in flight, stands in the object's status and is written
before a request is made; everything else is read from the machine. So the operator may die at any point.

What is kept in memory only makes passes better, never right: the session while a guest works on requests (or always, if
the set says so), what the machine's `_OST` reports were before this process asked, and what the guest itself last said.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from secrets import token_hex

from vcpuset.domain.assessment import (
    Assessment,
    RequeuePolicy,
    assess,
    conflict,
    conflict_over_machine,
    contested,
    failure,
    plugging,
    terminating,
)
from vcpuset.domain.backoff import jittered
from vcpuset.domain.contest import Contest
from vcpuset.domain.errors import (
    APIError,
    CommandError,
    Conflict,
    CredentialsUnavailable,
    DeviceGone,
    InvalidMonitor,
    MachineUnsettled,
    MonitorError,
    MonitorUnreachable,
    ObjectGone,
    PermanentError,
    SlotTaken,
    TransientError,
    VCPUSetError,
)
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Answer, Machine, Ost
from vcpuset.domain.plan import Plan, Target, first_fit, plan, target_for
from vcpuset.domain.reasons import Reason
from vcpuset.domain.report import AGENT, conditions, is_progress, observed, opened_at
from vcpuset.domain.requests import CPU, answered, asked, carried_over, cpu_of, revived, still_open, withdrawn
from vcpuset.domain.resource import UID, Connection, Request, Status, TCPMonitor, UnixMonitor, Unsupported, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Cluster
from vcpuset.kube.recorder import Recorder
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Session
from vcpuset.runtime.claims import Claims
from vcpuset.runtime.logcontext import log_context
from vcpuset.runtime.workers import Done, Result, Retry
from vcpuset.runtime.workqueue import SLOW_SECONDS

__all__ = ["Reconciler"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How often a machine is looked at while its guest works on requests, or its CPUs move, should no event come."""

NEXT_TURN_SECONDS = 0.02
"""How soon a session is followed by the next one where a monitor is wanted for long. Others who wait are first."""

UNSETTLED_SECONDS = 5.0
"""For how long CPUs may come or go at each look before it is reported as a monitor that cannot be used.

QEMU shows a slot as free some milliseconds before the CPU drops out of `query-cpus-fast`; then comes its event.
"""

ROUNDS = 32
"""How often one pass asks for CPUs, if QEMU rejects them: for others in their place."""

ANNOUNCE_SECONDS = 0.5
"""A plug that takes longer is reported while it is under way. QEMU takes about 10 ms a vCPU."""

PROGRESS_SECONDS = (3.0, 10.0, 30.0)
"""How long after a status write mere progress is written: later and later while one change goes on.

A change that takes less than three seconds thus costs a fixed number of writes, however many CPUs it moves.
"""


@dataclass
class _SetState:
    """What this process remembers of one set.

    sent        the requests that this process made, with the slot's `_OST` report that stood before
    unsent      the requests that this process has recorded, or has tried to, and not sent: what was recorded before
    rejected    what QEMU said to those that it rejected
    heard       what the guest has answered; the status need not say so yet, and another session has not heard it
    written_at  loop time of the last status write
    progress    how many writes the change under way has cost for progress alone
    unsettled   loop time of the first look in a row that could not count the CPUs
    vcpus       the last count
    woken       CPUs whose guest may take requests now, since something has happened after theirs was made
    moved_at    loop time when a CPU was last seen to leave
    reset       when the machine was last reset, as far as a session has heard
    speechless  the guest's agent did not answer when it was last asked
    plugged_at  loop time when this process last plugged one, or the guest then took one up
    online      how many the guest used when it last said so
    process     the QEMU process, as far as the host tells
    contest     whether something else changes the machine
    tried       a pass has been to its end
    yielded_to  the older set that had another monitor of the same machine when this one last looked
    deferred    that set has been asked to look first, since it does not seem to have it any more
    since       address of the monitor and `Machine.since` of the QEMU that the status is about; None: this process has
                not brought it up to date
    """

    sent: dict[CPU, Ost | None] = field(default_factory=dict)
    unsent: dict[CPU, Request | None] = field(default_factory=dict)
    rejected: dict[CPU, CommandError] = field(default_factory=dict)
    heard: dict[CPU, Answer] = field(default_factory=dict)
    written_at: float = 0.0
    progress: int = 0
    unsettled: float | None = None
    vcpus: int = 0
    woken: set[CPU] = field(default_factory=set)
    moved_at: float | None = None
    reset: datetime | None = None
    speechless: bool = False
    plugged_at: float | None = None
    online: int = 0
    process: Hashable | None = None
    contest: Contest | None = None
    tried: bool = False
    yielded_to: UID | None = None
    deferred: bool = False
    since: tuple[Hashable, datetime | None] | None = None


class _ElderFirst(Exception):
    """An older set may have a monitor of the same machine, and is to look first."""


class Reconciler:
    """Brings the machine of a VCPUSet to its declared count, one pass at a time.

    The work queue hands a set to one pass at a time, so nothing here is locked.
    """

    def __init__(
        self,
        *,
        cache: Cache,
        cluster: Cluster,
        recorder: Recorder,
        monitors: Monitors,
        guests: Guests,
        enqueue: Callable[[UID], None],
        resync_seconds: float,
        clock: Callable[[], datetime],
        node_name: str | None = None,
    ) -> None:
        self._cache = cache
        self._cluster = cluster
        self._recorder = recorder
        self._monitors = monitors
        self._guests = guests
        self._enqueue = enqueue
        self._resync_seconds = resync_seconds
        self._clock = clock
        self._node_name = node_name
        self._claims: Claims[UID] = Claims()
        """On monitors."""
        self._machines: Claims[UID] = Claims()
        """On what the monitors lead to; each stands until the monitor leads elsewhere, or cannot be reached."""
        self._states: dict[UID, _SetState] = {}

    def changed(self, uid: UID) -> None:
        """Note that the cache has news of this set (or has dropped it); called for every such change."""
        # Before those who wait for its monitor: it may have a session to close.
        self._enqueue(uid)
        vcpuset = self._cache.get(uid)
        if vcpuset is None:
            for touched in self._claims.release(uid):
                self._enqueue(touched)
            self._release_machine(uid)
        elif not self._claims.has(uid, _address(vcpuset)):
            # Otherwise the claims of its last pass stand, the one on the socket's inode among them.
            self._claim(vcpuset, _address(vcpuset))
            self._release_machine(uid)

    async def reconcile(self, uid: UID) -> Result:
        """One pass. Raises nothing that it expects; what it returns says when to come back."""
        vcpuset = self._cache.get(uid) or self._cache.terminating(uid)
        if vcpuset is None or vcpuset.deleting:
            # Deleted, or another operator's now: the machine stays as it is.
            self._release_machine(uid)
            await self._guests.forget(uid)
            await self._monitors.forget(uid)
            # The deletion may have come while a pass was waiting for its socket, and claimed it after that.
            for touched in self._claims.release(uid):
                self._enqueue(touched)
        if vcpuset is None:
            self._states.pop(uid, None)
            return Done()
        fields = {"vcpuset": vcpuset.name, "node": self._node_name, "pass": token_hex(4)}
        with log_context(namespace=vcpuset.namespace, **fields):
            try:
                return await self._pass(vcpuset)
            finally:
                self._states.setdefault(uid, _SetState()).tried = True

    async def _pass(self, vcpuset: VCPUSet) -> Result:
        uid = vcpuset.uid
        try:
            assessment = await self._converge(vcpuset)
        except MachineUnsettled:
            # A CPU is just leaving, and its event is to come. What this pass has done is done; the next one sees what
            # came of it.
            return Done(requeue_after=POLL_SECONDS)
        except _ElderFirst:
            await self._monitors.release(uid)
            return Done(requeue_after=POLL_SECONDS)
        except ObjectGone:
            # The watch, or at the latest the sweep, will say the same. If not, it was no more than a passing 404.
            await self._monitors.release(uid)
            return Done(requeue_after=jittered(self._resync_seconds, 0.1))
        except Conflict as error:
            # Nothing is lost: the next pass starts from the machine and from the newest object. That may be long in
            # coming when the watch is broken, and others may want the monitor.
            await self._lend(vcpuset)
            return Retry(error)
        except APIError as error:
            # The same; but the API server can be away for long, and others may want the monitor.
            logger.warning("%s; retrying", error)
            await self._lend(vcpuset)
            return Retry(error, at_least=error.retry_after)
        if assessment.pace is not RequeuePolicy.HELD:
            await self._lend(vcpuset)
        elif vcpuset.spec.connection is Connection.ON_DEMAND and await self._monitors.end_turn(uid):
            # All that this session has heard is in the report; the next one shall miss as little as can be.
            return Done(requeue_after=NEXT_TURN_SECONDS)
        return self._come_back(assessment)

    async def _lend(self, vcpuset: VCPUSet) -> None:
        """Give other clients of the monitor their turn, unless the set keeps it for its events."""
        if vcpuset.spec.connection is Connection.ON_DEMAND:
            await self._monitors.release(vcpuset.uid)

    async def _converge(self, vcpuset: VCPUSet) -> Assessment:
        if vcpuset.deleting:
            return await self._report_unseen(vcpuset, terminating())
        if vcpuset.spec.guest_agent is None:
            await self._guests.forget(vcpuset.uid)
        try:
            session = await self._take_monitor(vcpuset)
            if isinstance(session, Assessment):
                await self._monitors.release(vcpuset.uid)
                self._release_machine(vcpuset.uid)
                return await self._report_unseen(vcpuset, session)
            try:
                return await self._bring_to_count(vcpuset, session)
            finally:
                self._remember_answers(vcpuset.uid, session)
        except (InvalidMonitor, CredentialsUnavailable, MonitorError, MachineUnsettled, CommandError) as error:
            if self._may_settle(vcpuset, error):
                raise
            # The last command may or may not have run: close, and look before anything is repeated.
            await self._monitors.release(vcpuset.uid)
            if isinstance(error, InvalidMonitor | CredentialsUnavailable | MonitorUnreachable):
                self._release_machine(vcpuset.uid)
            # The pass may have written since; its requests must not be written over.
            newest = self._cache.get(vcpuset.uid) or vcpuset
            return await self._report_unseen(newest, failure(error))

    def _remember_answers(self, uid: UID, session: Session) -> None:
        """The session may end with this pass, and what it has heard meanwhile is told to nobody else."""
        state, newest = self._states.get(uid), self._cache.get(uid)
        if state is None or newest is None:
            return
        for request in newest.status.pending_unplugs:
            if (told := session.answer(request.slot)) is not None:
                state.heard[cpu_of(request)] = told

    def _may_settle(self, vcpuset: VCPUSet, error: VCPUSetError) -> bool:
        state = self._states.setdefault(vcpuset.uid, _SetState())
        if not isinstance(error, MachineUnsettled):
            state.unsettled = None
            return False
        now = asyncio.get_running_loop().time()
        if state.unsettled is None:
            state.unsettled = now
        return now < state.unsettled + UNSETTLED_SECONDS

    async def _take_monitor(self, vcpuset: VCPUSet) -> Session | Assessment:
        """The session with the set's machine, or why this set may not have one."""
        # What stands at the address is looked up anew each time; the address itself is known without a look.
        if (holder := self._claims.conflicting_owner(vcpuset.uid, _address(vcpuset))) is not None:
            # Nor is it known any more what stands there: an inode of old may be another machine's by now.
            self._claim(vcpuset, _address(vcpuset))
            return self._yield_to(holder)
        try:
            endpoint_context = await self._monitors.resolve(vcpuset)
        except (InvalidMonitor, MonitorError):
            # The inode that was there is not this set's any more.
            self._claim(vcpuset, _address(vcpuset))
            raise
        with endpoint_context as endpoint:
            # A socket can have several names (hard links): the inode tells.
            self._claim(vcpuset, _address(vcpuset), endpoint.identity)
            if (holder := self._claims.conflicting_owner(vcpuset.uid)) is not None:
                return self._yield_to(holder)
            return await self._monitors.session(vcpuset.uid, endpoint)

    def _claim(self, vcpuset: VCPUSet, *keys: Hashable) -> None:
        for touched in self._claims.claim(vcpuset.uid, vcpuset.seniority, keys):
            self._enqueue(touched)

    def _claim_machine(
        self, vcpuset: VCPUSet, state: _SetState, session: Session, machine: Machine
    ) -> tuple[UID, str] | None:
        """The older set that has another monitor of this machine, and by what that is told; None: there is none.

        What is told by its uuid stays within a namespace: QEMU says what its uuid is, and whoever plays a QEMU can say
        the same. A process and one of its threads name one machine; the process alone does not, since it can have made
        the sockets of many, as libvirt does. A connection that is kept, and that QEMU shows on another one, is QEMU's.
        """
        uid, peer, thread = vcpuset.uid, session.peer, machine.first_thread
        state.process = peer.process
        evidence: dict[Hashable, str] = {}
        if thread is not None and peer.process is not None:
            evidence[peer.process, machine.uuid, thread] = "one process listens on both"
        if thread is not None and machine.uuid is not None:
            evidence[vcpuset.namespace, peer.host, machine.uuid, thread] = (
                f"both report UUID {machine.uuid} and the same host threads; if these are two machines, start each "
                "with its own -uuid"
            )
        shared = "QEMU reports the connections of both"
        if peer.link is not None and vcpuset.spec.connection is Connection.PERSISTENT:
            evidence[peer.link] = shared
        for link in machine.connections:
            # Not of a younger set: what QEMU says may take a machine from the set that names it, and from no other one.
            if (first := self._machines.first(link)) is not None and first < vcpuset.seniority:
                evidence[link] = shared
        for touched in self._machines.claim(uid, vcpuset.seniority, evidence):
            self._enqueue(touched)
        for key, words in evidence.items():
            holder = self._machines.conflicting_owner(
                uid, key, rival=lambda other: not self._differ(state.process, other)
            )
            if holder is not None:
                return holder, words
        return None

    def _differ(self, process: Hashable | None, other: UID) -> bool:
        """Whether another set's machine is known to be another process."""
        theirs = self._states[other].process
        return process is not None and theirs is not None and process != theirs

    def _release_machine(self, uid: UID) -> None:
        for touched in self._machines.release(uid):
            self._enqueue(touched)

    def _let_elder_look(self, vcpuset: VCPUSet, state: _SetState) -> None:
        """A set that had yielded does not take over before the older one has had its turn.

        Both come back at once when QEMU or the operator is started again; to act first would be to fight.
        """
        ready = vcpuset.status.ready
        if state.yielded_to is not None:
            if self._cache.get(state.yielded_to) is not None and not state.deferred:
                state.deferred = True
                self._enqueue(state.yielded_to)
                raise _ElderFirst
            state.yielded_to, state.deferred = None, False
        elif ready is not None and ready.reason == Reason.MONITOR_CONFLICT:
            for other in self._cache:
                if other.seniority < vcpuset.seniority and not self._states.get(other.uid, _SetState()).tried:
                    raise _ElderFirst

    def _yield_to(self, holder: UID) -> Assessment:
        return conflict(str(self._cache.get(holder) or holder))

    async def _bring_to_count(self, vcpuset: VCPUSet, session: Session) -> Assessment:
        """Observe, plan, act, observe again, report."""
        state = self._states.setdefault(vcpuset.uid, _SetState())
        machine = await self._observe(state, session)
        if (found := self._claim_machine(vcpuset, state, session, machine)) is not None:
            holder, evidence = found
            if state.yielded_to != holder:
                # What this set has done until now, the older one has to see.
                self._enqueue(holder)
            state.yielded_to, state.deferred = holder, False
            await self._monitors.release(vcpuset.uid)
            assessment = conflict_over_machine(str(self._cache.get(holder) or holder), evidence)
            return await self._report_unseen(vcpuset, assessment)
        self._let_elder_look(vcpuset, state)
        requests = self._known_requests(vcpuset, state, session, machine)
        blocked: CommandError | None = None
        # A pass has a budget of time, so that other sets have their turn: whoever uses it up is slow.
        loop = asyncio.get_running_loop()
        until = loop.time() + SLOW_SECONDS
        unfinished = False

        step = self._plan(vcpuset, state, machine, requests)
        step = self._paced(vcpuset, state, session, machine, step)
        if step.plug:
            vcpuset, machine, blocked = await self._plug(vcpuset, state, session, machine, requests, step.target, until)
            requests = still_open(requests, machine, self._clock())
            unfinished = machine.vcpus < step.target.count and blocked is None and loop.time() >= until
            if machine.vcpus >= step.target.count:
                # Another client has plugged what was missing, or more: that a slot was taken blocks nothing any more.
                blocked = None
        rounds = ROUNDS
        while rounds and step.ask and blocked is None:
            now_asked = {cpu_of(slot) for slot in step.ask}
            vcpuset, requests, blocked = await self._ask(vcpuset, state, session, machine, requests, step)
            # Whatever else there is to ask for has come meanwhile, and can wait for the next pass.
            rounds = rounds - 1 if now_asked & state.rejected.keys() and loop.time() < until else 0
            machine = await self._observe(state, session)
            requests = still_open(requests, machine, self._clock())
            step = self._plan(vcpuset, state, machine, requests)

        requests = _still_wanted(vcpuset, machine, requests)
        unsent = loop.time() >= until and blocked is None and any(cpu_of(slot) in state.unsent for slot in step.ask)
        assert state.contest is not None
        leaving = [request.slot for request in requests if request.in_flight]
        state.contest.left(machine, leaving, unfinished=unfinished or unsent)
        if unfinished:
            # The next pass goes on at once, after those of the other sets.
            assessment = replace(self._plugging(vcpuset, state, machine, step.target), due=self._clock())
            await self._report(vcpuset, machine, requests, assessment)
            return assessment
        assessment = self._assess(vcpuset, state, machine, requests, blocked)
        if unsent:
            # The same; until all have been asked for, what this one has written says it best.
            return replace(assessment, pace=RequeuePolicy.HELD, due=self._clock())
        if step.ask and blocked is None:
            # QEMU rejects one after the other, or its CPUs are others than before. The next pass goes on.
            return replace(assessment, due=self._clock() + timedelta(seconds=POLL_SECONDS))
        guest: GuestReport | None = None
        may_be_asked = vcpuset.spec.guest_agent is not None and machine.run_state == "running"
        if may_be_asked and (machine.vcpus <= step.target.count or assessment.pace is RequeuePolicy.STEADY):
            # Not while the guest gives CPUs back: it has enough to do, and each answer would be out of date.
            guest = self._guests.ask(vcpuset, machine, surplus=machine.vcpus > step.target.count)
            self._note_progress(state, guest)
            if self._speaks_again(state, guest) and (still := {cpu_of(request) for request in requests}):
                # Its requests are due at once; nothing else would bring the next pass so soon.
                state.woken |= still
                self._enqueue(vcpuset.uid)
            if guest is None and machine.vcpus == vcpuset.spec.vcpus:
                # Nothing is said of these CPUs before the guest has spoken, or has failed to. Either wakes.
                return assessment
            assessment = self._assess(vcpuset, state, machine, requests, blocked, guest)
        await self._report(vcpuset, machine, requests, assessment, guest)
        return assessment

    def _paced(self, vcpuset: VCPUSet, state: _SetState, session: Session, machine: Machine, step: Plan) -> Plan:
        """The plan, or none while a contested machine is not to be changed."""
        now = asyncio.get_running_loop().time()
        contest = state.contest = state.contest or Contest(self._resync_seconds)
        qemu = (session.peer.process, machine.first_thread, machine.uuid, machine.since)
        contest.observed(
            (vcpuset.generation, qemu),
            machine,
            now,
            wrong=machine.vcpus != step.target.count and not vcpuset.spec.suspend,
            reported=self._reported(vcpuset) == Reason.CONTESTED,
        )
        if not step.plug and not step.ask:
            return step
        if not contest.may_correct(now):
            return Plan(step.target)
        contest.corrects(now)
        return step

    async def _observe(self, state: _SetState, session: Session) -> Machine:
        machine = await session.observe()
        state.unsettled = None
        if machine.vcpus < state.vcpus:
            state.moved_at = asyncio.get_running_loop().time()
        state.vcpus = machine.vcpus
        return machine

    def _note_progress(self, state: _SetState, guest: GuestReport | None) -> None:
        """A guest that goes on to take up what was plugged has not left the rest offline."""
        if guest is not None and guest.cpus is not None:
            if guest.cpus.online > state.online and state.plugged_at is not None:
                state.plugged_at = asyncio.get_running_loop().time()
            state.online = guest.cpus.online

    def _speaks_again(self, state: _SetState, guest: GuestReport | None) -> bool:
        """Whether the guest's agent answers and did not when it was asked before."""
        if guest is None:
            return False
        before, state.speechless = state.speechless, guest.cpus is None
        return before and not state.speechless

    def _known_requests(
        self, vcpuset: VCPUSet, state: _SetState, session: Session, machine: Machine
    ) -> tuple[Request, ...]:
        """The requests in the status that are still open, with what the guest has answered since."""
        # Times of the clock tell only what an earlier process has left: the clock may be set.
        # Another monitor of the same QEMU has another socket: by that nothing can be told.
        known = state.since is not None and state.since[0] == _address(vcpuset)
        same = state.since == (_address(vcpuset), machine.since) if known else None
        present = {cpu_of(slot) for slot in machine.occupied}
        state.unsent = {cpu: earlier for cpu, earlier in state.unsent.items() if cpu in present}
        status = replace(vcpuset.status, pending_unplugs=withdrawn(vcpuset.status.pending_unplugs, state.unsent))
        requests = carried_over(status, machine, self._clock(), same=same)
        # A CPU that is gone never comes back as the same: its entries would only grow the book.
        still_there = {cpu_of(request) for request in requests}
        state.sent = {cpu: report for cpu, report in state.sent.items() if cpu in still_there}

        def answer(request: Request) -> Answer | None:
            cpu = cpu_of(request)
            if cpu in state.rejected:
                return Answer.REJECTED
            told = session.answer(request.slot)
            # A report that stood before this process asked is about something older. When an earlier process asked,
            # none can be dated, so none counts but that the guest is at work: whatever came of it would replace that.
            report = (machine.ost or {}).get(request.slot)
            if told is None and report is not None:
                earlier = cpu not in state.sent
                if report.answer is Answer.IN_PROGRESS if earlier else report != state.sent[cpu]:
                    told = report.answer
            return told or state.heard.get(cpu)

        requests = answered(requests, answer)
        state.heard = {cpu_of(request): request.answer for request in requests if request.answer is not None}
        if (reset_at := session.take_reset()) is not None:
            # The guest that had these requests is gone, and another one boots.
            state.reset = self._at(reset_at)
            state.woken |= still_there
        state.woken = (state.woken | revived(status.pending_unplugs, requests)) & still_there
        requests = _still_wanted(vcpuset, machine, requests)
        refused = {cpu_of(request) for request in requests if not request.in_flight}
        state.rejected = {cpu: error for cpu, error in state.rejected.items() if cpu in refused}
        return requests

    async def _plug(
        self,
        vcpuset: VCPUSet,
        state: _SetState,
        session: Session,
        machine: Machine,
        requests: Sequence[Request],
        target: Target,
        until: float,
    ) -> tuple[VCPUSet, Machine, CommandError | None]:
        """Fill free slots until the target is reached or the time is up; if that takes long, say so meanwhile."""
        filling = asyncio.ensure_future(self._fill(vcpuset, state, session, machine, target, until))
        announcement, work = await asyncio.gather(
            self._announce_plug(vcpuset, state, machine, requests, target, filling), filling, return_exceptions=True
        )
        state.plugged_at = asyncio.get_running_loop().time()
        for outcome in (work, announcement):
            if isinstance(outcome, BaseException):
                raise outcome
        assert isinstance(announcement, VCPUSet)
        assert isinstance(work, tuple)
        machine, blocked = work
        return announcement, machine, blocked

    async def _announce_plug(
        self,
        vcpuset: VCPUSet,
        state: _SetState,
        machine: Machine,
        requests: Sequence[Request],
        target: Target,
        filling: asyncio.Future[tuple[Machine, CommandError | None]],
    ) -> VCPUSet:
        reported = self._reported(vcpuset)
        if reported in {Reason.PLUGGING, Reason.HOTPLUG_UNSUPPORTED}:
            # A repeated attempt; if it ends as the one before, nothing is to be written at all.
            return vcpuset
        if reported != Reason.CONVERGED:
            # Nothing that the status says of this generation is wrong, and what comes of the plug is a better report.
            await asyncio.wait({filling}, timeout=ANNOUNCE_SECONDS)
            if filling.done():
                return vcpuset
        # With this machine's uuid go this machine's requests, not those that the status has of another one.
        return await self._report(vcpuset, machine, requests, self._plugging(vcpuset, state, machine, target))

    async def _fill(
        self, vcpuset: VCPUSet, state: _SetState, session: Session, machine: Machine, target: Target, until: float
    ) -> tuple[Machine, CommandError | None]:
        loop = asyncio.get_running_loop()
        taken: set[int] = set()
        blocked: CommandError | None = None
        while chosen := first_fit(machine.free, target.count - machine.vcpus, taken):
            for slot in chosen:
                if self._superseded(vcpuset) or loop.time() >= until:
                    # Hundreds take seconds, and it may be another owner's by now, or fewer may be wanted: what this
                    # pass then reports is refused. The next one starts from the newest object.
                    return await self._observe(state, session), blocked
                try:
                    await session.plug(slot)
                    blocked = None
                except SlotTaken as error:
                    # Another client was faster: observe again, another free slot does as well.
                    taken.add(slot.index)
                    blocked = error
                    break
                except CommandError as error:
                    return await self._observe(state, session), error
            machine = await self._observe(state, session)
            if blocked is None:
                break
        return machine, blocked

    async def _ask(
        self,
        vcpuset: VCPUSet,
        state: _SetState,
        session: Session,
        machine: Machine,
        requests: Sequence[Request],
        step: Plan,
    ) -> tuple[VCPUSet, tuple[Request, ...], CommandError | None]:
        """Record the requests, then send them."""
        before = {cpu_of(request): request for request in requests}
        with_guest = {cpu for cpu, request in before.items() if request.in_flight}
        if not before:
            # What the status says of an earlier start is about requests that were never sent.
            vcpuset = replace(vcpuset, status=replace(vcpuset.status, unplug_started_at=None))
        requests = asked(requests, step.ask, self._clock(), state.woken)
        # The record comes before the request, since a successor must not send it twice. Whatever ends this pass (the
        # record may be stored although its write fails), what was not sent is known.
        state.unsent |= {cpu_of(slot): before.get(cpu_of(slot)) for slot in step.ask}
        assessment = self._assess(vcpuset, state, machine, requests, None)
        vcpuset = await self._report(vcpuset, machine, requests, assessment, must=True)
        blocked: CommandError | None = None
        loop = asyncio.get_running_loop()
        until = loop.time() + SLOW_SECONDS
        for slot in step.ask:
            if self._superseded(vcpuset) or loop.time() >= until:
                # The next pass starts from the newest object; fewer may be too many by then, or none.
                break
            cpu = cpu_of(slot)
            del state.unsent[cpu]
            state.rejected.pop(cpu, None)
            state.heard.pop(cpu, None)
            state.woken.discard(cpu)
            state.sent[cpu] = (machine.ost or {}).get(slot.index)
            try:
                await session.unplug(slot)
            except DeviceGone:
                continue
            except TransientError as error:
                # The guest is not up, or a migration began: neither this request nor the rest was made.
                state.unsent[cpu] = before.get(cpu)
                blocked = error
                break
            except CommandError as error:
                # That a repetition is refused says nothing of the request that the guest has already; only what can
                # never succeed cannot have been taken before.
                if cpu not in with_guest or isinstance(error, PermanentError):
                    state.rejected[cpu] = error
        requests = answered(requests, lambda request: Answer.REJECTED if cpu_of(request) in state.rejected else None)
        return vcpuset, withdrawn(requests, state.unsent), blocked

    def _superseded(self, vcpuset: VCPUSet) -> bool:
        """Whether the set has gone, or declares something else, since this pass began."""
        newest = self._cache.get(vcpuset.uid)
        return newest is None or newest.generation != vcpuset.generation

    def _plan(self, vcpuset: VCPUSet, state: _SetState, machine: Machine, requests: Sequence[Request]) -> Plan:
        moved = self._at(state.moved_at)
        return plan(vcpuset.spec, machine, requests, now=self._clock(), woken=state.woken, moved=moved)

    def _assess(
        self,
        vcpuset: VCPUSet,
        state: _SetState,
        machine: Machine,
        requests: Sequence[Request],
        blocked: CommandError | None,
        guest: GuestReport | None = None,
    ) -> Assessment:
        now = self._clock()
        target = target_for(vcpuset.spec, machine)
        assessment = assess(
            vcpuset.spec,
            machine,
            target,
            requests,
            started=opened_at(vcpuset.status, vcpuset.generation, requests, machine.vcpus - target.count, now),
            blocked=blocked or next(iter(state.rejected.values()), None),
            reported=self._reported(vcpuset),
            now=now,
            woken=state.woken,
            moved=self._at(state.moved_at),
            reset=state.reset,
            guest=guest,
            plugged=self._at(state.plugged_at),
        )
        return assessment if blocked is not None else self._or_contested(vcpuset, state, machine, assessment)

    def _plugging(self, vcpuset: VCPUSet, state: _SetState, machine: Machine, target: Target) -> Assessment:
        return self._or_contested(vcpuset, state, machine, plugging(vcpuset.spec, machine, target))

    def _or_contested(self, vcpuset: VCPUSet, state: _SetState, machine: Machine, assessment: Assessment) -> Assessment:
        if state.contest is not None and state.contest.contested:
            return contested(assessment, vcpuset.spec, machine, state.contest)
        return assessment

    def _at(self, loop_time: float | None) -> datetime | None:
        """A loop time as a time of the clock, which may have been set since."""
        if loop_time is None:
            return None
        return self._clock() - timedelta(seconds=asyncio.get_running_loop().time() - loop_time)

    def _reported(self, vcpuset: VCPUSet) -> str | None:
        """The reason that the status gives for this generation."""
        ready = vcpuset.status.ready
        return ready.reason if ready is not None and ready.observed_generation == vcpuset.generation else None

    async def _report_unseen(self, vcpuset: VCPUSet, assessment: Assessment) -> Assessment:
        """Report without an observation: the counts and requests of the last one stand."""
        await self._report(vcpuset, None, vcpuset.status.pending_unplugs, assessment)
        return assessment

    async def _report(
        self,
        vcpuset: VCPUSet,
        machine: Machine | None,
        requests: Sequence[Request],
        assessment: Assessment,
        guest: GuestReport | None = None,
        *,
        must: bool = False,
    ) -> VCPUSet:
        """Bring the status up to date if it is not; returns the set as it stands now.

        must  write progress too, instead of leaving it to a later pass
        """
        now = self._clock()
        surplus = 0 if machine is None else machine.vcpus - target_for(vcpuset.spec, machine).count
        started = opened_at(vcpuset.status, vcpuset.generation, requests, surplus, now)
        status = observed(vcpuset, machine, requests, started, guest)
        status = replace(status, conditions=conditions(vcpuset, assessment, machine, guest, now))
        state = self._states.setdefault(vcpuset.uid, _SetState())
        since = state.since if machine is None else (_address(vcpuset), machine.since)
        if status == vcpuset.status:
            state.since = since
            return vcpuset
        loop_time = asyncio.get_running_loop().time()
        progress = is_progress(vcpuset.status, status, assessment.pace)
        if progress and not must:
            pause = PROGRESS_SECONDS[min(state.progress, len(PROGRESS_SECONDS) - 1)]
            if loop_time < state.written_at + pause:
                return vcpuset
        with self._cache.expecting(vcpuset.uid, status):
            written = await self._cluster.write_status(vcpuset, status)
            # It may have gone meanwhile: the watch can tell that before this answer comes. And the answer can be the
            # first to show a field that the watch leaves out, since it began before the definition was upgraded.
            known = self._cache.get(vcpuset.uid) or self._cache.terminating(vcpuset.uid)
            if known is not None and self._cache.put(written):
                self._enqueue(vcpuset.uid)
        state.written_at, state.since = loop_time, since
        state.progress = state.progress + 1 if progress else 0
        self._announce(written, vcpuset.status, assessment)
        return written

    def _announce(self, vcpuset: VCPUSet, before: Status, assessment: Assessment) -> None:
        """Say once, in the log and as an Event, what has changed; not each time that it is tried."""
        old, new = _facts(before), _facts(vcpuset.status)
        status = vcpuset.status
        # So soon done that nothing was said meanwhile.
        resized = status.observed_generation != before.observed_generation and status.vcpus != before.vcpus
        if old[:3] != new[:3] or resized:
            level = logging.WARNING if assessment.event_type == "Warning" else logging.INFO
            logger.log(level, "%s: %s", assessment.reason, assessment.message)
            self._recorder.record(
                vcpuset,
                type=assessment.event_type,
                reason=assessment.reason,
                action="Reconcile",
                note=assessment.message,
            )
        agent = status.condition(AGENT)
        if agent is not None and agent.status != "Unknown" and old[3:] != new[3:]:
            good = agent.status == "True"
            logger.log(logging.INFO if good else logging.WARNING, "GuestAgent%s: %s", agent.reason, agent.message)
            self._recorder.record(
                vcpuset,
                type="Normal" if good else "Warning",
                reason=f"GuestAgent{agent.reason}",
                action="AskGuest",
                note=agent.message,
            )

    def _come_back(self, assessment: Assessment) -> Result:
        match assessment.pace:
            case RequeuePolicy.RETRY:
                return Retry(VCPUSetError(f"{assessment.reason}: {assessment.message}"))
            case RequeuePolicy.HELD | RequeuePolicy.WATCHED:
                seconds = POLL_SECONDS
            case RequeuePolicy.STEADY:
                seconds = jittered(self._resync_seconds, 0.1)
        if assessment.due is not None:
            seconds = min(seconds, max(0.0, (assessment.due - self._clock()).total_seconds()))
        return Done(requeue_after=seconds)


def _still_wanted(vcpuset: VCPUSet, machine: Machine, requests: tuple[Request, ...]) -> tuple[Request, ...]:
    """Without the refused ones if nothing is to be given back (any more): who said no may be asked afresh."""
    if machine.vcpus > target_for(vcpuset.spec, machine).count:
        return requests
    return tuple(request for request in requests if request.in_flight)


def _facts(status: Status) -> list[tuple[str, str]]:
    """What of each condition is worth an Event when it changes."""
    return [(condition.reason, condition.status) for condition in status.conditions]


def _address(vcpuset: VCPUSet) -> tuple[str, ...]:
    """The monitor's address as the set spells it; known also while nothing is there."""
    match vcpuset.spec.monitor:
        case UnixMonitor(path):
            return ("unix", vcpuset.namespace, path)
        case TCPMonitor(host, port, tls):
            # As TCPEndpoint.identity has it.
            return ("tcp", host, str(port), "" if tls is None else vcpuset.namespace)
        case Unsupported():
            # Nobody else's: it holds no monitor.
            return ("unsupported", vcpuset.uid)
