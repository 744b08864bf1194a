"""One observation of a machine and its guest from the command line. Only queries are sent."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from vcpuset.domain.credentials import CA, CERTIFICATE, KEY, Credentials
from vcpuset.domain.errors import AgentError, AgentUnreachable, CredentialsUnavailable, MachineUnsettled, VCPUSetError
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Machine
from vcpuset.domain.resource import UID
from vcpuset.qmp.agent import Agent
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import Endpoint, UnixEndpoint, find_local_socket
from vcpuset.qmp.tcp import TCPEndpoint
from vcpuset.qmp.tls import Access

__all__ = [
    "TIMEOUT_SECONDS",
    "Given",
    "Observation",
    "monitor_address",
    "observe_machine",
    "open_monitor",
    "query_guest",
    "read_credentials",
]

TIMEOUT_SECONDS: Final = 5.0
"""For each answer. QEMU takes some ms; a monitor that another client holds never answers."""

_UNSETTLED_SECONDS: Final = 0.02
"""When to observe again after CPUs came or went while they were counted."""

_HOST_PORT: Final = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]/,]+)):(?P<port>[0-9]{1,5})")
_OPTIONS: Final = re.compile(r"(?<!,)((?:,,)*),(?!,).*", re.DOTALL)
"""What follows the address in QEMU's own spelling: `,server=on,wait=off`. A comma in a path is doubled there."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What was observed of a machine.

    version  QEMU's; None: it sent none
    """

    machine: Machine
    version: str | None


def monitor_address(text: str) -> Path | TCPEndpoint:
    """Where a monitor is: `unix:PATH`, `tcp:HOST:PORT`, a text with a "/" or that names a file, or HOST:PORT.

    Raises ValueError, with the remedy.
    """
    scheme, _, rest = text.partition(":")
    if scheme in {"unix", "tcp"} and rest:
        rest = _OPTIONS.sub(r"\1", rest).replace(",,", ",")
        if scheme == "unix":
            return Path(rest)
        return _tcp(rest) or _refuse(text, "tcp: must be followed by HOST:PORT, with an IPv6 host in brackets")
    if text and ("/" in text or Path(text).exists()):
        return Path(text)
    return _tcp(text) or _refuse(text, "no such file exists, and it is not HOST:PORT (with an IPv6 host in brackets)")


def _tcp(text: str) -> TCPEndpoint | None:
    found = _HOST_PORT.fullmatch(text)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        return None
    return TCPEndpoint(found["ipv6"] or found["host"], int(found["port"]))


def _refuse(text: str, why: str) -> TCPEndpoint:
    raise ValueError(f"{text!r} is not a monitor: {why}")


async def open_monitor(
    address: Path | TCPEndpoint, credentials: Credentials | None = None, server_name: str | None = None
) -> Endpoint:
    """The endpoint at an address; close it if it is a socket.

    credentials  for one on TLS; a socket needs none
    server_name  what QEMU's certificate is for; None: the host

    Raises InvalidMonitor, MonitorUnreachable.
    """
    if isinstance(address, Path):
        return await find_local_socket(address)
    if credentials is None:
        return address
    fetch = partial(Given(credentials).fetch, UID(""), "", "")
    return replace(address, tls=Access("", credentials.source, server_name or address.host.rstrip("."), fetch))


class Given:
    """The `CredentialStore` of a local user: the same credentials for every monitor."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def fetch(self, uid: UID, namespace: str, name: str, doubted: Credentials | None = None) -> Credentials:
        """The credentials."""
        return self._credentials

    def forget(self, uid: UID) -> None:
        """Nothing is kept."""


def read_credentials(folder: Path) -> Credentials:
    """The credentials in a folder, in files with the names of a Secret's entries.

    Raises CredentialsUnavailable.
    """
    entries = {}
    for name in (CA, CERTIFICATE, KEY):
        try:
            entries[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue  # reported together with what else is missing
        except OSError as error:
            raise CredentialsUnavailable(f"{folder / name} cannot be read: {error.strerror}") from error
    return Credentials.of(str(folder), entries)


async def observe_machine(endpoint: Endpoint, seconds: float) -> Observation:
    """Observe the machine of a monitor; each answer may take so many seconds. The endpoint is closed.

    Raises InvalidMonitor, CredentialsUnavailable, MonitorError, MachineUnsettled, CommandError.
    """
    try:
        session = await Session.open(endpoint, lambda: None, open_seconds=seconds, command_seconds=seconds)
    finally:
        if isinstance(endpoint, UnixEndpoint):
            endpoint.close()
    try:
        return Observation(await _settled(session, seconds), session.version)
    finally:
        await session.close()


async def _settled(session: Session, seconds: float) -> Machine:
    clock = asyncio.get_running_loop().time
    until = clock() + seconds
    while True:
        try:
            return await session.observe()
        except MachineUnsettled:
            if clock() >= until:
                raise
        await asyncio.sleep(_UNSETTLED_SECONDS)


async def query_guest(find: Awaitable[UnixEndpoint], seconds: float) -> GuestReport:
    """What the guest says of its CPUs, or why its agent cannot be queried. Raises no expected error.

    find  the socket of its agent; what it raises becomes part of the answer
    """
    try:
        with await find as endpoint:
            agent = await Agent.open(endpoint, seconds=seconds)
        try:
            return GuestReport(await agent.cpus())
        finally:
            await agent.close()
    except AgentError as error:
        return GuestReport(None, error)
    except VCPUSetError as error:
        return GuestReport(None, AgentUnreachable(str(error)))
