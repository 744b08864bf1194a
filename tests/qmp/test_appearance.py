"""A socket that appears at a followed path is noticed, whatever folders it came with; nothing else is.

What is watched is read from the kernel (`/proc/self/fdinfo`). Deadlines are below the half minute after which
everything is looked at anew, so that what is noticed in time has been noticed by an event.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import watchfiles

import vcpuset.qmp.watch as watch_module
from harness.wait import until
from vcpuset.domain.resource import UID, Monitor, Spec, TCPMonitor, UnixMonitor, VCPUSet
from vcpuset.qmp.appearance import Appearances

SECONDS = 20.0
"""Deadline of every wait."""


@pytest.fixture
def root() -> Iterator[Path]:
    """A socket root with the namespaces team-a and team-b, with a name short enough to bind sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="vcpuset-app-"))
    (path / "team-a").mkdir()
    (path / "team-b").mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
async def nothing_is_left_behind() -> AsyncIterator[None]:
    yield
    await nothing_left()


async def nothing_left() -> None:
    """Assert that our thread is gone, and wait for watchfiles' own, which it only tells to end."""
    assert threads() == []
    await until(lambda: not inotify_instances() and not rust_threads(), SECONDS, "watchfiles to clean up")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "socket appearances"]


def rust_threads() -> list[str]:
    """Threads of watchfiles' library `notify`, which Python does not know of."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append((task / "comm").read_text().strip())
    return [name for name in names if name.startswith("notify")]


def inotify_instances() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(link.readlink()) == "anon_inode:inotify":
                found.append(link.name)
    return sorted(found)


def watched() -> list[int]:
    """The inodes that this process has inotify watches on."""
    inodes = []
    for descriptor in inotify_instances():
        with contextlib.suppress(FileNotFoundError):
            for line in (Path("/proc/self/fdinfo") / descriptor).read_text().splitlines():
                if line.startswith("inotify "):
                    inodes += [int(part[4:], 16) for part in line.split() if part.startswith("ino:")]
    return sorted(inodes)


async def watching(*folders: Path) -> None:
    """Wait until exactly these folders are watched."""
    expected = sorted(folder.stat().st_ino for folder in folders)
    await until(lambda: watched() == expected, SECONDS, lambda: f"watches on {expected}, not {watched()}")


def declared(monitor: Monitor | str, namespace: str = "team-a") -> VCPUSet:
    return VCPUSet(
        uid=UID("not read"),
        namespace=namespace,
        name="web-1",
        generation=1,
        resource_version="1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        spec=Spec(vcpus=2, monitor=UnixMonitor(monitor) if isinstance(monitor, str) else monitor),
    )


def listen(path: Path) -> None:
    """Put a socket there, as QEMU does: what was there before is removed. Nobody needs to listen to be noticed."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


class Following:
    """Running `Appearances`, and the sets that have been told of."""

    def __init__(self, root: Path, retry: Callable[[int], float] = lambda _failures: 0.05) -> None:
        self.calls: list[str] = []
        self.appearances = Appearances(root, self.calls.append, retry=retry)

    def follow(self, uid: str, monitor: Monitor | str, namespace: str = "team-a") -> None:
        self.appearances.follow(UID(uid), declared(monitor, namespace))

    def forget(self, uid: str) -> None:
        self.appearances.follow(UID(uid), None)

    async def told(self, *uids: str) -> None:
        """Wait until these have been told of, since the last `told`, and assert that no others have."""
        await until(lambda: set(uids) <= set(self.calls), SECONDS, f"{uids} to appear")
        assert sorted(self.calls) == sorted(uids)
        self.calls.clear()


@pytest.fixture
async def following(root: Path) -> AsyncIterator[Following]:
    one = Following(root)
    async with running(one):
        yield one


@contextlib.asynccontextmanager
async def running(following: Following) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(following.appearances.run())
    try:
        yield task
        assert not task.done(), task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_socket_that_appears_is_noticed_once(root: Path, following: Following) -> None:
    following.follow("one", "qmp.sock")
    following.follow("two", "other.sock")
    await watching(root, root / "team-a")
    listen(root / "team-a/qmp.sock")
    await following.told("one")
    listen(root / "team-a/other.sock")
    await following.told("two")


async def test_a_socket_is_noticed_when_another_takes_its_place(root: Path, following: Following) -> None:
    path = root / "team-a/qmp.sock"
    listen(path)
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    listen(path)
    await following.told("one")
    listen(root / "team-a/next")
    (root / "team-a/next").rename(path)
    await following.told("one")


async def test_what_is_there_when_a_set_is_first_followed_is_no_appearance(root: Path, following: Following) -> None:
    listen(root / "team-a/qmp.sock")
    following.follow("one", "qmp.sock")
    following.follow("two", "other.sock")
    await watching(root, root / "team-a")
    listen(root / "team-a/other.sock")
    await following.told("two")


async def test_a_socket_that_appears_between_the_first_sight_of_its_set_and_the_watch_is_noticed(
    root: Path, following: Following
) -> None:
    following.follow("one", "qmp.sock")
    listen(root / "team-a/qmp.sock")  # the watch cannot have started: this task has not yet waited
    await following.told("one")


async def test_removal_and_a_changed_mode_are_no_appearances(root: Path, following: Following) -> None:
    for name in ("removed", "changed"):
        listen(root / "team-a" / name)
        following.follow(name, name)
    following.follow("fence", "fence")
    await watching(root, root / "team-a")
    (root / "team-a/removed").unlink()
    (root / "team-a/changed").chmod(0o600)
    listen(root / "team-a/fence")
    await following.told("fence")


async def test_a_regular_file_a_folder_and_a_link_to_a_socket_are_no_appearances(
    root: Path, following: Following
) -> None:
    for name in ("file", "folder", "link", "fence"):
        following.follow(name, name)
    await watching(root, root / "team-a")
    listen(root / "team-b/elsewhere")
    (root / "team-a/file").touch()
    (root / "team-a/folder").mkdir()
    (root / "team-a/link").symlink_to(root / "team-b/elsewhere")
    listen(root / "team-a/fence")
    await following.told("fence")


async def test_two_sets_that_name_one_socket_are_both_told(root: Path, following: Following) -> None:
    following.follow("one", "qmp.sock")
    following.follow("two", "qmp.sock")
    following.forget("two")
    following.follow("two", "qmp.sock")
    await watching(root, root / "team-a")
    listen(root / "team-a/qmp.sock")
    await following.told("one", "two")


async def test_a_machine_folder_made_later_is_watched(root: Path, following: Following) -> None:
    following.follow("one", "web-1/qmp.sock")
    await watching(root, root / "team-a")
    folder = root / "team-a/web-1"
    folder.mkdir()
    await watching(root, root / "team-a", folder)
    listen(folder / "qmp.sock")
    await following.told("one")


async def test_a_socket_that_comes_with_all_its_folders_is_noticed(root: Path, following: Following) -> None:
    following.follow("one", "vms/web-1/run/qmp.sock")
    following.follow("two", "qmp.sock", "team-c")
    await watching(root, root / "team-a")
    folder = root / "team-a/vms/web-1/run"
    folder.mkdir(parents=True)
    listen(folder / "qmp.sock")
    (root / "team-c").mkdir()
    listen(root / "team-c/qmp.sock")
    await following.told("one", "two")
    await watching(root, root / "team-a", root / "team-a/vms", folder.parent, folder, root / "team-c")


async def test_a_namespace_folder_that_is_removed_and_made_again_is_watched_again(
    root: Path, following: Following
) -> None:
    """Its inode number may be the same; on some file systems it always is."""
    folder = root / "team-a"
    following.follow("one", "qmp.sock")
    for _ in range(3):
        await watching(root, folder)
        listen(folder / "qmp.sock")
        await following.told("one")
        shutil.rmtree(folder)
        folder.mkdir()


async def test_a_folder_that_is_moved_into_place_is_seen_with_what_is_in_it(root: Path, following: Following) -> None:
    following.follow("one", "web-1/qmp.sock")
    await watching(root, root / "team-a")
    (root / "team-a/new").mkdir()
    listen(root / "team-a/new/qmp.sock")
    (root / "team-a/new").rename(root / "team-a/web-1")
    await following.told("one")
    await watching(root, root / "team-a", root / "team-a/web-1")


async def test_a_root_that_is_made_later_and_made_again_is_found(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    later = root / "later"
    following = Following(later)
    following.follow("one", "qmp.sock")
    async with running(following):
        for _ in range(2):
            await until(lambda: "cannot be watched: No such file" in caplog.text, SECONDS, "a word about the root")
            assert watched() == []
            (later / "team-a").mkdir(parents=True)
            await watching(later, later / "team-a")
            listen(later / "team-a/qmp.sock")
            await following.told("one")
            warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert len(warnings) == 1
            assert str(later) in warnings[0].getMessage()
            caplog.clear()
            shutil.rmtree(later)


async def test_the_root_may_be_a_symbolic_link(root: Path) -> None:
    link = root / "link"
    link.symlink_to(root)
    following = Following(link)
    following.follow("one", "qmp.sock")
    async with running(following):
        await watching(root, root / "team-a")
        listen(root / "team-a/qmp.sock")
        await following.told("one")


async def test_folders_behind_a_symbolic_link_are_not_watched(root: Path, following: Following) -> None:
    """A set of team-a names a link to team-b's folder: it hears nothing of that, and hinders nobody."""
    following.follow("spy", "link/qmp.sock")
    following.follow("one", "qmp.sock")
    following.follow("fence", "fence")
    (root / "team-a/link").symlink_to(root / "team-b")
    await watching(root, root / "team-a")
    listen(root / "team-b/qmp.sock")
    listen(root / "team-a/fence")
    await following.told("fence")

    (root / "team-a/link").unlink()
    (root / "team-a/link").mkdir()
    await watching(root, root / "team-a", root / "team-a/link")
    shutil.rmtree(root / "team-a/link")
    (root / "team-a/link").symlink_to(root / "team-b")
    await watching(root, root / "team-a")
    listen(root / "team-a/qmp.sock")
    await following.told("one")


async def test_a_set_that_names_another_socket_is_followed_there(root: Path, following: Following) -> None:
    following.follow("one", "web-1/qmp.sock")
    (root / "team-a/web-1").mkdir()
    (root / "team-a/web-2").mkdir()
    listen(root / "team-a/web-2/qmp.sock")
    await watching(root, root / "team-a", root / "team-a/web-1")
    following.follow("one", "web-2/qmp.sock")
    following.follow("fence", "fence")
    await watching(root, root / "team-a", root / "team-a/web-2")
    listen(root / "team-a/web-1/qmp.sock")
    listen(root / "team-a/fence")
    await following.told("fence")
    listen(root / "team-a/web-2/qmp.sock")
    await following.told("one")


async def test_a_set_that_is_gone_or_has_a_monitor_on_tcp_is_not_followed(root: Path, following: Following) -> None:
    for uid in ("gone", "moved", "fence"):
        following.follow(uid, uid)
    await watching(root, root / "team-a")
    following.forget("gone")
    following.forget("gone")
    following.follow("moved", TCPMonitor("127.0.0.1", 4444))
    for uid in ("gone", "moved", "fence"):
        listen(root / "team-a" / uid)
    await following.told("fence")


async def test_without_followed_sets_no_thread_runs(root: Path, following: Following) -> None:
    following.follow("tcp", TCPMonitor("127.0.0.1", 4444))
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    assert len(threads()) == 1
    following.forget("one")
    await until(lambda: not threads(), SECONDS, "the thread to end")


@pytest.mark.parametrize(
    "path", ["../team-b/qmp.sock", "/qmp.sock", "a//qmp.sock", "a\0b", "\udc80", "a/" * 2000 + "s"]
)
async def test_a_path_that_cannot_be_hinders_nobody(root: Path, following: Following, path: str) -> None:
    following.follow("odd", path)
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    listen(root / "team-b/qmp.sock")
    listen(root / "team-a/qmp.sock")
    await following.told("one")


async def test_thousands_of_sets_share_one_start_of_the_watch(
    root: Path, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def counted(*folders: str, **options: object) -> object:
        starts.append(len(folders))
        return watchfiles.watch(*folders, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(watch_module, "watch", counted)
    folders = [root / f"team-a/{number}" for number in range(100)]
    for folder in folders:
        folder.mkdir()
    for number in range(5000):
        following.follow(str(number), f"{number % 100}/{number}.sock")
    await watching(root, root / "team-a", *folders)
    numbers = range(0, 5000, 50)
    for number in numbers:
        listen(root / f"team-a/{number % 100}/{number}.sock")
    await following.told(*map(str, numbers))
    assert starts == [102]

    for number in range(5000):
        following.forget(str(number))
    await until(lambda: not threads(), SECONDS, "the thread to end")
    assert starts == [102]


async def test_what_comes_and_goes_while_the_watch_starts_is_seen(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gaps: list[Callable[[], None]] = [
        (root / "team-b").rmdir,  # was there at the look: watchfiles finds that it is not
        (root / "team-a/web-1").mkdir,
        lambda: listen(root / "team-a/qmp.sock"),
    ]

    def late(*folders: str, **options: object) -> object:
        if gaps:
            gaps.pop(0)()
        return watchfiles.watch(*folders, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(watch_module, "watch", late)
    following = Following(root)
    following.follow("one", "qmp.sock")
    following.follow("two", "web-1/qmp.sock")
    following.follow("three", "qmp.sock", "team-b")
    async with running(following):
        await following.told("one")
        await watching(root, root / "team-a", root / "team-a/web-1")
    assert not gaps
    assert "cannot" not in caplog.text
    assert "failed" not in caplog.text


async def test_a_watch_that_fails_is_told_of_once_and_tried_until_it_works(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[int] = []
    allowed = threading.Event()

    def limited(*folders: str, **options: object) -> object:
        if not allowed.is_set():
            # the words of watchfiles' Rust part; it gives no errno
            raise OSError('OS file watch limit reached. about ["/run/vms/team-a"]')
        return watchfiles.watch(*folders, **options)  # type: ignore[arg-type]

    def retry(count: int) -> float:
        failures.append(count)
        return 0.05

    monkeypatch.setattr(watch_module, "watch", limited)
    following = Following(root, retry)
    following.follow("one", "qmp.sock")
    async with running(following):
        await until(lambda: len(failures) >= 3, SECONDS, "three failures")
        listen(root / "team-a/qmp.sock")
        await following.told("one")  # each try looks at everything
        allowed.set()
        await watching(root, root / "team-a")
        listen(root / "team-a/qmp.sock")
        await following.told("one")
    assert failures == list(range(1, len(failures) + 1))
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "watch limit reached" in warning
    assert "fs.inotify.max_user_watches" in warning


async def test_a_watch_that_failed_is_not_tried_before_its_time_whatever_else_happens(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def failing(*folders: str, **_options: object) -> object:
        tries.append(folders)
        raise RuntimeError("Error creating recommended watcher: Too many open files (os error 24)")

    monkeypatch.setattr(watch_module, "watch", failing)
    following = Following(root, lambda _failures: 3600.0)
    following.follow("0", "0/qmp.sock")
    async with running(following):
        await until(lambda: "Too many open files" in caplog.text, SECONDS, "the failure")
        for number in ("1", "2"):
            following.follow(number, f"{number}/qmp.sock")  # another folder: everything is looked at
            (root / "team-a" / number).mkdir()
            listen(root / "team-a" / number / "qmp.sock")
            await following.told(number)
    assert len(tries) == 1


async def test_a_file_name_that_watchfiles_cannot_read_ends_no_more_than_one_watch(
    root: Path, following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    (root / "team-a" / os.fsdecode(b"\xff")).touch()
    await until(lambda: "Unable to decode" in caplog.text, SECONDS, "a word about the name")
    await watching(root, root / "team-a")
    listen(root / "team-a/qmp.sock")
    await following.told("one")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, and back")
async def test_a_folder_that_may_not_be_read_is_told_of_once_and_hinders_nobody(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.chmod(0o755)  # noqa: ASYNC240 - of no length
    (root / "team-b").chmod(0o711)
    following = Following(root)
    following.follow("one", "qmp.sock")
    following.follow("two", "qmp.sock", "team-b")
    os.seteuid(65534)  # of all threads
    try:
        async with running(following):
            await watching(root, root / "team-a")
            os.seteuid(0)
            listen(root / "team-b/qmp.sock")
            listen(root / "team-a/qmp.sock")
            await following.told("one")
            os.seteuid(65534)
            following.follow("three", "web-3/qmp.sock")
            os.seteuid(0)
            (root / "team-a/web-3").mkdir()
            os.seteuid(65534)
            await watching(root, root / "team-a", root / "team-a/web-3")
            (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
            assert str(root / "team-b") in warning
            assert "uid 65534" in warning
            os.seteuid(0)
            (root / "team-b").chmod(0o755)
            os.seteuid(65534)
            await watching(root, root / "team-a", root / "team-a/web-3", root / "team-b")
            assert set(following.calls) <= {"two"}
    finally:
        os.seteuid(0)


async def test_an_error_of_the_one_who_is_told_is_passed_on_and_ends_the_watch(root: Path) -> None:
    def fail(_uid: UID) -> None:
        raise ZeroDivisionError

    appearances = Appearances(root, fail)
    appearances.follow(UID("one"), declared("qmp.sock"))
    listen(root / "team-a/qmp.sock")
    with pytest.raises(ZeroDivisionError):
        await appearances.run()


async def test_cancellation_leaves_neither_thread_nor_descriptor_at_any_moment(root: Path) -> None:
    for turns in range(40):
        following = Following(root)
        following.follow("one", "qmp.sock")
        async with running(following):
            for _ in range(turns):
                await asyncio.sleep(0.002)  # another moment each time, from the first look to the running watch
        await nothing_left()


async def test_events_are_not_logged_one_by_one(
    root: Path, following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    (root / "team-a/log").touch()
    listen(root / "team-a/qmp.sock")
    await following.told("one")
    assert [record.getMessage() for record in caplog.records if record.name.startswith(("watchfiles", "vcpuset"))] == []
