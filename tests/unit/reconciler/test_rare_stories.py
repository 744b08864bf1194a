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
