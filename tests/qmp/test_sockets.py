"""No spelling of a path, no link and no race leads to a socket of another namespace."""

import contextlib
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vcpuset.domain.errors import InvalidMonitor, MonitorUnreachable
from vcpuset.qmp.sockets import UnixEndpoint, open_socket
from vcpuset.qmp.tcp import TCPEndpoint


@pytest.fixture
def root(namespace_folder: Path) -> Path:
    """The socket root: namespaces team-a and team-b."""
    (namespace_folder.parent / "team-b").mkdir()
    return namespace_folder.parent


@pytest.fixture(autouse=True)
def descriptors_are_given_back() -> Iterator[None]:
    before = opened_files()
    yield
    assert opened_files() == before


def opened_files() -> list[str]:
    """The paths behind this process's descriptors."""
    targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sorted(target for target in targets if target.startswith("/") and not target.startswith("/proc/"))


@contextlib.contextmanager
def listening(path: Path, backlog: int = 8) -> Iterator[socket.socket]:
    """A listening unix socket, also at a path that is too long for a socket address."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            listener.listen(backlog)
            listener.setblocking(False)
            yield listener
    finally:
        os.close(folder)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to enter every folder."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def reached(listener: socket.socket) -> bool:
    """Whether somebody has connected."""
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        return False
    connection.close()
    return True


def test_a_socket_is_found_and_known_by_its_inode(root: Path) -> None:
    path = root / "team-a" / "vms" / "web-1" / "qmp.sock"
    path.parent.mkdir(parents=True)
    with listening(path) as listener, open_socket(root, "team-a", "vms/web-1/qmp.sock") as endpoint:
        status = path.stat()
        assert endpoint.identity == (status.st_dev, status.st_ino)
        assert str(endpoint) == "team-a/vms/web-1/qmp.sock"
        endpoint.connect().close()
        assert reached(listener)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "empty segment"),
        ("/etc/qmp.sock", "is absolute"),
        ("//qmp.sock", "is absolute"),
        ("vms//qmp.sock", "empty segment"),
        ("qmp.sock/", "empty segment"),
        (".", "must not leave"),
        ("./qmp.sock", "must not leave"),
        ("..", "must not leave"),
        ("../team-b/qmp.sock", "must not leave"),
        ("vms/../../team-b/qmp.sock", "must not leave"),
        ("vms/..", "must not leave"),
        ("qmp\0.sock", "no file name can hold"),
        ("\0", "no file name can hold"),
        ("qmp\ud800.sock", "no file name can hold"),
        ("q" * 256, "more than 255 bytes"),
        ("é" * 128, "more than 255 bytes"),
    ],
)
def test_a_path_that_could_leave_the_folder_or_names_nothing_is_invalid(root: Path, path: str, words: str) -> None:
    with listening(root / "team-b" / "qmp.sock") as listener:
        with pytest.raises(InvalidMonitor, match=words):
            open_socket(root, "team-a", path)
        assert not reached(listener)


@pytest.mark.parametrize("namespace", ["", ".", "..", "team-a/vms", "team-a\0"])
def test_a_namespace_that_is_no_single_folder_is_invalid(root: Path, namespace: str) -> None:
    with pytest.raises(InvalidMonitor, match="namespace's directory"):
        open_socket(root, namespace, "qmp.sock")


def test_a_symbolic_link_in_place_of_the_socket_is_invalid(root: Path) -> None:
    with listening(root / "team-b" / "qmp.sock"):
        (root / "team-a" / "qmp.sock").symlink_to(root / "team-b" / "qmp.sock")
        with pytest.raises(InvalidMonitor, match=r"team-a/qmp\.sock .*is a symbolic link, not a socket"):
            open_socket(root, "team-a", "qmp.sock")


def test_a_symbolic_link_is_invalid_even_if_it_stays_in_the_folder(root: Path) -> None:
    with listening(root / "team-a" / "qmp.sock"):
        (root / "team-a" / "current").symlink_to("qmp.sock")
        with pytest.raises(InvalidMonitor, match="is a symbolic link"):
            open_socket(root, "team-a", "current")


def test_a_symbolic_link_to_nothing_is_invalid_and_not_just_missing(root: Path) -> None:
    (root / "team-a" / "qmp.sock").symlink_to("nowhere")
    with pytest.raises(InvalidMonitor, match="is a symbolic link"):
        open_socket(root, "team-a", "qmp.sock")


def test_a_symbolic_link_in_place_of_a_folder_is_invalid(root: Path) -> None:
    (root / "team-a" / "vms").symlink_to(root / "team-b")
    with listening(root / "team-b" / "qmp.sock"), pytest.raises(InvalidMonitor, match=r"team-a/vms .*a symbolic link"):
        open_socket(root, "team-a", "vms/qmp.sock")


def test_a_symbolic_link_in_place_of_the_namespaces_folder_is_invalid(root: Path) -> None:
    (root / "team-c").symlink_to("team-b")
    with listening(root / "team-b" / "qmp.sock"), pytest.raises(InvalidMonitor, match=r"team-c .*a symbolic link"):
        open_socket(root, "team-c", "qmp.sock")


def test_the_socket_root_itself_may_be_a_symbolic_link(root: Path) -> None:
    (root / "elsewhere").symlink_to(root)
    with listening(root / "team-a" / "qmp.sock"), open_socket(root / "elsewhere", "team-a", "qmp.sock") as endpoint:
        endpoint.connect().close()


def test_a_fifo_is_invalid_and_does_not_block(root: Path) -> None:
    os.mkfifo(root / "team-a" / "qmp.sock")
    with pytest.raises(InvalidMonitor, match="is a FIFO, not a socket"):
        open_socket(root, "team-a", "qmp.sock")


def test_a_regular_file_is_invalid(root: Path) -> None:
    (root / "team-a" / "qmp.sock").touch()
    with pytest.raises(InvalidMonitor, match="is a regular file, not a socket"):
        open_socket(root, "team-a", "qmp.sock")


def test_a_folder_is_invalid(root: Path) -> None:
    (root / "team-a" / "qmp.sock").mkdir()
    with pytest.raises(InvalidMonitor, match="is a directory, not a socket"):
        open_socket(root, "team-a", "qmp.sock")


def test_a_device_is_invalid() -> None:
    with pytest.raises(InvalidMonitor, match="is a character device, not a socket"):
        open_socket(Path("/"), "dev", "null")


def test_a_file_in_place_of_a_folder_is_invalid(root: Path) -> None:
    (root / "team-a" / "vms").touch()
    with pytest.raises(InvalidMonitor, match=r"team-a/vms .*is a regular file, not a directory"):
        open_socket(root, "team-a", "vms/qmp.sock")


@pytest.mark.parametrize(
    ("namespace", "path", "missing"),
    [
        ("team-a", "qmp.sock", r"no team-a/qmp\.sock "),
        ("team-a", "vms/web-1/qmp.sock", "no team-a/vms "),
        ("team-z", "qmp.sock", "no team-z "),
    ],
)
def test_what_is_missing_is_unreachable_and_its_first_missing_part_named(
    root: Path, namespace: str, path: str, missing: str
) -> None:
    with pytest.raises(MonitorUnreachable, match=missing):
        open_socket(root, namespace, path)


def test_a_missing_socket_root_is_unreachable_and_named(root: Path) -> None:
    with pytest.raises(MonitorUnreachable, match=f"socket root {root}/none "):
        open_socket(root / "none", "team-a", "qmp.sock")


def test_a_folder_that_may_not_be_entered_is_unreachable_with_a_remedy(root: Path) -> None:
    vms = root / "team-a" / "vms"
    vms.mkdir()
    root.chmod(0o755)
    with listening(vms / "qmp.sock"):
        vms.chmod(0)
        with unprivileged(), pytest.raises(MonitorUnreachable, match=r"may not be opened: give the operator's user"):
            open_socket(root, "team-a", "vms/qmp.sock")
        vms.chmod(0o755)


def test_a_socket_swapped_for_a_link_after_it_was_opened_does_not_change_where_the_connection_goes(root: Path) -> None:
    mine, theirs = root / "team-a" / "qmp.sock", root / "team-b" / "qmp.sock"
    with listening(mine) as my_listener, listening(theirs) as their_listener:
        with open_socket(root, "team-a", "qmp.sock") as endpoint:
            mine.unlink()
            mine.symlink_to(theirs)
            endpoint.connect().close()
        assert reached(my_listener)
        assert not reached(their_listener)


def test_a_folder_swapped_for_a_link_after_it_was_opened_does_not_change_where_the_connection_goes(root: Path) -> None:
    mine, theirs = root / "team-a" / "vms" / "qmp.sock", root / "team-b" / "qmp.sock"
    mine.parent.mkdir()
    with listening(mine) as my_listener, listening(theirs) as their_listener:
        with open_socket(root, "team-a", "vms/qmp.sock") as endpoint:
            mine.parent.rename(root / "team-a" / "aside")
            mine.parent.symlink_to(root / "team-b")
            endpoint.connect().close()
        assert reached(my_listener)
        assert not reached(their_listener)


def test_when_the_opened_socket_has_died_the_connection_fails_and_reaches_nobody_else(root: Path) -> None:
    mine, theirs = root / "team-a" / "qmp.sock", root / "team-b" / "qmp.sock"
    with listening(theirs) as their_listener:
        with listening(mine):
            endpoint = open_socket(root, "team-a", "qmp.sock")
        with endpoint:
            mine.unlink()
            theirs.rename(mine)
            with pytest.raises(ConnectionRefusedError):
                endpoint.connect()
        assert not reached(their_listener)


def test_swapping_folder_and_link_all_the_time_never_leads_to_the_other_namespace(root: Path) -> None:
    folder, aside = root / "team-a" / "vms", root / "team-a" / "aside"
    folder.mkdir()
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            folder.rename(aside)
            folder.symlink_to(root / "team-b")
            folder.unlink()
            aside.rename(folder)

    outcomes = dict.fromkeys(("mine", "link", "nothing"), 0)
    with listening(folder / "qmp.sock"), listening(root / "team-b" / "qmp.sock"):
        mine = (folder / "qmp.sock").stat().st_ino
        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            # Chance decides how many of so many attempts find the folder: six or eight hundred.
            deadline = time.monotonic() + 60
            while sum(outcomes.values()) < 3000 or not (outcomes["mine"] and outcomes["link"]):
                assert time.monotonic() < deadline, outcomes
                try:
                    with open_socket(root, "team-a", "vms/qmp.sock") as endpoint:
                        assert endpoint.identity[1] == mine
                        outcomes["mine"] += 1
                except InvalidMonitor:
                    outcomes["link"] += 1
                except MonitorUnreachable:
                    outcomes["nothing"] += 1
        finally:
            stop.set()
            swapper.join()


@pytest.mark.parametrize("seconds", [300_000_000_000, -100_000_000_000])
def test_a_socket_whose_owner_has_set_it_to_an_impossible_time_is_of_no_known_age(
    root: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """A tmpfs keeps such times; where the tests run, the file system may not."""
    path = root / "team-a" / "qmp.sock"
    fstat = os.fstat

    def dated(descriptor: int) -> os.stat_result:
        fields = list(fstat(descriptor))
        fields[stat.ST_MTIME] = seconds
        return os.stat_result(fields, {"st_mtime": float(seconds), "st_mtime_ns": seconds * 10**9})

    with listening(path):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", dated)
            endpoint = open_socket(root, "team-a", "qmp.sock")
        with endpoint:
            assert endpoint.made_at is None


def test_what_goes_stale_once_it_was_opened_is_unreachable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, when the server does not know it any more."""
    with listening(root / "team-a" / "qmp.sock"):

        def stale(_: int) -> os.stat_result:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", stale)
            with pytest.raises(MonitorUnreachable, match="cannot be examined: Stale"):
                open_socket(root, "team-a", "qmp.sock")


def test_a_path_longer_than_a_socket_address_can_be_connected_to(root: Path) -> None:
    below = Path(*["a-folder-with-a-rather-long-name"] * 8)
    path = root / "team-a" / below / "qmp.sock"
    path.parent.mkdir(parents=True)
    assert len(str(path)) > 250
    with listening(path) as listener, open_socket(root, "team-a", f"{below}/qmp.sock") as endpoint:
        endpoint.connect().close()
        assert reached(listener)


def test_a_hard_link_has_the_identity_of_the_socket_that_it_names(root: Path) -> None:
    with listening(root / "team-a" / "qmp.sock"):
        os.link(root / "team-a" / "qmp.sock", root / "team-b" / "link.sock")
        with open_socket(root, "team-a", "qmp.sock") as one, open_socket(root, "team-b", "link.sock") as other:
            assert one.identity == other.identity


def test_a_listener_with_a_full_queue_is_reported_at_once_and_not_taken_for_a_connection(root: Path) -> None:
    with (
        listening(root / "team-a" / "qmp.sock", backlog=0),
        open_socket(root, "team-a", "qmp.sock") as endpoint,
        endpoint.connect(),
        pytest.raises(BlockingIOError),
    ):
        endpoint.connect()


def test_an_endpoint_can_be_closed_twice_and_not_used_after_that(root: Path) -> None:
    with listening(root / "team-a" / "qmp.sock"):
        endpoint = open_socket(root, "team-a", "qmp.sock")
        endpoint.close()
        endpoint.close()
        with pytest.raises(OSError, match="has been closed"):
            endpoint.connect()


def test_an_endpoint_that_is_forgotten_warns_and_gives_its_descriptor_back(root: Path) -> None:
    def forget() -> None:
        endpoint = open_socket(root, "team-a", "qmp.sock")
        assert isinstance(endpoint, UnixEndpoint)

    with listening(root / "team-a" / "qmp.sock"), pytest.warns(ResourceWarning, match="was never closed"):
        forget()


@pytest.mark.parametrize(
    ("one", "other"),
    [("vm.example.org", "VM.Example.Org."), ("::1", "0:0:0:0:0:0:0:1"), ("FE80::1", "fe80::0001")],
)
def test_spellings_of_one_host_are_one_monitor(one: str, other: str) -> None:
    assert TCPEndpoint(one, 4444).identity == TCPEndpoint(other, 4444).identity


def test_another_port_is_another_monitor_and_an_ipv6_address_is_shown_in_brackets() -> None:
    assert TCPEndpoint("::1", 4444).identity != TCPEndpoint("::1", 4445).identity
    assert str(TCPEndpoint("::1", 4444)) == "[::1]:4444"
