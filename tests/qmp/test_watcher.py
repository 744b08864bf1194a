"""A socket that comes, goes or is replaced at a followed path is noticed, whatever happens to the folders around it;
nothing else is.

What is watched is read from the kernel (`/proc/self/fdinfo`). Deadlines are below the half minute after which
everything is observed again, so that what is noticed in time has been noticed by an event.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from inotify_simple import INotify

import vcpuset.qmp.watcher as watcher_module
from harness.wait import until
from vcpuset.domain.resource import UID, Monitor, Spec, TCPMonitor, UnixMonitor, VCPUSet
from vcpuset.qmp.sockets import Stamp, stamp_of
from vcpuset.qmp.watcher import SocketWatcher

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
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert inotify_instances() == []


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


def declared(uid: str, monitor: Monitor | str, namespace: str = "team-a") -> VCPUSet:
    return VCPUSet(
        uid=UID(uid),
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
    """A running `SocketWatcher`, and the sets that it has called for. Each call is answered by a pass at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.watcher = SocketWatcher(root, self._changed)
        self._monitors: dict[str, VCPUSet] = {}

    def follow(self, uid: str, monitor: Monitor | str, namespace: str = "team-a") -> None:
        """Follow it, and have its first pass find what there is."""
        self._monitors[uid] = declared(uid, monitor, namespace)
        self.watcher.follow(UID(uid), self._monitors[uid])
        self.make_pass(uid)

    def make_pass(self, uid: str) -> None:
        vcpuset = self._monitors[uid]
        if isinstance(vcpuset.spec.monitor, UnixMonitor):
            self.watcher.found(vcpuset, stamp(self.root, f"{vcpuset.namespace}/{vcpuset.spec.monitor.path}"))

    def forget(self, uid: str) -> None:
        self.watcher.follow(UID(uid), None)

    def _changed(self, uid: UID) -> None:
        self.calls.append(uid)
        self.make_pass(uid)

    async def told(self, *uids: str) -> None:
        """Wait until these have been called for, since the last `told`, and assert that no others have."""
        await until(lambda: set(uids) <= set(self.calls), SECONDS, lambda: f"{uids}, not {self.calls}")
        assert sorted(self.calls) == sorted(uids)
        self.calls.clear()


def stamp(root: Path, path: str) -> Stamp | None:
    """What a pass finds there; no link stands on the way."""
    try:
        status = (root / path).lstat()
    except (OSError, ValueError):
        return None
    return stamp_of(status) if stat.S_ISSOCK(status.st_mode) else None


@pytest.fixture
async def following(root: Path) -> AsyncIterator[Following]:
    one = Following(root)
    async with running(one):
        yield one


@contextlib.asynccontextmanager
async def running(following: Following) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(following.watcher.run())
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


async def test_what_the_first_pass_of_a_set_has_found_makes_for_no_second_one(root: Path, following: Following) -> None:
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


async def test_a_socket_that_is_removed_is_noticed_and_one_whose_mode_changes_is_not(
    root: Path, following: Following
) -> None:
    for name in ("removed", "moved", "changed"):
        listen(root / "team-a" / name)
        following.follow(name, name)
    await watching(root, root / "team-a")
    (root / "team-a/removed").unlink()
    (root / "team-a/changed").chmod(0o600)
    (root / "team-a/moved").rename(root / "team-b/moved")
    await following.told("removed", "moved")


async def test_a_socket_that_is_removed_and_made_again_at_once_makes_for_one_pass(
    root: Path, following: Following
) -> None:
    listen(root / "team-a/qmp.sock")
    following.follow("one", "qmp.sock")
    following.follow("fence", "fence")
    following.follow("before", "before")
    await watching(root, root / "team-a")
    listen(root / "team-a/before")
    await following.told("before")  # no observation of the time before is under way any more
    (root / "team-a/qmp.sock").unlink()
    listen(root / "team-a/qmp.sock")
    await following.told("one")
    listen(root / "team-a/fence")
    await following.told("fence")


async def test_what_a_pass_has_found_gone_already_makes_for_no_second_one(root: Path, following: Following) -> None:
    """The loss of a session tells of a QEMU's end before its socket goes."""
    listen(root / "team-a/qmp.sock")
    following.follow("one", "qmp.sock")
    following.follow("fence", "fence")
    await watching(root, root / "team-a")
    (root / "team-a/qmp.sock").unlink()
    following.make_pass("one")
    listen(root / "team-a/fence")
    await following.told("fence")


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda folder: folder.rename(folder.parent / "away")])
async def test_a_folder_that_goes_takes_its_sockets_with_it(
    root: Path, following: Following, remove: Callable[[Path], None]
) -> None:
    folder = root / "team-a/vms/web-1"
    folder.mkdir(parents=True)
    listen(folder / "qmp.sock")
    following.follow("one", "vms/web-1/qmp.sock")
    await watching(root, root / "team-a", folder.parent, folder)
    remove(folder.parent)
    await following.told("one")
    await watching(root, root / "team-a")


async def test_a_folder_that_another_takes_the_place_of_is_followed_there(root: Path, following: Following) -> None:
    for name in ("web-1", "new"):
        (root / "team-a" / name).mkdir()
        listen(root / "team-a" / name / "qmp.sock")
    following.follow("one", "web-1/qmp.sock")
    await watching(root, root / "team-a", root / "team-a/web-1")
    (root / "team-a/web-1").rename(root / "team-a/old")
    (root / "team-a/new").rename(root / "team-a/web-1")
    await following.told("one")
    await watching(root, root / "team-a", root / "team-a/web-1")
    listen(root / "team-a/web-1/qmp.sock")
    await following.told("one")


async def test_a_socket_root_that_goes_takes_all_sockets_with_it(root: Path) -> None:
    (root / "root/team-a").mkdir(parents=True)
    following = Following(root / "root")
    listen(root / "root/team-a/qmp.sock")
    following.follow("one", "qmp.sock")
    async with running(following):
        await watching(root / "root", root / "root/team-a")
        (root / "root").rename(root / "away")
        await following.told("one")


async def test_what_the_kernels_queue_of_events_had_no_place_for_is_noticed_all_the_same(
    root: Path, following: Following
) -> None:
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())  # noqa: ASYNC240 - of no length
    # Nothing is read meanwhile, as this does not let the event loop on. Two events each.
    for number in range(most // 2 + 1):
        (root / "team-a" / f"x{number % 2}").touch()
        (root / "team-a" / f"x{number % 2}").unlink()
    listen(root / "team-a/qmp.sock")
    await following.told("one")


async def test_a_regular_file_a_folder_and_a_link_to_a_socket_are_not_noticed(root: Path, following: Following) -> None:
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
        await following.told("one")


async def test_a_folder_that_is_moved_into_place_is_seen_with_what_is_in_it(root: Path, following: Following) -> None:
    following.follow("one", "web-1/qmp.sock")
    await watching(root, root / "team-a")
    (root / "team-a/new").mkdir()
    listen(root / "team-a/new/qmp.sock")
    (root / "team-a/new").rename(root / "team-a/web-1")
    await following.told("one")
    await watching(root, root / "team-a", root / "team-a/web-1")


async def test_a_root_that_is_made_later_and_made_again_is_found(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watcher_module, "SOON_SECONDS", 0.1)
    later = root / "later"
    following = Following(later)
    following.follow("one", "qmp.sock")
    async with running(following):
        for _ in range(2):
            await until(lambda: "cannot watch the socket root" in caplog.text, SECONDS, "a word about the root")
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
            await following.told("one")


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


async def test_without_followed_sets_nothing_is_watched(root: Path, following: Following) -> None:
    following.follow("tcp", TCPMonitor("127.0.0.1", 4444))
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    following.forget("one")
    await watching()


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


async def test_thousands_of_sets_are_followed(root: Path, following: Following) -> None:
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
    for number in range(5000):
        following.forget(str(number))
    await watching()


async def test_what_comes_and_goes_while_the_watches_are_made_is_seen(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gaps: list[Callable[[], object]] = [
        (root / "team-b").rmdir,
        (root / "team-a/web-1").mkdir,
        lambda: listen(root / "team-a/qmp.sock"),
    ]

    class Late(INotify):  # type: ignore[misc]
        def add_watch(self, path: str, mask: int) -> int:
            watch: int = super().add_watch(path, mask)
            if gaps:
                gaps.pop()()
            return watch

    monkeypatch.setattr(watcher_module, "INotify", Late)
    following = Following(root)
    following.follow("one", "qmp.sock")
    following.follow("two", "web-1/qmp.sock")
    following.follow("three", "qmp.sock", "team-b")
    async with running(following):
        await following.told("one")
        await watching(root, root / "team-a", root / "team-a/web-1")
    assert not gaps
    assert caplog.text == ""


@pytest.mark.parametrize("where", ["init", "add"])
async def test_a_limit_of_the_kernel_is_logged_once_and_tried_until_there_is_space(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    tries = []
    allowed = False

    def limit(here: str, number: int) -> None:
        if here == where and not allowed:
            tries.append(here)
            raise OSError(number, os.strerror(number))

    class Limited(INotify):  # type: ignore[misc]
        def __init__(self, *, nonblocking: bool) -> None:
            limit("init", errno.EMFILE)
            super().__init__(nonblocking=nonblocking)

        def add_watch(self, path: str, mask: int) -> int:
            limit("add", errno.ENOSPC)
            watch: int = super().add_watch(path, mask)
            return watch

    monkeypatch.setattr(watcher_module, "INotify", Limited)
    monkeypatch.setattr(watcher_module, "OBSERVE_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    following = Following(root)
    following.follow("one", "qmp.sock")
    async with running(following):
        await until(lambda: len(tries) >= 5, SECONDS, "some tries")
        listen(root / "team-a/qmp.sock")
        await following.told("one")  # each try observes everything
        (warning,) = caplog.messages
        assert os.strerror(errno.EMFILE if where == "init" else errno.ENOSPC) in warning
        assert "fs.inotify.max_user_watches" in warning
        caplog.clear()
        allowed = True
        await watching(root, root / "team-a")
        await until(lambda: caplog.messages, SECONDS, "a word about the end of it")
        (word,) = caplog.messages
        assert "watching sockets below" in word


async def test_a_file_name_that_is_no_text_hinders_nothing(root: Path, following: Following) -> None:
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    (root / "team-a" / os.fsdecode(b"\xff")).touch()
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
            await until(lambda: "team-b" in caplog.text, 60, "the warning")  # it names the user of that moment
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


async def test_an_error_of_what_is_called_is_passed_on_and_ends_the_watch(root: Path) -> None:
    def fail(_uid: UID) -> None:
        raise ZeroDivisionError

    watcher = SocketWatcher(root, fail)
    watcher.follow(UID("one"), declared("one", "qmp.sock"))
    watcher.found(declared("one", "qmp.sock"), None)
    listen(root / "team-a/qmp.sock")
    with pytest.raises(ExceptionGroup) as raised:
        await watcher.run()
    assert raised.group_contains(ZeroDivisionError)


async def test_cancellation_leaves_no_descriptor_at_any_moment(root: Path) -> None:
    for turns in range(0, 40, 3):
        following = Following(root)
        following.follow("one", "qmp.sock")
        async with running(following):
            for _ in range(turns):
                await asyncio.sleep(0.005)  # another moment each time, from the start to the running watch
        assert inotify_instances() == []


async def test_events_are_not_logged_one_by_one(
    root: Path, following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    following.follow("one", "qmp.sock")
    await watching(root, root / "team-a")
    (root / "team-a/log").touch()
    listen(root / "team-a/qmp.sock")
    await following.told("one")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("vcpuset")] == []
