"""What `test_kill` does to the operator and to QEMU, drawn from a seed before anything starts.

So a seed gives the same changes and the same moments again, as fractions of what a change takes on the machine that
runs the test. What is hit at such a moment is up to the scheduler: the same seed need not fail twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from harness.effort import LONG

__all__ = ["BOOT_VCPUS", "CHANGES", "Change", "QEMUDeath", "script"]

CHANGES = 50 if LONG else 5
"""With each of the two seeds."""

BOOT_VCPUS = 2
MOST_VCPUS = 8
BLOCK = 5
"""One change of so many kills QEMU too, and one the operator's successor.

TCG counts all CPUs ever plugged into one QEMU against maxcpus (64 here). A QEMU lives for less than two blocks, so it
sees at most `2 * BLOCK * (MOST_VCPUS - 1) / 2` plugs: each change up needs one down before it.
"""


@dataclass(frozen=True)
class QEMUDeath:
    """QEMU is killed and started again, whatever the operator does meanwhile.

    after     when, counted from the change; 1 is what an undisturbed change takes
    down_for  how long it stays down, in seconds
    """

    after: float
    down_for: float


@dataclass(frozen=True)
class Change:
    """One change, and what happens to it.

    after      when the operator is killed, counted from the change; 1 is what an undisturbed change takes
    successor  when the next operator is killed too, counted from its start; 1 is what its start takes; None: not
    """

    number: int
    old: int
    vcpus: int
    after: float
    successor: float | None
    qemu: QEMUDeath | None

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most vCPUs that the machine may have at any moment from the change to its end."""
        counts = {self.old, self.vcpus} | ({BOOT_VCPUS} if self.qemu else set())
        return min(counts), max(counts)

    def __str__(self) -> str:
        what = f"change {self.number}: {self.old} to {self.vcpus}, operator killed at {self.after:.3f}"
        if self.successor is not None:
            what += f", its successor at {self.successor:.3f}"
        if self.qemu is not None:
            what += f", QEMU at {self.qemu.after:.3f} for {self.qemu.down_for:.3f} s"
        return what


def script(seed: int, old: int = BOOT_VCPUS) -> list[Change]:
    """The changes for a seed, in order; the machine begins with `old`."""
    rng = random.Random(seed)
    # One moment from each of as many parts of the range as there are changes, so that every seed meets every phase;
    # squared, since a lot happens early: the watch event, the record of the requests, the first commands.
    fractions = [(number + rng.random()) / CHANGES for number in range(CHANGES)]
    rng.shuffle(fractions)
    changes = []
    for number, fraction in enumerate(fractions):
        if number % BLOCK == 0:
            qemu_dies_in = number + rng.randrange(BLOCK)
            successor_dies_in = number + rng.randrange(BLOCK)
        vcpus = rng.choice([count for count in range(1, MOST_VCPUS + 1) if count != old])
        changes.append(
            Change(
                number,
                old,
                vcpus,
                after=1.3 * fraction**2,
                successor=1.5 * rng.random() if number == successor_dies_in else None,
                # Up to three times as late: it may hit the first operator, the gap, or the next one.
                qemu=QEMUDeath(3 * rng.random() ** 2, rng.random()) if number == qemu_dies_in else None,
            )
        )
        old = vcpus
    return changes
