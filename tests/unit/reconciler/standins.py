"""What a `Reconciler` of these tests talks to: the product's own classes, with the model where the wire would be.

They keep the rules that a pass relies on: a write with an old resourceVersion is a conflict, a session that was cut is
dead, a command that got no answer may have run. Each call of a pass has two points, before and after its effect, at
which the world can be changed or the call made to fail (`World.interrupt`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast
from unittest import mock

from qemu.qmp import Message
from typing_extensions import override

from harness.mergepatch import merged
from unit.reconciler.model import AgentMode, Client, Qemu
from vcpuset.domain.errors import (
    AgentRefused,
    AgentTimeout,
    AgentUnreachable,
    APIError,
    Conflict,
    Forbidden,
    MachineUnsettled,
    MonitorBusy,
    MonitorTimeout,
    MonitorUnreachable,
    ObjectGone,
)
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Machine
from vcpuset.domain.resource import UID, GuestAgent, UnixMonitor, VCPUSet
from vcpuset.kube.cluster import Cluster
from vcpuset.kube.codec import decode
from vcpuset.kube.recorder import Recorder
from vcpuset.qmp import monitors as monitors_module
from vcpuset.qmp.exchange import Command
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.replies import CPUs
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import Endpoint
from vcpuset.qmp.tcp import TCPEndpoint

if TYPE_CHECKING:
    from unit.reconciler.world import World

__all__ = ["LOSS_SECONDS", "ApiServer", "FakeRecorder", "ModelGuests", "ModelMonitors", "ModelSession"]

AGENT_SECONDS = 3.0
"""How long a mute agent is waited for."""

LATE_SECONDS = 1.5
"""How long a late one takes."""

LOSS_SECONDS = 5.0
"""For how long it is kept quiet that one session after the other was lost."""


class ApiServer(Cluster):
    """Objects with resourceVersions, below the product's own status writer. What is stored never changes in place."""

    def __init__(self, world: World) -> None:
        super().__init__(cast("Any", None), None)  # there is no connection: `_request` ends here
        self._world = world
        self.objects: dict[str, dict[str, Any]] = {}
        self.sets: dict[str, VCPUSet] = {}
        """The objects, decoded."""
        self.version = 0
        self.writes: list[VCPUSet] = []
        self.seconds = 0.0
        """How long each write takes."""
        self.brings_at_once = False
        """Whether the watch brings each status write before its answer comes."""
        self.brings_counts = True
        """Whether the watch brings each count that the operator writes."""
        self.counts: list[int] = []
        """The counts that the operator has written."""
        self.refuses_counts = ""
        """Why the operator may not write a count; empty: it may."""

    def store(self, body: Mapping[str, Any]) -> VCPUSet:
        """Keep a new version of an object."""
        self.version += 1
        stored = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        vcpuset = decode(stored)
        self.objects[vcpuset.name], self.sets[vcpuset.name] = stored, vcpuset
        return vcpuset

    def delete(self, name: str) -> None:
        """Forget an object."""
        del self.objects[name], self.sets[name]

    @override
    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: list[tuple[str, str]] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        assert method == "PATCH"
        assert body is not None
        await self._world.point(APIError("no answer"))
        self._world.spend(self.seconds)
        name, subresource = path.split("/")[-2:]
        found = self.objects.get(name)
        if found is None:
            raise ObjectGone(path)
        if found["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise Conflict(path)
        before = self.sets[name]
        if subresource == "scale":
            if self.refuses_counts:
                raise Forbidden(self.refuses_counts)
            self._scale(before, body["spec"]["replicas"])
            await self._world.point(APIError("no answer"))
            return {"kind": "Scale"}
        assert subresource == "status"
        after = self.store({**found, "status": merged(found.get("status", {}), body["status"])})
        assert before.status != after.status, "a write that changes nothing"
        self._world.on_write(before, after)
        self.writes.append(after)
        if self.brings_at_once:
            self._world.deliver()
        answer = self.objects[name]
        await self._world.point(APIError("no answer"))
        return answer

    def _scale(self, before: VCPUSet, count: int) -> None:
        self._world.on_adopt(before, count)
        self.counts.append(count)
        found = self.objects[before.name]
        metadata = {**found["metadata"], "generation": before.generation + 1}
        self.store({**found, "metadata": metadata, "spec": {**found["spec"], "vcpus": count}})
        if self.brings_counts:
            self._world.deliver()


class FakeRecorder(Recorder):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    @override
    def record(
        self,
        vcpuset: VCPUSet,
        *,
        type: Literal["Normal", "Warning"],
        reason: str,
        action: str,
        note: str,
    ) -> None:
        assert note
        assert action
        self.events.append((type, reason))


class ModelSession(Session):
    """A session with the model. How events are taken, and what is kept of them, is the product's own."""

    def __init__(self, world: World, qemu: Qemu, wake: Callable[[], None]) -> None:
        super().__init__("model", wake, 1.0, 1.0)
        self._world = world
        self._qemu = qemu
        self._open = True
        self._since = qemu.machine().since
        self.opened_at = world.loop.now
        # As over a wire: what is sent now is read when the loop comes to it.
        loop = world.loop
        self._end = Client(
            lambda event: void(loop.call_soon(self._on_event, cast("Message", event))),
            self._lose,
        )
        qemu.clients.append(self._end)
        self._client.peer = replace(qemu.peer, link=self._end.link if qemu.on_tcp else None)

    @property
    def gathering(self) -> bool:
        """Whether events have come whose wake is still to come."""
        return self._waking is not None

    @override
    async def observe(self) -> Machine:
        await self._point()
        self._world.spend(self._qemu.seconds.get("observe", 0.0))
        self._qemu.looked_at()
        machine = await super().observe()
        self._world.on_observe(self._qemu, machine)
        await self._point()
        return machine

    @override
    async def recount(self, machine: Machine) -> Machine:
        await self._point()
        self._world.spend(self._qemu.seconds.get("observe", 0.0))
        self._qemu.looked_at()
        machine = await super().recount(machine)
        self._world.on_observe(self._qemu, machine)
        await self._point()
        return machine

    @override
    async def _execute(self, *commands: Command) -> list[Any]:
        # In place of replies and what is read from them. No query waits here, so all show one moment.
        return [
            self._shown(each.name) if each.arguments is None else await self._change(each.name, each.arguments)
            for each in commands
        ]

    def _shown(self, command: str) -> object:
        machine = self._qemu.machine()
        match command:
            case "query-status":
                return machine.run_state
            case "query-migrate":
                return machine.migrating
            case "query-acpi-ospm-status":
                return machine.ost
            case "query-cpus-fast":
                return CPUs(machine.arch, machine.vcpus, {})
            case "query-hotpluggable-cpus":
                if machine.slots is not None and not self._qemu.settled:
                    raise MachineUnsettled("CPUs were plugged or unplugged during the observation")
                return machine.slots
            case "query-uuid":
                return machine.uuid
            case "query-stats":
                return None
            case "query-chardev":
                return frozenset(client.link for client in self._qemu.clients)
            case unknown:
                raise AssertionError(unknown)

    async def _change(self, command: str, arguments: Mapping[str, object]) -> object:
        await self._point()
        machine = self._qemu.machine()
        assert machine.slots is not None
        match command:
            case "device_add":
                slot = machine.slots[cast("int", arguments["core-id"])]
                self._world.on_plug(self._qemu, slot)
                self._qemu.device_add(slot.index, str(arguments["id"]), expected=slot.index in self._arriving)
            case "device_del":
                found = next((slot for slot in machine.occupied if slot.path == arguments["id"]), None)
                if found is not None:
                    self._world.on_unplug(self._qemu, found)
                self._qemu.device_del(str(arguments["id"]))
            case unknown:
                raise AssertionError(unknown)
        self._world.spend(self._qemu.seconds.get(command, 0.0))
        await self._point()
        return {}

    def _lose(self) -> None:
        self._world.on_loss()
        self._world.loop.call_soon(self._on_loss)

    @override
    async def close(self) -> None:
        self._open = False
        self._closed = True
        self._qemu.let_go(self._end)

    async def _point(self) -> None:
        await self._world.point(MonitorTimeout("no answer in time"))
        if self._end not in self._qemu.clients:
            raise MonitorUnreachable("the connection broke")


class ModelMonitors(Monitors):
    """Finds the model's machines by the path of `spec.monitor.unix`; keeps their sessions as the product does."""

    def __init__(self, world: World, wake: Callable[[UID], None]) -> None:
        super().__init__(None, wake, pause=lambda losses: LOSS_SECONDS if losses > 1 else 0.0)
        self._world = world

    @override
    async def resolve(self, vcpuset: VCPUSet, *, connect: bool = True) -> AbstractContextManager[Endpoint]:
        if not isinstance(vcpuset.spec.monitor, UnixMonitor):
            return await super().resolve(vcpuset)
        qemu = self._world.machines.get(vcpuset.spec.monitor.path)
        if qemu is None:
            raise MonitorUnreachable(f"nothing is at {vcpuset.spec.monitor.path}")
        second = vcpuset.spec.monitor.path in self._world.second_monitors
        return nullcontext(TCPEndpoint(str(id(qemu)), 2 if second else 1))

    @override
    async def session(self, uid: UID, endpoint: Endpoint) -> Session:
        with mock.patch.object(monitors_module, "Session", self):
            return await super().session(uid, endpoint)

    async def open(self, endpoint: Endpoint, wake: Callable[[], None], **_: object) -> Session:
        """In place of `Session.open`."""
        qemu = next(each for each in self._world.machines.values() if str(id(each)) == endpoint.identity[0])
        await self._world.point(MonitorUnreachable("nobody listens"))
        if not qemu.reachable:
            raise MonitorUnreachable("nobody listens")
        if qemu.other_has_it:
            raise MonitorBusy("no greeting")
        self._world.on_open(qemu)
        return ModelSession(self._world, qemu, wake)

    def held(self) -> list[ModelSession]:
        """The sessions that are open."""
        return [cast("ModelSession", session) for _, session in self._kept.values() if session.alive]


class ModelGuests(Guests):
    """Asks the model's guests, found by the path of `spec.guestAgent.unix`; all but the asking is the product's own."""

    def __init__(self, world: World, wake: Callable[[UID], None]) -> None:
        super().__init__(None, wake)
        self._world = world
        self.querying_now = 0
        """How many questions are under way."""

    @override
    async def _query_once(
        self, vcpuset: VCPUSet, agent: GuestAgent, machine: Machine, *, bring_online: bool
    ) -> GuestReport:
        self.querying_now += 1
        try:
            return await self._put(agent, machine.vcpus if bring_online else 0)
        finally:
            self.querying_now -= 1

    async def _put(self, agent: GuestAgent, bring_online: int) -> GuestReport:
        qemu = self._world.machines.get(agent.path.removesuffix(".agent") + ".sock")
        if qemu is None or qemu.agent is AgentMode.ABSENT:
            raise AgentUnreachable("nobody listens")
        process = qemu.process
        if not qemu.agent_runs:
            await asyncio.sleep(AGENT_SECONDS)
            raise AgentTimeout("no answer in time")
        if qemu.agent is AgentMode.BLOCKED:
            raise AgentRefused("guest-get-vcpus", "CommandNotFound", "the command is blocked")
        late = LATE_SECONDS if qemu.agent is AgentMode.LATE else 0.0
        await asyncio.sleep(late)
        resisted: Mapping[int, str] = {}
        offline = qemu.guest_cpus().offline
        if offline and len(qemu.guest_cpus().cpus) <= bring_online:
            resisted = qemu.bring_online(offline)
        cpus = qemu.guest_cpus()
        answered = self._world.on_answer(qemu, cpus)
        await asyncio.sleep(late)
        if qemu.process != process:
            raise AgentUnreachable("the connection broke")
        answered()
        return GuestReport(cpus, resisted=resisted)


def void(_: object) -> None:
    """For callbacks that must return nothing."""
