"""What a session shows of a machine, what plug and unplug do to it, and what the guest answers."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness.acpi import Acpi, Source, Status
from harness.faults import Link
from harness.faulty import Fault, FaultyMonitor, Silent
from harness.guest import Guest
from harness.qmp import Raw, raw
from harness.wait import until
from qmp.sessions import Connect, Wakes
from vcpuset.domain.errors import DeviceGone, MachineUnsettled, MonitorUnreachable
from vcpuset.domain.machine import Activity, Answer, Machine, Ost, Slot
from vcpuset.qmp.session import Session


@pytest.fixture
async def control(q35: Guest) -> AsyncIterator[Raw]:
    """A second monitor of the machine, for the guest's part and for somebody else's changes."""
    async with raw(q35.control) as client:
        yield client


@pytest.fixture
async def acpi(control: Raw) -> Acpi:
    """The hand of a guest whose ACPI is up."""
    acpi = Acpi(control)
    await acpi.leave_legacy()
    return acpi


class Says(Fault):
    """An answer of the test's own."""

    def __init__(self, *returns: object) -> None:
        super().__init__(times=len(returns))
        self._returns = list(returns)

    async def deliver(self, link: Link, answer: dict[str, Any]) -> None:
        await link.send({**answer, "return": self._returns.pop(0)})


def slot_of(machine: Machine, index: int) -> Slot:
    assert machine.slots is not None
    return machine.slots[index]


async def test_a_machine_is_seen_as_its_monitor_shows_it(q35: Guest, control: Raw, connect: Connect) -> None:
    machine = await (await connect(q35.monitors[0])).observe()
    shown = await control.slots()
    threads = {cpu["qom-path"]: cpu["thread-id"] for cpu in await control.call("query-cpus-fast")}
    assert (machine.run_state, machine.arch, machine.vcpus, machine.migrating) == ("paused", "x86_64", 2, False)
    assert machine.activity is Activity.CHANGEABLE
    assert machine.slots is not None
    assert [slot.index for slot in machine.slots] == list(range(64))
    for slot, entry in zip(machine.slots, shown, strict=True):
        assert slot.props == entry["props"]
        assert (slot.driver, slot.vcpus, slot.path) == (entry["type"], entry["vcpus-count"], entry.get("qom-path"))
        assert slot.thread_id == threads.get(entry.get("qom-path"))
    assert [slot.index for slot in machine.occupied] == [0, 1]
    assert all(slot.boot and slot.thread_id for slot in machine.occupied)


async def test_slots_ascend_by_socket_die_core_and_thread(namespace_folder: Path, connect: Connect) -> None:
    smp = "1,sockets=2,dies=2,cores=2,threads=2,maxcpus=16"
    async with Guest(None, smp=smp, memory=64, socket_dir=namespace_folder) as guest:
        machine = await (await connect(guest.monitors[0])).observe()
        assert machine.slots is not None
        keys = ("socket-id", "die-id", "core-id", "thread-id")
        ids = [tuple(slot.props[key] for key in keys) for slot in machine.slots]
        assert ids == [(s, d, c, t) for s in (0, 1) for d in (0, 1) for c in (0, 1) for t in (0, 1)]


async def test_the_machine_type_pc_works_as_q35(namespace_folder: Path, connect: Connect) -> None:
    async with Guest(None, machine="pc", smp="1,maxcpus=64", memory=64, socket_dir=namespace_folder) as guest:
        session = await connect(guest.monitors[0])
        machine = await session.observe()
        await session.plug(machine.free[0])
        assert (await session.observe()).vcpus == 2


async def test_a_machine_type_without_cpu_hotplug_has_no_slots(namespace_folder: Path, connect: Connect) -> None:
    async with Guest(None, machine="microvm", smp="2", memory=64, socket_dir=namespace_folder) as guest:
        machine = await (await connect(guest.monitors[0])).observe()
        assert machine.slots is None
        assert (machine.vcpus, machine.floor, machine.ceiling) == (2, 2, 2)


async def test_four_thousand_slots_are_seen(namespace_folder: Path, connect: Connect) -> None:
    async with Guest(None, smp="2,maxcpus=4096", memory=64, socket_dir=namespace_folder) as guest:
        machine = await (await connect(guest.monitors[0])).observe()
        assert machine.slots is not None
        assert len(machine.slots) == 4096
        assert machine.ceiling == 4096


async def test_a_machine_is_told_from_its_successor_by_its_uuid_and_the_age_of_its_socket(
    namespace_folder: Path, connect: Connect
) -> None:
    uuid = "11111111-2222-4333-8444-555555555555"
    async with Guest(None, memory=64, extra=["-uuid", uuid], socket_dir=namespace_folder) as guest:
        path = guest.monitors[0]
        machine = await (await connect(path)).observe()
        assert machine.uuid == uuid
        assert machine.since == datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        await guest.restart()
        successor = await (await connect(path)).observe()
        assert successor.uuid == uuid
        assert successor.since == datetime.fromtimestamp(path.lstat().st_mtime, UTC) > machine.since


async def test_a_machine_that_was_given_no_uuid_has_none_and_on_tcp_no_age(connect: Connect) -> None:
    async with Guest(None, memory=64, tcp=True) as guest:
        machine = await (await connect(guest.tcp_address)).observe()
        assert (machine.uuid, machine.since) == (None, None)


async def test_a_guest_whose_acpi_is_not_up_reports_nothing_yet(q35: Guest, connect: Connect, control: Raw) -> None:
    session = await connect(q35.monitors[0])
    assert (await session.observe()).ost == {}
    assert not (await session.observe()).guest_accepts_unplugs
    await Acpi(control).leave_legacy()
    machine = await session.observe()
    assert machine.guest_accepts_unplugs
    assert machine.ost is not None
    assert machine.ost[1] == Ost(0, 0)


async def test_a_plugged_cpu_counts_at_once_and_is_named_for_its_slot(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0])
    for index in (2, 3, 63):
        await session.plug(slot_of(await session.observe(), index))
    machine = await session.observe()
    assert machine.vcpus == 5
    assert [slot.index for slot in machine.occupied] == [0, 1, 2, 3, 63]
    assert slot_of(machine, 63).path == "/machine/peripheral/vcpu63"
    assert len({slot.thread_id for slot in machine.occupied}) == 5


async def test_an_unplugged_cpu_is_gone_when_the_guest_gives_it_up_and_every_step_that_matters_wakes(
    q35: Guest, connect: Connect, acpi: Acpi, wakes: Wakes
) -> None:
    session = await connect(q35.monitors[0], wakes)
    await session.plug(slot_of(await session.observe(), 2))
    plugged = slot_of(await session.observe(), 2)
    await session.unplug(plugged)
    assert (await session.observe()).vcpus == 3
    assert session.answer(2) is None
    await acpi.eject(2)
    await until(lambda: wakes.count, 60, "a wake")
    assert (await session.observe()).vcpus == 2
    assert session.answer(2) is Answer.IN_PROGRESS
    with pytest.raises(DeviceGone):
        await session.unplug(plugged)


async def test_a_cpu_plugged_again_into_a_slot_has_another_thread(q35: Guest, connect: Connect, acpi: Acpi) -> None:
    session = await connect(q35.monitors[0])
    seen = []
    for _ in range(2):
        await session.plug(slot_of(await session.observe(), 2))
        plugged = slot_of(await session.observe(), 2)
        seen.append((plugged.path, plugged.thread_id))
        await session.unplug(plugged)
        await acpi.eject(2)
        assert (await session.observe()).vcpus == 2
    assert seen[0] != seen[1]


async def test_a_boot_cpu_is_given_back_by_its_path(q35: Guest, connect: Connect, acpi: Acpi) -> None:
    session = await connect(q35.monitors[0])
    await session.unplug(slot_of(await session.observe(), 1))
    await acpi.eject(1)
    machine = await session.observe()
    assert [slot.index for slot in machine.occupied] == [0]


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (Status.FAILURE, Answer.FAILURE),
        (Status.NOT_SUPPORTED, Answer.NOT_SUPPORTED),
        (Status.IN_USE, Answer.IN_USE),
        (Status.BUSY, Answer.BUSY),
        (Status.DEPENDENCY_BUSY, Answer.DEPENDENCY_BUSY),
        (0x99, Answer.OTHER),
    ],
)
async def test_a_refusal_is_heard_wakes_and_is_seen_again_by_an_observation(
    q35: Guest, connect: Connect, acpi: Acpi, wakes: Wakes, status: int, answer: Answer
) -> None:
    session = await connect(q35.monitors[0], wakes)
    boot = slot_of(await session.observe(), 1)
    await session.unplug(boot)
    await acpi.refuse(1, status)
    await until(lambda: session.answer(1) is answer, 60, "the answer")
    await until(lambda: wakes.count, 60, "a wake")
    machine = await session.observe()
    assert machine.vcpus == 2
    assert machine.ost is not None
    assert machine.ost[1] == Ost(Source.EJECT_REQUEST, status)
    await session.unplug(boot)
    assert session.answer(1) is None, "a new request has no answer yet"


async def test_an_answer_in_progress_is_heard_and_wakes_nobody(
    q35: Guest, connect: Connect, acpi: Acpi, wakes: Wakes
) -> None:
    session = await connect(q35.monitors[0], wakes)
    await session.unplug(slot_of(await session.observe(), 1))
    await acpi.ost(1, Source.EJECT_REQUEST, Status.IN_PROGRESS)
    await until(lambda: session.answer(1) is Answer.IN_PROGRESS, 60, "the answer")
    await session.observe()
    assert wakes.count == 0


async def test_an_answer_counts_for_its_own_slot_only_and_a_report_about_a_plug_is_none(
    q35: Guest, connect: Connect, acpi: Acpi
) -> None:
    session = await connect(q35.monitors[0])
    await session.unplug(slot_of(await session.observe(), 1))
    await acpi.ost(2, Source.EJECT_REQUEST, Status.BUSY)
    await acpi.ost(1, Source.DEVICE_CHECK, Status.FAILURE)
    await session.observe()
    assert session.answer(1) is None
    assert session.answer(2) is Answer.BUSY


async def test_the_answer_to_a_request_of_an_earlier_session_is_heard_too(
    q35: Guest, connect: Connect, acpi: Acpi, wakes: Wakes
) -> None:
    earlier = await connect(q35.monitors[0])
    await earlier.unplug(slot_of(await earlier.observe(), 1))
    await earlier.close()
    session = await connect(q35.monitors[0], wakes)
    await acpi.refuse(1)
    await until(lambda: wakes.count, 60, "a wake")
    assert session.answer(1) is Answer.BUSY


async def test_a_refusal_on_machines_without_acpi_comes_by_path(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", cpus=3) as monitor:
        session = await connect(monitor.path)
        machine = await session.observe()
        monitor.cpus.unplug = {1: Silent(), 2: Silent()}
        await session.unplug(slot_of(machine, 1))
        await session.unplug(slot_of(machine, 2))
        monitor.emit("DEVICE_UNPLUG_GUEST_ERROR", {"path": slot_of(machine, 2).path})
        await until(lambda: session.answer(2) is Answer.GUEST_ERROR, 60, "the answer")
        assert session.answer(1) is None


async def test_a_refusal_by_path_is_heard_by_a_later_session_too(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", cpus=3) as monitor:
        monitor.cpus.unplug = {1: Silent()}
        earlier = await connect(monitor.path)
        asked = slot_of(await earlier.observe(), 1)
        await earlier.unplug(asked)
        await earlier.close()
        session = await connect(monitor.path)
        await session.observe()
        monitor.emit("DEVICE_UNPLUG_GUEST_ERROR", {"path": asked.path})
        await until(lambda: session.answer(1) is Answer.GUEST_ERROR, 60, "the answer")


async def test_stopping_continuing_and_resetting_a_machine_wake(
    q35: Guest, connect: Connect, control: Raw, wakes: Wakes
) -> None:
    session = await connect(q35.monitors[0], wakes)
    for command, state in (("cont", "running"), ("stop", "paused"), ("system_reset", "prelaunch")):
        before = wakes.count
        await control.call(command)
        await until(lambda: wakes.count > before, 60, f"a wake by {command}")  # noqa: B023 - used at once
        assert (await session.observe()).run_state == state


async def test_a_change_by_somebody_else_is_seen(q35: Guest, connect: Connect, control: Raw) -> None:
    session = await connect(q35.monitors[0])
    assert (await session.observe()).vcpus == 2
    await control.device_add(7, "somebody-elses")
    machine = await session.observe()
    assert machine.vcpus == 3
    assert slot_of(machine, 7).path == "/machine/peripheral/somebody-elses"


async def test_a_migration_is_seen_until_it_is_cancelled(
    q35: Guest, connect: Connect, control: Raw, namespace_folder: Path
) -> None:
    session = await connect(q35.monitors[0])
    await pause_in_migration(control, namespace_folder)
    machine = await session.observe()
    assert machine.migrating
    assert machine.activity is Activity.BUSY
    await control.call("migrate_cancel")

    async def cancelled() -> bool:
        return not (await session.observe()).migrating

    await until(cancelled, 60, "the migration to end")
    assert (await session.observe()).activity is Activity.CHANGEABLE


async def pause_in_migration(control: Raw, folder: Path) -> None:
    """Start a migration to a file that stops just before its end."""
    capability = {"capability": "pause-before-switchover", "state": True}
    await control.call("migrate-set-capabilities", {"capabilities": [capability]})
    await control.call("migrate", {"uri": f"file:{folder}/state"})

    async def paused() -> bool:
        return bool((await control.call("query-migrate"))["status"] == "pre-switchover")

    await until(paused, 60, "the migration to pause")


async def test_a_cpu_that_goes_between_two_queries_makes_the_observation_void(
    namespace_folder: Path, connect: Connect
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", cpus=2) as monitor:
        three = [*monitor.cpus.query_cpus_fast({}), cpu("/machine/peripheral/vcpu2", 77)]
        monitor.faults["query-cpus-fast"] = Says(three)
        session = await connect(monitor.path)
        with pytest.raises(MachineUnsettled, match="CPUs were plugged or unplugged"):
            await session.observe()
        machine = await session.observe()
        assert machine.vcpus == 2
        assert len(machine.occupied) == 2


async def test_a_machine_without_ospm_status_has_no_reports(namespace_folder: Path, connect: Connect) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        del monitor._handlers["query-acpi-ospm-status"]
        assert (await (await connect(monitor.path)).observe()).ost is None


def cpu(path: str, thread: object = 1) -> dict[str, object]:
    return {"cpu-index": 0, "qom-path": path, "thread-id": thread, "target": "x86_64"}


def slot(**changes: object) -> dict[str, object]:
    return {"type": "t", "vcpus-count": 1, "props": {"core-id": 0}, **changes}


@pytest.mark.parametrize(
    ("command", "reply", "words"),
    [
        ("query-status", [], "with []"),
        ("query-status", {}, "without 'status'"),
        ("query-status", {"status": 5}, "'status' is 5"),
        ("query-migrate", None, "with None"),
        ("query-migrate", {"status": []}, "'status' is []"),
        ("query-acpi-ospm-status", {}, "with {}"),
        ("query-acpi-ospm-status", [{"slot-type": "CPU", "slot": "x", "source": 0, "status": 0}], "'slot' is 'x'"),
        ("query-acpi-ospm-status", [{"slot-type": "CPU", "slot": "-1", "source": 0, "status": 0}], "'slot' is '-1'"),
        ("query-acpi-ospm-status", [{"slot-type": "CPU", "slot": 1, "source": 0, "status": 0}], "'slot' is 1"),
        ("query-cpus-fast", {}, "with {}"),
        ("query-cpus-fast", [5], "with 5"),
        ("query-cpus-fast", [{"target": "x86_64"}], "without 'qom-path'"),
        ("query-cpus-fast", [cpu("/a", "1")], "'thread-id' is '1'"),
        ("query-cpus-fast", [cpu("/a", True)], "'thread-id' is True"),
        ("query-hotpluggable-cpus", "many", "with 'many'"),
        ("query-hotpluggable-cpus", [slot(props=[])], "'props' is []"),
        ("query-hotpluggable-cpus", [slot(props={"core-id": "0"})], "'core-id' is '0'"),
        ("query-hotpluggable-cpus", [slot(props={"core-id": [0]})], "'core-id' is [0]"),
        ("query-hotpluggable-cpus", [slot(props={"core-id": 1.5})], "'core-id' is 1.5"),
        ("query-hotpluggable-cpus", [slot(**{"qom-path": None})], "'qom-path' is None"),
        ("query-hotpluggable-cpus", [slot(**{"vcpus-count": 0.5})], "'vcpus-count' is 0.5"),
        ("query-hotpluggable-cpus", [{"props": {}}], "without 'type'"),
        ("query-hotpluggable-cpus", ["x" * 10_000], "with 'xxx"),
    ],
)
async def test_a_reply_of_another_shape_is_told_and_not_guessed_at(
    namespace_folder: Path, connect: Connect, command: str, reply: object, words: str
) -> None:
    async with FaultyMonitor(namespace_folder / "qmp") as monitor:
        monitor.faults[command] = Says(reply)
        session = await connect(monitor.path)
        with pytest.raises(MonitorUnreachable) as raised:
            await session.observe()
        assert f"team-a/qmp answered {command} with " in str(raised.value)
        assert words in str(raised.value)
        assert len(str(raised.value)) < 200


async def test_observations_plugs_and_refusals_at_the_same_time_do_not_mix_up(q35: Guest, connect: Connect) -> None:
    session = await connect(q35.monitors[0])
    machine = await session.observe()
    observed: list[Machine | BaseException | None] = list(
        await asyncio.gather(
            *(session.plug(free) for free in machine.free[:8]),
            *(session.observe() for _ in range(8)),
            *(session.plug(machine.occupied[0]) for _ in range(4)),
            return_exceptions=True,
        )
    )
    assert [type(outcome).__name__ for outcome in observed] == ["NoneType"] * 8 + ["Machine"] * 8 + ["SlotTaken"] * 4
    assert (await session.observe()).vcpus == 10


async def test_a_free_slot_cannot_be_unplugged(q35: Guest, connect: Connect) -> None:
    session: Session = await connect(q35.monitors[0])
    with pytest.raises(ValueError, match="slot 2 holds no CPU"):
        await session.unplug((await session.observe()).free[0])
