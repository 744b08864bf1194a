"""What the kernel tells of who listens at a monitor: the monitors of one QEMU have one peer, those of two have two."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.guest import Guest
from harness.qmp import SECOND_ON_TCP, second_on_tcp
from harness.wait import until
from qmp.sessions import Connect
from vcpuset.qmp.peer import peer_of

__all__: list[str] = []

FROM_A_CONTAINER = """
import socket, struct, sys
from vcpuset.qmp.peer import peer_of

def seen(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    pid, *_ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, peer_of(connection).process

(pid, first), (_, second), (_, other) = map(seen, sys.argv[1:])
print(pid, first == second, first == other, first is None)
"""

KERNEL = tuple(int(number) for number in platform.release().split(".")[:2])


@pytest.fixture
async def machines(namespace_folder: Path) -> AsyncIterator[tuple[Guest, Guest]]:
    """A QEMU with two monitors and one on TCP, and another QEMU."""
    paths = [namespace_folder / name for name in ("first", "second")]
    async with (
        Guest(None, smp="2,maxcpus=4", memory=64, monitor_paths=paths, tcp=True) as one,
        Guest(None, smp="2,maxcpus=4", memory=64, monitor_paths=[namespace_folder / "other"]) as other,
    ):
        yield one, other


async def test_the_unix_monitors_of_one_qemu_lead_to_one_process_and_those_of_another_to_another(
    machines: tuple[Guest, Guest], connect: Connect
) -> None:
    one, other = machines
    first, second, theirs = [await connect(path) for path in (*one.monitors, *other.monitors)]
    assert first.peer == second.peer
    assert first.peer.host is None
    assert None not in {first.peer.process, theirs.peer.process}
    assert first.peer != theirs.peer
    shown = [(await session.observe()).first_thread for session in (first, second, theirs)]
    assert shown[0] == shown[1] != shown[2]


async def test_a_qemu_that_is_started_again_is_another_process(machines: tuple[Guest, Guest], connect: Connect) -> None:
    one, _ = machines
    before = (await connect(one.monitors[0])).peer
    one.kill()
    await one.start()
    assert (await connect(one.monitors[0])).peer.process not in {None, before.process}


async def test_of_a_monitor_on_tcp_the_host_is_known(machines: tuple[Guest, Guest], connect: Connect) -> None:
    one, _ = machines
    on_unix, on_tcp = await connect(one.monitors[0]), await connect(one.tcp_address)
    assert on_tcp.peer.host == on_unix.peer.host, "this host, as for the unix socket"
    assert on_tcp.peer.process is None


async def test_a_qemu_without_a_uuid_shows_all_of_its_connections_on_each_of_them(connect: Connect) -> None:
    async with Guest(None, smp="2,maxcpus=4", memory=64, tcp=True, extra=SECOND_ON_TCP) as guest:
        first, second = await connect(guest.tcp_address), await connect(await second_on_tcp(guest.control))
        assert None not in {first.peer.link, second.peer.link}
        assert (await first.observe()).connections == {first.peer.link, second.peer.link}
        await second.close()

        async def gone() -> bool:
            return (await first.observe()).connections == {first.peer.link}

        await until(gone, 60, "QEMU to have noticed")


async def test_a_qemu_with_a_uuid_is_not_asked_for_its_connections(connect: Connect) -> None:
    uuid = "6f1b2a52-7f0e-4d0c-9a53-2f6f5e1f7a01"
    async with Guest(None, smp="2,maxcpus=4", memory=64, tcp=True, extra=("-uuid", uuid)) as guest:
        machine = await (await connect(guest.tcp_address)).observe()
        assert (machine.uuid, machine.connections) == (uuid, frozenset())


def test_another_host_is_known_by_its_address() -> None:
    with socket.create_server(("127.0.0.2", 0)) as server, socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        connection.connect(server.getsockname())
        assert peer_of(connection).host == "127.0.0.2"


def test_a_kernel_that_tells_no_processes_apart_is_asked_for_the_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcpuset.qmp.peer._SO_PEERPIDFD", 0x7FFF)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as connection:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        connection.connect(str(tmp_path / "socket"))
        assert peer_of(connection).process == ("pid", os.getpid())


@pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace takes root")
@pytest.mark.skipif(KERNEL < (6, 9), reason="before Linux 6.9 a pidfd has no inode of its own")
async def test_processes_are_told_apart_from_a_container_in_which_their_ids_mean_nothing(
    machines: tuple[Guest, Guest],
) -> None:
    one, other = machines
    paths = map(str, (*one.monitors, *other.monitors))
    child = await asyncio.create_subprocess_exec(
        "unshare", "--pid", "--fork", sys.executable, "-c", FROM_A_CONTAINER, *paths, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await asyncio.wait_for(child.communicate(), 60)
    assert told.split() == [b"0", b"True", b"False", b"False"]
