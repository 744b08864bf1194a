"""What the state machines have found, told plainly."""

from __future__ import annotations

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu

__all__: list[str] = []


def test_boot_cpus_that_are_kept_from_now_on_are_not_waited_for_for_ever(world: LawfulWorld, qemu: Qemu) -> None:
    """They were asked for when that was allowed, and a reset lost the request: it will never be made again."""
    unplug = {"retrySeconds": 10, "timeoutSeconds": 10}
    world.apply("web", vcpus=3, unplug=unplug)
    world.run_due()
    qemu.guest = Guest.SLOW
    qemu.rejected_slots = {2}
    world.apply("web", vcpus=2)
    world.run_due()
    assert qemu.latched == {1}

    qemu.forget()
    qemu.guest = Guest.PROMPT
    qemu.rejected_slots = set()
    world.apply("web", unplug={**unplug, "bootVCPUs": "Keep"})
    world.advance(80)

    assert (sorted(qemu.cpus), world.true_conditions()) == ([0, 1], ["Ready"])


def test_a_refusal_that_was_heard_in_a_pass_outlives_the_session_that_ends_with_it(
    world: LawfulWorld, qemu: Qemu
) -> None:
    """The slot's `_OST` report is the same as before the request, so only the event tells."""
    unplug = {"retrySeconds": 10, "timeoutSeconds": 60}
    world.apply("web", vcpus=4, unplug=unplug)
    world.run_due()
    qemu.refused_slots = {3}
    world.apply("web", vcpus=3)
    world.run_due()
    world.apply("web", vcpus=4)
    world.run_due()
    assert sorted(qemu.cpus) == [0, 1, 2, 3]

    qemu.guest = Guest.ASLEEP
    world.apply("web", vcpus=1)
    world.advance(1)
    assert qemu.latched == {1, 2, 3}
    # From here on one is too many. It is asked for again in a moment, and then the guest gives all but that one back.
    world.apply("web", vcpus=3)
    world.advance(3)
    qemu.guest = Guest.PROMPT
    world.advance(3)
    assert world.true_conditions() == ["Ready"]
    assert 3 in qemu.cpus

    assert world.status().pending_unplugs == ()
    world.apply("web", vcpus=2)
    world.run_due()
    assert (qemu.vcpus, world.true_conditions()) == (2, ["Ready"])
