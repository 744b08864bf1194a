"""Which of the VCPUSets that name one monitor, or two monitors of one machine, owns it: the oldest.

Claims on an address hold from the first event of a set, claims on what is found there (the socket's inode, the QEMU
process, its UUID and threads) from the pass that found it. A set whose turn comes because another one left is enqueued.
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

    process     the QEMU process, if the host reports it
    tried       a pass has completed
    yielded_to  the older set that had another monitor of the same machine when this one last observed it
    deferred    that set was enqueued to come first, because it no longer seems to have the machine
    """

    process: Hashable | None = None
    tried: bool = False
    yielded_to: UID | None = None
    deferred: bool = False


class Ownership:
    """The claims of all sets; every method is synchronous.

    enqueue  called with each set that may own a monitor now, or has lost it
    """

    def __init__(self, cache: Cache, enqueue: Callable[[UID], None]) -> None:
        self._cache = cache
        self._enqueue = enqueue
        self._monitors: Claims[UID] = Claims()
        self._machines: Claims[UID] = Claims()
        """On the machines behind the monitors; each holds until the monitor leads elsewhere, or cannot be reached."""
        self._states: dict[UID, _State] = {}

    def changed(self, vcpuset: VCPUSet) -> None:
        """The set is new or has a new spec."""
        if not self._monitors.has(vcpuset.uid, address_of(vcpuset)):
            # Otherwise the claims of its last pass hold, including that on the socket's inode.
            self.claim_monitor(vcpuset)
            self.release_machine(vcpuset.uid)

    def release(self, uid: UID) -> None:
        """The set is gone, or no longer owns its monitor."""
        self._enqueue_all(self._monitors.release(uid))
        self.release_machine(uid)

    def release_machine(self, uid: UID) -> None:
        """The machine behind the set's monitor is no longer known."""
        self._enqueue_all(self._machines.release(uid))

    def forget(self, uid: UID) -> None:
        """The set is gone."""
        self.release(uid)
        self._states.pop(uid, None)

    def tried(self, uid: UID) -> None:
        """A pass of this set has completed."""
        self._state(uid).tried = True

    def owner_of_address(self, vcpuset: VCPUSet) -> UID | None:
        """The older set that names the same monitor; None: there is none. Does not open the monitor."""
        owner = self._monitors.conflicting_owner(vcpuset.uid, address_of(vcpuset))
        if owner is not None:
            # What is there is no longer known: the old inode may be another machine's by now.
            self.claim_monitor(vcpuset)
        return owner

    def claim_monitor(self, vcpuset: VCPUSet, *identity: Hashable) -> UID | None:
        """Claim the address and what was found there; returns the older set that owns it, if there is one.

        identity  of the socket (its inode), which can have several names (hard links); empty: nothing was found
        """
        keys = (address_of(vcpuset), *identity)
        self._enqueue_all(self._monitors.claim(vcpuset.uid, vcpuset.seniority, keys))
        return self._monitors.conflicting_owner(vcpuset.uid)

    def claim_machine(self, vcpuset: VCPUSet, peer: Peer, machine: Machine) -> tuple[UID, str] | None:
        """Claim the machine; returns the older set that has another monitor of it, if there is one, and the evidence.

        Evidence by UUID is limited to a namespace: any server that imitates a QEMU can report any UUID. A process and
        one of its threads identify one machine; the process alone does not, because it can have created the sockets of
        many, as libvirt does. A kept connection that QEMU reports on another one is QEMU's.
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
            # Not of a younger set: QEMU's report may only take a machine from the set that names it.
            if (first := self._machines.first(link)) is not None and first < vcpuset.seniority:
                evidence[link] = shared
        self._enqueue_all(self._machines.claim(vcpuset.uid, vcpuset.seniority, evidence))
        for key, words in evidence.items():
            owner = self._machines.conflicting_owner(
                vcpuset.uid, key, rival=lambda other: not self._differ(state.process, other)
            )
            if owner is not None:
                if state.yielded_to != owner:
                    # The older set has to observe what this one has changed.
                    self._enqueue(owner)
                state.yielded_to, state.deferred = owner, False
                return owner, words
        return None

    def older_comes_first(self, vcpuset: VCPUSet) -> bool:
        """Whether an older set must have its turn before this one, which had yielded, takes over.

        Both return at once when QEMU or the operator restarts; acting first would start a fight.
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
    """The monitor's address as the set spells it; known even if nothing is there."""
    match vcpuset.spec.monitor:
        case UnixMonitor(path):
            return ("unix", vcpuset.namespace, path)
        case TCPMonitor(host, port, tls):
            # As in TCPEndpoint.identity.
            return ("tcp", host, str(port), "" if tls is None else vcpuset.namespace)
        case Unsupported():
            # A key of its own: it has no monitor.
            return ("unsupported", vcpuset.uid)
