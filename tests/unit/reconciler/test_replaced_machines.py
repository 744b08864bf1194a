"""A QEMU that was replaced by another one, whose CPUs can look the same: in a container, paths and ids repeat."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu

__all__: list[str] = []


@pytest.fixture
def undated() -> Iterator[LawfulWorld]:
    """A set whose machine is known by its uuid only, as over TCP."""
    qemu = Qemu(boot=2, slots=8, repeats_ids=True, dated=False)
    world = LawfulWorld(qemu, vcpus=2)
    world.run_due()
    yield world
    world.close()


def test_while_another_machine_is_filled_the_requests_of_the_one_before_are_not_its_own(undated: LawfulWorld) -> None:
    world, qemu = undated, undated.qemu
    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.advance(1)
    assert [request.slot for request in world.status().pending_unplugs] == [1]

    qemu.power_on(other_machine=True)
    # session, look (2), then the report of the plug beside the plug itself: the operator dies when it has been written.
    world.apply("web", vcpus=3)
    world.interrupt(6, "dies")
    world.advance(1)

    assert world.operator_number == 2
    assert world.status().pending_unplugs == ()
    assert "earlier request" not in world.status().conditions[0].message


@pytest.fixture
def anonymous() -> Iterator[LawfulWorld]:
    """A set whose machine has no uuid: only the age of its socket tells one QEMU from the next."""
    qemu = Qemu(boot=2, slots=8, repeats_ids=True, has_uuid=False)
    world = LawfulWorld(qemu, vcpus=2)
    world.run_due()
    qemu.guest = Guest.ASLEEP
    yield world
    world.close()


def test_a_request_made_while_the_clock_was_behind_is_still_this_machines_when_it_has_caught_up(
    anonymous: LawfulWorld,
) -> None:
    """By the clock it was made before QEMU started."""
    world = anonymous
    world.set_clock(-5)
    world.apply("web", vcpus=1)
    world.advance(9)

    (request,) = world.status().pending_unplugs
    assert request.attempts == 2, "made again after the pause, and not void when the clock has caught up"


def test_the_requests_to_a_qemu_that_is_gone_are_void_although_the_clock_was_set_back(anonymous: LawfulWorld) -> None:
    """By the clock they were made after the new one started."""
    world = anonymous
    world.apply("web", vcpus=1)
    world.advance(1)
    (old,) = world.status().pending_unplugs

    world.set_clock(-3600)
    world.qemu.power_on()
    world.advance(1)

    (new,) = world.status().pending_unplugs
    assert (new.path, new.thread_id, new.attempts) == (old.path, old.thread_id, 1)
    assert world.qemu.latched == {1}


def test_the_requests_to_a_qemu_that_is_gone_are_void_for_the_next_operator_too(anonymous: LawfulWorld) -> None:
    world = anonymous
    world.apply("web", vcpus=1)
    world.advance(1)
    world.qemu.power_on()
    world.restart_operator()
    world.advance(1)

    assert [request.attempts for request in world.status().pending_unplugs] == [1]
    assert world.qemu.latched == {1}
