"""What guests say of their own CPUs, asked for beside the passes.

An agent may be absent, slow or broken, and takes seconds to show it. So no pass waits for one: it takes the newest
answer, which is about the very CPUs that it sees, and has the next one asked for; `wake` is called when there is news.
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
from vcpuset.qmp.ratelimiter import RateLimiter
from vcpuset.qmp.sockets import find_socket

__all__ = ["AT_ONCE", "RETRY_SECONDS", "Guests"]

RETRY_SECONDS: Final = (5.0, 10.0, 30.0, 60.0, 60.0, 60.0, 300.0)
"""How long an agent that failed is left alone; longer with every failure in a row."""

AT_ONCE: Final = 64
"""How many agents are asked at once; their deadlines begin when it is their turn."""

RETRIES_AT_ONCE: Final = 16
"""The same for those that failed last time: each can take its whole deadline, and must not hold up the others."""

_log = logging.getLogger(__name__)

_About = tuple[GuestAgent, str | None, frozenset[CPU]]
"""What an answer is about: which agent was asked, and of which CPUs of which machine."""

_Question = tuple[GuestAgent, bool]


@dataclass
class _Guest:
    """One set's guest.

    about     what the report is about
    failures  how many in a row
    retry_at  loop time before which an agent that failed is not asked again
    asking    the question under way
    question  which agent is asked, and whether to bring CPUs online
    awaited   whether a pass was told that there is no answer yet
    again     wakes when an agent that failed is to be asked again
    news      wakes later than at once, since its answers have woken so often
    wakes     how often its answers may wake
    """

    about: _About | None = None
    report: GuestReport | None = None
    failures: int = 0
    retry_at: float = 0.0
    asking: asyncio.Task[None] | None = None
    question: _Question | None = None
    awaited: bool = False
    again: asyncio.TimerHandle | None = None
    news: asyncio.TimerHandle | None = None
    wakes: RateLimiter = field(default_factory=RateLimiter)


class Guests:
    """Asks guest agents.

    socket_root  where the namespaces' folders with the agents' sockets are; None: none can be asked
    wake         told when a guest says something else than before
    permit       called right before each command is sent; raises if this process must not act (any more)
    """

    def __init__(
        self, socket_root: Path | None, wake: Callable[[UID], None], *, permit: Callable[[], None] | None = None
    ) -> None:
        self._socket_root = socket_root
        self._wake = wake
        self._permit = permit
        self._guests: dict[UID, _Guest] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._retries = asyncio.Semaphore(RETRIES_AT_ONCE)
        self._ending: set[asyncio.Task[None]] = set()

    def ask(self, vcpuset: VCPUSet, machine: Machine, *, surplus: bool = False) -> GuestReport | None:
        """What the guest last said of these CPUs (or that it cannot be asked), while it is asked anew.

        None: it has not said anything of these CPUs yet; it will, or fail, in a matter of seconds. CPUs that it left
        offline are brought online if the set says so and is not suspended, unless there are too many of them
        (`surplus`: what is offline may be on its way out) or the machine migrates.
        """
        agent = vcpuset.spec.guest_agent
        assert agent is not None, "the set names no guest agent"
        guest = self._guests.setdefault(vcpuset.uid, _Guest())
        about = (agent, machine.uuid, frozenset(map(cpu_of, machine.occupied)))
        change = not (vcpuset.spec.suspend or surplus or machine.migrating)
        question = (agent, agent.bring_online and change)
        if guest.question != question:
            # Nobody wants that answer any more; and bringing CPUs online, which can take long, is to end.
            self._stop_asking(guest)
            guest.retry_at = 0.0
        if guest.question is not None and guest.question[0] != agent:
            guest.failures = 0
        guest.question = question
        if guest.asking is None and asyncio.get_running_loop().time() >= guest.retry_at:
            work = self._ask(vcpuset, machine.vcpus, question, guest, about)
            guest.asking = asyncio.create_task(work, name=f"guest of {vcpuset}")
        failed = guest.report is not None and guest.report.cpus is None
        if guest.about == about or (failed and guest.about is not None and guest.about[0] == agent):
            return guest.report
        guest.awaited = True
        return None

    async def forget(self, uid: UID) -> None:
        """The set is not this operator's any more."""
        if (guest := self._guests.pop(uid, None)) is not None:
            self._stop_asking(guest)
            if self._ending:
                await asyncio.wait(self._ending)

    async def close(self) -> None:
        """Ask no more."""
        for uid in list(self._guests):
            await self.forget(uid)

    def _stop_asking(self, guest: _Guest) -> None:
        for timer in (guest.again, guest.news):
            if timer is not None:
                timer.cancel()
        if guest.asking is not None:
            guest.asking.cancel()
            self._ending.add(guest.asking)
            guest.asking.add_done_callback(self._ending.discard)
            guest.asking = None

    async def _ask(self, vcpuset: VCPUSet, vcpus: int, question: _Question, guest: _Guest, about: _About) -> None:
        agent, bring_online = question
        try:
            async with self._retries if guest.failures else self._turns:
                report = await self._look(vcpuset.namespace, agent, vcpus if bring_online else 0)
        except AgentError as error:
            report = GuestReport(None, error)
        except Exception as error:  # noqa: BLE001 - a defect: logged with its traceback, and told in the status; a set waits for this answer
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
        # Whoever waits may wait for an answer to another question: that one is asked now.
        wake = guest.awaited or guest.about != about or _words(guest.report) != _words(report)
        guest.about, guest.report, guest.asking, guest.awaited = about, report, None, False
        if not wake:
            return
        if delay := guest.wakes.delay():
            if guest.news is not None:
                guest.news.cancel()
            guest.news = loop.call_later(delay, self._wake, vcpuset.uid)
        else:
            self._wake(vcpuset.uid)

    async def _look(self, namespace: str, agent: GuestAgent, bring_online: int) -> GuestReport:
        """Ask once; CPUs are brought online if there are at most `bring_online`: else it is another machine's guest."""
        field = "spec.guestAgent.unix.path"
        if self._socket_root is None:
            raise AgentUnreachable(
                f"{field}: this operator was started without --socket-root; run one with that flag on the machine's "
                "node"
            )
        try:
            endpoint = await find_socket(self._socket_root, namespace, agent.path, field)
        except (InvalidMonitor, MonitorUnreachable) as error:
            # The set names two sockets: say which of them is meant.
            words = str(error)
            raise AgentUnreachable(words if words.startswith(field) else f"{field}: {words}") from error
        with endpoint:
            asked = await Agent.open(endpoint, permit=self._permit)
        try:
            cpus = await asked.cpus()
            if not cpus.offline or len(cpus.cpus) > bring_online:
                return GuestReport(cpus)
            resisted = await asked.bring_online(cpus.offline)
            cpus = await asked.cpus()
            # Somebody else may have been faster: what is online has not resisted.
            return GuestReport(cpus, resisted={cpu: words for cpu, words in resisted.items() if cpu in cpus.offline})
        finally:
            await asked.close()


def _words(report: GuestReport | None) -> object:
    """What of a report a status can show; errors are equal if their words are."""
    return report and (report.cpus, str(report.error), report.resisted)
