"""Two sets that name one monitor: the older one keeps it, and nothing flaps."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest

from unit.reconciler.model import Guest, Qemu
from unit.reconciler.standins import ModelMonitors
from unit.reconciler.world import World
from vcpuset.domain.resource import VCPUSet
from vcpuset.qmp.sockets import Endpoint

__all__: list[str] = []


@pytest.fixture
def world(empty_world: World, qemu: Qemu) -> World:
    """Set "elder" has the machine at a.sock; "younger" comes a minute later and names the same."""
    world = empty_world
    world.machines["a.sock"] = qemu
    world.apply("elder", vcpus=4)
    world.run_due()
    world.advance(60)
    world.apply("younger", vcpus=6)
    world.run_due()
    return world


def test_the_younger_set_yields_and_says_to_whom(world: World, qemu: Qemu) -> None:
    assert qemu.vcpus == 4
    assert world.true_conditions("elder") == ["Ready"]
    assert (world.reason("younger"), world.true_conditions("younger")) == ("MonitorConflict", ["Stalled"])
    assert "VCPUSet default/elder is older" in world.status("younger").conditions[0].message
    assert world.status("younger").vcpus is None


def test_nothing_flaps(world: World, qemu: Qemu) -> None:
    writes = len(world.api.writes)
    world.advance(1000)

    assert len(world.api.writes) == writes
    assert qemu.vcpus == 4


def test_the_younger_takes_over_at_once_when_the_elder_goes(world: World, qemu: Qemu) -> None:
    world.delete("elder")
    world.run_due()

    assert qemu.vcpus == 6
    assert world.true_conditions("younger") == ["Ready"]


def test_the_younger_takes_over_when_the_elder_is_deleted_while_a_pass_finds_its_socket(
    world: World, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = ModelMonitors.resolve

    async def slow(self: ModelMonitors, vcpuset: VCPUSet) -> AbstractContextManager[Endpoint]:
        if vcpuset.name == "elder":
            world.delete("elder")
        return await resolve(self, vcpuset)

    monkeypatch.setattr(ModelMonitors, "resolve", slow)
    world.apply("elder", vcpus=5)
    world.run_due()

    assert qemu.vcpus == 6
    assert world.true_conditions("younger") == ["Ready"]


def test_the_younger_takes_over_at_once_when_the_elder_is_deleted_although_a_finalizer_keeps_it(
    world: World, qemu: Qemu
) -> None:
    world.delete("elder", held=True)
    world.run_due()

    assert qemu.vcpus == 6
    assert world.true_conditions("younger") == ["Ready"]


def test_the_younger_takes_over_at_once_when_the_elder_names_another_monitor(world: World, qemu: Qemu) -> None:
    other = world.machines["b.sock"] = Qemu()
    world.apply("elder", monitor={"unix": {"path": "b.sock"}})
    world.run_due()

    assert (qemu.vcpus, other.vcpus) == (6, 4)
    assert world.true_conditions("elder") == world.true_conditions("younger") == ["Ready"]


def test_a_suspended_set_holds_its_monitor(world: World, qemu: Qemu) -> None:
    world.apply("elder", suspend=True)
    world.advance(100)

    assert qemu.vcpus == 4
    assert world.reason("younger") == "MonitorConflict"


def test_after_a_restart_of_the_operator_the_elder_still_has_it(world: World, qemu: Qemu) -> None:
    writes = len(world.api.writes)
    world.restart_operator()
    world.advance(100)

    assert qemu.vcpus == 4
    assert len(world.api.writes) == writes


def test_two_names_of_one_socket_are_one_monitor(world: World, qemu: Qemu) -> None:
    world.machines["alias.sock"] = qemu
    world.apply("younger", monitor={"unix": {"path": "alias.sock"}})
    world.advance(100)

    assert world.reason("younger") == "MonitorConflict"
    assert qemu.vcpus == 4


def test_of_two_sets_of_one_second_the_smaller_uid_has_it(empty_world: World, qemu: Qemu) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    world.apply("b", vcpus=6)
    world.apply("a", vcpus=4)
    world.run_due()
    world.advance(100)

    assert qemu.vcpus == 4
    assert (world.reason("a"), world.reason("b")) == ("Converged", "MonitorConflict")


def test_an_elder_that_appears_while_the_younger_waits_for_its_guest_takes_over(empty_world: World, qemu: Qemu) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    world.machines["b.sock"] = Qemu()
    world.apply("elder", vcpus=2, monitor={"unix": {"path": "b.sock"}})
    world.advance(60)
    qemu.guest = Guest.SLOW
    world.apply("younger", vcpus=1)
    world.run_due()
    assert world.sessions_held == 2

    world.apply("elder", monitor={"unix": {"path": "a.sock"}})
    world.advance(2)
    assert world.reason("younger") == "MonitorConflict"

    qemu.guest_works()
    world.advance(70)

    # The request that the younger had made was carried out; the elder plugs what it lost.
    assert qemu.vcpus == 2
    assert world.true_conditions("elder") == ["Ready"]
    assert world.sessions_held == 1


def test_a_set_that_yields_gives_up_what_it_knew_of_the_socket(empty_world: World, qemu: Qemu) -> None:
    """File systems use an inode's number again: it may be another machine's by now."""
    world, other = empty_world, Qemu()
    world.machines["a.sock"] = qemu
    world.apply("elder", vcpus=2, monitor={"unix": {"path": "elsewhere.sock"}})
    world.advance(1)
    world.apply("holder", vcpus=2)
    world.advance(1)
    world.apply("elder", monitor={"unix": {"path": "a.sock"}})
    world.run_due()
    assert world.reason("holder") == "MonitorConflict"

    world.machines = {"a.sock": other, "c.sock": qemu}
    world.advance(100)
    world.apply("younger", vcpus=2, monitor={"unix": {"path": "c.sock"}})
    world.run_due()

    assert world.true_conditions("younger") == ["Ready"]
