"""A file system that does not answer holds up what is on it, and nothing else.

Once with a real mount that hangs, and once with the system call made to hang, for where nothing can be mounted.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import vcpuset.qmp.watcher as watcher_module
from harness.fuse import HungMount, why_not
from harness.wait import until
from vcpuset.domain.errors import AgentUnreachable, MonitorUnreachable
from vcpuset.domain.resource import UID, Spec, UnixMonitor, VCPUSet
from vcpuset.qmp import files
from vcpuset.qmp.agent import Agent
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import Endpoint, find_local_socket, find_socket
from vcpuset.qmp.watcher import SocketWatcher

SECONDS = 60.0
"""Deadline of every wait."""

Hang = Callable[[str], AbstractContextManager[object]]
"""Has the folder of this name in team-a hang."""


@pytest.fixture
def root(namespace_folder: Path) -> Path:
    """The socket root: team-a and team-b with a socket each, and folders in team-a that can be made to hang."""
    (namespace_folder.parent / "team-b").mkdir()
    for namespace in ("team-a", "team-b"):
        listen(namespace_folder.parent / namespace / "qmp.sock")
    for number in range(5):
        (namespace_folder / f"nfs-{number}/web").mkdir(parents=True)
        listen(namespace_folder / f"nfs-{number}/web/qmp.sock")
    return namespace_folder.parent


@pytest.fixture(params=["mounted", "injected"])
def hang(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Hang:
    if request.param == "injected":
        return lambda name: hanging_call(monkeypatch, name)
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    return lambda name: HungMount(root / "team-a" / name)


@pytest.fixture(autouse=True)
async def everything_is_given_back() -> AsyncIterator[None]:
    before = descriptors()
    yield
    await until(lambda: descriptors() == before, SECONDS, lambda: f"{before}, not {descriptors()}")


def descriptors() -> list[str]:
    targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    # Sockets are counted: the event loop has two of its own, which it makes again each time that it runs.
    return sorted(
        target.partition(":[")[0] for target in targets if target.startswith(("/tmp/", "anon_inode:inotify", "socket:"))
    )


def listen(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@contextlib.contextmanager
def hanging_call(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Opening something of this name in a folder hangs."""
    answers = threading.Event()
    real = os.open

    def slow(path: Any, flags: int, *arguments: Any, **options: Any) -> int:  # noqa: ANN401 - os.open's own
        if path == name:
            answers.wait()
        return real(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", slow)
        try:
            yield
        finally:
            answers.set()


async def hangs_at(root: Path, path: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that the socket is not found, for this reason. The deadline is short: what hangs, hangs."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "CALL_SECONDS", 0.3)
        with pytest.raises(MonitorUnreachable) as raised:
            await find_socket(root, "team-a", path)
    assert f"the file system at {root}/{place} does not answer" in str(raised.value)


async def answers_again(root: Path, *folders: str) -> None:
    """Wait until what hung has returned."""
    lane = str(root / "team-a")
    await until(
        lambda: not any(files.hangs(lane, f"{lane}/{folder}") for folder in folders), SECONDS, f"{folders} to answer"
    )


async def test_what_is_on_a_hung_mount_fails_with_its_path_and_what_is_beside_it_is_found(
    root: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hang("nfs-0"):
        await hangs_at(root, "nfs-0/web/qmp.sock", "team-a/nfs-0", monkeypatch)
        for namespace in ("team-a", "team-b"):
            (await find_socket(root, namespace, "qmp.sock")).close()
        (await find_socket(root, "team-a", "nfs-1/web/qmp.sock")).close()
    await answers_again(root, "nfs-0")


async def test_while_one_call_hangs_others_to_the_same_mount_fail_at_once_and_take_no_thread(
    root: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hang("nfs-0"):
        await hangs_at(root, "nfs-0/web/qmp.sock", "team-a/nfs-0", monkeypatch)
        monkeypatch.setattr(files, "THREADS", None)
        for path in ("nfs-0/web/qmp.sock", "nfs-0/db/qmp.sock", "nfs-0"):
            with pytest.raises(MonitorUnreachable, match="team-a/nfs-0 does not answer"):
                await find_socket(root, "team-a", path)
    await answers_again(root, "nfs-0")


async def test_a_namespace_with_many_hung_mounts_fails_as_a_whole_and_no_other_does(
    root: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as hung:
        for number in range(files.AT_ONCE):
            hung.enter_context(hang(f"nfs-{number}"))
            await hangs_at(root, f"nfs-{number}/web/qmp.sock", f"team-a/nfs-{number}", monkeypatch)
        with pytest.raises(MonitorUnreachable, match="team-a does not answer"):
            await find_socket(root, "team-a", "qmp.sock")
        (await find_socket(root, "team-b", "qmp.sock")).close()
    await answers_again(root, *(f"nfs-{number}" for number in range(files.AT_ONCE)))
    (await find_socket(root, "team-a", "qmp.sock")).close()


async def test_the_event_loop_goes_on_while_calls_hang(root: Path, hang: Hang) -> None:
    with hang("nfs-0"):
        hung = asyncio.create_task(find_socket(root, "team-a", "nfs-0/web/qmp.sock"))
        for _ in range(10):
            await asyncio.sleep(0)
            (await find_socket(root, "team-b", "qmp.sock")).close()
        hung.cancel()
        await asyncio.wait({hung})
    await answers_again(root, "nfs-0")


async def test_sockets_beside_a_hung_mount_are_watched_and_those_on_it_once_it_answers(
    root: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher_module, "OBSERVE_SECONDS", 0.2)
    changed: list[UID] = []
    watcher = SocketWatcher(root, changed.append)
    sets = [a_set(path) for path in ("nfs-0/web/qmp.sock", "other.sock", "nfs-1/web/other.sock")]
    with hang("nfs-0"):
        for each in sets:
            watcher.follow(each.uid, each)
            watcher.found(each, None)
        watching = asyncio.create_task(watcher.run())
        listen(root / "team-a/other.sock")
        listen(root / "team-a/nfs-1/web/other.sock")
        await until(lambda: len(changed) == 2, SECONDS, lambda: f"two sockets, not {changed}")
        assert set(changed) == {"other.sock", "nfs-1/web/other.sock"}
    await until(lambda: "nfs-0/web/qmp.sock" in changed, SECONDS, "the socket on the mount")
    watching.cancel()
    await asyncio.wait({watching})
    await answers_again(root, "nfs-0")


def a_set(path: str) -> VCPUSet:
    return VCPUSet(UID(path), "team-a", path, 1, "1", datetime.now(UTC), Spec(2, UnixMonitor(path)))


def test_a_process_ends_while_calls_hang(root: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    program = f"""
import asyncio, pathlib
from vcpuset.domain.errors import AgentUnreachable, MonitorUnreachable
from vcpuset.qmp.sockets import Endpoint, find_socket
async def main():
    try:
        await find_socket(pathlib.Path({str(root)!r}), "team-a", "nfs-0/web/qmp.sock")
    except MonitorUnreachable as error:
        print(error)
asyncio.run(main())
"""
    with HungMount(root / "team-a/nfs-0"):
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=True
        )
    assert "does not answer" in ended.stdout
    assert ended.stderr == ""


async def test_a_socket_that_is_found_too_late_is_closed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hanging_call(monkeypatch, "qmp.sock"):
        await hangs_at(root, "nfs-0/web/qmp.sock", "team-a/nfs-0/web/qmp.sock", monkeypatch)
    await answers_again(root, "nfs-0/web/qmp.sock")  # and `everything_is_given_back`


@pytest.mark.parametrize("connect", [lambda endpoint: Session.open(endpoint, lambda: None), Agent.open])
async def test_a_connection_that_hangs_with_the_file_system_is_reported_and_closed_when_it_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch, connect: Callable[[Endpoint], Awaitable[object]]
) -> None:
    real = socket.socket.connect
    answers = threading.Event()

    def slow(self: socket.socket, address: Any) -> None:  # noqa: ANN401 - socket.connect's own
        answers.wait()
        real(self, address)

    path = root / "team-a/here.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with monkeypatch.context() as patch, await find_socket(root, "team-a", "here.sock") as endpoint:
            patch.setattr(socket.socket, "connect", slow)
            with pytest.raises((MonitorUnreachable, AgentUnreachable)) as raised:
                await connect(endpoint)
            assert str(raised.value).startswith(f"the file system at {path} does not answer")
            answers.set()
            await answers_again(root, "here.sock")
        connection, _ = await asyncio.to_thread(listener.accept)
        with connection:
            assert await asyncio.to_thread(connection.recv, 1) == b""


async def test_the_command_line_reports_a_hung_file_system_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "team-a/qmp.sock"
    with hanging_call(monkeypatch, path), monkeypatch.context() as patch:  # type: ignore[arg-type]
        patch.setattr(files, "CALL_SECONDS", 0.3)
        with pytest.raises(MonitorUnreachable, match=f"the file system at {path} does not answer"):
            await find_local_socket(path)
    await until(lambda: not files.hangs(str(path), str(path)), SECONDS, "it to answer")
