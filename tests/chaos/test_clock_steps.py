"""The clock of an operator's host is set while it works: by an hour, forwards and backwards.

The step is made in the running process (`harness.steppedclock`). The API server, and so the validity of certificates
and tokens, keeps the right time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any

from harness.audit import AuditEvent
from harness.controlplane import ControlPlane
from harness.faulty import FaultyMonitor, Working
from harness.operator import OperatorProcess
from harness.steppedclock import SteppedClock
from harness.wait import until
from harness.world import Seen, User

__all__: list[str] = []

WAIT = 180.0

HOUR = 3600
TIMEOUT_SECONDS = 10
RETRY_SECONDS = 600
"""Longer than the test, so that each request but the first is one that a clock has brought about."""

WORKING_MACHINES = ("pending", "late")

UNPLUG = {"timeoutSeconds": TIMEOUT_SECONDS, "retrySeconds": RETRY_SECONDS}

WRITES = 12
"""More status writes, or Events, of one set are a storm: a step costs a few, each change of the spec one or two."""


@dataclass
class Scene:
    """An operator that leads and whose clock can be set, and its machines.

    still    is as declared
    pending  its guest has been asked for a CPU, says that it is at work on that, and no more
    late     is to be asked after the first step
    """

    user: User
    control_plane: ControlPlane
    operator: OperatorProcess
    clock: SteppedClock
    machines: dict[str, FaultyMonitor]
    pid: int
    begun_at: int
    stepped_by: int = 0

    async def lease(self) -> Mapping[str, Any]:
        """The Lease's spec."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.user.namespace}/leases/vcpuset-controller"
        answer = await self.control_plane.request("GET", path)
        assert answer.status == 200, answer
        spec: Mapping[str, Any] = answer.body["spec"]
        return spec

    async def step(self, seconds: int) -> None:
        """Set the clock so that it is wrong by so much, and wait until the process is seen to go by it."""
        self.stepped_by = seconds
        self.clock.step(seconds)

        async def is_seen() -> bool:
            renewed = datetime.fromisoformat((await self.lease())["renewTime"])
            return abs(renewed - self.now()) < timedelta(minutes=30)

        await until(is_seen, WAIT, lambda: f"the Lease to have the new time; {self.operator.tail()}")

    def now(self) -> datetime:
        """The time by the operator's clock."""
        return datetime.now(UTC) + timedelta(seconds=self.stepped_by)

    def asked(self, name: str) -> int:
        """How often a guest was asked for a CPU."""
        return len(self.machines[name].received("device_del"))

    async def is_looked_at(self) -> None:
        """Wait until each machine whose guest does not finish has been looked at some times more, by several passes."""
        for name in WORKING_MACHINES:
            machine = self.machines[name]
            before = len(machine.received("query-hotpluggable-cpus"))
            await until(
                lambda machine=machine, before=before: len(machine.received("query-hotpluggable-cpus")) >= before + 6,  # type: ignore[misc]
                WAIT,
                lambda: f"looks at the machine; {self.operator.tail()}",
            )

    async def timed_out(self, name: str) -> None:
        """Wait until a set's request is reported as unanswered, as of now."""

        def is_reported(seen: Seen) -> bool:
            return seen.reason == "UnplugTimedOut" and all(
                datetime.fromisoformat(each["requestedAt"]) <= self.now() + timedelta(seconds=60)
                for each in seen.pending
            )

        await self.user.wait(name, is_reported, "UnplugTimedOut, of no time to come", WAIT)

    async def obeys(self, vcpus: int) -> None:
        """Change a spec and wait until it is obeyed."""
        await self.user.change("still", vcpus=vcpus)
        await self.user.wait(
            "still", lambda seen: seen.ready and seen.vcpus == vcpus, f"{vcpus} vCPUs; {self.operator.tail()}", WAIT
        )
        assert len(self.machines["still"].cpus.occupied()) == vcpus

    async def requests(self) -> list[AuditEvent]:
        """All requests about the namespace since the operator was started."""
        path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{self.user.namespace}/vcpusets/none-{token_hex(4)}"
        await self.control_plane.request("GET", path)

        def found() -> list[AuditEvent]:
            return [
                each for each in self.control_plane.audit_events(self.begun_at) if each.namespace == self.user.namespace
            ]

        # Records follow their answers by a moment; this one was the last.
        await until(lambda: any(each.request_uri == path for each in found()), WAIT, "the last record")
        return found()

    async def check_writes(self) -> None:
        """Check that neither statuses nor Events were written again and again, and that all were accepted."""
        requests = await self.requests()
        statuses = [each for each in requests if each.subresource == "status" and each.is_write]
        assert {each.code for each in statuses} <= {200, 409}, statuses
        events = [each for each in requests if each.group == "events.k8s.io" and each.is_write]
        assert {each.code for each in events} <= {200, 201}, events
        for name, times in Counter(each.name for each in statuses).items():
            assert times <= WRITES, (name, times)
        assert len(events) <= WRITES * len(self.machines), events

    async def is_the_same_leader(self, lease: Mapping[str, Any]) -> None:
        """Check that the process has neither failed nor lost its lease meanwhile."""
        self.operator.require_running()
        assert self.operator.pid == self.pid
        log = self.operator.text()
        assert "Traceback" not in log, log
        assert log.count("became leader:") == 1, log
        now = await self.lease()
        same = ("holderIdentity", "leaseTransitions", "acquireTime")
        assert [now.get(key) for key in same] == [lease.get(key) for key in same]


@asynccontextmanager
async def scene(control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path) -> AsyncIterator[Scene]:
    """Four sets: one as declared, one with a request that is not answered, one without monitor, one without agent."""
    clock = SteppedClock(tmp_path)
    async with AsyncExitStack() as stack:
        machines = {
            name: await stack.enter_async_context(FaultyMonitor(folder / f"{name}.sock", cpus=4))
            for name in ("still", "pending", "late", "mute")
        }
        for name in WORKING_MACHINES:
            machines[name].cpus.unplug[3] = Working()
        begun_at = control_plane.audit_offset()
        await user.create("still", 4)
        await user.create("pending", 3, unplug=UNPLUG)
        await user.create("away", 2)
        await user.create("mute", 4, guestAgent={"unix": {"path": "mute-agent.sock"}})
        operator = OperatorProcess(
            control_plane,
            f"--namespace={user.namespace}",
            "--resync-seconds=1",
            "--leader-elect",
            f"--leader-elect-namespace={user.namespace}",
            "--leader-elect-lease-duration=60s",
            "--leader-elect-renew-deadline=40s",
            "--leader-elect-retry-period=1s",
            socket_root=folder.parent,
            environment=clock.environment,
        )
        stack.callback(lambda: clock.remove_traces(operator.pid))  # after its end
        await stack.enter_async_context(operator)
        pid = operator.pid
        await user.wait_ready("still")
        await user.wait_reason("away", "MonitorUnreachable")
        await user.wait("mute", lambda seen: seen.current, "a report", WAIT)
        found = Scene(user, control_plane, operator, clock, machines, pid, begun_at)
        await until(lambda: found.asked("pending") == 1, WAIT, lambda: f"the request; {operator.tail()}")
        yield found


async def test_a_clock_that_is_set_while_requests_are_pending_costs_neither_requests_nor_writes_nor_the_lease(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    async with scene(control_plane, user, folder, tmp_path) as world:
        lease = await world.lease()

        await world.step(HOUR)
        await user.create("late", 3, unplug=UNPLUG)
        await world.obeys(5)
        await world.timed_out("pending")
        await world.timed_out("late")
        await world.is_looked_at()
        assert (world.asked("pending"), world.asked("late")) == (2, 1), "by the clock one was due again, once"

        await world.step(-HOUR)
        await world.obeys(6)
        await world.timed_out("pending")
        await world.timed_out("late")
        await world.is_looked_at()
        assert (world.asked("pending"), world.asked("late")) == (2, 1), "a step back makes nothing due"

        await world.step(0)
        await world.obeys(4)
        await world.is_looked_at()
        await world.timed_out("pending")
        await world.timed_out("late")
        assert (world.asked("pending"), world.asked("late")) == (3, 2), "again one interval early, once"
        assert world.asked("still") == 2

        for name in WORKING_MACHINES:
            world.machines[name].cpus.eject(3)
            seen = await user.wait_ready(name)
            assert seen.vcpus == 3
        await world.check_writes()
        await world.is_the_same_leader(lease)
