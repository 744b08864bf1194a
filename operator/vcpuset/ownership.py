"""Which of the VCPUSets that name one monitor, or two monitors of one machine, has it: the oldest.

Claims on an address stand from the first news of a set, claims on what is found there (the socket's inode, the QEMU
process, its UUID and threads) from the pass that found it. A set that gets its turn by another's leaving is enqueued.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from vcpuset.domain.machine import Machine
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import UID, Connection, TCPMonitor, UnixMonitor, Unsupported, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.qmp.peer import Peer
from vcpuset.runtime.claims import Claims

__all__ = ["Ownership", "address_of"]


@dataclass
class _State:
    """What is known of one set.

    process     the QEMU process, as far as the host tells
    tried       a pass has been to its end
    yielded_to  the older set that had another monitor of the same machine when this one last observed it
    deferred    that set has been enqueued to come first, since it does not seem to have the machine any more
    """

    process: Hashable | None = None
    tried: bool = False
    yielded_to: UID | None = None
    deferred: bool = False


class Ownership:
    """The claims of all sets; every method is synchronous.

    enqueue  called with each set that may have its turn now, or has lost it
    """

    def __init__(self, cache: Cache, enqueue: Callable[[UID], None]) -> None:
        self._cache = cache
        self._enqueue = enqueue
        self._monitors: Claims[UID] = Claims()
        self._machines: Claims[UID] = Claims()
        """On what the monitors lead to; each stands until the monitor leads elsewhere, or cannot be reached."""
        self._states: dict[UID, _State] = {}

    def changed(self, vcpuset: VCPUSet) -> None:
        """The set is new or its spec is another one."""
        if not self._monitors.has(vcpuset.uid, address_of(vcpuset)):
            # Otherwise the claims of its last pass stand, the one on the socket's inode among them.
            self.claim_monitor(vcpuset)
            self.release_machine(vcpuset.uid)

    def release(self, uid: UID) -> None:
        """The set is gone, or its monitor is not its own any more."""
        self._enqueue_all(self._monitors.release(uid))
        self.release_machine(uid)

    def release_machine(self, uid: UID) -> None:
        """What the set's monitor leads to is not known any more."""
        self._enqueue_all(self._machines.release(uid))

    def forget(self, uid: UID) -> None:
        """The set is gone."""
        self.release(uid)
        self._states.pop(uid, None)

    def tried(self, uid: UID) -> None:
        """A pass of this set has been to its end."""
        self._state(uid).tried = True

    def owner_of_address(self, vcpuset: VCPUSet) -> UID | None:
        """The older set that names the same monitor; None: there is none. Known without looking for the monitor."""
        owner = self._monitors.conflicting_owner(vcpuset.uid, address_of(vcpuset))
        if owner is not None:
            # What stands there is not known any more: an inode of old may be another machine's by now.
            self.claim_monitor(vcpuset)
        return owner

    def claim_monitor(self, vcpuset: VCPUSet, *identity: Hashable) -> UID | None:
        """Claim the address and what was found there; returns the older set that has it, if there is one.

        identity  a socket can have several names (hard links), which its inode tells; empty: nothing was found
        """
        keys = (address_of(vcpuset), *identity)
        self._enqueue_all(self._monitors.claim(vcpuset.uid, vcpuset.seniority, keys))
        return self._monitors.conflicting_owner(vcpuset.uid)

    def claim_machine(self, vcpuset: VCPUSet, peer: Peer, machine: Machine) -> tuple[UID, str] | None:
        """Claim the machine; returns the older set that has another monitor of it, if there is one, and the evidence.

        What is told by its UUID stays within a namespace: QEMU says what its UUID is, and whoever plays a QEMU can say
        the same. A process and one of its threads name one machine; the process alone does not, since it can have made
        the sockets of many, as libvirt does. A connection that is kept, and that QEMU shows on another one, is QEMU's.
        """
        state, thread = self._state(vcpuset.uid), machine.first_thread
        state.process = peer.process
        evidence: dict[Hashable, str] = {}
        if thread is not None and peer.process is not None:
            evidence[peer.process, machine.uuid, thread] = "one process listens on both"
        if thread is not None and machine.uuid is not None:
            evidence[vcpuset.namespace, peer.host, machine.uuid, thread] = (
                f"both report UUID {machine.uuid} and the same host threads; if these are two machines, start each "
                "with its own -uuid"
            )
        shared = "QEMU reports the connections of both"
        if peer.link is not None and vcpuset.spec.connection is Connection.PERSISTENT:
            evidence[peer.link] = shared
        for link in machine.connections:
            # Not of a younger set: what QEMU says may take a machine from the set that names it, and from no other one.
            if (first := self._machines.first(link)) is not None and first < vcpuset.seniority:
                evidence[link] = shared
        self._enqueue_all(self._machines.claim(vcpuset.uid, vcpuset.seniority, evidence))
        for key, words in evidence.items():
            owner = self._machines.conflicting_owner(
                vcpuset.uid, key, rival=lambda other: not self._differ(state.process, other)
            )
            if owner is not None:
                if state.yielded_to != owner:
                    # What this set has done until now, the older one has to see.
                    self._enqueue(owner)
                state.yielded_to, state.deferred = owner, False
                return owner, words
        return None

    def older_comes_first(self, vcpuset: VCPUSet) -> bool:
        """Whether an older set is to have its turn before this one, which had yielded, takes over.

        Both come back at once when QEMU or the operator is started again; to act first would be to fight.
        """
        state, ready = self._state(vcpuset.uid), vcpuset.status.ready
        if state.yielded_to is not None:
            if self._cache.get(state.yielded_to) is not None and not state.deferred:
                state.deferred = True
                self._enqueue(state.yielded_to)
                return True
            state.yielded_to, state.deferred = None, False
            return False
        return (
            ready is not None
            and ready.reason == Reason.MONITOR_CONFLICT
            and any(other.seniority < vcpuset.seniority and not self._state(other.uid).tried for other in self._cache)
        )

    def _differ(self, process: Hashable | None, other: UID) -> bool:
        """Whether another set's machine is known to be another process."""
        theirs = self._state(other).process
        return process is not None and theirs is not None and process != theirs

    def _state(self, uid: UID) -> _State:
        return self._states.setdefault(uid, _State())

    def _enqueue_all(self, uids: set[UID]) -> None:
        for uid in uids:
            self._enqueue(uid)


def address_of(vcpuset: VCPUSet) -> tuple[str, ...]:
    """The monitor's address as the set spells it; known also while nothing is there."""
    match vcpuset.spec.monitor:
        case UnixMonitor(path):
            return ("unix", vcpuset.namespace, path)
        case TCPMonitor(host, port, tls):
            # As TCPEndpoint.identity has it.
            return ("tcp", host, str(port), "" if tls is None else vcpuset.namespace)
        case Unsupported():
            # Its own: it has no monitor.
            return ("unsupported", vcpuset.uid)
