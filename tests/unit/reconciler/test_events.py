"""An Event tells a person something new: a change that was carried out, what went wrong, and that it is over."""

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu

__all__: list[str] = []

CONVERGED = ("Normal", "Converged")


def test_a_set_that_is_found_as_declared_posts_none_nor_after_a_restart_of_the_operator(world: LawfulWorld) -> None:
    world.restart_operator()
    world.advance(100)
    assert world.reason() == "Converged"
    assert world.recorder.events == []


def test_a_plug_posts_one_when_it_is_carried_out(world: LawfulWorld) -> None:
    world.apply("web", vcpus=6)
    world.advance(100)
    assert world.recorder.events == [CONVERGED]


def test_an_unplug_posts_one_when_it_is_carried_out_however_long_the_guest_takes(
    world: LawfulWorld, qemu: Qemu
) -> None:
    world.apply("web", vcpus=6)
    world.advance(1)
    world.recorder.events.clear()
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=4)
    world.advance(10)
    assert world.reason() == "UnplugPending"
    assert world.recorder.events == []
    qemu.guest = Guest.PROMPT
    world.advance(30)
    assert world.recorder.events == [CONVERGED]


def test_an_unplug_that_ends_while_no_operator_runs_posts_one(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.run_due()
    qemu.guest = Guest.PROMPT
    qemu.guest_works()
    world.restart_operator()
    world.run_due()
    assert world.reason() == "Converged"
    assert world.recorder.events == [CONVERGED]


def test_drift_that_is_undone_posts_one(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.come_by_another_hand(5, "other")
    world.advance(100)
    assert world.reason() == "Converged"
    assert world.recorder.events == [CONVERGED]


def test_what_goes_wrong_posts_a_warning_and_its_end_posts_one(world: LawfulWorld, qemu: Qemu) -> None:
    qemu.reachable = False
    qemu.disconnect()
    world.advance(5)
    assert world.recorder.events == [("Warning", "MonitorUnreachable")]
    qemu.reachable = True
    world.advance(60)
    assert world.recorder.events[1:] == [CONVERGED]
