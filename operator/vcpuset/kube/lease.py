"""Leader election of replicas: the leader holds a Lease, by the rules of client-go.

The holder writes a new `renewTime` every few seconds. A standby that has seen no new one for the length of the lease
takes it. Each process measures times itself: those in the Lease are for people, because clocks of different hosts
differ. The holder counts from before it sent a request, the others from after they saw the change, so that the holder
stops first, by the difference between `renew_seconds` and the length of the lease.

No lease can stop a process that was itself stopped and does not know it yet (SIGSTOP, a frozen container, a suspended
host). So leadership is not a state here but a question of time, `require`, to be called right before each command and
write.

`kubernetes.aio.leaderelection` is not used (version 37): it uses a clock that can be set, its requests have no
deadline, so that after one that hangs a leader never learns that it has lost, and it does not release the lease.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from vcpuset.domain.backoff import jittered
from vcpuset.domain.errors import APIError, Conflict, Forbidden, NotLeading, ObjectGone
from vcpuset.kube.cluster import Cluster

__all__ = ["Leadership", "own_identity", "since_boot"]

JITTER: Final = 0.2
"""The largest part by which the time between two attempts of a standby differs, so that replicas do not try in step."""

_STOPPED: Final = "the process was stopped, or had too little CPU time"

_log = logging.getLogger(__name__)


def since_boot() -> float:
    """Seconds, also those in which the host was suspended, on a clock that cannot be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def own_identity() -> str:
    """A name for this process: the pod's (or host's) with a random suffix."""
    return f"{os.environ.get('HOSTNAME') or socket.gethostname()}_{secrets.token_hex(4)}"


class Leadership:
    """One process in the election for one Lease.

        await leadership.acquire(answered) # standby until it returns
        ...                                # work, with `require` before each command and write, concurrent with
        await leadership.keep()            # which renews, and raises when that has failed for too long
        await leadership.release()         # once all work has ended

    identity       of this process, different for each process
    lease_seconds  how long the others wait after the last renewal; at least 1
    renew_seconds  how long the holder works after its last renewal; less than the lease
    retry_seconds  between two attempts, of the holder to renew, of the others to acquire
    clock          seconds; see `since_boot`
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        *,
        lease_seconds: int,
        renew_seconds: float,
        retry_seconds: float,
        clock: Callable[[], float] = since_boot,
    ) -> None:
        self.identity = identity
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._retry_seconds = retry_seconds
        # Two attempts fit into the holder's time, as with the components of Kubernetes.
        self._request_seconds = renew_seconds / 2
        self._clock = clock
        self._until = -math.inf
        """How long this process may work."""
        self._lease: dict[str, Any] | None = None
        """The Lease as last written by this process; None: it must be read before it is written."""
        self._tried = False
        self._seen: Mapping[str, Any] | None = None
        """The last spec of the Lease, and when it was first seen."""
        self._seen_at = -math.inf
        self._logged = ""

    def __str__(self) -> str:
        return f"lease {self._namespace}/{self._name}"

    @property
    def leading(self) -> bool:
        """Whether this process may work."""
        return self._clock() < self._until

    def require(self) -> None:
        """Raise NotLeading unless this process may work."""
        if not self.leading:
            raise NotLeading(f"{self} has not been renewed in time, so another replica may be the leader")

    async def acquire(self, answered: asyncio.Event) -> None:
        """Be a standby until the lease is free, then acquire it. Retries permanently; logs each kind of failure once.

        answered  is set when the API server has answered, also if another replica holds the lease
        """
        while True:
            try:
                async with asyncio.timeout(self._request_seconds):
                    held = await self._try(keeping=False)
            except TimeoutError:
                self._log_once(logging.WARNING, f"{self}: no answer within {self._request_seconds:g} s; retrying")
            except Conflict:
                answered.set()  # another replica was faster
            except APIError as error:
                self._log_once(logging.WARNING, f"{self}: {error}{_remedy(error)}; retrying")
            else:
                answered.set()
                if held and self.leading:
                    _log.info("became leader: acquired %s as %s", self, self.identity)
                    return
            await asyncio.sleep(jittered(self._retry_seconds, JITTER))

    async def keep(self) -> NoReturn:
        """Renew the lease for as long as that succeeds.

        Raises:
            NotLeading: it is lost, or could not be renewed for `renew_seconds`; no other replica has it before
                `lease_seconds` are over, unless it was taken by force.
        """
        trouble = _STOPPED
        while True:
            await asyncio.sleep(min(self._retry_seconds, max(self._until - self._clock(), 0.0)))
            if not self.leading:
                raise NotLeading(f"{self} could not be renewed within {self._renew_seconds:g} s: {trouble}")
            seconds = min(self._request_seconds, self._until - self._clock())
            try:
                async with asyncio.timeout(seconds):
                    held = await self._try(keeping=True)
            except TimeoutError:
                trouble = "the API server did not answer"
            except APIError as error:
                trouble = f"{error}{_remedy(error)}"
                _log.warning("%s: %s; retrying", self, trouble)
            else:
                if not held:
                    self._until = -math.inf
                    raise NotLeading(
                        f"{self} was taken by {_holder(self._seen) or 'another holder, which released it'}"
                    )
                trouble = _STOPPED

    async def release(self) -> None:
        """Release the lease for another replica; all work must have ended. Without effect if it is not held.

        Never raises (except CancelledError): if it cannot be released, the others wait until it expires.
        """
        self._until = -math.inf
        if not self._tried:
            return
        try:
            async with asyncio.timeout(self._request_seconds):
                lease = await self._cluster.read_lease(self._namespace, self._name)
                if _holder(lease.get("spec")) != self.identity:
                    return
                now = _now()
                free = {"holderIdentity": "", "leaseDurationSeconds": 1, "acquireTime": now, "renewTime": now}
                await self._cluster.replace_lease(self._namespace, self._name, lease, {**lease["spec"], **free})
        except (APIError, TimeoutError) as error:
            _log.warning(
                "%s could not be released, so a standby has to wait until it expires: %s", self, error or "no answer"
            )
        else:
            _log.info("released %s", self)

    async def _try(self, *, keeping: bool) -> bool:
        """Acquire the lease or renew it; returns whether this process has it now.

        keeping  it was held until now: if another replica has had it since, it is not taken back

        Raises APIError; then, and when it is cancelled, the Lease may have been written nevertheless.
        """
        began = self._clock()
        self._tried = True
        known, self._lease = self._lease, None
        if known is None:
            try:
                known = await self._cluster.read_lease(self._namespace, self._name)
            except ObjectGone:
                spec = self._spec({})
                self._lease = await self._cluster.create_lease(self._namespace, self._name, spec)
                self._until = began + self._renew_seconds
                return True
            if not self._is_for_us(known.get("spec") or {}, keeping=keeping):
                return False
        spec = self._spec(known.get("spec") or {})
        self._lease = await self._cluster.replace_lease(self._namespace, self._name, known, spec)
        self._until = began + self._renew_seconds
        return True

    def _is_for_us(self, spec: Mapping[str, Any], *, keeping: bool) -> bool:
        """Whether this process has the lease, or may take it."""
        if spec != self._seen:
            self._seen, self._seen_at = spec, self._clock()
        holder = _holder(spec)
        if holder == self.identity:
            return True
        if keeping:
            return False
        # The length that the holder uses, which can differ from this process'.
        seconds = spec.get("leaseDurationSeconds") or self._lease_seconds
        if holder and self._clock() < self._seen_at + seconds:
            self._log_once(logging.INFO, f"standby: {self} is held by {holder}")
            return False
        return True

    def _spec(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """The Lease's new spec, with this process as its holder."""
        now = _now()
        taken: dict[str, Any] = {}
        if _holder(before) != self.identity:
            # As with client-go, the first holder of a new Lease makes no transition.
            transitions = (before.get("leaseTransitions") or 0) + 1 if before else 0
            taken = {"acquireTime": now, "leaseTransitions": transitions}
        return {
            **before,
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._lease_seconds,
            "renewTime": now,
            **taken,
        }

    def _log_once(self, level: int, text: str) -> None:
        """Log a standby's message, but not the same twice in a row."""
        if text != self._logged:
            self._logged = text
            _log.log(level, "%s", text)


def _holder(spec: Mapping[str, Any] | None) -> str:
    return str((spec or {}).get("holderIdentity") or "")


def _now() -> str:
    """The time as Kubernetes' MicroTime."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _remedy(error: APIError) -> str:
    return (
        " (the Role vcpuset-leader-election in deploy/ grants the required permissions)"
        if isinstance(error, Forbidden)
        else ""
    )
