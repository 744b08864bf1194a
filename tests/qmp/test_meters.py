"""How busy machines are, from a monitor or a guest's agent that says so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from harness.cpus import kvm_counters
from harness.faults import Answer, Error
from harness.faulty import FaultyMonitor
from harness.faultyagent import FaultyAgent, Returns
from harness.guest import Guest
from harness.qmp import execute
from harness.wait import until
from vcpuset.domain import busy
from vcpuset.domain.busy import SHORTEST_SECONDS, Source
from vcpuset.domain.machine import Machine
from vcpuset.domain.resource import UID, GuestAgent, Spec, UnixMonitor, VCPUSet
from vcpuset.qmp import replies
from vcpuset.qmp.guests import Guests
from vcpuset.qmp.meters import OLDEST_SECONDS, Meters
from vcpuset.qmp.monitors import Monitors

VM = UID("vm")


def kvm(path: str, *, exits: int, halted: float, blocking: bool = False) -> Answer:
    """An entry of query-stats; `halted` in seconds."""
    return kvm_counters(path, exits=exits, halt_wait_ns=round(halted * 1e9), blocking=blocking)


def linux(cpu: int, *, user: int, idle: int) -> Answer:
    """An entry of guest-get-cpustats, in ms."""
    return {
        "type": "linux", "cpu": cpu, "user": user, "nice": 0, "system": 0, "idle": idle, "iowait": 50, "irq": 0,
        "softirq": 0, "steal": 0, "guest": user, "guestnice": 0,
    }  # fmt: skip


class World:
    """Monitors, guests and meters as the operator wires them; time is virtual."""

    def __init__(self, folder: Path) -> None:
        self.observed: list[UID] = []
        self.meters = Meters(self.observed.append, lambda: datetime.now(UTC))
        self.monitors = Monitors(folder.parent, lambda _: None, meters=self.meters)
        self.guests = Guests(folder.parent, lambda _: None, meters=self.meters)
        agent = GuestAgent("agent.sock", bring_online=False)
        self.vcpuset = VCPUSet(
            VM, folder.name, "vm", 1, "1", datetime.now(UTC), Spec(2, UnixMonitor("vm.sock"), guest_agent=agent)
        )

    async def observe(self) -> Machine:
        """What a pass does."""
        with await self.monitors.resolve(self.vcpuset) as endpoint:
            session = await self.monitors.session(VM, endpoint)
        return await session.observe()


@pytest.fixture
async def world(namespace_folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(busy, "SHORTEST_SECONDS", 1.0)
    world = World(namespace_folder)
    yield world
    await world.guests.close()
    await world.monitors.close()


@pytest.fixture
async def monitor(namespace_folder: Path) -> AsyncIterator[FaultyMonitor]:
    async with FaultyMonitor(namespace_folder / "vm.sock") as monitor:
        yield monitor


async def test_each_observation_takes_a_sample_of_kvms_counters(world: World, monitor: FaultyMonitor) -> None:
    monitor.stats = [kvm("/a", exits=1, halted=0), kvm("/b", exits=1, halted=0, blocking=True)]
    await world.observe()
    assert world.meters.last(VM) is None
    assert (await world.meters.ask(VM)) is None
    await asyncio.sleep(1.1)
    monitor.stats = [kvm("/a", exits=9, halted=0.2), kvm("/b", exits=1, halted=0, blocking=True)]
    await world.observe()
    found = world.meters.last(VM)
    assert found is not None
    assert (found.source, found.vcpus) == (Source.KVM, 2)
    assert found.busy == pytest.approx((found.seconds - 0.2) / found.seconds)
    total, now = world.meters.all()[VM]
    assert total == pytest.approx(found.busy * found.seconds)
    assert now == found.busy
    assert not world.meters.needs_agent(VM)


async def test_a_machine_without_counters_is_asked_once(world: World, monitor: FaultyMonitor) -> None:
    for _ in range(3):
        await world.observe()
    assert len(monitor.received("query-stats")) == 1
    assert not world.meters.has_source(VM)
    monitor.restart(2)  # another QEMU, which may use KVM
    for _ in range(2):
        await world.observe()
    assert len(monitor.received("query-stats")) == 2


async def test_a_qemu_that_does_not_know_query_stats_is_observed_as_before(
    world: World, monitor: FaultyMonitor
) -> None:
    monitor.faults["query-stats"] = Error("CommandNotFound", "The command query-stats has not been found")
    assert (await world.observe()).vcpus == 2
    assert not world.meters.has_source(VM)


async def test_the_guests_agent_is_asked_for_a_machine_without_counters(
    world: World, monitor: FaultyMonitor, namespace_folder: Path
) -> None:
    async with FaultyAgent(namespace_folder / "agent.sock") as agent:
        agent.stats = [linux(0, user=1000, idle=0), linux(1, user=0, idle=1000)]
        machine = await world.observe()
        world.guests.query(world.vcpuset, machine)
        await until(lambda: world.meters.has_source(VM), 60, "the first sample")
        await asyncio.sleep(1.1)
        agent.stats = [linux(0, user=1500, idle=600), linux(1, user=0, idle=2100)]
        world.guests.query(world.vcpuset, await world.observe())
        await until(lambda: world.meters.last(VM) is not None, 60, "the second sample")
        found = world.meters.last(VM)
        assert found is not None
        assert found.source is Source.GUEST_AGENT
        assert found.busy * found.seconds == pytest.approx(0.5)
    assert len(monitor.received("query-stats")) == 1


async def test_the_agent_is_left_alone_where_kvm_counts(
    world: World, monitor: FaultyMonitor, namespace_folder: Path
) -> None:
    monitor.stats = [kvm("/a", exits=1, halted=0)]
    async with FaultyAgent(namespace_folder / "agent.sock") as agent:
        world.guests.query(world.vcpuset, await world.observe())
        await until(lambda: world.guests._guests[VM].task is None, 60, "the end of the query")
        assert agent.received("guest-get-vcpus")
        assert agent.received("guest-get-cpustats") == []


@pytest.mark.parametrize("fault", [Error("CommandNotFound", "disabled"), Returns({}), Returns([{"cpu": "0"}])])
@pytest.mark.usefixtures("monitor")
async def test_an_agent_that_does_not_count_is_asked_once_and_its_cpus_are_known(
    world: World, namespace_folder: Path, fault: Error | Returns
) -> None:
    async with FaultyAgent(namespace_folder / "agent.sock", faults={"guest-get-cpustats": fault}) as agent:
        for _ in range(3):
            machine = await world.observe()
            world.guests.query(world.vcpuset, machine)
            await until(lambda: world.guests._guests[VM].task is None, 60, "the end of the query")
        assert len(agent.received("guest-get-vcpus")) == 3
        assert len(agent.received("guest-get-cpustats")) == 1
        report = world.guests.query(world.vcpuset, machine)
        assert report is not None
        assert report.cpus is not None
        assert not world.meters.has_source(VM)


async def test_an_agent_that_knows_the_load_says_so_at_each_query_wherever_the_counters_come_from(
    world: World, monitor: FaultyMonitor, namespace_folder: Path
) -> None:
    monitor.stats = [kvm("/a", exits=1, halted=0)]
    async with FaultyAgent(namespace_folder / "agent.sock") as agent:
        for load in (0.76123046875, 5):
            agent.load = {**agent.load, "load1m": load}
            world.guests.query(world.vcpuset, await world.observe())
            await until(lambda: world.guests._guests[VM].task is None, 60, "the end of the query")
            assert world.meters.demand(VM) == load
        monitor.restart(2)  # another QEMU: this was not its guest's
        await world.observe()
        assert world.meters.demand(VM) is None


@pytest.mark.parametrize(
    "fault",
    [Error("CommandNotFound", "disabled"), Returns({}), Returns([]), Returns({"load1m": "1"}), Returns({"load1m": -1})],
)
@pytest.mark.usefixtures("monitor")
async def test_an_agent_that_does_not_know_the_load_is_asked_once(
    world: World, namespace_folder: Path, fault: Error | Returns
) -> None:
    async with FaultyAgent(namespace_folder / "agent.sock", faults={"guest-get-load": fault}) as agent:
        for _ in range(3):
            world.guests.query(world.vcpuset, await world.observe())
            await until(lambda: world.guests._guests[VM].task is None, 60, "the end of the query")
        assert len(agent.received("guest-get-vcpus")) == 3
        assert len(agent.received("guest-get-load")) == 1
        assert world.meters.demand(VM) is None


def kvm_opens() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not kvm_opens(), reason="/dev/kvm cannot be opened here")
async def test_a_real_machine_with_kvm_has_kvms_counters(world: World, namespace_folder: Path) -> None:
    monitor = namespace_folder / "vm.sock"
    async with Guest(None, accel="kvm", smp="2,maxcpus=64", memory=64, monitor_paths=[monitor]) as guest:
        await world.observe()
        assert world.meters.has_source(VM)
        await execute(guest.control, "cont")
        await asyncio.sleep(1.1)
        await world.observe()
        found = world.meters.last(VM)
        assert found is not None
        assert (found.source, found.vcpus) == (Source.KVM, 2)
        assert 0 <= found.busy <= 2


class TestAsking:
    """`Meters.ask`, in virtual time."""

    pytestmark = pytest.mark.looptime

    def sample(self, meters: Meters, halted: float) -> None:
        stats = replies.halts([kvm("/a", exits=1 + round(halted * 10), halted=halted)])
        meters.from_monitor(VM, TWO, stats)

    def meters(self, halted: float | None = None) -> tuple[Meters, list[UID]]:
        observed: list[UID] = []

        def observe(uid: UID) -> None:
            observed.append(uid)
            if halted is not None:
                asyncio.get_running_loop().call_later(0.1, self.sample, meters, halted)

        meters = Meters(observe, lambda: datetime(2026, 1, 1, tzinfo=UTC))
        return meters, observed

    async def test_a_fresh_value_is_given_at_once(self) -> None:
        meters, observed = self.meters()
        self.sample(meters, 0)
        await asyncio.sleep(8)
        self.sample(meters, 4)
        await asyncio.sleep(SHORTEST_SECONDS - 1)
        found = await meters.ask(VM)
        assert found is not None
        assert found.busy == pytest.approx(0.5)
        assert observed == []

    async def test_an_older_one_is_preceded_by_a_sample_which_all_who_ask_meanwhile_share(self) -> None:
        meters, observed = self.meters(halted=4)
        self.sample(meters, 0)
        await asyncio.sleep(SHORTEST_SECONDS + 2.9)
        values = await asyncio.gather(*(meters.ask(VM) for _ in range(5)))
        assert {value and round(value.seconds, 3) for value in values} == {8.0}
        assert {value and round(value.busy, 3) for value in values} == {0.5}
        assert set(observed) == {VM}

    async def test_without_a_new_sample_the_last_value_counts_for_a_minute(self) -> None:
        meters, _ = self.meters()
        self.sample(meters, 0)
        await asyncio.sleep(8)
        self.sample(meters, 0)
        await asyncio.sleep(OLDEST_SECONDS - 3)
        assert await meters.ask(VM) is not None
        await asyncio.sleep(4)
        assert await meters.ask(VM) is None
        total, now = meters.all()[VM]
        assert total == pytest.approx(8)
        assert now is None

    async def test_a_machine_without_a_source_is_not_observed_because_somebody_asks(self) -> None:
        meters, observed = self.meters()
        meters.from_monitor(VM, TWO, None)
        assert await meters.ask(VM) is None
        meters.from_agent(VM, TWO, None)
        assert await meters.ask(VM) is None
        assert observed == []

    async def test_a_set_that_is_gone_has_nothing(self) -> None:
        meters, _ = self.meters()
        self.sample(meters, 0)
        asking = asyncio.create_task(meters.ask(UID("other")))
        await asyncio.sleep(0.5)
        meters.forget(UID("other"))
        meters.forget(VM)
        assert await asking is None
        assert (dict(meters.all()), meters.last(VM)) == ({}, None)


TWO = Machine("running", "x86_64", 2, ())
