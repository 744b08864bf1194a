"""No spelling of a path, no link and no race reaches a monitor outside the namespace's own folder.

Each test plants something in the attacker's folder and a healthy monitor in the victim's. The victim's monitor counts
its connections: none may come.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.expect import READY, RECONCILING, STALLED, shows
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.race import again_and_again
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks every two seconds, so that what is put right is soon seen."""
    async with OperatorProcess(control_plane, "--resync-seconds=2", socket_root=socket_root) as running:
        yield running


@pytest.fixture
async def victim(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[FaultyMonitor]:
    """A healthy monitor, `vm.sock` in the folder of another namespace."""
    folder = socket_root / await control_plane.namespace("victim")
    folder.mkdir()
    async with FaultyMonitor(folder / "vm.sock") as monitor:
        yield monitor


def _symlink(folder: Path, target: Path) -> None:
    (folder / "vm.sock").symlink_to(target)


def _relative_symlink(folder: Path, target: Path) -> None:
    (folder / "vm.sock").symlink_to(Path("..") / target.parent.name / target.name)


def _symlinked_folder(folder: Path, target: Path) -> None:
    (folder / "run").symlink_to(target.parent)


def _symlink_to_the_root(folder: Path, target: Path) -> None:
    (folder / "run").symlink_to("/")


def _fifo(folder: Path, _: Path) -> None:
    os.mkfifo(folder / "vm.sock")


def _folder(folder: Path, _: Path) -> None:
    (folder / "vm.sock").mkdir()


def _file(folder: Path, target: Path) -> None:
    (folder / "vm.sock").write_text(str(target))


def _file_as_a_folder(folder: Path, _: Path) -> None:
    (folder / "run").write_text("")


def _socket_as_a_folder(folder: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "run"))


@pytest.mark.parametrize(
    ("plant", "path", "words"),
    [
        (_symlink, "vm.sock", "/vm.sock below the socket root is a symbolic link, not a socket"),
        (_relative_symlink, "vm.sock", "/vm.sock below the socket root is a symbolic link, not a socket"),
        (_symlinked_folder, "run/vm.sock", "/run below the socket root is a symbolic link, not a directory"),
        (_symlink_to_the_root, "run/dev/null", "/run below the socket root is a symbolic link, not a directory"),
        (_fifo, "vm.sock", "is a FIFO, not a socket"),
        (_folder, "vm.sock", "is a directory, not a socket"),
        (_file, "vm.sock", "is a regular file, not a socket"),
        (_file_as_a_folder, "run/vm.sock", "/run below the socket root is a regular file, not a directory"),
        (_socket_as_a_folder, "run/vm.sock", "/run below the socket root is a socket, not a directory"),
    ],
)
async def test_what_is_no_socket_of_the_namespace_s_own_is_refused(
    folder: Path,
    operator: OperatorProcess,
    user: User,
    victim: FaultyMonitor,
    plant: Callable[[Path, Path], None],
    path: str,
    words: str,
) -> None:
    plant(folder, victim.path)
    await user.create("vm", 3, path)
    await shows(user, "vm", "InvalidMonitor", STALLED, f"{user.namespace}/", words, vcpus=None)
    assert victim.connections == 0


async def test_a_namespace_s_folder_that_is_a_symbolic_link_is_refused(
    socket_root: Path, operator: OperatorProcess, user: User, victim: FaultyMonitor
) -> None:
    (socket_root / user.namespace).symlink_to(victim.path.parent)
    await user.create("vm", 3, "vm.sock")
    await shows(
        user,
        "vm",
        "InvalidMonitor",
        STALLED,
        f"{user.namespace} below the socket root is a symbolic link, not a directory",
        vcpus=None,
    )
    assert victim.connections == 0


@pytest.mark.parametrize(
    "spelling",
    [
        "%2e%2e/{namespace}/vm.sock",
        "..%2f{namespace}%2fvm.sock",
        ".../{namespace}/vm.sock",
        "..../vm.sock",
        "~/vm.sock",
        "~root/vm.sock",
        "{namespace}/vm.sock",
        "file:///{namespace}/vm.sock".replace("///", "/"),
        "unix:/{namespace}/vm.sock",
        "@abstract",
        "vm.sock,server=on",
        "-",
    ],
)
async def test_a_path_that_only_looks_like_a_way_out_names_a_file_of_the_namespace_s_own(
    folder: Path, operator: OperatorProcess, user: User, victim: FaultyMonitor, spelling: str
) -> None:
    path = spelling.format(namespace=victim.path.parent.name)
    await user.create("vm", 3, path)
    await shows(user, "vm", "MonitorUnreachable", RECONCILING, "There is no", user.namespace, vcpus=None)
    assert victim.connections == 0

    mine = folder / path
    mine.parent.mkdir(parents=True, exist_ok=True)
    async with FaultyMonitor(mine):
        await shows(user, "vm", "Converged", READY, vcpus=3)
    assert victim.connections == 0


async def test_an_abstract_socket_cannot_be_named(folder: Path, operator: OperatorProcess, user: User) -> None:
    with socket.socket(socket.AF_UNIX) as abstract:
        name = f"{user.namespace}-abstract"
        abstract.bind(f"\0{name}")
        abstract.listen()
        abstract.setblocking(False)
        await user.create("vm", 3, f"@{name}")
        await shows(user, "vm", "MonitorUnreachable", RECONCILING, "There is no", vcpus=None)
        with pytest.raises(BlockingIOError):
            abstract.accept()


async def test_a_path_longer_than_a_socket_address_is_reached(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    path = "/".join(["d" * 200] * 4 + ["vm.sock"])
    async with FaultyMonitor(folder / "short") as monitor:
        (folder / path).parent.mkdir(parents=True)
        (folder / "short").rename(folder / path)
        await user.create("vm", 3, path)
        await shows(user, "vm", "Converged", READY, vcpus=3)
        assert len(monitor.received("device_add")) == 1
        (folder / path).unlink()


async def test_a_set_recovers_by_itself_when_its_path_is_put_right(
    folder: Path, operator: OperatorProcess, user: User, victim: FaultyMonitor
) -> None:
    _symlink(folder, victim.path)
    await user.create("vm", 3, "vm.sock")
    await user.wait_reason("vm", "InvalidMonitor")
    (folder / "vm.sock").unlink()
    async with FaultyMonitor(folder / "vm.sock"):
        await shows(user, "vm", "Converged", READY, vcpus=3)
    assert victim.connections == 0


async def test_links_that_change_while_they_are_followed_lead_nowhere_else(
    folder: Path, operator: OperatorProcess, user: User, victim: FaultyMonitor
) -> None:
    """The folder on the way is exchanged for a symbolic link to the victim's, thousands of times."""
    (folder / "mine").mkdir()
    (folder / "link").symlink_to(victim.path.parent)
    async with FaultyMonitor(folder / "mine" / "vm.sock") as own:
        (folder / "mine").rename(folder / "run")
        await user.create("vm", 2, "run/vm.sock", connection="OnDemand")
        await user.wait_reason("vm", "Converged")
        with _exchanging(folder) as exchanged:
            for _ in range(60):
                await user.touch("vm")
            looks = own.connections
            await until(lambda: exchanged() > 1000, 60, "a thousand exchanges")
        await user.touch("vm")
        await shows(user, "vm", "Converged", READY, vcpus=2)
        assert looks > 1
        assert victim.connections == 0


@contextmanager
def _exchanging(folder: Path) -> Iterator[Callable[[], int]]:
    """Exchange `run` (the folder) for `link` and back, again and again; yields how often that was done."""

    def exchange() -> None:
        (folder / "run").rename(folder / "mine")
        (folder / "link").rename(folder / "run")
        time.sleep(0.0005)
        (folder / "run").rename(folder / "link")
        (folder / "mine").rename(folder / "run")
        time.sleep(0.0005)

    with again_and_again(exchange) as done:
        yield done
