"""What a guest itself says of its CPUs, by its QEMU guest agent (`guest-get-vcpus`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GuestCPU", "GuestCPUs"]


@dataclass(frozen=True, slots=True)
class GuestCPU:
    """One logical processor of the guest. `logical_id` is the guest's own number, not QEMU's slot."""

    logical_id: int
    online: bool
    can_offline: bool


@dataclass(frozen=True, slots=True)
class GuestCPUs:
    """All logical processors that the guest knows of. One that was just plugged may be missing for a moment."""

    cpus: tuple[GuestCPU, ...]

    @property
    def online(self) -> int:
        """How many the guest uses."""
        return sum(cpu.online for cpu in self.cpus)

    @property
    def offline(self) -> tuple[int, ...]:
        """The logical ids of those that it has and does not use, ascending."""
        return tuple(sorted(cpu.logical_id for cpu in self.cpus if not cpu.online))
