"""A set that is told of another monitor of the same QEMU."""

from __future__ import annotations

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu

__all__: list[str] = []


def test_requests_in_flight_are_kept_when_the_set_names_another_monitor_of_the_same_qemu() -> None:
    qemu = Qemu(boot=2, slots=8)
    world = LawfulWorld(qemu, vcpus=4)
    try:
        world.run_due()
        qemu.guest = Guest.ASLEEP
        world.advance(2)
        world.apply("web", vcpus=3)
        world.run_due()
        (asked,) = world.status().pending_unplugs
        world.machines["b.sock"] = qemu
        world.apply("web", monitor={"unix": {"path": "b.sock"}})
        world.advance(2)
        assert [(each.path, each.attempts) for each in world.status().pending_unplugs] == [(asked.path, 1)]
    finally:
        world.close()
