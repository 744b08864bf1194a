"""The monitors of all sets: how each is found, and the sessions that are kept between passes.

A monitor serves one client at a time, so a session is kept only while its events are awaited, and closed by whoever
no longer waits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from vcpuset.domain.errors import InvalidMonitor
from vcpuset.domain.resource import UID, TCPMonitor, UnixMonitor, VCPUSet
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import Endpoint, TCPEndpoint, open_socket

__all__ = ["Monitors"]


class Monitors:
    """Finds monitors and keeps sessions; one caller at a time for each set.

    socket_root  where the namespaces' folders with unix monitors are; None: this operator serves none
    wake         told that something happened to a set's machine while its session is kept
    """

    def __init__(self, socket_root: Path | None, wake: Callable[[UID], None]) -> None:
        self._socket_root = socket_root
        self._wake = wake
        self._kept: dict[UID, tuple[Endpoint, Session]] = {}

    def resolve(self, vcpuset: VCPUSet) -> AbstractContextManager[Endpoint]:
        """Find the set's monitor; the endpoint lasts as long as the context.

        Raises InvalidMonitor (the set's author must act) and MonitorUnreachable (nothing is there).
        """
        match vcpuset.spec.monitor:
            case TCPMonitor(host, port):
                return nullcontext(TCPEndpoint(host, port))
            case UnixMonitor(path):
                if self._socket_root is None:
                    raise InvalidMonitor(
                        "spec.monitor.unix: this operator serves no unix monitors, since it was started without "
                        "--socket-root; run one on the machine's node that has it"
                    )
                return open_socket(self._socket_root, vcpuset.namespace, path)

    async def session(self, uid: UID, endpoint: Endpoint) -> Session:
        """The session with this endpoint: the kept one while it lasts, else a new one, which is then kept.

        Raises MonitorUnreachable and MonitorBusy.
        """
        if (kept := self._kept.get(uid)) is not None:
            known, session = kept
            if session.alive and known.identity == endpoint.identity:
                return session
            await self.release(uid)
        session = await Session.open(endpoint, partial(self._wake, uid))
        self._kept[uid] = (endpoint, session)
        return session

    async def release(self, uid: UID) -> None:
        """Close the set's session, if one is kept, so that other clients get their turn."""
        if (kept := self._kept.pop(uid, None)) is not None:
            await kept[1].close()

    async def close(self) -> None:
        """Close every session."""
        for uid in list(self._kept):
            await self.release(uid)
