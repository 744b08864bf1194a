"""What a guest reports of its CPUs, by its QEMU guest agent (`guest-get-vcpus`)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from vcpuset.domain.errors import AgentError, AgentRefused, AgentTimeout

__all__ = ["AgentReason", "GuestCPU", "GuestCPUs", "GuestReport"]


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


class AgentReason(enum.StrEnum):
    """Why the condition GuestAgentConnected is as it is; `status` is the condition's, `meaning` is for people."""

    status: str
    meaning: str

    def __new__(cls, value: str, status: str, meaning: str) -> Self:
        """An enum member whose value is its CamelCase name."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.status = status
        member.meaning = meaning
        return member

    CONNECTED = ("Connected", "True", "The agent has answered.")
    NOT_QUERIED = (
        "NotQueried",
        "Unknown",
        (
            "The agent has not been queried yet, or cannot be: the guest is unplugging CPUs, or the machine is not "
            "running."
        ),
    )
    NO_ANSWER = (
        "NoAnswer",
        "False",
        "The agent did not answer in time: it is not running, hangs, or another client holds its socket.",
    )
    UNREACHABLE = (
        "Unreachable",
        "False",
        "The socket in spec.guestAgent cannot be opened, nothing listens there, or it is not a guest agent.",
    )
    REFUSED = ("Refused", "False", "The agent returned an error, for example because a command is blocked.")
    OTHER_MACHINE = (
        "OtherMachine",
        "False",
        "The agent reports more vCPUs than QEMU has: spec.guestAgent names the socket of another machine.",
    )


@dataclass(frozen=True, slots=True)
class GuestReport:
    """The result of a guest agent's query.

    cpus      None: the query failed
    error     why
    resisted  CPUs (logical ids) that the agent did not set online, with its error texts
    """

    cpus: GuestCPUs | None
    error: AgentError | None = None
    resisted: Mapping[int, str] = field(default_factory=dict)

    def reason(self, vcpus: int) -> AgentReason:
        """What this report means for the agent of a machine with so many vCPUs."""
        if self.cpus is not None:
            return AgentReason.OTHER_MACHINE if self.cpus.online > vcpus else AgentReason.CONNECTED
        match self.error:
            case AgentTimeout():
                return AgentReason.NO_ANSWER
            case AgentRefused():
                return AgentReason.REFUSED
            case _:
                return AgentReason.UNREACHABLE
