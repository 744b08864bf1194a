"""The queries of an observation, and what their replies are read as."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Final

from vcpuset.domain.errors import MachineUnsettled
from vcpuset.domain.machine import Machine, Slot
from vcpuset.qmp import replies, translate
from vcpuset.qmp.exchange import Command

__all__ = ["Queries"]

_STATS: Final = {
    "target": "vcpu",
    "providers": [
        {
            "provider": "kvm",
            "names": ["exits", "halt_wait_ns", "halt_poll_success_ns", "halt_poll_fail_ns", "blocking"],
        }
    ],
}


class Queries:
    """Those of one set, for all its sessions: what has not changed since the last observation is not read again."""

    def __init__(self) -> None:
        self.status = Command("query-status", read=replies.run_state)
        self.migrate = Command("query-migrate", read=replies.migrating)
        # An error: no ACPI here, or no such command. Either way nothing is known.
        self.ost = Command("query-acpi-ospm-status", read=replies.ost, optional=lambda _: True)
        self.uuid = Command("query-uuid", read=replies.uuid)
        self.cpus = Command("query-cpus-fast", read=self._read_cpus)
        # No slots: the machine type has no CPU hotplug.
        self.slots = Command("query-hotpluggable-cpus", read=self._read_slots, optional=translate.says_no_hotplug)
        self.stats = Command("query-stats", _STATS, read=replies.halts, optional=lambda _: True)
        self.chardev = Command("query-chardev", read=replies.connections, optional=lambda _: True)
        self._threads: Mapping[str, Sequence[int]] = {}
        self.machine: Machine | None = None
        """As last observed."""
        self._uncounted: Hashable | None = None

    def counts(self) -> bool:
        """Whether the QEMU that was observed last may have counters of busy vCPUs."""
        return self.machine is None or self._uncounted != (self.machine.process,)

    def uncounted(self, machine: Machine) -> None:
        """This QEMU has none, and is not asked again."""
        self._uncounted = (machine.process,)

    def known(self, machine: Machine) -> Machine:
        """The machine that was observed before if it is equal: what follows from it is computed once."""
        if machine != self.machine:
            self.machine = machine
        return self.machine

    def _read_cpus(self, result: object) -> replies.CPUs:
        found = replies.cpus(result)
        self._threads = found.threads
        self.slots.forget()  # It names the threads of these CPUs.
        return found

    def _read_slots(self, result: object) -> tuple[Slot, ...]:
        if (slots := replies.slots(result, self._threads)) is None:
            raise MachineUnsettled("CPUs were plugged or unplugged during the observation")
        return slots
