"""A set that moves between agents and controllers: the old owner lets go without a trace, the new one takes over.

Each owner acts as a service account of its own, so that the audit log tells who wrote what, and in which order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from secrets import token_hex

import pytest

from harness.acpi import Acpi, Source, Status
from harness.audit import AuditEvent
from harness.controlplane import ControlPlane
from harness.faults import Held
from harness.faulty import FaultyMonitor, Silent, Working
from harness.guest import Guest
from harness.helm import render, settings
from harness.operator import OperatorProcess
from harness.qmp import raw
from harness.wait import until
from harness.world import Seen, User

__all__: list[str] = []

WAIT = 120.0
LONG = {"timeoutSeconds": 3600, "retrySeconds": 3600}
"""With a guest that says that it is at work: so no request is repeated because it is due."""


@dataclass
class Owner:
    """One operator; `node` is what `spec.nodeName` says of its sets, `user` its name in the audit log."""

    node: str | None
    user: str
    process: OperatorProcess

    async def has_let_go(self) -> None:
        """Wait until it serves no set, and check that nothing of one is left in its metrics."""
        await until(lambda: self.process.sets_served() == 0, WAIT, lambda: f"it to let go; {self.process.tail()}")
        assert '"vm"' not in self.process.metrics()


class Owners:
    """Starts operators for the test's namespace."""

    def __init__(self, control_plane: ControlPlane, namespace: str, socket_root: Path, stack: AsyncExitStack) -> None:
        self._control_plane = control_plane
        self._namespace = namespace
        self._socket_root = socket_root
        self._stack = stack
        self._since = control_plane.audit_offset()

    async def agent(self, node: str) -> Owner:
        """The agent of a node."""
        return await self._start(node, node, f"--node-name={node}")

    async def controller(self) -> Owner:
        """A controller, which has to lead before it works."""
        return await self._start("controller", None, "--leader-elect", f"--leader-elect-namespace={self._namespace}")

    async def shards(self, shard: str) -> list[Owner]:
        """The two controllers that the chart makes with one shard: the one of all other sets, and that of the shard."""
        objects = await render(*settings({"controller.shards": [shard]}))
        deployments = {each["metadata"]["name"]: each for each in objects if each["kind"] == "Deployment"}
        owners = []
        for name in sorted(deployments):
            arguments = deployments[name]["spec"]["template"]["spec"]["containers"][0]["args"]
            flags = [each for each in arguments if each.startswith(("--leader-elect", "--label-selector"))]
            owners.append(await self._start(name, None, *flags, f"--leader-elect-namespace={self._namespace}"))
        return owners

    async def _start(self, name: str, node: str | None, *flags: str) -> Owner:
        there = ("-n", self._namespace)
        await self._control_plane.kubectl("create", "serviceaccount", name, *there)
        account = f"--serviceaccount={self._namespace}:{name}"
        await self._control_plane.kubectl("create", "rolebinding", name, "--clusterrole=cluster-admin", account, *there)
        process = OperatorProcess(
            self._control_plane,
            f"--namespace={self._namespace}",
            "--resync-seconds=1",
            *flags,
            socket_root=self._socket_root,
            kubeconfig=await self._control_plane.service_account_kubeconfig(self._namespace, name),
        )
        await self._stack.enter_async_context(process)
        return Owner(node, f"system:serviceaccount:{self._namespace}:{name}", process)

    async def writes(self) -> list[AuditEvent]:
        """All writes to sets and their status that counted, of whomever, in the order in which they were answered."""
        path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{self._namespace}/vcpusets/none-{token_hex(4)}"
        await self._control_plane.request("GET", path)

        def found() -> list[AuditEvent]:
            return self._control_plane.audit_events(self._since)

        await until(lambda: any(each.request_uri == path for each in found()), WAIT, "the last record")
        return [
            each
            for each in found()
            if each.namespace == self._namespace and each.resource == "vcpusets" and each.is_write and each.code < 300
        ]

    async def check_order(self, *owners: Owner) -> None:
        """Check that these owners wrote the status in turn, and none of them after the set was moved away from it."""
        turns: list[set[str]] = [set()]
        for each in await self.writes():
            if each.subresource == "status":
                turns[-1].add(each.user)
            else:
                turns.append(set())  # the user's: a move, or another change
        assert [turn for turn, _ in groupby(filter(None, turns))] == [{owner.user} for owner in owners]


@pytest.fixture
async def owners(control_plane: ControlPlane, namespace: str, socket_root: Path) -> AsyncIterator[Owners]:
    async with AsyncExitStack() as stack:
        yield Owners(control_plane, namespace, socket_root, stack)


@pytest.fixture
async def machine(folder: Path) -> AsyncIterator[FaultyMonitor]:
    async with FaultyMonitor(folder / "vm.sock", cpus=4) as running:
        yield running


def about(seen: Seen) -> list[tuple[int, int]]:
    """Slot and attempts of each request in the status."""
    return [(each["slot"], each["attempts"]) for each in seen.pending]


async def test_a_set_goes_from_owner_to_owner_and_back(owners: Owners, user: User, machine: FaultyMonitor) -> None:
    """It holds its monitor all the time, which serves one client at a time: so each owner has to let go of it."""
    agent, controller, other = await owners.agent("n1"), await owners.controller(), await owners.agent("n2")
    await user.create("vm", 4, "vm.sock", nodeName="n1")
    await user.wait_ready("vm")
    route = [(controller, 6), (agent, 3), (other, 5), (controller, 2)]
    before = agent
    for owner, vcpus in route:
        # In one change, as a user would do it who moves a machine.
        await user.change("vm", nodeName=owner.node, vcpus=vcpus)
        await user.wait_ready("vm")
        assert len(machine.cpus.occupied()) == vcpus
        await before.has_let_go()
        before = owner
    await owners.check_order(agent, *(owner for owner, _ in route))


async def test_a_set_goes_from_shard_to_shard_by_its_label(
    owners: Owners, control_plane: ControlPlane, user: User, machine: FaultyMonitor
) -> None:
    """A kept monitor serves the next shard only once the one before has let go of it."""
    rest, shard = await owners.shards("b")
    leases = await control_plane.request("GET", f"/apis/coordination.k8s.io/v1/namespaces/{user.namespace}/leases")
    assert {each["metadata"]["name"] for each in leases.body["items"]} == {"vcpuset-controller", "vcpuset-controller-b"}
    await user.create("vm", 4, "vm.sock", connection="Persistent")
    await user.wait_ready("vm")
    before = rest
    for owner, label, vcpus in ((shard, "b", 6), (rest, "elsewhere", 3), (shard, "b", 5), (rest, None, 2)):
        # In one change, so that whoever acts on it twice plugs or unplugs too much.
        metadata = {"labels": {"vcpuset.dev/shard": label}}
        await user.patch("vm", {"metadata": metadata, "spec": {"vcpus": vcpus}})
        await user.wait_ready("vm")
        assert len(machine.cpus.occupied()) == vcpus
        await before.has_let_go()
        before = owner
    assert len(machine.received("device_add")) == 4
    assert len(machine.received("device_del")) == 6
    await owners.check_order(rest, shard, rest, shard, rest)


async def test_a_plug_under_way_is_finished_by_the_new_owner_and_makes_no_cpu_too_many(
    owners: Owners, user: User, machine: FaultyMonitor
) -> None:
    agent, controller = await owners.agent("n1"), await owners.controller()
    await user.create("vm", 4, "vm.sock", nodeName="n1")
    await user.wait_ready("vm")
    held = machine.faults["device_add"] = Held(times=1)
    await user.change("vm", vcpus=8)
    await until(lambda: held.struck, WAIT, "the first plug")
    await user.change("vm", nodeName=None, vcpus=7)
    held.let_go.set()

    assert (await user.wait_ready("vm")).vcpus == 7
    await agent.has_let_go()
    assert len(machine.received("device_add")) <= 4, "up to 8, and none twice"
    await until(lambda: len(machine.cpus.occupied()) == 7, WAIT, "seven CPUs")
    await owners.check_order(agent, controller)


@pytest.mark.parametrize("death", [False, True], ids=["alive", "dead"])
async def test_the_successor_of_an_owner_does_not_ask_the_guest_again(
    owners: Owners, user: User, machine: FaultyMonitor, death: bool
) -> None:
    """Whether the old owner lives to see the move or not."""
    agent, other = await owners.agent("n1"), await owners.agent("n2")
    machine.cpus.unplug = {2: Working(), 3: Working()}
    await user.create("vm", 4, "vm.sock", nodeName="n1", unplug=LONG)
    await user.wait_ready("vm")
    await user.change("vm", vcpus=2)
    await until(lambda: len(machine.received("device_del")) == 2, WAIT, "two requests")
    if death:
        agent.process.kill()
    await user.change("vm", nodeName="n2")
    seen = await user.wait("vm", lambda seen: seen.current and bool(seen.pending), "the successor's report")
    assert about(seen) == [(2, 1), (3, 1)]
    looks = len(machine.received("query-cpus-fast"))
    await until(lambda: len(machine.received("query-cpus-fast")) > looks + 2, WAIT, "more looks")
    assert about(await user.get("vm")) == [(2, 1), (3, 1)]

    machine.cpus.eject(3)
    machine.cpus.eject(2)
    assert (await user.wait_ready("vm")).vcpus == 2
    assert len(machine.received("device_del")) == 2
    if not death:
        await agent.has_let_go()
    await owners.check_order(agent, other)


@pytest.mark.parametrize(("hours", "attempts"), [(1, 2), (-1, 1)], ids=["ahead", "behind"])
async def test_an_owner_whose_clock_was_an_hour_off_costs_neither_an_hour_nor_a_storm_of_requests(
    owners: Owners, user: User, machine: FaultyMonitor, hours: int, attempts: int
) -> None:
    """A time in the future counts as now. One before the start of the machine is about another one, and is void.

    Either way the guest is asked a second time, and no third before its time.
    """
    agent, _ = await owners.agent("n1"), await owners.agent("n2")
    machine.cpus.unplug = {3: Silent()}
    unplug = {"timeoutSeconds": 3, "retrySeconds": 3600}
    await user.create("vm", 3, "vm.sock", nodeName="n1", unplug=unplug)
    seen = await user.wait("vm", lambda seen: about(seen) == [(3, 1)], "a request")
    await until(lambda: len(machine.received("device_del")) == 1, WAIT, "the request")
    agent.process.kill()
    seen = await user.get("vm")
    off = datetime.fromisoformat(seen.pending[0]["requestedAt"]) + timedelta(hours=hours)
    path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{user.namespace}/vcpusets/vm/status"
    requests = [{**seen.pending[0], "requestedAt": f"{off:%Y-%m-%dT%H:%M:%SZ}"}]
    answer = await user.control_plane.request("PATCH", path, {"status": {"unplug": {"requests": requests}}})
    assert answer.status == 200, answer
    machine.cpus.unplug = {3: Working()}

    await user.change("vm", nodeName="n2")
    await until(lambda: len(machine.received("device_del")) == 2, WAIT, "a second request")
    again = await user.get("vm")
    assert about(again) == [(3, attempts)]
    asked_at = datetime.fromisoformat(again.pending[0]["requestedAt"])
    assert abs(asked_at - datetime.now(UTC)) < timedelta(minutes=30), "by the clock of who has asked"
    await user.wait_reason("vm", "UnplugTimedOut", stalled=True)
    looks = len(machine.received("query-cpus-fast"))
    await until(lambda: len(machine.received("query-cpus-fast")) > looks + 2, WAIT, "more looks")
    assert len(machine.received("device_del")) == 2
    machine.cpus.eject(3)
    assert (await user.wait_ready("vm")).vcpus == 3


async def test_a_request_that_qemu_holds_for_its_guest_moves_along(owners: Owners, user: User, folder: Path) -> None:
    """A real QEMU, and a guest whose ACPI answers only after the move."""
    agent, controller = await owners.agent("n1"), await owners.controller()
    async with Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest, raw(guest.control) as hand:
        acpi = Acpi(hand)
        await acpi.leave_legacy()
        await user.create("vm", 3, "vm.sock", nodeName="n1", unplug=LONG)
        await user.wait_ready("vm")
        await acpi.insert(2)
        await user.change("vm", vcpus=2)
        await user.wait("vm", lambda seen: about(seen) == [(2, 1)], "a request")
        await until(lambda: _removing(acpi), WAIT, "QEMU to hold it")
        await acpi.ost(2, Source.EJECT_REQUEST, Status.IN_PROGRESS)

        await user.change("vm", nodeName=None)
        seen = await user.wait("vm", lambda seen: seen.current and bool(seen.pending), "the successor's report")
        assert about(seen) == [(2, 1)]
        await agent.has_let_go()

        await acpi.eject(2)
        assert (await user.wait_ready("vm")).vcpus == 2
    await owners.check_order(agent, controller)


async def test_a_set_that_moves_to_where_nobody_is_stays_as_it_was_and_its_monitor_is_free(
    owners: Owners, user: User, machine: FaultyMonitor
) -> None:
    agent = await owners.agent("n1")
    created = await user.create("vm", 4, "vm.sock", nodeName="n1")
    await user.wait_ready("vm")
    # The older one keeps the monitor, and the API server counts ages in whole seconds.
    second = created.body["metadata"]["creationTimestamp"]
    await until(lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}" > second, WAIT, "the next second")
    await user.create("heir", 4, "vm.sock", nodeName="n1")
    await user.wait_reason("heir", "MonitorConflict")

    moved = await user.change("vm", nodeName="nowhere", vcpus=8)
    assert (await user.wait_ready("heir")).vcpus == 4
    left = await user.get("vm")
    assert left.body["metadata"]["resourceVersion"] == moved.body["metadata"]["resourceVersion"]
    assert left.status["observedGeneration"] < left.body["metadata"]["generation"]
    assert not left.ready, "kubectl wait does not take an old report for a new one"
    waiting = await user.control_plane.kubectl(
        "wait", "vcpuset/vm", "-n", user.namespace, "--for=condition=Ready", "--timeout=1s", check=False
    )
    assert waiting.returncode != 0
    assert len(machine.cpus.occupied()) == 4

    await user.delete("heir")
    await agent.has_let_go()
    async with raw(machine.path) as client:
        assert await client.count() == 4
    # And back.
    await user.change("vm", nodeName="n1")
    assert (await user.wait_ready("vm")).vcpus == 8


async def _removing(acpi: Acpi) -> bool:
    return (await acpi.flags(2)).removing
