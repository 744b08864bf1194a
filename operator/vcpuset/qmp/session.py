"""One connection to one monitor: observe the machine, plug, unplug, and receive the guest's answers.

A monitor serves one client at a time, so a session is kept only while there is work or its events are needed. Every
wait has a deadline. A command that missed its deadline, or was interrupted, may still have run, or run later: after
`MonitorError`, close the session and observe again.

Events only trigger an observation: `wake` is called, and the next observation decides. The guest's answer to an unplug
request is the exception, because on machines without `query-acpi-ospm-status` it only comes by event. No state grows
with the age of a session or the number of its events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from secrets import token_hex
from typing import Any, Final, Literal

from qemu.qmp import ExecuteError, Message, QMPError, StateError

from vcpuset.domain.busy import Halts
from vcpuset.domain.credentials import Credentials
from vcpuset.domain.errors import (
    CredentialsUnavailable,
    MachineUnsettled,
    MonitorTimeout,
    MonitorUnreachable,
    SlotTaken,
    VCPUSetError,
)
from vcpuset.domain.machine import Answer, Machine, Slot
from vcpuset.qmp import replies, translate
from vcpuset.qmp.client import Client, Stage
from vcpuset.qmp.exchange import Command, Exchange
from vcpuset.qmp.peer import Link, Peer
from vcpuset.qmp.queries import Queries
from vcpuset.qmp.ratelimiter import RateLimiter
from vcpuset.qmp.sockets import Endpoint
from vcpuset.qmp.tcp import TCPEndpoint
from vcpuset.qmp.tls import ClosedAfterHandshake, Keys, keys_of

__all__ = [
    "CLOSE_SECONDS",
    "COMMAND_SECONDS",
    "MANY_SECONDS",
    "OPEN_SECONDS",
    "SETTLE_SECONDS",
    "Outcome",
    "Session",
]

OPEN_SECONDS: Final = 3.0
"""For connecting, the greeting and the negotiation together. QEMU takes 2 ms; a busy monitor sends no greeting."""

COMMAND_SECONDS: Final = 10.0
"""For the reply to one command. The slowest known one, listing 4096 slots, takes 0.15 s on an idle host."""

CLOSE_SECONDS: Final = 2.0
"""For closing. Nothing is flushed or awaited, so it takes a millisecond; this only bounds a fault."""

SETTLE_SECONDS: Final = 0.02
"""How long events are collected before `wake` is called. One CPU that leaves causes two or three within some ms, and
each observation takes time from the guest that unplugs the next."""

MANY_SECONDS: Final = 0.25
"""The same if one CPU has left and others are expected to: one observation after the last one is enough."""

_WAKING: Final = frozenset({
    "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "GUEST_CRASHLOADED", "GUEST_PANICKED", "MIGRATION", "RESET",
    "RESUME", "SHUTDOWN", "STOP", "SUSPEND", "SUSPEND_DISK", "WAKEUP", "WATCHDOG",
})  # fmt: skip
"""Events after which a pass could observe a change. `ACPI_DEVICE_OST` is examined separately."""

Outcome = Literal["done", "refused", "timeout", "lost"]
"""The result of a command: success, an error of QEMU, no answer in time, or the connection was lost or closed."""

_log = logging.getLogger(__name__)


class Session:
    """A session with a monitor, opened by `Session.open`; close it, also after an error."""

    def __init__(
        self,
        where: str,
        wake: Callable[[], None],
        command_seconds: float,
        close_seconds: float,
        permit: Callable[[], None] | None = None,
        commanded: Callable[[str, float, Outcome], None] | None = None,
        queries: Queries | None = None,
        sampled: Callable[[Machine, Mapping[str, Halts] | None], None] | None = None,
    ) -> None:
        self._where = where
        self._wake = wake
        self._command_seconds = command_seconds
        self._close_seconds = close_seconds
        self._client = Client(self._on_event, self._on_loss, permit)
        self._commanded = commanded
        self._sampled = sampled
        self._open = False
        self._closed = False
        self._warned = False
        self._waking: asyncio.TimerHandle | None = None
        self._waits_for_many = False
        self._leaving: set[int] = set()
        """The slots whose unplug was requested in this session, and that the guest has neither freed nor refused
        since."""
        self._arriving: set[int] = set()
        """The slots that were plugged silently in this session, and that the guest has not reported yet."""
        self._wake_limiter = RateLimiter()
        self._at: dict[str, int] = {}
        """The slot of each CPU of the last observation, by its path."""
        self._answers: dict[int, Answer] = {}
        self._reset_at: float | None = None
        self.answers_by_event_only = False
        """Whether a guest's answer without a session is lost: no query returns it."""
        self._since: datetime | None = None
        self._uuid: tuple[str | None] | None = None
        self._queries = Queries() if queries is None else queries

    @classmethod
    async def open(
        cls,
        endpoint: Endpoint,
        wake: Callable[[], None],
        *,
        permit: Callable[[], None] | None = None,
        commanded: Callable[[str, float, Outcome], None] | None = None,
        queries: Queries | None = None,
        sampled: Callable[[Machine, Mapping[str, Halts] | None], None] | None = None,
        open_seconds: float = OPEN_SECONDS,
        command_seconds: float = COMMAND_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> Session:
        """Connect, wait for the greeting, negotiate.

        `wake` is called from the event loop, soon after an event that can matter, and once when the connection is lost;
        never after `close`. Several events in quick succession cause one call. It must not raise.

        `permit` is called right before each command is sent; if it raises, the connection is closed instead.
        `commanded` is called at the end of each: its name, how many seconds it took, and its outcome.
        `queries` are those of an earlier session with the same machine, most likely. `sampled` is called at the end of
        each observation with KVM's counters by QOM path; None: this QEMU has none.

        Raises InvalidMonitor if connecting to the endpoint is not allowed, CredentialsUnavailable if its Secret, a
        certificate or QEMU's authorization is wrong, MonitorUnreachable if nothing listens or what listens does not
        speak QMP, MonitorBusy if no greeting comes, MonitorTimeout if QEMU does not answer after its greeting. The
        endpoint may be closed afterwards.
        """

        async def opened(credentials: Credentials | None) -> Session:
            session = cls(str(endpoint), wake, command_seconds, close_seconds, permit, commanded, queries, sampled)
            session._since = endpoint.made_at
            await session._connect(endpoint, None if credentials is None else keys_of(credentials), open_seconds)
            return session

        access = endpoint.tls if isinstance(endpoint, TCPEndpoint) else None
        if access is None:
            return await opened(None)
        credentials = await access.fetch(None)
        try:
            return await opened(credentials)
        except CredentialsUnavailable as error:
            # They may have been replaced since they were read, or QEMU was ending: a QEMU that rejects does so again.
            newer = await access.fetch(credentials)
            if newer == credentials and not isinstance(error, ClosedAfterHandshake):
                raise
        return await opened(newer)

    async def _connect(self, endpoint: Endpoint, keys: Keys | None, seconds: float) -> None:
        client = self._client
        try:
            async with asyncio.timeout(seconds):
                await client.open(endpoint, keys)
        except TimeoutError as error:
            await self.close()
            if isinstance(endpoint, TCPEndpoint):
                if client.stage is Stage.RESOLVING:
                    raise endpoint.without_address() from error
                if client.stage is Stage.CONNECTING:
                    raise endpoint.unanswered(client.addresses) from error
            if client.greeting is None:
                raise translate.busy(self._where, _silence(endpoint, client.stage)) from error
            raise MonitorTimeout(
                f"{self._where} sent a greeting, but did not negotiate within {seconds:g} s"
            ) from error
        except VCPUSetError:
            await self.close()
            raise
        except Exception as error:
            await self.close()
            access = endpoint.tls if isinstance(endpoint, TCPEndpoint) else None
            if keys is not None and access is not None and client.stage in {Stage.SECURING, Stage.GREETING}:
                agreed = client.stage is Stage.GREETING
                cause = translate.cause(error)
                failure = keys.failure(self._where, access.server_name, cause, agreed=agreed)
                if failure is not None:
                    raise failure from error
            raise translate.connect_failure(self._where, error) from error
        self._open = True

    @property
    def peer(self) -> Peer:
        """The kernel's information about the other end."""
        return self._client.peer

    @property
    def alive(self) -> bool:
        """False once the connection is lost or closed."""
        return self._open

    @property
    def version(self) -> str | None:
        """QEMU's version from its greeting, such as "10.0.2 (Debian 1:10.0.2)"; None: not in a known form."""
        return None if self._client.greeting is None else replies.version(self._client.greeting.QMP.version)

    async def observe(self) -> Machine:
        """The current state of the machine.

        Raises MonitorUnreachable (also for malformed replies), MonitorTimeout, MachineUnsettled if the two lists of
        CPUs disagree (while a CPU leaves, for some ms), CommandError if QEMU rejects a query that every QEMU has.
        """
        queries = self._queries
        first = [queries.status, queries.migrate, queries.ost]
        if self._uuid is None:  # One connection leads to one process, which keeps it.
            first.append(queries.uuid)
        if counts := self._sampled is not None and queries.counts():
            first.append(queries.stats)
        run_state, migrating, ost, *more, cpus, slots = await self._execute(*first, queries.cpus, queries.slots)
        self.answers_by_event_only = ost is None
        if self._uuid is None:
            self._uuid = (more[0],)
        uuid = self._uuid[0]
        connections: frozenset[Link] | None = None
        if uuid is None and self.peer.link is not None:
            (connections,) = await self._execute(queries.chardev)
        self._place(slots)
        links = connections or frozenset()
        machine = queries.known(
            Machine(run_state, cpus.arch, cpus.count, slots, migrating, ost, uuid, self._since, links)
        )
        if counts and self._sampled is not None:
            if more[-1] is None:
                queries.uncounted(machine)
            self._sampled(machine, more[-1])
        return machine

    async def recount(self, machine: Machine) -> Machine:
        """The machine of an observation a moment ago with the CPUs that QEMU shows now, for two queries. Raises as
        `observe`."""
        cpus, slots = await self._execute(self._queries.cpus, self._queries.slots)
        self._place(slots)
        return self._queries.known(replace(machine, vcpus=cpus.count, slots=slots))

    def _place(self, slots: Sequence[Slot] | None) -> None:
        """Keep where the CPUs are."""
        self._at = {slot.path: slot.index for slot in slots or () if slot.path is not None}
        occupied = set(self._at.values())
        self._leaving &= occupied
        self._arriving &= occupied

    async def plug(self, slot: Slot, *, silently: bool = False) -> None:
        """Plug a CPU into a free slot. It counts at once; the guest uses it later, if at all.

        silently  `wake` is not called when the guest reports that it has found the CPU

        Its id is `vcpu<slot>`, as with libvirt, or begins with that: any other device can have the same id.

        Raises SlotTaken, Migrating, PermanentError, CommandRefused, or MonitorError.
        """
        if silently:
            self._arriving.add(slot.index)
        arguments = {**slot.props, "driver": slot.driver, "id": f"vcpu{slot.index}"}
        try:
            await self._execute(Command("device_add", arguments))
        except SlotTaken:
            # If the slot is taken and not the id, QEMU reports that again.
            await self._execute(Command("device_add", {**arguments, "id": f"vcpu{slot.index}-{token_hex(3)}"}))

    async def unplug(self, slot: Slot) -> None:
        """Request the unplug of the CPU in an occupied slot; returns when QEMU has passed the request to the guest.

        Raises DeviceGone if it has left already, GuestNotReady, Migrating, PermanentError, CommandRefused, or
        MonitorError. ValueError: the slot is free.
        """
        if slot.path is None:
            raise ValueError(f"slot {slot.index} holds no CPU")
        self._answers.pop(slot.index, None)
        self._leaving.add(slot.index)
        # QEMU reads a name without a slash as a device id; every CPU has a path, and only plugged ones have an id.
        await self._execute(Command("device_del", {"id": slot.path}))

    def answer(self, slot: int) -> Answer | None:
        """The guest's answer, by event, in this session since the last `unplug` of that slot in it."""
        return self._answers.get(slot)

    def take_reset(self) -> float | None:
        """Loop time of a reset of the machine in this session; None: none since the last call."""
        reset_at, self._reset_at = self._reset_at, None
        return reset_at

    async def close(self) -> None:
        """End the session. Pending commands raise MonitorUnreachable. Never raises, and may be called again.

        If cancelled, it has closed the connection nevertheless.
        """
        self._open = False
        self._closed = True
        await self._client.end(self._close_seconds)

    async def _execute(self, *commands: Command) -> list[Any]:
        """The results of commands that are sent together. The first error is raised; the rest is executed nevertheless.

        Raises MonitorUnreachable, MonitorTimeout, CommandError, and what a command's `read` raises.
        """
        try:
            exchange = self._client.send(*commands)
        except StateError as error:
            await self._client.end(self._close_seconds)  # it is lost already: its end has the reason
            raise translate.loss(self._where, commands[0].name, error, self._client.cause) from error
        try:
            await exchange.wait(self._command_seconds)
        finally:
            self._client.forget(exchange)
        outcome, failure = self._failure(commands, exchange)
        if self._commanded is not None:
            for number, (command, seconds) in enumerate(zip(commands, exchange.seconds, strict=False)):
                self._commanded(command.name, seconds, "done" if number < len(exchange.results) else outcome)
        if failure is None:
            return exchange.results
        if failure is exchange.failure:
            raise failure
        raise failure from exchange.failure

    def _failure(self, commands: Sequence[Command], exchange: Exchange) -> tuple[Outcome, Exception | None]:
        """What the command without a result is to be counted and raised as."""
        if (error := exchange.failure) is None:
            return "done", None
        command = commands[len(exchange.results)].name
        match error:
            case TimeoutError():
                return "timeout", translate.unanswered(self._where, command, self._command_seconds)
            case ExecuteError():
                return "refused", translate.refusal(command, error)
            case QMPError():
                return "lost", translate.loss(self._where, command, error, self._client.cause)
            case replies.Malformed():
                return "done", MonitorUnreachable(f"{self._where} answered {command} with {error}: this is not QEMU")
            case MachineUnsettled():
                return "done", MachineUnsettled(f"{self._where}: {error}")
            case _:
                return "done", error

    def _on_event(self, event: Message) -> None:
        name, data = event["event"], event.get("data")
        if not isinstance(name, str):
            return
        if name == "ACPI_DEVICE_OST":
            self._on_ost(data)
        elif name == "DEVICE_UNPLUG_GUEST_ERROR":
            self._on_guest_error(data)
        elif name == "RESET":
            self._reset_at = asyncio.get_running_loop().time()
        elif name == "DEVICE_DELETED" and isinstance(data, dict):
            self._leaving.discard(self._at.get(str(data.get("path")), -1))
            self._wake_soon(one_of_many=bool(self._leaving))
            return
        if name in _WAKING:
            self._wake_soon()

    def _on_ost(self, data: object) -> None:
        try:
            report = replies.ost_of_event(data)
        except replies.Malformed as error:
            # Once: a peer that sends one can send thousands.
            level = logging.DEBUG if self._warned else logging.WARNING
            self._warned = True
            _log.log(level, "%s sent an invalid ACPI_DEVICE_OST event: %s", self._where, error)
            return
        if report is None:
            return
        slot, ost = report
        # Also for slots without a request in this session: an earlier one may have sent it.
        if ost.answer is not None:
            self._answers[slot] = ost.answer
            if ost.answer.refused:
                self._leaving.discard(slot)
        if ost.answer is None and slot in self._arriving:
            self._arriving.discard(slot)
            return
        # "In progress" needs no pass of its own: a final answer, or the CPU's departure, follows.
        if ost.answer is not Answer.IN_PROGRESS:
            self._wake_soon(one_of_many=ost.answer is None and bool(self._leaving))

    def _on_guest_error(self, data: object) -> None:
        """spapr sends this instead of an _OST, without a reason. Also for a request of an earlier session."""
        path = data.get("path") if isinstance(data, dict) else None
        if isinstance(path, str) and (slot := self._at.get(path)) is not None:
            self._answers[slot] = Answer.GUEST_ERROR

    def _on_loss(self) -> None:
        if self._open:
            self._open = False
            if self._waking is not None:
                self._waking.cancel()
            self._wake_in(SETTLE_SECONDS)

    def _wake_soon(self, *, one_of_many: bool = False) -> None:
        seconds = MANY_SECONDS if one_of_many else SETTLE_SECONDS
        if self._waking is not None:
            if one_of_many or not self._waits_for_many:
                return
            self._waking.cancel()
        self._waits_for_many = one_of_many
        self._wake_in(seconds + self._wake_limiter.delay())

    def _wake_in(self, seconds: float) -> None:
        self._waking = asyncio.get_running_loop().call_later(seconds, self._wake_now)

    def _wake_now(self) -> None:
        self._waking = None
        if not self._closed:
            self._wake()


def _silence(endpoint: Endpoint, stage: Stage) -> str:
    """What is missing, for the message."""
    if stage is Stage.SECURING:
        return "does not answer the TLS handshake"
    if isinstance(endpoint, TCPEndpoint) and endpoint.tls is None:
        return "does not greet (or waits for TLS, which spec.monitor.tcp.tls and --tls-credentials enable)"
    return "does not greet"
