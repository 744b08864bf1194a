"""What the tests of the package `qmp` share: the event loop, a socket root with one namespace, and sessions.

VCPUSET_TEST_LOOP=asyncio     on the event loop of the commands, in place of that of the operator
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from harness.guest import Guest
from qmp.sessions import Connect, Wakes
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import open_socket
from vcpuset.qmp.tcp import TCPEndpoint

__all__ = ["connect", "namespace_folder", "q35", "wakes"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Virtual time there is only on asyncio's own loop."""
    if os.environ.get("VCPUSET_TEST_LOOP") == "asyncio" or item.get_closest_marker("looptime") is not None:
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def namespace_folder() -> Iterator[Path]:
    """`<socket root>/team-a`, with a name short enough to bind sockets in it."""
    root = Path(tempfile.mkdtemp(prefix="vcpuset-qmp-"))
    folder = root / "team-a"
    folder.mkdir()
    yield folder
    shutil.rmtree(root)


@pytest.fixture
def wakes() -> Wakes:
    return Wakes()


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Deadlines are long, since the machine may be busy; a test that waits for one gives its own."""
    sessions = []

    async def opened(
        monitor: Path | tuple[str, int],
        wake: Callable[[], None] = lambda: None,
        *,
        open_seconds: float = 60.0,
        command_seconds: float = 60.0,
    ) -> Session:
        if isinstance(monitor, tuple):
            session = await Session.open(
                TCPEndpoint(*monitor), wake, open_seconds=open_seconds, command_seconds=command_seconds
            )
        else:
            folder = monitor.parent
            with open_socket(folder.parent, folder.name, monitor.name) as endpoint:
                session = await Session.open(endpoint, wake, open_seconds=open_seconds, command_seconds=command_seconds)
        sessions.append(session)
        return session

    yield opened
    for session in sessions:
        await session.close()


@pytest.fixture
async def q35(namespace_folder: Path) -> AsyncIterator[Guest]:
    """A real QEMU without a guest: 2 of 64 CPUs, stopped."""
    async with Guest(None, smp="2,maxcpus=64", memory=64, socket_dir=namespace_folder) as guest:
        yield guest
