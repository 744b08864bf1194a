"""Everything around a real `Reconciler`, in memory: the API server, the monitors, the work queue, and time.

The reconciler, its cache, the codec and the status writer are the product's own. What stands in for the rest keeps the
rules that a pass relies on: a write with an old resourceVersion is a conflict, a session that was cut is dead, a
command that got no answer may have run. Each call of a pass has two points, before and after its effect, at which the
world can be changed or the call made to fail (`World.interrupt`).
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from unit.reconciler.model import Listener, Qemu
from vcpuset.domain.errors import APIError, Conflict, MachineUnsettled, MonitorTimeout, MonitorUnreachable, ObjectGone
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Answer, Machine, Ost, Slot
from vcpuset.domain.resource import UID, Status, UnixMonitor, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Cluster
from vcpuset.kube.codec import decode
from vcpuset.kube.recorder import Recorder
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import Endpoint, TCPEndpoint
from vcpuset.reconciler import Reconciler
from vcpuset.runtime.workers import Done, Result, Retry

__all__ = ["NAMESPACE", "START", "Fault", "OperatorDied", "World"]

NAMESPACE = "default"
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

RESYNC_SECONDS = 60.0
BACKOFF_SECONDS = (0.25, 30.0)
PASSES_AT_ONE_MOMENT = 40
"""More passes without any time between them are an operator that spins."""

Fault = Literal["fails", "dies", "unsettled"] | Callable[[], None]
"""What happens at a point: the call fails, the operator dies, CPUs move while they are counted, or anything else."""


class OperatorDied(BaseException):
    """SIGKILL, as far as the code can tell: nothing that it does from here on reaches anybody."""


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still until the test moves it."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class _ApiServer(Cluster):
    """Objects with resourceVersions, below the product's own status writer."""

    def __init__(self, world: World) -> None:
        super().__init__(cast("Any", None), None)  # there is no connection: `_request` ends here
        self._world = world
        self.objects: dict[str, dict[str, Any]] = {}
        self.version = 0
        self.writes: list[VCPUSet] = []

    def stamp(self, body: dict[str, Any]) -> None:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)

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
        assert path.endswith("/status")
        assert body is not None
        await self._world.point(APIError("no answer"))
        found = self.objects.get(path.split("/")[-2])
        if found is None:
            raise ObjectGone(path)
        if found["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise Conflict(path)
        changed = copy.deepcopy(found)
        changed["status"] = {
            key: value for key, value in {**found.get("status", {}), **body["status"]}.items() if value is not None
        }
        before, after = decode(found), decode(changed)
        assert before.status != after.status, "a write that changes nothing"
        self._world.on_write(before, after)
        self.stamp(changed)
        self.objects[after.name] = changed
        self.writes.append(decode(changed))
        await self._world.point(APIError("no answer"))
        return copy.deepcopy(changed)


class _Recorder(Recorder):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def record(
        self,
        vcpuset: VCPUSet,
        *,
        type: Literal["Normal", "Warning"],  # noqa: A002 - the API's word
        reason: str,
        action: str,
        note: str,
    ) -> None:
        assert note
        assert action
        self.events.append((type, reason))


class _Session(Session):
    """A session with the model; answers are kept as the real one keeps them."""

    def __init__(self, world: World, qemu: Qemu, wake: Callable[[], None]) -> None:
        self._world = world
        self._qemu = qemu
        self._told = wake
        self._live = True
        self._asked: dict[int, str] = {}
        self._answers: dict[int, Answer] = {}
        self._listener = Listener(ost=self._take_ost, event=wake, lost=self._lose)
        qemu.listeners.append(self._listener)

    @property
    def alive(self) -> bool:
        return self._live

    async def observe(self) -> Machine:
        await self._point()
        machine = self._qemu.machine()
        self._world.on_observe(self._qemu, machine)
        await self._point()
        return machine

    async def plug(self, slot: Slot) -> None:
        await self._point()
        self._world.on_plug(self._qemu, slot)
        self._qemu.device_add(slot.index, slot.device_id)
        await self._point()

    async def unplug(self, slot: Slot) -> None:
        assert slot.path is not None
        self._asked[slot.index] = slot.path
        self._answers.pop(slot.index, None)
        await self._point()
        self._world.on_unplug(self._qemu, slot)
        self._qemu.device_del(slot.path)
        await self._point()
        self._world.on_unplug_taken(slot)

    def answer(self, slot: int) -> Answer | None:
        return self._answers.get(slot)

    async def close(self) -> None:
        self._live = False
        if self._listener in self._qemu.listeners:
            self._qemu.listeners.remove(self._listener)

    async def _point(self) -> None:
        await self._world.point(MonitorTimeout("no answer in time"))
        if not self._live:
            raise MonitorUnreachable("the connection broke")

    def _take_ost(self, slot: int, ost: Ost) -> None:
        if ost.answer is not None and slot in self._asked:
            self._answers[slot] = ost.answer
        if ost.answer is not Answer.IN_PROGRESS:
            self._told()

    def _lose(self) -> None:
        self._live = False
        self._told()


class _Monitors(Monitors):
    """Finds the model's machines by the path of `spec.monitor.unix`."""

    def __init__(self, world: World, wake: Callable[[UID], None]) -> None:
        self._world = world
        self._told = wake
        self._sessions: dict[UID, tuple[Qemu, _Session]] = {}

    def resolve(self, vcpuset: VCPUSet) -> AbstractContextManager[Endpoint]:
        assert isinstance(vcpuset.spec.monitor, UnixMonitor)
        qemu = self._world.machines.get(vcpuset.spec.monitor.path)
        if qemu is None:
            raise MonitorUnreachable(f"nothing is at {vcpuset.spec.monitor.path}")
        return nullcontext(TCPEndpoint(str(id(qemu)), 1))

    async def session(self, uid: UID, endpoint: Endpoint) -> Session:
        qemu = next(each for each in self._world.machines.values() if str(id(each)) == endpoint.identity[0])
        kept = self._sessions.get(uid)
        if kept is not None and kept[0] is qemu and kept[1].alive:
            return kept[1]
        await self.release(uid)
        await self._world.point(MonitorUnreachable("nobody listens"))
        if not qemu.reachable:
            raise MonitorUnreachable("nobody listens")
        session = _Session(self._world, qemu, lambda: self._told(uid))
        self._sessions[uid] = (qemu, session)
        return session

    async def release(self, uid: UID) -> None:
        if (kept := self._sessions.pop(uid, None)) is not None:
            await kept[1].close()

    def held(self) -> set[UID]:
        return {uid for uid, (_, session) in self._sessions.items() if session.alive}

    async def close(self) -> None:
        for uid in tuple(self._sessions):
            await self.release(uid)


class _Guests(Guests):
    """No machine of this world has a guest agent."""

    def __init__(self) -> None:
        pass

    def ask(self, vcpuset: VCPUSet, machine: Machine) -> GuestReport | None:
        raise AssertionError("the set has no guest agent")

    async def forget(self, uid: UID) -> None:
        return None


class World:
    """A cluster with machines and one operator; close it at the end."""

    def __init__(self) -> None:
        self._loop = _Loop()
        self.wall = START
        self.machines: dict[str, Qemu] = {}
        self.api = _ApiServer(self)
        self.recorder = _Recorder()
        self.passes = 0
        self.operator_number = 0
        self._countdown = -1
        self._fault: Fault | None = None
        self._dead = False
        self._start_operator()

    def close(self) -> None:
        """End the event loop."""
        self._loop.close()

    # --- for laws: called with every deed of the operator, before it takes effect ---------------------------------

    def on_observe(self, qemu: Qemu, machine: Machine) -> None:
        """The operator has looked."""

    def on_plug(self, qemu: Qemu, slot: Slot) -> None:
        """The operator plugs."""

    def on_unplug(self, qemu: Qemu, slot: Slot) -> None:
        """The operator asks."""

    def on_unplug_taken(self, slot: Slot) -> None:
        """The operator knows that QEMU has taken the request."""

    def on_write(self, before: VCPUSet, after: VCPUSet) -> None:
        """The operator writes a status."""

    def on_pass(self, uid: UID) -> None:
        """A pass begins."""

    # --- the user -------------------------------------------------------------------------------------------------

    def apply(self, name: str, *, deliver: bool = True, **spec: Any) -> None:
        """Create a set, or change fields of its spec; `deliver`: the watch tells the operator at once."""
        body = self.api.objects.get(name)
        if body is None:
            metadata = {
                "uid": f"uid-{name}",
                "namespace": NAMESPACE,
                "name": name,
                "generation": 1,
                "creationTimestamp": self.wall.isoformat(),
            }
            body = {"metadata": metadata, "spec": {"monitor": {"unix": {"path": "a.sock"}}, **spec}}
        else:
            body = copy.deepcopy(body)
            body["spec"] |= spec
            if body["spec"] == self.api.objects[name]["spec"]:
                return
            body["metadata"]["generation"] += 1
        self.api.stamp(body)
        self.api.objects[name] = body
        if deliver:
            self.deliver()

    def delete(self, name: str) -> None:
        """Delete a set; the watch tells at once."""
        del self.api.objects[name]
        self.deliver()

    def deliver(self) -> None:
        """The watch tells the operator all that it does not know yet."""
        alive = {body["metadata"]["uid"] for body in self.api.objects.values()}
        for known in self.cache:
            if known.uid not in alive:
                self.cache.drop(known.uid)
                self.reconciler.changed(known.uid)
        for body in self.api.objects.values():
            vcpuset = decode(body)
            if self.cache.put(vcpuset):
                self.reconciler.changed(vcpuset.uid)

    def vcpuset(self, name: str = "web") -> VCPUSet:
        """The set as the API server has it."""
        return decode(self.api.objects[name])

    def status(self, name: str = "web") -> Status:
        """Its status."""
        return self.vcpuset(name).status

    def reason(self, name: str = "web") -> str | None:
        """The reason of its Ready condition."""
        ready = self.status(name).ready
        return None if ready is None else ready.reason

    def true_conditions(self, name: str = "web") -> list[str]:
        """The types of its conditions that are True."""
        return [condition.type for condition in self.status(name).conditions if condition.status == "True"]

    # --- faults ---------------------------------------------------------------------------------------------------

    def interrupt(self, after: int, fault: Fault) -> None:
        """Let `fault` happen at the point that comes after so many others."""
        self._countdown, self._fault = after, fault

    def heal(self) -> None:
        """Forget an interruption that has not happened."""
        self._fault = None

    async def point(self, failure: Exception) -> None:
        """A moment between two effects of a pass."""
        await asyncio.sleep(0)
        if self._dead:
            raise OperatorDied
        if self._fault is None:
            return
        if self._countdown > 0:
            self._countdown -= 1
            return
        fault, self._fault = self._fault, None
        if fault == "dies":
            self._dead = True
            raise OperatorDied
        if fault == "fails":
            raise failure
        if fault == "unsettled":
            # Only an observation can raise it; a call of another kind fails in its own way.
            raise MachineUnsettled("CPUs move") if isinstance(failure, MonitorTimeout) else failure
        fault()

    def restart_operator(self) -> None:
        """The operator is gone and a successor begins."""
        self._loop.run_until_complete(self._monitors.close())
        self._start_operator()

    def _start_operator(self) -> None:
        self._dead = False
        self.operator_number += 1
        self._due: dict[UID, float] = {}
        self._failures: dict[UID, int] = {}
        self.cache = Cache()
        self._monitors = _Monitors(self, self._enqueue)
        self.reconciler = Reconciler(
            cache=self.cache,
            cluster=self.api,
            recorder=self.recorder,
            monitors=self._monitors,
            guests=_Guests(),
            enqueue=self._enqueue,
            resync_seconds=RESYNC_SECONDS,
            clock=lambda: self.wall,
        )
        self.deliver()

    @property
    def sessions_held(self) -> int:
        """How many monitor sessions are open between passes."""
        return len(self._monitors.held())

    # --- the queue and time ---------------------------------------------------------------------------------------

    def _enqueue(self, uid: UID) -> None:
        self._due[uid] = self._loop.now

    def wake(self, name: str = "web") -> None:
        """Something makes the operator look."""
        self._enqueue(self.vcpuset(name).uid)

    def run_due(self) -> None:
        """Run the passes that are due, and those that they make due."""
        for _ in range(PASSES_AT_ONE_MOMENT):
            due = [uid for uid, at in self._due.items() if at <= self._loop.now]
            if not due:
                return
            self.run_pass(due[0])
        raise AssertionError(f"the operator spins: {PASSES_AT_ONE_MOMENT} passes at one moment")

    def run_pass(self, uid: UID) -> Result | None:
        """One pass; None: the operator died in it, and a successor has begun."""
        self._due.pop(uid, None)
        self.passes += 1
        self.on_pass(uid)
        try:
            result = self._loop.run_until_complete(self.reconciler.reconcile(uid))
        except OperatorDied:
            self.restart_operator()
            return None
        match result:
            case Done(requeue_after=seconds):
                self._failures.pop(uid, None)
            case Retry():
                failures = self._failures[uid] = self._failures.get(uid, 0) + 1
                seconds = min(BACKOFF_SECONDS[0] * 2 ** (failures - 1), BACKOFF_SECONDS[1])
        if seconds is not None:
            self._due[uid] = min(self._due.get(uid, float("inf")), self._loop.now + seconds)
        return result

    def advance(self, seconds: float) -> None:
        """Let time go by, with all passes that fall due in it."""
        end = self._loop.now + seconds
        self.run_due()
        while self._due and (next_at := min(self._due.values())) <= end:
            self._move(next_at - self._loop.now)
            self.run_due()
        self._move(end - self._loop.now)

    def _move(self, seconds: float) -> None:
        if seconds > 0:
            self._loop.now += seconds
            # Whole microseconds upwards, so that what falls due at this loop time has fallen due.
            self.wall += timedelta(seconds=seconds, microseconds=1)

    def set_clock(self, seconds: float) -> None:
        """The host's clock is set by so many seconds; the loop's goes on as before."""
        self.wall += timedelta(seconds=seconds)
