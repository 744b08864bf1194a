"""Where a TCP monitor may lie is judged by the addresses that the connection goes to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from harness.guest import Guest
from vcpuset.domain.errors import InvalidMonitor, MonitorUnreachable
from vcpuset.domain.networks import Networks, network
from vcpuset.domain.resource import UID, Spec, TCPMonitor, VCPUSet
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Session
from vcpuset.qmp.tcp import TCPEndpoint

REAL = socket.getaddrinfo
LOOPBACK = Networks((network("127.0.0.0/8"),))


class Resolver:
    """In place of the system's resolver: what a name means, look-up after look-up; the last answer stays.

    asked  how many names were looked up; addresses are not
    """

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    def getaddrinfo(
        self,
        host: str,
        port: int,
        type: socket.SocketKind,  # noqa: A002 - its name there
        flags: int = 0,
    ) -> Sequence[tuple[Any, ...]]:
        """As `socket.getaddrinfo`."""
        if flags & socket.AI_NUMERICHOST:
            return REAL(host, port, type=type, flags=flags)
        self.asked += 1
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in found
        ]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """The resolver of this process."""
    found = Resolver(["127.0.0.1"])
    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    return found


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    """A real QEMU with a monitor on TCP."""
    async with Guest(None, memory=64, tcp=True) as running:
        yield running


async def vcpus_at(host: str, port: int, networks: Networks | None) -> int:
    """What is observed there."""
    session = await Session.open(TCPEndpoint(host, port, networks), lambda: None, open_seconds=60)
    try:
        return (await session.observe()).vcpus
    finally:
        await session.close()


async def unreachable(host: str, port: int, open_seconds: float = 60) -> str:
    """Why no session can be opened there."""
    with pytest.raises(MonitorUnreachable) as caught:
        await Session.open(TCPEndpoint(host, port), lambda: None, open_seconds=open_seconds)
    return str(caught.value)


async def refusal(host: str, port: int, networks: Networks) -> str:
    """Why nothing is observed there."""
    with pytest.raises(InvalidMonitor) as caught:
        await vcpus_at(host, port, networks)
    assert str(caught.value).startswith("spec.monitor.tcp: ")
    return str(caught.value)


async def test_a_monitor_in_a_listed_network_is_served_by_address_and_by_name(guest: Guest) -> None:
    host, port = guest.tcp_address
    for spelling in (host, "localhost", "::ffff:127.0.0.1"):
        assert await vcpus_at(spelling, port, LOOPBACK) == 1
        assert await vcpus_at(spelling, port, None) == 1, "a local user needs no list"


async def test_without_a_list_no_tcp_monitor_is_served_and_no_name_looked_up(guest: Guest, resolver: Resolver) -> None:
    for host in ("127.0.0.1", "vm.example"):
        words = await refusal(host, guest.tcp_address[1], Networks())
        assert f"{host}:" in words
        assert "started without --allow-tcp" in words
    assert resolver.asked == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1", "::1", "192.0.2.1", "::", "169.254.169.254"])
async def test_an_address_outside_the_list_is_not_connected_to_and_named_with_the_remedy(host: str) -> None:
    elsewhere = Networks((network("0.0.0.0/1"), network("10.0.0.0/8"), network("::/0")))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        words = await refusal(host, listener.getsockname()[1], elsewhere)
        assert host in words
        assert "add the network with --allow-tcp" in words
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_a_name_goes_to_its_allowed_addresses_only(guest: Guest, resolver: Resolver) -> None:
    # The first ones would take the connection as well, were they asked.
    resolver.answers = [["::1", "127.0.0.2", "127.0.0.1"]]
    assert await vcpus_at("vm.example", guest.tcp_address[1], Networks((network("127.0.0.1"),))) == 1


async def test_a_name_of_foreign_addresses_is_refused_with_what_it_means(resolver: Resolver) -> None:
    resolver.answers = [[f"198.51.100.{number}" for number in range(1, 200)]]
    words = await refusal("vm.example", 4444, LOOPBACK)
    assert "4444 (198.51.100.1, 198.51.100.10, 198.51.100.100, 198.51.100.101 and 195 more) is not in" in words


async def test_a_name_that_means_another_address_a_moment_later_leads_nowhere_else(
    guest: Guest, resolver: Resolver
) -> None:
    resolver.answers = [["127.0.0.1"], ["198.51.100.1"]]
    assert await vcpus_at("vm.example", guest.tcp_address[1], LOOPBACK) == 1
    assert resolver.asked == 1, "who looks twice can be told two things"
    assert "198.51.100.1" in await refusal("vm.example", guest.tcp_address[1], LOOPBACK)


async def test_a_name_without_an_address_is_unreachable(resolver: Resolver) -> None:
    resolver.answers = [[]]
    with pytest.raises(
        MonitorUnreachable, match=r"host name of vm\.example:4444 cannot be resolved: it does not exist"
    ):
        await vcpus_at("vm.example", 4444, LOOPBACK)


async def test_names_that_nobody_answers_for_hold_up_nothing_else(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def slow(host: str, port: int, **options: Any) -> Sequence[tuple[Any, ...]]:
        if host.endswith(".example"):
            answered.wait(60)
        return REAL("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    endpoints = [TCPEndpoint(f"{number}.example", 4444, LOOPBACK) for number in range(220)]
    try:
        outcomes = await asyncio.gather(
            *(Session.open(each, lambda: None, open_seconds=0.3) for each in endpoints), return_exceptions=True
        )
        assert {type(each) for each in outcomes} == {MonitorUnreachable}
        assert "the host name of 0.example:4444 cannot be resolved: it does not exist, or DNS" in str(outcomes[0])
        assert await asyncio.to_thread(lambda: "a thread") == "a thread"
        assert await vcpus_at("vm.test", guest.tcp_address[1], LOOPBACK) == 1
    finally:
        answered.set()


async def test_a_name_that_no_resolver_takes_is_unreachable() -> None:
    with pytest.raises(MonitorUnreachable, match="cannot be resolved"):
        await vcpus_at(f"{'a' * 64}.example", 4444, LOOPBACK)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "a network policy, firewall or route blocks the traffic"),
        (errno.EPERM, "a network policy, firewall or route blocks the traffic"),
        (errno.EINVAL, "Invalid argument"),  # what IPv6 says to fe80::1, which needs a zone
        (errno.ENETUNREACH, "Network is unreachable"),
    ],
)
@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", ""), ("vm.example", " (127.0.0.1, 127.0.0.2)")])
async def test_what_the_network_forbids_is_no_matter_of_a_socket_s_rights_and_no_busy_monitor(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch, number: int, words: str, host: str, shown: str
) -> None:
    class Fenced(socket.socket):
        def connect(self, address: object, /) -> None:
            raise OSError(number, os.strerror(number))

    resolver.answers = [["127.0.0.2", "127.0.0.1"]]
    monkeypatch.setattr(socket, "socket", Fenced)
    with pytest.raises(MonitorUnreachable) as caught:
        await vcpus_at(host, 4444, LOOPBACK)
    assert str(caught.value) == f"{host}:4444{shown} cannot be reached: {words}"


async def test_a_name_whose_addresses_all_refuse_is_told_once_with_the_addresses(resolver: Resolver) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        resolver.answers = [["127.0.0.1", "127.0.0.2"]]
        with pytest.raises(MonitorUnreachable) as caught:
            await vcpus_at("vm.example", port, LOOPBACK)
    assert str(caught.value).startswith(
        f"vm.example:{port} (127.0.0.1, 127.0.0.2) refuses the connection: check that QEMU is running"
    )


async def test_a_name_whose_addresses_fail_each_in_its_way_is_told_with_all_of_them(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fenced(socket.socket):
        def connect(self, address: Any, /) -> None:  # noqa: ANN401 - as the socket's own
            if address[0] == "127.0.0.2":
                raise OSError(errno.EACCES, "Permission denied")
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Fenced)
    resolver.answers = [["127.0.0.1", "127.0.0.2"]]
    with pytest.raises(MonitorUnreachable) as caught:
        await vcpus_at("vm.example", 1, LOOPBACK)
    assert str(caught.value) == (
        "vm.example:1 (127.0.0.1, 127.0.0.2) cannot be reached: Connection refused, "
        "a network policy, firewall or route blocks the traffic"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "vm.example"])
@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ETIMEDOUT])
async def test_a_host_that_is_away_is_told_in_one_way_whether_the_kernel_or_the_deadline_is_first(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch, host: str, number: int
) -> None:
    fenced = False

    class Fenced(socket.socket):
        def connect(self, address: Any, /) -> None:  # noqa: ANN401 - as the socket's own
            if fenced:
                raise OSError(number, os.strerror(number))
            super().connect(address)

    with contextlib.ExitStack() as queue:
        port = queue.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)).getsockname()[1]
        for _ in range(3):  # fill the queue: the kernel drops what comes after
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        monkeypatch.setattr(socket, "socket", Fenced)
        late = await unreachable(host, port, open_seconds=0.3)
        fenced = True
        assert await unreachable(host, port) == late
    assert f"{port}{'' if host == '127.0.0.1' else ' (127.0.0.1)'} did not accept the connection: its host is" in late
    assert "a network policy, firewall or route blocks the traffic, or another client holds the monitor" in late


@pytest.mark.parametrize(
    "numbers",
    [
        (errno.ECONNREFUSED, errno.EHOSTUNREACH),
        (errno.ENETUNREACH, errno.EHOSTUNREACH),
        (errno.EACCES, errno.ENETUNREACH),
        (errno.ECONNREFUSED, errno.EACCES),
    ],
    ids=lambda numbers: "-".join(errno.errorcode[each] for each in numbers),
)
async def test_the_addresses_of_a_name_may_fail_in_any_order(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, int]
) -> None:
    class Fenced(socket.socket):
        def connect(self, address: Any, /) -> None:  # noqa: ANN401 - as the socket's own
            number = numbers[address[0] == "127.0.0.2"]
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", Fenced)
    told = set()
    for answer in (["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]):
        resolver.answers = [answer]
        told.add(await unreachable("vm.example", 4444))
    assert len(told) == 1
    assert ("did not accept the connection" in told.pop()) == (errno.EHOSTUNREACH in numbers)


async def test_a_name_that_leads_to_no_address_is_told_in_one_way_whatever_dns_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = [socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL]
    ended = threading.Event()

    def failing(*_: object, **__: object) -> Sequence[tuple[Any, ...]]:
        if not failures:
            ended.wait(60)
        raise socket.gaierror(failures.pop() if failures else socket.EAI_AGAIN, "as the resolver has it")

    monkeypatch.setattr(socket, "getaddrinfo", failing)
    told = {await unreachable("vm.example", 4444) for _ in range(len(failures))}
    try:
        told.add(await unreachable("vm.example", 4444, open_seconds=0.3))
    finally:
        ended.set()
    assert len(told) == 1


VANISHED = """
import asyncio, json, subprocess
from pathlib import Path
from vcpuset.qmp.session import Session
from vcpuset.qmp.tcp import TCPEndpoint

for line in (
    "link add op type veth peer name vm",
    "address add 192.0.2.1/24 dev op",
    "link set lo up",
    "link set vm up",
    "link set op up",
):
    subprocess.run(["ip", *line.split()], check=True)
# The kernel gives up on a neighbour after three tries; here for 0.1 s each, in place of 1 s.
Path("/proc/sys/net/ipv4/neigh/op/retrans_time_ms").write_text("100")

async def tried():
    try:
        await Session.open(TCPEndpoint("192.0.2.2", 4444), lambda: None, open_seconds=0.25)
    except Exception as error:
        return type(error.__cause__).__name__, str(error)

async def tries():
    told = []
    while len({cause for cause, _ in told}) < 2 and len(told) < 200:
        told.append(await tried())
    return told

print(json.dumps(asyncio.run(tries())))
"""
"""A host that has gone from the operator's own network: `unshare --net` gives both of them to this program alone."""


def _no_networks() -> str | None:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs root, ip and unshare, to make a network"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "op", "type", "veth", "peer", "name", "vm"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return None if tried.returncode == 0 else f"needs networks of its own: {tried.stderr.strip()}"


@pytest.mark.skipif((why := _no_networks()) is not None, reason=str(why))
def test_a_host_that_has_gone_from_the_network_is_told_in_one_way() -> None:
    tries = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", VANISHED], capture_output=True, text=True, timeout=120, check=False
    )
    assert tries.returncode == 0, tries.stderr
    told = json.loads(tries.stdout)
    assert {cause for cause, _ in told} == {"TimeoutError", "OSError"}, "both were met"
    assert len({words for _, words in told}) == 1


def test_a_process_does_not_outlive_its_end_for_a_name_that_nobody_answers_for() -> None:
    # The look-up of the child never ends; only the child can.
    program = """
import socket, threading
from vcpuset.cli.main import main
socket.getaddrinfo = lambda *_, **__: threading.Event().wait()
main(["inspect", "vm.example:4444", "--timeout", "0.3"])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "host name of vm.example:4444 cannot be resolved" in ended.stderr


async def test_monitors_serve_tcp_only_as_they_were_told_to(guest: Guest) -> None:
    host, port = guest.tcp_address
    vcpuset = VCPUSet(UID("one"), "team-a", "vm", 1, "1", datetime.now(UTC), Spec(2, TCPMonitor(host, port)))

    async def observed(monitors: Monitors) -> int:
        try:
            with await monitors.resolve(vcpuset) as endpoint:
                return (await (await monitors.session(vcpuset.uid, endpoint)).observe()).vcpus
        finally:
            await monitors.close()

    with pytest.raises(InvalidMonitor):
        await observed(Monitors(None, lambda _: None))
    assert await observed(Monitors(None, lambda _: None, networks=LOOPBACK)) == 1
