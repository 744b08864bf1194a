"""From the host and port in a VCPUSet to a connected socket.

A host name is resolved once, each of its addresses is checked, and the connection goes to an allowed one: a name that
means another address a moment later leads nowhere else.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from aiohappyeyeballs import AddrInfoType, start_connection

from vcpuset.domain.errors import InvalidMonitor, MonitorUnreachable
from vcpuset.domain.networks import Networks
from vcpuset.qmp.daemons import DaemonThreads
from vcpuset.qmp.tls import Access

__all__ = ["TCPEndpoint"]

_HEAD_START = 0.25
"""Seconds before the next address of a host is tried in parallel (RFC 8305)."""

_RESOLVERS = DaemonThreads(256, "resolver")
"""The threads that resolve names. Their own, because a resolver is slow without an answer of a DNS server, and authors
of sets can use such names: the rest of the process must not wait behind them for a thread. Enough for all workers (64,
each with such a name every 3 s, for 10 s or so until the resolver gives up)."""

_SHOWN = 4
"""As many addresses of a host are shown."""

_LONGEST = 200
"""Characters of an error without a number that are shown."""

_UNANSWERED = frozenset({errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT})
"""The errors that alternate with no answer if a host is away: the kernel gives up on its link address after three
seconds, and fails the next attempt at once. A router or firewall that rejects also causes some of these, but not for
each packet."""

_NUMBER = re.compile(r"\[Errno (\d+)\]")
"""In the text of each `OSError`. That of several addresses has all their numbers, in the order of the errors."""


@dataclass(frozen=True, slots=True)
class TCPEndpoint:
    """A monitor on TCP.

    host      a name or an address, an IPv6 one without brackets
    networks  the allowed ones; None: all, for the user of this process, who is trusted
    tls       None: neither encrypted nor authenticated
    """

    host: str
    port: int
    networks: Networks | None = None
    tls: Access | None = None

    made_at: ClassVar[None] = None
    """It is not known when a port was opened."""

    @property
    def identity(self) -> tuple[str, int, str]:
        """Host in one spelling, port, and on TLS the namespace. Two names of one host remain two.

        QEMU decides who may use a monitor on TLS: a set in another namespace that only names it must not keep it from
        those with its credentials.
        """
        namespace = "" if self.tls is None else self.tls.namespace
        try:
            return (str(ipaddress.ip_address(self.host)), self.port, namespace)
        except ValueError:
            return (self.host.lower().rstrip("."), self.port, namespace)

    @property
    def route(self) -> Hashable:
        """What a session opened here is connected through; another route needs another session."""
        return self

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def addresses(self) -> Sequence[AddrInfoType]:
        """The allowed addresses of the host. No deadline.

        Raises InvalidMonitor if none is allowed, MonitorUnreachable if the name has none.
        """
        self.require_served()
        return self._allowed(await self._look_up())

    async def connect(self, addresses: Sequence[AddrInfoType]) -> socket.socket:
        """A non-blocking socket connected to one of the addresses. No deadline.

        Raises MonitorUnreachable if none accepts the connection.
        """
        try:
            connection = await start_connection(addresses, happy_eyeballs_delay=_HEAD_START, interleave=1)
        except OSError as error:
            raise self._unreachable(addresses, error) from error
        _keep_alive(connection)
        return connection

    def without_address(self) -> MonitorUnreachable:
        """The error if the name was not found, or not in time: a DNS failure causes both alternately."""
        return MonitorUnreachable(
            f"the host name of {self} cannot be resolved: it does not exist, or DNS does not answer; correct "
            "spec.monitor.tcp.host or DNS"
        )

    def unanswered(self, addresses: Sequence[AddrInfoType]) -> MonitorUnreachable:
        """The error if no address has answered, or not within the deadline."""
        return MonitorUnreachable(
            f"{self}{self._meaning(addresses)} did not accept the connection: its host is unreachable, a network "
            "policy, firewall or route blocks the traffic, or another client holds the monitor and its queue is full"
        )

    def require_served(self) -> None:
        """Raises InvalidMonitor if no TCP monitor is allowed at all."""
        if self.networks is not None and not self.networks.listed:
            raise InvalidMonitor(
                f"spec.monitor.tcp: {self} is not allowed, because this operator was started without --allow-tcp; its "
                "administrator must add the network of the monitor with that flag"
            )

    async def _look_up(self) -> Sequence[AddrInfoType]:
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            pass
        else:
            # Sends no query, so it need not wait for a thread behind names without an answer.
            return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        try:
            return await _RESOLVERS.run(self._query_resolver)
        except (socket.gaierror, UnicodeError) as error:
            raise self.without_address() from error

    def _query_resolver(self) -> Sequence[AddrInfoType]:
        return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)

    def _allowed(self, found: Sequence[AddrInfoType]) -> Sequence[AddrInfoType]:
        if self.networks is None:
            return found
        allowed = [each for each in found if self.networks.allow(each[4][0])]
        if not allowed:
            raise InvalidMonitor(
                f"spec.monitor.tcp: {self}{self._meaning(found)} is not in an allowed network; name a monitor in "
                "an allowed network, or have the administrator of the operator add the network with --allow-tcp"
            )
        return allowed

    def _unreachable(self, tried: Sequence[AddrInfoType], error: OSError) -> MonitorUnreachable:
        failures = {int(number) for number in _NUMBER.findall(str(error))}
        if failures & _UNANSWERED:
            return self.unanswered(tried)
        where = f"{self}{self._meaning(tried)}"
        if failures == {errno.ECONNREFUSED}:
            return MonitorUnreachable(
                f"{where} refuses the connection: check that QEMU is running, and that no network policy or firewall "
                "rejects the traffic"
            )
        words = ", ".join(sorted({_words(number) for number in failures})) or str(error)[:_LONGEST]
        return MonitorUnreachable(f"{where} cannot be reached: {words}")

    def _meaning(self, found: Sequence[AddrInfoType]) -> str:
        """The addresses of a name, for the text after it."""
        addresses = sorted({str(each[4][0]) for each in found})  # DNS may return them in another order each time
        if addresses == [self.host]:
            return ""
        more = f" and {len(addresses) - _SHOWN} more" if len(addresses) > _SHOWN else ""
        return f" ({', '.join(addresses[:_SHOWN])}{more})"


def _words(number: int) -> str:
    if number in {errno.EACCES, errno.EPERM}:
        return "a network policy, firewall or route blocks the traffic"
    return os.strerror(number)


def _keep_alive(connection: socket.socket) -> None:
    """Make the kernel detect within two minutes that the host of an idle connection is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
