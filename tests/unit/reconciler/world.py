"""Everything around a real `Reconciler`, in memory: the API server, machines, guests, the work queue, and time.

Nothing happens between its methods. Time goes by in `advance` only, and in `run_due` the moment for which a session
gathers events. `on_…` are for laws.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from unit.reconciler.model import START, Qemu
from unit.reconciler.standins import ApiServer, FakeRecorder, ModelGuests, ModelMonitors, ModelSession
from unit.reconciler.timeless import TimelessLoop
from vcpuset.controller import Controller
from vcpuset.domain.guest import GuestCPUs
from vcpuset.domain.machine import Machine, Slot
from vcpuset.domain.resource import UID, Status, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.pods import Pods
from vcpuset.qmp.session import SETTLE_SECONDS
from vcpuset.reporter import Reporter
from vcpuset.runtime.workers import Done, Result, Retry

__all__ = ["NAMESPACE", "ON_DEMAND", "START", "Fault", "OperatorDied", "World"]

NAMESPACE = "default"

ON_DEMAND = {"unix": {"path": "a.sock"}, "connection": "OnDemand"}
"""`spec.monitor` of a set whose monitor is shared; by default it is kept."""

RESYNC_SECONDS = 60.0
BACKOFF_SECONDS = (0.25, 30.0)
PASSES_AT_ONE_MOMENT = 40
"""More passes without any time between them are an operator that spins."""

Fault = Literal["fails", "dies"] | Callable[[], None]
"""What happens at a point: the call fails, the operator dies, or anything else."""


class OperatorDied(BaseException):
    """SIGKILL, as far as the code can tell: nothing that it does from here on reaches anybody."""


class World:
    """A cluster with machines and one operator; close it at the end."""

    def __init__(self) -> None:
        self.loop = TimelessLoop()
        self.wall = START
        self.machines: dict[str, Qemu] = {}
        self.second_monitors: set[str] = set()
        """The paths that are another monitor of their machine; else two paths of one are two names of one socket."""
        self.api = ApiServer(self)
        self.recorder = FakeRecorder()
        self.passes = 0
        self.operator_number = 0
        self._countdown = -1
        self._fault: Fault | None = None
        self._dead = False
        self._start_operator()

    def close(self) -> None:
        """End the operator and the event loop."""
        self._end_operator()
        self.loop.close()

    # --- for laws: called with every deed of the operator, before it takes effect ---------------------------------

    def on_observe(self, qemu: Qemu, machine: Machine) -> None:
        """The operator has looked."""

    def on_plug(self, qemu: Qemu, slot: Slot) -> None:
        """The operator plugs."""

    def on_unplug(self, qemu: Qemu, slot: Slot) -> None:
        """The operator asks."""

    def on_answer(self, qemu: Qemu, cpus: GuestCPUs) -> Callable[[], None]:
        """A guest answers; what is returned is called when the operator hears it."""
        return lambda: None

    def on_open(self, qemu: Qemu) -> None:
        """The operator has opened a session."""

    def on_loss(self) -> None:
        """A session is cut."""

    def on_write(self, before: VCPUSet, after: VCPUSet) -> None:
        """The operator writes a status."""

    def on_adopt(self, before: VCPUSet, count: int) -> None:
        """The operator writes a count."""

    def on_pass(self, uid: UID) -> None:
        """A pass begins."""

    def on_result(self, uid: UID, result: Result | None) -> None:
        """A pass has ended; None: by the death of the operator."""

    # --- the user -------------------------------------------------------------------------------------------------

    def apply(self, name: str, *, deliver: bool = True, namespace: str = NAMESPACE, **spec: Any) -> None:
        """Create a set, or change fields of its spec; `deliver`: the watch tells the operator at once."""
        body = self.api.objects.get(name)
        if body is None:
            metadata = {
                "uid": f"uid-{name}",
                "namespace": namespace,
                "name": name,
                "generation": 1,
                "creationTimestamp": self.wall.isoformat(),
            }
            body = {"metadata": metadata, "spec": {"monitor": {"unix": {"path": "a.sock"}}, **spec}}
        else:
            changed = {**body["spec"], **spec}
            if changed == body["spec"]:
                return
            metadata = {**body["metadata"], "generation": body["metadata"]["generation"] + 1}
            body = {**body, "metadata": metadata, "spec": changed}
        self.api.store(body)
        if deliver:
            self.deliver()

    def delete(self, name: str, *, held: bool = False) -> None:
        """Delete a set; the watch tells at once. `held`: somebody's finalizer keeps the object."""
        if held:
            body = self.api.objects[name]
            generation = body["metadata"]["generation"] + 1
            deleted = {"deletionTimestamp": self.wall.isoformat(), "generation": generation}
            self.api.store({**body, "metadata": {**body["metadata"], **deleted}})
        else:
            self.api.delete(name)
        self.deliver()

    def deliver(self) -> None:
        """The watch tells the operator all that it does not know yet."""
        alive = {vcpuset.uid for vcpuset in self.api.sets.values()}
        for uid in self.cache.versions():
            if uid not in alive:
                self.cache.drop(uid)
                self.controller.changed(uid)
        for vcpuset in self.api.sets.values():
            if self.cache.put(vcpuset):
                self.controller.changed(vcpuset.uid)

    def vcpuset(self, name: str = "web") -> VCPUSet:
        """The set as the API server has it."""
        return self.api.sets[name]

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

    @property
    def reasons_written(self) -> list[str]:
        """The reasons of the status writes so far."""
        return [written.status.ready.reason for written in self.api.writes if written.status.ready is not None]

    @property
    def slots_pending(self) -> list[int]:
        """The slots of the unplug requests in the status of "web"."""
        return [request.slot for request in self.status().pending_unplugs]

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
        fault()

    def restart_operator(self) -> None:
        """The operator is gone and a successor begins."""
        self._end_operator()
        self._start_operator()

    def _end_operator(self) -> None:
        self.loop.run(self._guests.close())
        self.loop.run(self._monitors.close())

    def _start_operator(self) -> None:
        self.others_wait = False
        self._dead = False
        self.operator_number += 1
        self._due: dict[UID, float] = {}
        self._failures: dict[UID, int] = {}
        self.cache = Cache()
        self._monitors = ModelMonitors(self, self._enqueue)
        self._guests = ModelGuests(self, self._enqueue)
        self.controller = Controller(
            cache=self.cache,
            reporter=Reporter(self.cache, self.api, self.recorder, lambda: self.wall, self._enqueue),
            monitors=self._monitors,
            guests=self._guests,
            pods=Pods(self.api),
            enqueue=self._enqueue,
            others_wait=lambda: self.others_wait,
            resync_seconds=RESYNC_SECONDS,
            clock=lambda: self.wall,
        )
        self.deliver()

    @property
    def sessions_held(self) -> int:
        """How many monitor sessions are open between passes."""
        return len(self._monitors.held())

    @property
    def sessions(self) -> list[ModelSession]:
        """The sessions that are open."""
        return self._monitors.held()

    @property
    def guests_being_queried(self) -> int:
        """How many guests owe an answer."""
        return self._guests.querying_now

    @property
    def next_pass(self) -> float:
        """The loop time of the next pass that is planned; infinity: none is."""
        return min(self.due_at, default=float("inf"))

    @property
    def due_at(self) -> list[float]:
        """The loop times of all passes that are planned."""
        return list(self._due.values())

    # --- the queue and time ---------------------------------------------------------------------------------------

    def _enqueue(self, uid: UID) -> None:
        self._due[uid] = self.loop.now

    def wake(self, name: str = "web") -> None:
        """Something makes the operator look."""
        self._enqueue(self.vcpuset(name).uid)

    def run_due(self) -> None:
        """Run the passes that are due, those that they make due, and those that events are being gathered for."""
        self._run_due_now()
        for _ in range(PASSES_AT_ONE_MOMENT):
            next_at = self.loop.next_timer
            if next_at > self.loop.now + SETTLE_SECONDS:
                return
            self._move_to(next_at)
            self._run_due_now()
        raise AssertionError("the operator spins: each pass makes events for another one")

    def _run_due_now(self) -> None:
        for _ in range(PASSES_AT_ONE_MOMENT):
            self.loop.settle()
            due = [uid for uid, at in self._due.items() if at <= self.loop.now]
            if not due:
                return
            self.run_pass(due[0])
        raise AssertionError(f"the operator spins: {PASSES_AT_ONE_MOMENT} passes at one moment")

    def run_pass(self, uid: UID) -> Result | None:
        """One pass; None: the operator died in it, and a successor has begun."""
        self._due.pop(uid, None)
        self.passes += 1
        self.on_pass(uid)
        result: Result | None
        try:
            result = self.loop.run(self.controller.reconcile(uid))
        except OperatorDied:
            self.on_result(uid, None)
            self.restart_operator()
            return None
        match result:
            case Done(requeue_after=seconds):
                self._failures.pop(uid, None)
            case Retry(at_least=at_least, at_most=at_most):
                failures = self._failures[uid] = self._failures.get(uid, 0) + 1
                seconds = max(min(BACKOFF_SECONDS[0] * 2 ** (failures - 1), BACKOFF_SECONDS[1], at_most), at_least)
        if seconds is not None:
            self._due[uid] = min(self._due.get(uid, float("inf")), self.loop.now + seconds)
        self.on_result(uid, result)
        return result

    def advance(self, seconds: float) -> None:
        """Let time go by, with all passes that fall due in it."""
        end = self.loop.now + seconds
        self.run_due()
        while (next_at := min([self.loop.next_timer, *self._due.values()])) <= end:
            self._move_to(next_at)
            self.run_due()
        self._move_to(end)

    def _move_to(self, moment: float) -> None:
        if moment > self.loop.now:
            # Whole microseconds upwards, so that what falls due at this loop time has fallen due.
            self.wall += timedelta(seconds=moment - self.loop.now, microseconds=1)
            self.loop.now = moment

    def spend(self, seconds: float) -> None:
        """Let time go by in the middle of a pass."""
        self._move_to(self.loop.now + seconds)

    def tick(self) -> None:
        """Let a moment pass in which nothing falls due."""
        self.wall += timedelta(milliseconds=1)

    def set_clock(self, seconds: float) -> None:
        """The host's clock is set by so many seconds; the loop's goes on as before."""
        self.wall += timedelta(seconds=seconds)
