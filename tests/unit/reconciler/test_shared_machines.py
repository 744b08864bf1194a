"""Two sets that name two monitors of one machine: the older one keeps the machine, and nothing flaps."""

from __future__ import annotations

import pytest

from unit.reconciler.model import Qemu
from unit.reconciler.world import World

__all__: list[str] = []

ON_DEMAND, PERSISTENT = "OnDemand", "Persistent"


def second(world: World, name: str, path: str, qemu: Qemu, vcpus: int, connection: str = ON_DEMAND) -> None:
    """A set with another monitor of this machine."""
    world.machines[path] = qemu
    world.second_monitors.add(path)
    world.apply(name, vcpus=vcpus, monitor={"unix": {"path": path}, "connection": connection})


@pytest.fixture(params=["by its process", "by its uuid"])
def qemu(request: pytest.FixtureRequest) -> Qemu:
    """A machine that is known by one of the two."""
    by_process = request.param == "by its process"
    return Qemu(boot=2, slots=8, has_uuid=not by_process, shows_process=by_process)


@pytest.fixture(params=[ON_DEMAND, PERSISTENT])
def world(empty_world: World, qemu: Qemu, request: pytest.FixtureRequest) -> World:
    """Set "elder" has the machine by a.sock; "younger" comes a minute later and has another monitor of it, b.sock."""
    world = empty_world
    world.machines["a.sock"] = qemu
    world.apply("elder", vcpus=4, monitor={"unix": {"path": "a.sock"}, "connection": request.param})
    world.run_due()
    world.advance(60)
    second(world, "younger", "b.sock", qemu, 3, connection=request.param)
    world.run_due()
    return world


def test_the_younger_set_yields_before_it_changes_anything(world: World, qemu: Qemu) -> None:
    assert qemu.vcpus == 4
    assert qemu.changes == 1
    assert world.true_conditions("elder") == ["Ready"]
    assert (world.reason("younger"), world.true_conditions("younger")) == ("MonitorConflict", ["Stalled"])
    message = world.status("younger").conditions[0].message
    assert "VCPUSet default/elder is older and names another monitor of the same machine" in message
    words = "its own -uuid" if qemu.has_uuid else "one process listens on both"
    assert words in message


def test_nothing_flaps_and_the_younger_one_keeps_no_session(world: World, qemu: Qemu) -> None:
    writes, changes = len(world.api.writes), qemu.changes
    world.advance(1000)

    assert len(world.api.writes) == writes
    assert (qemu.vcpus, qemu.changes) == (4, changes)
    assert world.sessions_held <= 1


def test_the_younger_takes_over_at_once_when_the_elder_goes(world: World, qemu: Qemu) -> None:
    world.delete("elder")
    world.run_due()

    assert qemu.vcpus == 3
    assert world.true_conditions("younger") == ["Ready"]


def test_the_younger_takes_over_within_a_second_when_the_elder_names_another_machine(world: World, qemu: Qemu) -> None:
    world.machines["c.sock"] = Qemu()
    world.apply("elder", monitor={"unix": {"path": "c.sock"}})
    world.advance(1)

    assert qemu.vcpus == 3
    assert world.true_conditions("elder") == world.true_conditions("younger") == ["Ready"]


def test_an_elder_that_is_told_of_a_third_monitor_keeps_the_machine(world: World, qemu: Qemu) -> None:
    changes = qemu.changes
    world.machines["c.sock"] = qemu
    world.second_monitors.add("c.sock")
    world.apply("elder", monitor={"unix": {"path": "c.sock"}})
    world.advance(100)

    assert (qemu.vcpus, qemu.changes) == (4, changes)
    assert world.reason("younger") == "MonitorConflict"


def test_a_suspended_set_holds_its_machine(world: World, qemu: Qemu) -> None:
    world.apply("elder", suspend=True)
    world.advance(100)

    assert qemu.vcpus == 4
    assert world.reason("younger") == "MonitorConflict"


def test_neither_a_restart_of_the_operator_nor_of_qemu_lets_the_younger_one_act_first(world: World, qemu: Qemu) -> None:
    for restarts_operator in (True, False, True):
        asked = qemu.changes
        # The younger one is looked at first.
        world.machines = dict(reversed(world.machines.items()))
        if restarts_operator:
            world.restart_operator()
        else:
            qemu.power_on()
            asked += 1
        world.wake("younger")
        world.run_pass(world.vcpuset("younger").uid)
        world.wake("elder")
        world.advance(100)

        assert (qemu.vcpus, qemu.changes) == (4, asked)
        assert world.true_conditions("elder") == ["Ready"]
        assert world.reason("younger") == "MonitorConflict"


def test_a_younger_one_whose_machine_is_replaced_by_another_one_is_free(world: World, qemu: Qemu) -> None:
    other = world.machines["b.sock"] = Qemu(has_uuid=qemu.has_uuid, shows_process=qemu.shows_process)
    world.advance(100)

    assert (qemu.vcpus, other.vcpus) == (4, 3)
    assert world.true_conditions("elder") == world.true_conditions("younger") == ["Ready"]


def test_an_elder_whose_monitor_is_busy_keeps_its_machine(world: World, qemu: Qemu) -> None:
    changes = qemu.changes
    qemu.disconnect()
    qemu.other_client_comes()
    world.advance(100)
    qemu.other_client_goes()
    world.advance(100)

    assert (qemu.vcpus, qemu.changes) == (4, changes)
    assert world.true_conditions("elder") == ["Ready"]


def test_while_an_elder_has_lost_its_monitor_the_younger_one_has_the_machine(world: World, qemu: Qemu) -> None:
    """A file that somebody has removed does not leave a machine without anybody."""
    del world.machines["a.sock"]
    qemu.disconnect()
    world.advance(100)
    assert qemu.vcpus == 3
    assert world.true_conditions("younger") == ["Ready"]
    assert world.reason("elder") == "MonitorUnreachable"

    world.machines["a.sock"] = qemu
    world.advance(100)
    assert qemu.vcpus == 4
    assert world.true_conditions("elder") == ["Ready"]
    assert world.reason("younger") == "MonitorConflict"


def test_an_elder_that_comes_to_the_machine_of_a_younger_one_takes_it_from_there(
    empty_world: World, qemu: Qemu
) -> None:
    world = empty_world
    world.machines["a.sock"] = Qemu()
    world.apply("elder", vcpus=4, monitor={"unix": {"path": "a.sock"}})
    world.advance(60)
    second(world, "younger", "b.sock", qemu, 3)
    world.run_due()
    assert world.true_conditions("younger") == ["Ready"]

    world.machines["c.sock"] = qemu
    world.apply("elder", monitor={"unix": {"path": "c.sock"}})
    world.run_due()

    assert qemu.vcpus == 4
    assert world.true_conditions("elder") == ["Ready"]
    assert world.reason("younger") == "MonitorConflict"


def test_two_machines_with_one_uuid_are_two_if_their_host_tells_their_processes_apart(empty_world: World) -> None:
    """Cloned machines in containers: uuid and thread ids are the same."""
    world = empty_world
    first, clone = Qemu(repeats_ids=True), Qemu(repeats_ids=True)
    assert first.machine() == clone.machine()
    world.machines |= {"a.sock": first, "b.sock": clone}
    for name, vcpus in (("a", 4), ("b", 3)):
        world.apply(name, vcpus=vcpus, monitor={"unix": {"path": f"{name}.sock"}})
    world.run_due()

    assert (first.vcpus, clone.vcpus) == (4, 3)


def test_a_kept_connection_that_qemu_shows_on_another_one_of_its_monitors_is_proof_enough(empty_world: World) -> None:
    """On TCP, without a uuid."""
    world = empty_world
    qemu = Qemu(has_uuid=False, shows_process=False, dated=False, on_tcp=True)
    world.machines["a.sock"] = qemu
    world.apply("elder", vcpus=4, monitor={"unix": {"path": "a.sock"}, "connection": PERSISTENT})
    world.run_due()
    world.advance(60)
    second(world, "younger", "b.sock", qemu, 3, PERSISTENT)
    world.advance(300)
    assert (qemu.vcpus, qemu.changes) == (4, 1)
    assert world.true_conditions("elder") == ["Ready"]
    assert "QEMU reports the connections of both" in world.status("younger").conditions[0].message

    qemu.disconnect()
    world.advance(100)
    assert (qemu.vcpus, qemu.changes) == (4, 1)
    assert world.reason("younger") == "MonitorConflict"

    world.delete("elder")
    world.run_due()
    assert qemu.vcpus == 3
    assert world.true_conditions("younger") == ["Ready"]


def test_a_monitor_that_shows_the_connections_of_others_takes_no_machine_from_them(empty_world: World) -> None:
    world = empty_world
    liar, honest = (Qemu(has_uuid=False, shows_process=False, dated=False, on_tcp=True) for _ in range(2))
    world.machines |= {"a.sock": liar, "b.sock": honest}
    for name in ("a", "b"):
        monitor = {"unix": {"path": f"{name}.sock"}, "connection": PERSISTENT}
        world.apply(name, vcpus=4, monitor=monitor)
        world.run_due()
        world.advance(60)
    liar.clients += honest.clients
    world.advance(100)
    world.apply("b", vcpus=5)
    world.run_due()

    assert honest.vcpus == 5
    assert world.true_conditions("b") == ["Ready"]


@pytest.mark.parametrize("alike", ["uuid", "threads"])
def test_of_uuid_and_threads_one_alone_proves_nothing(empty_world: World, alike: str) -> None:
    """The two ends of a migration have one uuid; machines in containers have one another's thread ids."""
    world = empty_world
    for name, vcpus in (("a", 4), ("b", 3)):
        world.machines[f"{name}.sock"] = Qemu(
            shows_process=False, has_uuid=alike == "uuid", repeats_ids=alike == "threads"
        )
        world.apply(name, vcpus=vcpus, monitor={"unix": {"path": f"{name}.sock"}})
    world.run_due()

    assert [qemu.vcpus for qemu in world.machines.values()] == [4, 3]


def test_one_process_that_listens_for_two_machines_is_two_machines(empty_world: World) -> None:
    """libvirt makes the sockets of all of its machines."""
    world = empty_world
    for name, vcpus in (("a", 4), ("b", 3)):
        qemu = world.machines[f"{name}.sock"] = Qemu(has_uuid=False)
        qemu.listener = "libvirtd"
        world.apply(name, vcpus=vcpus, monitor={"unix": {"path": f"{name}.sock"}})
    world.run_due()

    assert [qemu.vcpus for qemu in world.machines.values()] == [4, 3]


def test_what_a_machine_says_of_itself_takes_nothing_from_sets_of_another_namespace(empty_world: World) -> None:
    """Whoever plays a QEMU can say any uuid and any thread ids."""
    world = empty_world
    for name, namespace in (("a", "tenant"), ("b", "default")):
        world.machines[f"{name}.sock"] = Qemu(shows_process=False, repeats_ids=True)
        world.apply(name, namespace=namespace, vcpus=4, monitor={"unix": {"path": f"{name}.sock"}})
    world.run_due()

    assert [qemu.vcpus for qemu in world.machines.values()] == [4, 4]
