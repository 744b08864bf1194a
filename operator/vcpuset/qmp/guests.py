"""Queries of the guest agents, concurrent with reconciliations.

An agent may be absent, slow or broken, and that takes seconds to find out. So no pass waits for one: it uses the newest
answer about the CPUs that it observed, and starts the next query; `wake` is called when the answer has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vcpuset.domain.errors import AgentError, AgentUnreachable, InvalidMonitor, MonitorUnreachable
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Machine
from vcpuset.domain.requests import CPU, cpu_of
from vcpuset.domain.resource import UID, GuestAgent, VCPUSet
from vcpuset.qmp.agent import Agent
from vcpuset.qmp.meters import Meters
from vcpuset.qmp.ratelimiter import RateLimiter
from vcpuset.qmp.sockets import find_socket

__all__ = ["AT_ONCE", "RETRY_SECONDS", "Guests"]

RETRY_SECONDS: Final = (5.0, 10.0, 30.0, 60.0, 60.0, 60.0, 300.0)
"""How long an agent that failed is not queried; longer with every failure in a row."""

AT_ONCE: Final = 64
"""How many agents are queried at once; the deadline of each begins with its query."""

RETRIES_AT_ONCE: Final = 16
"""The same for those that failed last time: each can take its whole deadline, and must not delay the others."""

_log = logging.getLogger(__name__)

_About = tuple[GuestAgent, str | None, frozenset[CPU]]
"""What an answer is about: the queried agent, and the CPUs of which machine."""

_Query = tuple[GuestAgent, bool]


@dataclass
class _Guest:
    """One set's guest.

    about     what the report is about
    failures  how many in a row
    retry_at  loop time before which an agent that failed is not queried again
    task      the query in progress
    query     which agent is queried, and whether to bring CPUs online
    awaited   whether a pass found no answer yet
    again     wakes when an agent that failed is to be queried again
    delayed   wakes later, because its answers have woken too often
    wakes     limits how often its answers wake
    """

    about: _About | None = None
    report: GuestReport | None = None
    failures: int = 0
    retry_at: float = 0.0
    task: asyncio.Task[None] | None = None
    query: _Query | None = None
    awaited: bool = False
    again: asyncio.TimerHandle | None = None
    delayed: asyncio.TimerHandle | None = None
    wakes: RateLimiter = field(default_factory=RateLimiter)


class Guests:
    """Queries guest agents.

    socket_root  where the namespaces' folders with the agents' sockets are; None: no agent can be queried
    wake         called when the answer of a guest has changed
    permit       called right before each command is sent; raises if this process must not act (any more)
    meters       have the counters of the guests whose machines have none
    """

    def __init__(
        self,
        socket_root: Path | None,
        wake: Callable[[UID], None],
        *,
        permit: Callable[[], None] | None = None,
        meters: Meters | None = None,
    ) -> None:
        self._socket_root = socket_root
        self._wake = wake
        self._permit = permit
        self._meters = meters
        self._guests: dict[UID, _Guest] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._retries = asyncio.Semaphore(RETRIES_AT_ONCE)
        self._ending: set[asyncio.Task[None]] = set()

    def query(self, vcpuset: VCPUSet, machine: Machine, *, surplus: bool = False) -> GuestReport | None:
        """The last answer about these CPUs (or why the agent cannot be queried); starts the next query.

        None: there is no answer about these CPUs yet; it comes, or fails, within seconds. CPUs that the guest left
        offline are brought online if the set says so and is not suspended, unless there are too many of them
        (`surplus`: an offline CPU may be leaving) or the machine migrates.
        """
        agent = vcpuset.spec.guest_agent
        assert agent is not None, "the set names no guest agent"
        guest = self._guests.setdefault(vcpuset.uid, _Guest())
        about = (agent, machine.uuid, frozenset(map(cpu_of, machine.occupied)))
        change = not (vcpuset.spec.suspend or surplus or machine.migrating)
        query = (agent, agent.bring_online and change)
        if guest.query != query:
            # The old answer is not needed; and bringing CPUs online, which can take long, ends.
            self._cancel(guest)
            guest.retry_at = 0.0
        if guest.query is not None and guest.query[0] != agent:
            guest.failures = 0
        guest.query = query
        if guest.task is None and asyncio.get_running_loop().time() >= guest.retry_at:
            work = self._run(vcpuset, machine, query, guest, about)
            guest.task = asyncio.create_task(work, name=f"guest of {vcpuset}")
        failed = guest.report is not None and guest.report.cpus is None
        if guest.about == about or (failed and guest.about is not None and guest.about[0] == agent):
            return guest.report
        guest.awaited = True
        return None

    async def forget(self, uid: UID) -> None:
        """This process no longer manages the set."""
        if (guest := self._guests.pop(uid, None)) is not None:
            self._cancel(guest)
            if self._ending:
                await asyncio.wait(self._ending)

    async def close(self) -> None:
        """End all queries."""
        for uid in list(self._guests):
            await self.forget(uid)

    def _cancel(self, guest: _Guest) -> None:
        for timer in (guest.again, guest.delayed):
            if timer is not None:
                timer.cancel()
        if guest.task is not None:
            guest.task.cancel()
            self._ending.add(guest.task)
            guest.task.add_done_callback(self._ending.discard)
            guest.task = None

    async def _run(self, vcpuset: VCPUSet, machine: Machine, query: _Query, guest: _Guest, about: _About) -> None:
        agent, bring_online = query
        try:
            async with self._retries if guest.failures else self._turns:
                report = await self._query_once(vcpuset, agent, machine, bring_online=bring_online)
        except AgentError as error:
            report = GuestReport(None, error)
        except Exception as error:  # noqa: BLE001 - the set waits for this answer, and would never get one after a defect; it is logged with its traceback and reported in the status
            _log.exception("querying the guest agent of %s failed unexpectedly", vcpuset)
            report = GuestReport(None, AgentUnreachable(f"querying the guest agent failed: {error!r}"))
        loop = asyncio.get_running_loop()
        if report.cpus is None:
            pause = RETRY_SECONDS[min(guest.failures, len(RETRY_SECONDS) - 1)]
            guest.failures += 1
            guest.retry_at = loop.time() + pause
            guest.again = loop.call_at(guest.retry_at, self._wake, vcpuset.uid)
        else:
            guest.failures, guest.retry_at = 0, 0.0
        # A pass may wait for the answer about other CPUs: wake it, so that it starts that query.
        wake = guest.awaited or guest.about != about or _words(guest.report) != _words(report)
        guest.about, guest.report, guest.task, guest.awaited = about, report, None, False
        if not wake:
            return
        if delay := guest.wakes.delay():
            if guest.delayed is not None:
                guest.delayed.cancel()
            guest.delayed = loop.call_later(delay, self._wake, vcpuset.uid)
        else:
            self._wake(vcpuset.uid)

    async def _query_once(
        self, vcpuset: VCPUSet, agent: GuestAgent, machine: Machine, *, bring_online: bool
    ) -> GuestReport:
        """Brings CPUs online, unless the guest has more than the machine: then it is another machine's guest."""
        field = "spec.guestAgent.unix.path"
        if self._socket_root is None:
            raise AgentUnreachable(
                f"{field}: this operator was started without --socket-root; run one with that flag on the machine's "
                "node"
            )
        try:
            endpoint = await find_socket(self._socket_root, vcpuset.namespace, agent.path, field, connect=True)
        except (InvalidMonitor, MonitorUnreachable) as error:
            # The set names two sockets: say which one is meant.
            words = str(error)
            raise AgentUnreachable(words if words.startswith(field) else f"{field}: {words}") from error
        with endpoint:
            connection = await Agent.open(endpoint, permit=self._permit)
        try:
            cpus = await connection.cpus()
            if self._meters is not None and self._meters.needs_agent(vcpuset.uid):
                self._meters.from_agent(vcpuset.uid, machine, await connection.used())
            if self._meters is not None and self._meters.needs_load(vcpuset.uid):
                self._meters.load_from_agent(vcpuset.uid, machine, await connection.load())
            if not (bring_online and cpus.offline) or len(cpus.cpus) > machine.vcpus:
                return GuestReport(cpus)
            resisted = await connection.bring_online(cpus.offline)
            cpus = await connection.cpus()
            # Another client may have been faster: a CPU that is online has not resisted.
            return GuestReport(cpus, resisted={cpu: words for cpu, words in resisted.items() if cpu in cpus.offline})
        finally:
            await connection.close()


def _words(report: GuestReport | None) -> object:
    """What of a report a status can show; errors with the same text are equal."""
    return report and (report.cpus, str(report.error), report.resisted)
