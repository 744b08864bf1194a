"""A machine and a world around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Qemu
from unit.reconciler.world import World

__all__ = ["empty_world", "qemu", "world"]


@pytest.fixture
def qemu() -> Qemu:
    """Two CPUs from the boot, slots for eight."""
    return Qemu(boot=2, slots=8)


@pytest.fixture
def world(qemu: Qemu) -> Iterator[LawfulWorld]:
    """The set "web" declares the two CPUs of `qemu` and is Ready; every deed of the operator is judged."""
    world = LawfulWorld(qemu, vcpus=2)
    world.run_due()
    yield world
    world.close()


@pytest.fixture
def empty_world() -> Iterator[World]:
    """An operator without sets."""
    world = World()
    yield world
    world.close()
