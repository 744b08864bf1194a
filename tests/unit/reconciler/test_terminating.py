"""A set that has been deleted and whose object somebody's finalizer keeps: its machine is left alone."""

from __future__ import annotations

import pytest

from unit.reconciler.model import Qemu
from unit.reconciler.world import World

__all__: list[str] = []


@pytest.fixture
def world(empty_world: World, qemu: Qemu) -> World:
    """A deleted set that had brought its machine from 2 to 4, and kept its monitor."""
    world = empty_world
    world.machines["a.sock"] = qemu
    world.apply("web", vcpus=4)
    world.run_due()
    assert world.sessions_held == 1
    world.delete("web", held=True)
    world.run_due()
    return world


def test_its_monitor_is_free_at_once(world: World) -> None:
    assert world.sessions_held == 0


def test_its_status_says_once_that_its_machine_is_left_alone(world: World) -> None:
    assert (world.reason(), world.true_conditions()) == ("Terminating", [])
    assert world.status().observed_generation == world.vcpuset().generation
    assert world.recorder.events[-1] == ("Normal", "Terminating")

    writes, passes = len(world.api.writes), world.passes
    world.deliver()
    world.run_due()
    assert world.passes == passes, "its own report is no news"
    world.advance(600)
    world.restart_operator()
    world.advance(600)
    assert len(world.api.writes) == writes


def test_its_machine_is_not_changed_any_more(world: World, qemu: Qemu) -> None:
    world.apply("web", vcpus=6)
    qemu.take_away(3)
    world.advance(600)
    world.restart_operator()
    world.advance(600)

    assert qemu.vcpus == 3


def test_a_deletion_that_the_operator_was_not_there_for_is_reported_by_the_next_one(
    empty_world: World, qemu: Qemu
) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    world.apply("web", vcpus=4)
    world.delete("web", held=True)
    world.restart_operator()
    world.run_due()

    assert world.reason() == "Terminating"
    assert qemu.vcpus == 2


def test_when_its_object_goes_nothing_is_left_to_do(world: World) -> None:
    world.delete("web")
    world.run_due()

    assert world.next_pass == float("inf")
