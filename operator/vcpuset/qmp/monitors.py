"""The monitors of all sets: how each is found, and the sessions that are kept between passes.

A monitor serves one client at a time, so a session is kept only while its events are needed, and closed by the pass
that no longer needs them.

The loss of a kept session triggers a pass like any event, which opens a new one at once. If sessions break repeatedly
soon after they were opened (something between here and QEMU closes them), the delays grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from vcpuset.domain.backoff import ExponentialBackoff
from vcpuset.domain.credentials import CredentialStore, NoCredentials
from vcpuset.domain.errors import InvalidMonitor, UnsupportedSpec
from vcpuset.domain.machine import Machine
from vcpuset.domain.networks import Networks
from vcpuset.domain.resource import TLS, UID, TCPMonitor, UnixMonitor, Unsupported, VCPUSet
from vcpuset.qmp.meters import Meters
from vcpuset.qmp.queries import Queries
from vcpuset.qmp.session import Outcome, Session
from vcpuset.qmp.sockets import Endpoint, Stamp, UnixEndpoint, find_socket
from vcpuset.qmp.tcp import TCPEndpoint
from vcpuset.qmp.tls import Access
from vcpuset.qmp.watcher import SocketWatcher

__all__ = ["EVENTS_TURN_SECONDS", "LASTING_SECONDS", "TURN_SECONDS", "Monitors"]

TURN_SECONDS = 3.0
"""How long a session with a shared monitor lasts before other clients get their turn."""

EVENTS_TURN_SECONDS = 60.0
"""The same if a guest's answers come by event only: an event between two sessions is lost."""

_LOSS_BACKOFF = ExponentialBackoff(base_seconds=0.25, cap_seconds=30)

LASTING_SECONDS = 10.0
"""The loss of a session that has lasted so long is the first in its row."""

_NOWHERE = Networks()


def _pause_seconds(losses: int) -> float:
    """The delay after the loss of so many sessions in a row, each soon after it was opened.

    The first one is reported at once.
    """
    return 0.0 if losses == 1 else _LOSS_BACKOFF.delay(losses - 1)


class Monitors:
    """Finds monitors and keeps sessions; one caller at a time for each set.

    socket_root  where the namespaces' folders with unix monitors are; None: unix monitors are rejected
    networks     the allowed networks of TCP monitors; None: all, for a local user, who is trusted
    credentials  reads the Secrets of monitors on TLS; None: these are rejected
    wake         called when something happened to a set's machine while its session is kept
    permit       called right before each command is sent; raises if this process must not act (any more)
    commanded    called at the end of each command: whose machine, its name, how many seconds it took, its outcome
    meters       have the counters of each observation
    watcher      is told what each pass finds at its set's path; while it sees the same there, a kept session's monitor
                 is not searched again
    pause        the delay in seconds after the loss of so many sessions in a row soon after their opening
    """

    def __init__(
        self,
        socket_root: Path | None,
        wake: Callable[[UID], None],
        *,
        networks: Networks | None = _NOWHERE,
        credentials: CredentialStore | None = None,
        permit: Callable[[], None] | None = None,
        commanded: Callable[[UID, str, float, Outcome], None] | None = None,
        meters: Meters | None = None,
        watcher: SocketWatcher | None = None,
        pause: Callable[[int], float] = _pause_seconds,
    ) -> None:
        self._socket_root = socket_root
        self._networks = networks
        self._credentials: CredentialStore = NoCredentials() if credentials is None else credentials
        self._wake = wake
        self._permit = permit
        self._commanded = commanded
        self._meters = meters
        self._watcher = watcher
        self._pause = pause
        self._kept: dict[UID, tuple[Endpoint, Session]] = {}
        self._opened_at: dict[UID, float] = {}
        """Loop time at which each kept session was opened."""
        self._queries: dict[UID, Queries] = {}
        self._losses: dict[UID, int] = {}
        """How many sessions in a row were lost soon after their opening."""

    async def resolve(self, vcpuset: VCPUSet, *, connect: bool = True) -> AbstractContextManager[Endpoint]:
        """Find the set's monitor; the endpoint is open as long as the context.

        connect  a session will be opened, unless one is kept

        Raises InvalidMonitor (the set's author must act) and MonitorUnreachable (nothing is there, or its file system
        does not answer).
        """
        access = self._access(vcpuset)
        match vcpuset.spec.monitor:
            case TCPMonitor(host, port):
                endpoint = TCPEndpoint(host, port, self._networks, access)
                endpoint.require_served()
                return nullcontext(endpoint)
            case UnixMonitor(path):
                if self._socket_root is None:
                    raise InvalidMonitor(
                        "spec.monitor.unix: this operator does not connect to unix monitors, because it was started "
                        "without --socket-root; run an operator with that flag on the machine's node"
                    )
                if (known := self._known(vcpuset)) is not None:
                    return nullcontext(known)
                stamp: Stamp | None = None
                try:
                    kept = self._kept.get(vcpuset.uid)
                    connect = connect and (kept is None or not kept[1].alive)
                    socket = await find_socket(self._socket_root, vcpuset.namespace, path, connect=connect)
                    stamp = socket.stamp
                    return socket
                finally:
                    if self._watcher is not None:
                        self._watcher.found(vcpuset, stamp)
            case Unsupported(message):
                raise UnsupportedSpec(message)

    def _known(self, vcpuset: VCPUSet) -> UnixEndpoint | None:
        """The closed endpoint of the set's session, if its socket is still the one at the set's path."""
        match self._kept.get(vcpuset.uid):
            case (UnixEndpoint() as endpoint, session) if session.alive and self._watcher is not None:
                return endpoint if self._watcher.shows(vcpuset, endpoint.stamp) else None
            case _:
                return None

    def _access(self, vcpuset: VCPUSet) -> Access | None:
        match vcpuset.spec.monitor:
            case TCPMonitor(tls=TLS(secret)) as monitor:
                fetch = partial(self._credentials.fetch, vcpuset.uid, vcpuset.namespace, secret)
                return Access(vcpuset.namespace, secret, monitor.server_name, fetch)
            case _:
                self._credentials.forget(vcpuset.uid)
                return None

    async def session(self, uid: UID, endpoint: Endpoint) -> Session:
        """The session with this endpoint: the kept one while it is alive, otherwise a new one, which is then kept.

        Raises InvalidMonitor, CredentialsUnavailable, MonitorUnreachable and MonitorBusy.
        """
        if (kept := self._kept.get(uid)) is not None:
            known, session = kept
            if session.alive and known.route == endpoint.route:
                return session
            await self._close(uid)
        commanded = None if self._commanded is None else partial(self._commanded, uid)
        session = await Session.open(
            endpoint,
            partial(self._happened, uid),
            permit=self._permit,
            commanded=commanded,
            queries=self._queries.setdefault(uid, Queries()),
            sampled=None if self._meters is None else partial(self._meters.from_monitor, uid),
        )
        self._kept[uid] = (endpoint, session)
        self._opened_at[uid] = asyncio.get_running_loop().time()
        return session

    def machine(self, uid: UID) -> Machine | None:
        """The set's machine as last observed by this process; None: never."""
        queries = self._queries.get(uid)
        return None if queries is None else queries.machine

    async def end_turn(self, uid: UID) -> bool:
        """Close the set's session if it has lasted for its turn; returns whether it was closed.

        Clients that wait for the monitor are served before a session that is opened soon after. A monitor may be needed
        for longer than others can wait: by a guest that is slow, or that answers by event only.
        """
        if (kept := self._kept.get(uid)) is None:
            return False
        turn = EVENTS_TURN_SECONDS if kept[1].answers_by_event_only else TURN_SECONDS
        if asyncio.get_running_loop().time() < self._opened_at[uid] + turn:
            return False
        await self._close(uid)
        return True

    async def release(self, uid: UID) -> None:
        """Close the set's session, if one is kept, so that other clients get their turn."""
        kept = self._kept.get(uid)
        if kept is None or kept[1].alive:  # One that broke in use counts with those that broke before.
            self._losses.pop(uid, None)
        await self._close(uid)

    async def forget(self, uid: UID) -> None:
        """This process no longer manages the set."""
        await self.release(uid)
        self._losses.pop(uid, None)
        self._queries.pop(uid, None)
        if self._meters is not None:
            self._meters.forget(uid)
        self._credentials.forget(uid)

    async def _close(self, uid: UID) -> None:
        self._opened_at.pop(uid, None)
        if (kept := self._kept.pop(uid, None)) is not None:
            await kept[1].close()

    def _happened(self, uid: UID) -> None:
        """Something happened to the set's machine, or its session was lost."""
        if (kept := self._kept.get(uid)) is None or kept[1].alive:
            self._wake(uid)
            return
        loop = asyncio.get_running_loop()
        lasted = loop.time() >= self._opened_at[uid] + LASTING_SECONDS
        self._losses[uid] = 1 if lasted else self._losses.get(uid, 0) + 1
        if (pause := self._pause(self._losses[uid])) > 0:
            # An earlier pass, for another reason, finds the loss too.
            loop.call_later(pause, self._wake, uid)
        else:
            self._wake(uid)

    async def close(self) -> None:
        """Close every session."""
        for uid in list(self._kept):
            await self.release(uid)
