"""One level-triggered pass: observe a machine, plan, plug or request unplugs, observe again, report.

A pass does not know what triggered it: a changed spec, an event of QEMU, a timer and a restart of the operator are all
the same. What a successor must know, the unplug requests in flight, is in the object's status and is written before a
request is sent; everything else is read from the machine. So the operator may crash at any point.

Other parts: `controller` (when a pass runs), `ownership` (which of two sets has a monitor), `reporter` (status,
Events), `memory` (what passes leave to later ones), and in `domain` the values: `Findings` → `Plan` → `Assessment`, and
the `Ledger` of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

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
    with_pod,
)
from vcpuset.domain.errors import (
    CommandError,
    CredentialsUnavailable,
    DeviceGone,
    InvalidMonitor,
    MachineUnsettled,
    MonitorError,
    MonitorUnreachable,
    PermanentError,
    SlotTaken,
    TransientError,
    VCPUSetError,
)
from vcpuset.domain.findings import Findings
from vcpuset.domain.machine import Machine, Slot
from vcpuset.domain.plan import Plan, first_fit, plan
from vcpuset.domain.pod import PodFindings
from vcpuset.domain.reasons import Reason
from vcpuset.domain.requests import cpu_of, requested
from vcpuset.domain.resource import UID, Request, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.pods import Pods
from vcpuset.memory import Memory
from vcpuset.ownership import Ownership, address_of
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Session
from vcpuset.reporter import Reporter
from vcpuset.runtime.workqueue import SLOW_SECONDS

__all__ = ["POLL_SECONDS", "Later", "Pass", "Services"]

POLL_SECONDS = 1.0
"""How often a machine is observed while its guest works on requests, or CPUs come or go, if no event arrives."""

ROUNDS = 32
"""How many times one pass requests unplugs, if QEMU rejects requests and others are sent instead."""

ANNOUNCE_SECONDS = 0.5
"""A plug that takes longer is reported while it is in progress. QEMU takes about 10 ms per vCPU."""


@dataclass(frozen=True)
class Services:
    """What the passes of all sets share.

    enqueue      schedules a pass for a set
    others_wait  whether other sets wait for a pass
    """

    cache: Cache
    reporter: Reporter
    monitors: Monitors
    guests: Guests
    pods: Pods
    ownership: Ownership
    enqueue: Callable[[UID], None]
    others_wait: Callable[[], bool]
    clock: Callable[[], datetime]


class Later(Exception):
    """This pass ends without a report; the next one follows soon."""


class Pass:
    """One pass over one set.

    vcpuset   the set at the start of this pass, or as last written
    session   with its monitor, once that is open
    machine   as last observed
    pod       what its pod allows; None: the set names none
    until     loop time after which the rest of the changes is left to the next pass, so that other sets get their turn
    """

    session: Session
    machine: Machine
    until: float
    pod: PodFindings | None = None
    blocked: CommandError | None = None
    """Why QEMU did not do what this pass wanted; None: it did, or nothing was wanted."""

    def __init__(self, services: Services, vcpuset: VCPUSet, memory: Memory) -> None:
        self.services = services
        self.vcpuset = vcpuset
        self.memory = memory
        self.uid = vcpuset.uid
        self.ledger = memory.ledger
        self.contest = memory.contest
        self.loop = asyncio.get_running_loop()

    async def run(self) -> Assessment:
        """Raises Later, and APIError if the status could not be written."""
        if self.vcpuset.deleting:
            return await self._report(terminating())
        if self.vcpuset.spec.guest_agent is None:
            await self.services.guests.forget(self.uid)
        try:
            if (owner := await self._open()) is not None:
                await self.services.monitors.release(self.uid)
                self.services.ownership.release_machine(self.uid)
                return await self._report(conflict(self._name(owner)))
            try:
                return await self._converge()
            finally:
                # The session may end with this pass, and what it has received is not kept elsewhere.
                self.ledger.hear(self.session.answer)
        except (InvalidMonitor, CredentialsUnavailable, MonitorError, MachineUnsettled, CommandError) as error:
            return await self._report(await self._failed(error))

    async def _open(self) -> UID | None:
        """Open a session with the set's monitor, or use the kept one; returns the older set that has the monitor."""
        ownership = self.services.ownership
        if (owner := ownership.owner_of_address(self.vcpuset)) is not None:
            return owner
        try:
            resolved = await self.services.monitors.resolve(self.vcpuset)
        except (InvalidMonitor, MonitorError):
            # The inode that was found there before is no longer this set's.
            ownership.claim_monitor(self.vcpuset)
            raise
        with resolved as endpoint:
            if (owner := ownership.claim_monitor(self.vcpuset, endpoint.identity)) is not None:
                return owner
            self.session = await self.services.monitors.session(self.uid, endpoint)
        return None

    async def _converge(self) -> Assessment:
        """Observe, plan, act, observe again, report."""
        self._note(await self.session.observe())
        ownership = self.services.ownership
        if (found := ownership.claim_machine(self.vcpuset, self.session.peer, self.machine)) is not None:
            owner, evidence = found
            await self.services.monitors.release(self.uid)
            return await self._report(conflict_over_machine(self._name(owner), evidence))
        if ownership.older_comes_first(self.vcpuset):
            await self.services.monitors.release(self.uid)
            raise Later
        self._hear()
        self.pod = await self.services.pods.follow(self.vcpuset, self._findings())
        findings = self._findings()
        step = self._unless_contested(findings, plan(findings))
        # Not from the start of the pass: a monitor that is slow to observe would leave no time for any change.
        self.until = self.loop.time() + SLOW_SECONDS
        if step.plug or step.unplug:
            await (self._plug(findings) if step.plug else self._unplug(step.unplug))
            findings = self._findings()
        out_of_time = self.blocked is None and self.loop.time() >= self.until
        rest = plan(findings) if self.blocked is None and (out_of_time or step.unplug) else Plan()
        unfinished = out_of_time and bool((step.plug and rest.plug) or (step.unplug and rest.unplug))
        self.contest.left(self.machine, [each.slot for each in findings.in_flight], unfinished=unfinished)
        if unfinished and rest.plug:
            # The next pass continues at once, after those of the other sets.
            going_on = self._or_contested(plugging(findings), findings)
            return await self._report(replace(going_on, due=findings.now), findings)
        assessment = self._assess(findings)
        if unfinished or (step.plug and self.blocked is None and self.services.others_wait()):
            # Continue likewise. What was reported before the requests were sent still holds; and the report of a plug
            # needs the API server, so other machines come first.
            return replace(assessment, policy=RequeuePolicy.HOLD, due=findings.now)
        if step.unplug and rest.unplug:
            # QEMU rejects them one by one, or the CPUs have changed. The next pass continues.
            return replace(assessment, due=findings.now + timedelta(seconds=POLL_SECONDS))
        return await self._report_with_guest(assessment, findings)

    def _note(self, machine: Machine) -> None:
        """Record an observation. A request whose CPU is gone has been carried out."""
        self.machine = machine
        self.memory.observed(machine, self.loop.time())
        if self.ledger.observe(self.vcpuset.status, address_of(self.vcpuset), machine, self.services.clock()):
            self.memory.carried_out = True

    def _hear(self) -> None:
        """Record what the guest has answered since the last pass."""
        self.ledger.hear(self.session.answer, self.machine)
        if (reset_at := self.session.take_reset()) is not None:
            # The guest with these requests is gone, and a new one boots.
            self.memory.reset = self._at(reset_at)
            self.ledger.hurry_up()

    # --- plug -------------------------------------------------------------------------------------------------------

    async def _plug(self, findings: Findings) -> None:
        """Plug CPUs until the target or the deadline is reached; if that takes long, report it meanwhile."""
        filling = asyncio.ensure_future(self._fill(findings.plug_to))
        announcing = asyncio.ensure_future(self._announce_plug(findings, filling))
        await asyncio.gather(filling, announcing, return_exceptions=True)
        self.memory.plugged_at = self.loop.time()
        filling.result()
        announcing.result()
        if self.machine.vcpus >= findings.plug_to:
            # Another client has plugged what was missing, or more: a taken slot no longer blocks anything.
            self.blocked = None

    async def _fill(self, target: int) -> None:
        taken: set[int] = set()
        while chosen := first_fit(self.machine.free, target - self.machine.vcpus, taken):
            self.blocked = None
            for slot in chosen:
                if self._stops(self.until):
                    break
                try:
                    # What the guest does with a CPU is only observed through its agent.
                    await self.session.plug(slot, silently=self.vcpuset.spec.guest_agent is None)
                    self.memory.carried_out = True
                except CommandError as error:
                    self.blocked = error
                    break
            self._note(await self.session.recount(self.machine))
            if not isinstance(self.blocked, SlotTaken) or self._stops(self.until):
                return
            # Another client was faster: use another free slot.
            taken.add(slot.index)

    async def _announce_plug(self, findings: Findings, filling: asyncio.Future[None]) -> None:
        if findings.reported in {Reason.PLUGGING, Reason.HOTPLUG_UNSUPPORTED}:
            # A repeated attempt; if it ends like the one before, nothing has to be written.
            return
        if findings.reported != Reason.CONVERGED:
            # The status is not wrong about this generation, and the result of the plug is a better report.
            await asyncio.wait({filling}, timeout=ANNOUNCE_SECONDS)
            if filling.done():
                return
        await self._report(self._or_contested(plugging(findings), findings), findings)

    # --- unplug -----------------------------------------------------------------------------------------------------

    async def _unplug(self, slots: tuple[Slot, ...]) -> None:
        """Record the requests and send them; for each that QEMU rejects, record and send another one."""
        for _ in range(ROUNDS):
            rejected = await self._request(slots)
            self._note(await self.session.recount(self.machine))
            # Anything else to request is new, and can wait for the next pass.
            if self.blocked is not None or not rejected or self.loop.time() >= self.until:
                return
            if not (slots := plan(self._findings()).unplug):
                return

    async def _request(self, slots: tuple[Slot, ...]) -> bool:
        """Returns whether QEMU rejected any of the requests."""
        now = self.services.clock()
        requests = requested(self.ledger.requests, slots, now, self.ledger.early)
        # The record is written before the request is sent, because a successor must not send it twice.
        findings = self._findings(requests, now)
        await self._report(self._assess(findings), findings, must=True)
        # Not from before the record: an API server that is slow to write it would leave no time for any request.
        until = self.loop.time() + SLOW_SECONDS
        recorded = {cpu_of(request): request for request in requests}
        rejected = False
        for slot in slots:
            if self._stops(until):
                break
            request, with_guest = recorded[cpu_of(slot)], self.ledger.with_guest(slot)
            withdraw = self.ledger.send(request, (self.machine.ost or {}).get(slot.index))
            try:
                await self.session.unplug(slot)
            except DeviceGone:
                continue
            except TransientError as error:
                # The guest is not ready, or a migration began: QEMU accepted neither this request nor the rest.
                withdraw()
                self.blocked = error
                break
            except CommandError as error:
                # A rejected repetition does not void the request that the guest already has; but after a permanent
                # error QEMU cannot have accepted the first one either.
                if not with_guest or isinstance(error, PermanentError):
                    self.ledger.reject(request, error)
                    rejected = True
        return rejected

    def _stops(self, until: float) -> bool:
        """Whether the rest is left to the next pass: the set has gone or declares something else, or time is up."""
        newest = self.services.cache.get(self.uid)
        return newest is None or newest.generation != self.vcpuset.generation or self.loop.time() >= until

    # --- what is known, what it means, what is reported -------------------------------------------------------------

    def _findings(self, about_to_send: tuple[Request, ...] | None = None, now: datetime | None = None) -> Findings:
        """What this pass knows now, or will know once these requests are recorded."""
        vcpuset, memory, ledger = self.vcpuset, self.memory, self.ledger
        found = Findings(
            spec=vcpuset.spec,
            machine=self.machine,
            now=now or self.services.clock(),
            reported=vcpuset.status.reason_for(vcpuset.generation),
            blocked=self.blocked or ledger.rejection,
            early=ledger.early,
            moved=self._at(memory.moved_at),
            reset=memory.reset,
            plugged=self._at(memory.plugged_at),
            pod=self.pod,
        )
        if found.surplus <= 0:
            ledger.forget_refusals()
        requests = ledger.requests if about_to_send is None else about_to_send
        started = ledger.started(requests, vcpuset.generation, found.surplus, found.now)
        return replace(found, requests=requests, started=started)

    def _assess(self, findings: Findings) -> Assessment:
        assessment = with_pod(assess(findings), findings)
        return assessment if self.blocked is not None else self._or_contested(assessment, findings)

    def _or_contested(self, assessment: Assessment, findings: Findings) -> Assessment:
        return contested(assessment, findings, self.contest) if self.contest.contested else assessment

    def _unless_contested(self, findings: Findings, step: Plan) -> Plan:
        """The plan, or an empty one while a contested machine must not be changed."""
        now, machine = self.loop.time(), self.machine
        qemu = (self.session.peer.process, machine.first_thread, machine.uuid, machine.since)
        self.contest.observed(
            (self.vcpuset.generation, qemu),
            machine,
            now,
            wrong=findings.surplus != 0 and not findings.spec.suspend,
            reported=findings.reported == Reason.CONTESTED,
        )
        if not step.plug and not step.unplug:
            return step
        if not self.contest.may_correct(now):
            return Plan()
        self.contest.corrects(now)
        return step

    async def _report_with_guest(self, assessment: Assessment, findings: Findings) -> Assessment:
        """Report, with what the guest says of its CPUs if it can be queried now."""
        spec, machine = findings.spec, findings.machine
        # Not while the guest unplugs CPUs: it is busy, and each answer would be outdated.
        at_rest = findings.surplus <= 0 or assessment.policy is RequeuePolicy.RESYNC
        if spec.guest_agent is not None and machine.run_state == "running" and at_rest:
            guest = self.services.guests.query(self.vcpuset, machine, surplus=findings.surplus > 0)
            if guest is not None and self.memory.guest_said(guest, self.loop.time()) and self.ledger.requests:
                # Its requests are due at once; nothing else would trigger the next pass this early.
                self.ledger.hurry_up()
                self.services.enqueue(self.uid)
            if guest is None and machine.vcpus == spec.vcpus:
                # The guest's use of these CPUs is reported once it answers, or its query fails. Either triggers a pass.
                return assessment
            findings = replace(self._findings(), guest=guest)
            assessment = self._assess(findings)
        return await self._report(assessment, findings)

    async def _failed(self, error: VCPUSetError) -> Assessment:
        if isinstance(error, MachineUnsettled):
            # A CPU is leaving, and its event follows: the next pass observes the result.
            if not self.memory.unsettled_too_long(self.loop.time()):
                raise Later
        else:
            self.memory.unsettled = None
        # The last command may or may not have run: close, and observe before anything is repeated.
        await self.services.monitors.release(self.uid)
        if isinstance(error, InvalidMonitor | CredentialsUnavailable | MonitorUnreachable):
            self.services.ownership.release_machine(self.uid)
        return failure(error)

    async def _report(
        self, assessment: Assessment, findings: Findings | None = None, *, must: bool = False
    ) -> Assessment:
        """Report, and adopt the count if none stands; without findings the counts of the last observation are kept."""
        self.vcpuset = await self.services.reporter.report(self.vcpuset, assessment, self.memory, findings, must=must)
        if assessment.reason is Reason.ADOPTING:
            await self.services.reporter.adopt(self.vcpuset, self.memory)
        return assessment

    def _name(self, owner: UID) -> str:
        return str(self.services.cache.get(owner) or owner)

    def _at(self, loop_time: float | None) -> datetime | None:
        """A loop time as wall-clock time, which may have been set since."""
        return None if loop_time is None else self.services.clock() - timedelta(seconds=self.loop.time() - loop_time)
