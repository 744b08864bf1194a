"""A spec that this version cannot obey, as after a roll-back: said on the object, and nothing is done by it."""

from __future__ import annotations

from typing import Any

from unit.reconciler.model import AgentMode, Guest, Qemu
from unit.reconciler.world import ON_DEMAND, World

__all__: list[str] = []

NEWER: dict[str, Any] = {"unplug": {"policy": "Sometimes"}}
"""What a newer version knows."""


def _ready(world: World, name: str = "web", **spec: Any) -> None:
    world.apply(name, **spec)
    world.run_due()
    assert world.true_conditions(name) == ["Ready"]


def test_it_is_stalled_with_the_field_and_an_event_and_nothing_more_is_written(empty_world: World, qemu: Qemu) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    _ready(world, vcpus=4)
    world.apply("web", vcpus=6, **NEWER)
    world.run_due()

    ready = world.status().ready
    assert ready is not None
    assert (world.reason(), world.true_conditions()) == ("UnsupportedSpec", ["Stalled"])
    assert ready.observed_generation == world.status().observed_generation == world.vcpuset().generation == 2
    assert "spec.unplug.policy: Invalid enum value 'Sometimes'" in ready.message
    assert "upgrade the operator, or correct the field" in ready.message
    assert world.recorder.events[-1] == ("Warning", "UnsupportedSpec")
    assert (world.status().vcpus, qemu.vcpus) == (4, 4)

    writes, passes = len(world.api.writes), world.passes
    world.advance(3600)
    assert len(world.api.writes) == writes
    assert world.passes - passes <= 3600 / 54 + 1, "no back-off is at work"


def test_it_converges_once_the_field_is_corrected(empty_world: World, qemu: Qemu) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    world.apply("web", vcpus=6, **NEWER)
    world.run_due()
    assert (world.reason(), qemu.vcpus) == ("UnsupportedSpec", 2)

    _ready(world, unplug={"policy": "Disabled"})
    assert qemu.vcpus == 6


def test_it_lets_go_of_its_monitor_at_once_and_yields_when_it_comes_back(empty_world: World, qemu: Qemu) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    _ready(world, "elder", vcpus=4)
    assert world.sessions_held == 1
    world.advance(60)
    world.apply("younger", vcpus=6, monitor=ON_DEMAND)
    world.run_due()
    assert world.reason("younger") == "MonitorConflict"

    world.apply("elder", **NEWER)
    world.run_due()
    assert world.sessions_held == 0
    assert (world.reason("elder"), qemu.vcpus) == ("UnsupportedSpec", 6)
    assert world.true_conditions("younger") == ["Ready"]

    world.apply("elder", unplug={})
    world.run_due()
    assert (world.reason("younger"), qemu.vcpus) == ("MonitorConflict", 4)


def test_requests_of_before_stand_in_the_status_and_are_followed_once_the_field_is_corrected(
    empty_world: World, qemu: Qemu
) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    _ready(world, vcpus=6)
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=5)
    world.run_due()
    (request,) = world.status().pending_unplugs

    world.apply("web", **NEWER)
    world.advance(100)
    assert world.status().pending_unplugs == (request,)

    qemu.guest = Guest.PROMPT
    world.apply("web", unplug={})
    world.advance(600)
    assert (qemu.vcpus, world.status().pending_unplugs) == (5, ())


def test_the_guest_is_asked_no_more(empty_world: World, qemu: Qemu) -> None:
    world = empty_world
    world.machines["a.sock"] = qemu
    qemu.agent = AgentMode.MUTE
    world.apply("web", vcpus=2, guestAgent={"unix": {"path": "a.agent"}})
    world.run_due()
    assert world.guests_being_queried == 1

    world.apply("web", **NEWER)
    world.run_due()
    assert world.guests_being_queried == 0
    assert [condition.type for condition in world.status().conditions] == ["Ready", "Reconciling", "Stalled"]
