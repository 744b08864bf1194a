"""Two replicas with leader election: one works, and the other takes over, whatever becomes of the first.

Each replica acts as a service account of its own, so that the audit log of the API server tells who wrote what. Where a
lease must not run out by itself it is longer than any test; where a test waits for that, as short as a busy host can
renew it.
"""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from harness.audit import AuditEvent
from harness.controlplane import ControlPlane
from harness.faultproxy import FaultProxy
from harness.faults import Held
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import User

__all__: list[str] = []

WAIT = 120.0
END = "stopped changing machines"
"""What a leader logs when it leads no more."""
FOR_EVER = ("600s", "300s", "1s")
SHORT = ("15s", "10s", "1s")


class Replica:
    """One of the operators; `user` is its name in the audit log."""

    def __init__(self, name: str, namespace: str, process: OperatorProcess) -> None:
        self.user = f"system:serviceaccount:{namespace}:{name}"
        self.process = process

    def get(self, path: str) -> tuple[int, str]:
        """What it answers at its HTTP address."""
        with urllib.request.urlopen(f"{self.process.url}{path}", timeout=10) as answer:  # noqa: S310 - our own URL
            return answer.status, answer.read().decode()

    def is_ready(self) -> bool:
        """Whether /readyz says so; a process that changes its role does not listen for a moment."""
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def said(self, words: str) -> int:
        """How often it has said this."""
        return self.process.text().count(words)

    async def logs(self, words: str, times: int = 1) -> None:
        """Wait until it has said this so many times."""
        await until(lambda: self.said(words) >= times, WAIT, lambda: f"{words!r}; its log:\n{self.process.tail()}\n")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    async def ended(self) -> int:
        """Wait until it has ended by itself; its exit status."""
        child = self.process._child
        assert child is not None
        return await child.wait(WAIT)


class Replicas:
    """Starts replicas that serve the test's namespace, and knows the Lease that they share."""

    def __init__(self, control_plane: ControlPlane, namespace: str, socket_root: Path, stack: AsyncExitStack) -> None:
        self._control_plane = control_plane
        self._namespace = namespace
        self._socket_root = socket_root
        self._stack = stack
        self._started_at = control_plane.audit_offset()

    async def start(
        self,
        name: str,
        times: tuple[str, str, str],
        way: Callable[[Path], Path] = lambda path: path,
        resync_seconds: int = 1,
    ) -> Replica:
        """Start one and wait until it is ready; `way` gives its kubeconfig another address."""
        there = ("-n", self._namespace)
        await self._control_plane.kubectl("create", "serviceaccount", name, *there)
        account = f"--serviceaccount={self._namespace}:{name}"
        await self._control_plane.kubectl("create", "rolebinding", name, "--clusterrole=cluster-admin", account, *there)
        flags = dict(zip(("lease-duration", "renew-deadline", "retry-period"), times, strict=True))
        process = OperatorProcess(
            self._control_plane,
            f"--namespace={self._namespace}",
            f"--resync-seconds={resync_seconds}",
            "--leader-elect",
            f"--leader-elect-namespace={self._namespace}",
            *(f"--leader-elect-{flag}={value}" for flag, value in flags.items()),
            socket_root=self._socket_root,
            kubeconfig=way(await self._control_plane.service_account_kubeconfig(self._namespace, name)),
        )
        await self._stack.enter_async_context(process)
        return Replica(name, self._namespace, process)

    async def lease(self) -> dict[str, Any]:
        """The Lease's spec."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self._namespace}/leases/vcpuset-controller"
        answer = await self._control_plane.request("GET", path)
        assert answer.status == 200, answer
        spec: dict[str, Any] = answer.body["spec"]
        return spec

    async def is_held_by(self, replica: Replica) -> bool:
        """Whether the Lease names it."""
        holder = (await self.lease())["holderIdentity"]
        return bool(holder) and f" as {holder}" in replica.process.text()

    async def led_by(self, replica: Replica) -> None:
        """Wait until a replica leads."""

        def tail() -> str:
            return f"a leader; its log ends with:\n{replica.process.tail()}\n"

        await until(lambda: self.is_held_by(replica), WAIT, tail)

    async def requests(self) -> list[AuditEvent]:
        """What the replicas have asked of the API server, in the order in which it was answered."""
        path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{self._namespace}/vcpusets/none-{token_hex(4)}"
        await self._control_plane.request("GET", path)

        def found() -> list[AuditEvent]:
            return self._control_plane.audit_events(self._started_at)

        # Records follow their answers by a moment; this one was the last.
        await until(lambda: any(each.request_uri == path for each in found()), WAIT, "the last record")
        return [each for each in found() if each.namespace == self._namespace]


@pytest.fixture
async def replicas(control_plane: ControlPlane, namespace: str, socket_root: Path) -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        yield Replicas(control_plane, namespace, socket_root, stack)


@pytest.fixture
async def machine(folder: Path) -> AsyncIterator[FaultyMonitor]:
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as running:
        yield running


def of(replica: Replica, requests: list[AuditEvent], resource: str) -> list[AuditEvent]:
    """A replica's requests about one kind of objects."""
    return [each for each in requests if each.user == replica.user and each.resource == resource]


def first_write(replica: Replica, requests: list[AuditEvent]) -> int:
    """Where among the requests a replica's first write is: the one by which it took the lease."""
    number = next(number for number, each in enumerate(requests) if each.user == replica.user and each.is_write)
    assert requests[number].resource == "leases"
    return number


async def lists_before_the_watch(proxy: FaultProxy, since: int) -> int:
    """How many lists there were from this request on; work may begin before the watch does."""
    await until(lambda: any(each.watch for each in proxy.requests[since:]), WAIT, "the watch")
    return sum(each.list for each in proxy.requests[since:])


async def test_one_of_two_replicas_works_and_the_other_asks_for_nothing_but_the_lease(
    replicas: Replicas, user: User, machine: FaultyMonitor
) -> None:
    first = await replicas.start("first", FOR_EVER)
    second = await replicas.start("second", FOR_EVER)
    await user.create("vm", 4, "vm.sock")
    await user.wait_ready("vm")
    await user.change("vm", vcpus=3)
    await user.wait_ready("vm")

    requests = await replicas.requests()
    assert {each.user for each in requests if each.subresource == "status"} == {first.user}
    assert {each.resource for each in requests if each.user == second.user} == {"leases"}
    assert {each.verb for each in of(second, requests, "leases")} == {"get"}
    assert await replicas.is_held_by(first)
    # A standby is alive, and ready to take over.
    for replica, leading in ((first, 1), (second, 0)):
        assert replica.get("/healthz") == (200, "ok\n")
        assert replica.get("/readyz") == (200, "ok\n")
        assert f'leader_election_master_status{{name="vcpuset-controller"}} {leading}.0' in replica.get("/metrics")[1]
    assert "standby: lease" in second.process.text()


async def test_a_leader_that_is_asked_to_end_hands_over_at_once_and_after_its_last_deed(
    replicas: Replicas, user: User, machine: FaultyMonitor
) -> None:
    first = await replicas.start("first", FOR_EVER)
    second = await replicas.start("second", FOR_EVER)
    await user.create("vm", 4, "vm.sock")
    await user.wait_ready("vm")
    held = machine.faults["query-cpus-fast"] = Held()
    await until(lambda: held.struck, WAIT, "a look at the machine")
    first.signal(signal.SIGTERM)

    async def has_begun_to_end() -> bool:
        return any(each.verb == "watch" for each in of(first, await replicas.requests(), "vcpusets"))

    await until(has_begun_to_end, WAIT, "the end of the watch")
    assert await replicas.is_held_by(first), "it has a pass to finish"
    del machine.faults["query-cpus-fast"]
    held.let_go.set()

    assert await first.ended() == 0, first.process.tail()
    await replicas.led_by(second)  # not because the lease ran out
    await user.change("vm", vcpus=6)
    await user.wait_ready("vm")

    requests = await replicas.requests()
    released = [number for number, each in enumerate(requests) if each.user == first.user and each.is_write][-1]
    taken = first_write(second, requests)
    assert requests[released].resource == "leases"
    assert released < taken
    assert [each for each in requests[released + 1 :] if each.user == first.user] == []
    assert {each.resource for each in requests[:taken] if each.user == second.user} == {"leases"}
    assert (await replicas.lease())["leaseTransitions"] == 1
    assert "Traceback" not in first.process.text()


async def test_a_standby_that_is_asked_to_end_leaves_the_lease_alone(
    replicas: Replicas, user: User, machine: FaultyMonitor
) -> None:
    first = await replicas.start("first", FOR_EVER)
    second = await replicas.start("second", FOR_EVER)

    assert await second.process.stop() == 0, second.process.tail()

    assert await replicas.is_held_by(first)
    await user.create("vm", 4, "vm.sock")
    await user.wait_ready("vm")


async def test_when_a_leader_is_killed_the_standby_waits_for_the_end_of_its_lease_and_works_on(
    replicas: Replicas, user: User, machine: FaultyMonitor
) -> None:
    first = await replicas.start("first", SHORT)
    second = await replicas.start("second", SHORT)
    await user.create("vm", 4, "vm.sock")
    await user.wait_ready("vm")

    first.process.kill()
    assert await replicas.is_held_by(first), "nobody has told the standby"
    await user.change("vm", vcpus=6)
    await replicas.led_by(second)

    assert (await user.wait_ready("vm")).vcpus == 6
    assert len(machine.cpus.occupied()) == 6
    assert (await replicas.lease())["leaseTransitions"] == 1


async def test_a_leader_that_is_cut_off_from_the_api_server_stops_before_anybody_takes_over_and_stands_by_again(
    control_plane: ControlPlane, replicas: Replicas, user: User, machine: FaultyMonitor, tmp_path: Path
) -> None:
    """Between its own deadline and the end of the lease nobody works."""
    async with FaultProxy(control_plane, tmp_path) as proxy:
        times = ("24s", "5s", "1s")
        first = await replicas.start("first", times, proxy.kubeconfig)
        second = await replicas.start("second", times)
        pid = first.process.pid
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")

        proxy.block()
        await first.logs(f"could not be renewed within 5 s: the API server did not answer; {END}")

        assert await replicas.is_held_by(first)
        before = len(machine.commands)
        machine.cpus.eject(3)
        await first.logs("no answer within 2.5 s; retrying")
        assert first.is_ready() is False, "it could not take over"
        assert len(machine.commands) == before, "nobody leads, so nobody touches the machine"
        await replicas.led_by(second)
        await user.change("vm", vcpus=6)
        assert (await user.wait_ready("vm")).vcpus == 6
        asking = {each.connection for each in machine.commands[before:]}
        assert asking.isdisjoint(each.connection for each in machine.commands[:before])

        proxy.unblock()
        await first.logs("standby: lease")
        await until(first.is_ready, WAIT, "the standby to be ready")
        second.process.kill()
        await user.change("vm", vcpus=3)
        assert (await user.wait_ready("vm")).vcpus == 3
        assert first.process.pid == pid
        first.process.require_running()
        assert "Traceback" not in first.process.text()


async def test_while_the_api_server_is_away_a_single_replica_stands_by_in_peace_and_then_leads_again(
    control_plane: ControlPlane, replicas: Replicas, user: User, machine: FaultyMonitor, tmp_path: Path
) -> None:
    """Twice, as one that exits would be started again later each time."""
    async with FaultProxy(control_plane, tmp_path) as proxy:
        only = await replicas.start("only", SHORT, proxy.kubeconfig)
        pid = only.process.pid
        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        for vcpus in (6, 3):
            ends = only.said(END)
            await proxy.shut()
            await only.logs(END, ends + 1)
            await user.change("vm", vcpus=vcpus)
            asked = len(proxy.requests)
            await proxy.reopen()
            assert (await user.wait_ready("vm")).vcpus == vcpus
            assert await lists_before_the_watch(proxy, asked) == 2, "its own and that of the watch"
        only.process.require_running()
        assert only.process.pid == pid
        assert "Traceback" not in only.process.text()


async def test_a_leader_that_was_stopped_longer_than_its_lease_sends_no_command_when_it_wakes(
    replicas: Replicas, user: User, machine: FaultyMonitor
) -> None:
    """It is stopped after the first of four plugs; another one leads when it goes on, and does the other three."""
    first = await replicas.start("first", SHORT, resync_seconds=3600)
    second = await replicas.start("second", SHORT, resync_seconds=3600)
    await user.create("vm", 2, "vm.sock")
    await user.wait_ready("vm")
    held = machine.faults["device_add"] = Held(times=1)
    await user.change("vm", vcpus=6)
    await until(lambda: held.struck, WAIT, "the first plug")
    last = machine.commands[-1]
    assert last.name == "device_add"

    first.signal(signal.SIGSTOP)
    try:
        await replicas.led_by(second)
        held.let_go.set()
    finally:
        first.signal(signal.SIGCONT)

    # That it was stopped, or, if it was just waiting for one, that no answer came.
    await first.logs("could not be renewed within 10 s: ")
    assert [each for each in machine.commands if each.connection == last.connection][-1] == last
    assert (await user.wait_ready("vm")).vcpus == 6
    requests = await replicas.requests()
    taken = first_write(second, requests)
    assert [each for each in requests[taken:] if each.user == first.user and each.is_write] == []


async def test_a_leader_whose_lease_is_taken_by_force_stands_by_again(
    control_plane: ControlPlane, replicas: Replicas, user: User, machine: FaultyMonitor
) -> None:
    first = await replicas.start("first", FOR_EVER)
    await control_plane.kubectl(
        "patch",
        "lease/vcpuset-controller",
        "-n",
        user.namespace,
        "--type=merge",
        "-p",
        '{"spec": {"holderIdentity": "thief"}}',
    )
    await first.logs(f"was taken by thief; {END}")
    await first.logs("is held by thief")
    await user.create("vm", 4, "vm.sock")
    await until(first.is_ready, WAIT, "the standby to be ready")
    first.process.require_running()
    assert machine.commands == []
