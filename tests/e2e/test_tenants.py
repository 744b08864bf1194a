"""Attacks by an author of VCPUSets on what is not theirs: sockets, TCP servers and Secrets of others.

The schema refuses most of what is tried here. That is convenient, and no fence: an administrator may have installed an
older one. So the API server of this module takes anything, and the operator stands alone.

What is attacked are traps: sockets that nobody may connect to, whatever the attempt. What a link, a file of another
kind or a race on a legal path does is in test_paths.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from e2e.tlsworld import ACCOUNT
from harness.audit import AuditEvent
from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.expect import READY, STALLED, shows
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.pki import Authority
from harness.race import again_and_again
from harness.wait import until
from harness.world import User

CHECKS: Final = {
    "x-kubernetes-validations",
    "pattern",
    "format",
    "maxLength",
    "minLength",
    "minimum",
    "maximum",
    "enum",
}
"""What a schema checks beside the types."""

EVERYTHING: Final = ("--allow-tcp=0.0.0.0/0", "--allow-tcp=::/0")
"""As far as an administrator can go without naming the special ranges."""


def unchecked(schema: Any) -> Any:  # noqa: ANN401 - JSON
    """A schema that has the types only. Names below `properties` are fields, whatever they are called."""
    if isinstance(schema, list):
        return [unchecked(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: unchecked(value) for key, value in schema.items() if key not in {*CHECKS, "properties", "required"}}
    if "properties" in schema:
        kept["properties"] = {name: unchecked(value) for name, value in schema["properties"].items()}
    return kept


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def control_plane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ControlPlane]:
    """An API server that accepts every VCPUSet whose fields have the right types."""
    crd = yaml.safe_load((REPOSITORY / "crds" / "vcpusets.yaml").read_text())
    for version in crd["spec"]["versions"]:
        fields = version["schema"]["openAPIV3Schema"]["properties"]
        fields["spec"] = unchecked(fields["spec"])
    folder = tmp_path_factory.mktemp("unchecked")
    (folder / "vcpusets.yaml").write_text(yaml.safe_dump(crd))
    async with ControlPlane() as running:
        await running.install_crd(folder)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, account: Path, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks every two seconds, and may do more than it should.

    It may read the Secrets of all namespaces, and connect everywhere but where nobody may by default.
    """
    binding = ("clusterrolebinding", "everything", "--clusterrole=vcpuset-monitor-credentials")
    await control_plane.kubectl("create", *binding, "--serviceaccount=vcpuset-system:vcpuset-controller")
    flags = ("--resync-seconds=2", *EVERYTHING)
    async with OperatorProcess(control_plane, *flags, socket_root=socket_root, kubeconfig=account) as running:
        yield running


class Trap:
    """A listening socket of somebody else."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        listener.setblocking(False)

    def require_untouched(self) -> None:
        """Fail if anybody has ever connected."""
        with contextlib.suppress(BlockingIOError):
            self._listener.accept()
            pytest.fail("somebody has connected to a socket that is not theirs")


@pytest.fixture
async def victim(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[Path]:
    """The folder of another namespace, with a trap `vm.sock` in it."""
    folder = socket_root / await control_plane.namespace("victim")
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "vm.sock"))
        listener.listen()
        yield folder
        Trap(listener).require_untouched()


ESCAPES: Final = [
    "../{victim}/vm.sock",
    "./../{victim}/vm.sock",
    "run/../../{victim}/vm.sock",
    "../{own}/../{victim}/vm.sock",
    "../../{root}/{victim}/vm.sock",
    "{path}",
    "//{path}",
    "..",
    "run/..",
    "",
    "vm.sock/",
    "../{victim}//vm.sock",
    "..\0/{victim}/vm.sock",
]
"""Paths that leave the folder, or would for a reader who is less strict."""


@pytest.mark.parametrize("escape", ESCAPES)
async def test_a_path_out_of_the_folder_leads_to_nobody(
    folder: Path, operator: OperatorProcess, user: User, victim: Path, socket_root: Path, escape: str
) -> None:
    (folder / "run").mkdir()
    path = escape.format(victim=victim.name, own=folder.name, root=socket_root.name, path=victim / "vm.sock")
    await user.create("vm", 3, Path("x"))  # `create` would take an empty path for none
    await user.change("vm", monitor={"unix": {"path": path}})
    await shows(user, "vm", "InvalidMonitor", STALLED, "spec.monitor.unix.path", vcpus=None)


@pytest.mark.parametrize("escape", ESCAPES)
async def test_a_path_out_of_the_folder_leads_to_nobody_s_guest_either(
    folder: Path, operator: OperatorProcess, user: User, victim: Path, socket_root: Path, escape: str
) -> None:
    (folder / "run").mkdir()
    path = escape.format(victim=victim.name, own=folder.name, root=socket_root.name, path=victim / "vm.sock")
    await agent_is_refused(folder, user, path, "spec.guestAgent.unix.path")


async def agent_is_refused(folder: Path, user: User, path: str, *words: str) -> None:
    """The machine itself is served; of its agent the set says that it cannot be reached, and why."""
    async with FaultyMonitor(folder / "own.sock", cpus=2):
        await user.create("vm", 2, "own.sock", guestAgent={"unix": {"path": path}, "bringOnline": True})
        seen = await user.wait(
            "vm",
            lambda seen: seen.condition("GuestAgentConnected").get("reason") == "Unreachable",
            "the agent is unreachable",
        )
        assert all(word in seen.condition("GuestAgentConnected")["message"] for word in words)
        await shows(user, "vm", "Converged", READY, vcpus=2)


@pytest.mark.parametrize("plant", ["link", "linked folder", "fifo", "device", "folder"])
async def test_what_is_no_socket_of_the_namespace_s_own_is_no_guest_s(
    folder: Path, operator: OperatorProcess, user: User, victim: Path, plant: str
) -> None:
    path, words = "ga.sock", "not a socket"
    match plant:
        case "link":
            (folder / path).symlink_to(victim / "vm.sock")
        case "linked folder":
            (folder / "run").symlink_to(victim)
            path, words = "run/vm.sock", "not a directory"
        case "fifo":
            os.mkfifo(folder / path)
        case "device":
            make_device(folder / path)
        case "folder":
            (folder / path).mkdir()
        case _:
            raise AssertionError(plant)
    await agent_is_refused(folder, user, path, words)


async def test_a_device_in_the_folder_is_not_opened(folder: Path, operator: OperatorProcess, user: User) -> None:
    make_device(folder / "vm.sock")
    await user.create("vm", 2)
    await shows(user, "vm", "InvalidMonitor", STALLED, "is a character device, not a socket", vcpus=None)


def make_device(path: Path) -> None:
    """A terminal: one that is opened can take a process's signals."""
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(5, 0))
    except PermissionError:
        pytest.skip("only root can make devices")


async def test_a_socket_that_becomes_something_else_between_two_looks_is_let_go(
    folder: Path, operator: OperatorProcess, user: User, victim: Path
) -> None:
    async with FaultyMonitor(folder / "own.sock", cpus=2) as own:
        (folder / "own.sock").rename(folder / "vm.sock")
        await user.create("vm", 2)
        await user.wait_ready("vm")
        (folder / "vm.sock").rename(folder / "aside")
        (folder / "vm.sock").mkdir()
        await shows(user, "vm", "InvalidMonitor", STALLED, "is a directory, not a socket", vcpus=2)
        (folder / "vm.sock").rmdir()
        (folder / "vm.sock").symlink_to(victim / "vm.sock")
        await shows(user, "vm", "InvalidMonitor", STALLED, "is a symbolic link, not a socket", vcpus=2)
        (folder / "vm.sock").unlink()
        seen = own.connections
        (folder / "aside").rename(folder / "vm.sock")
        await user.wait_ready("vm")
        assert own.connections == seen + 1, "the one from before was given up"
        (folder / "vm.sock").unlink()


async def test_a_socket_that_is_swapped_for_a_link_all_the_time_leads_to_nobody_else(
    folder: Path, operator: OperatorProcess, user: User, victim: Path
) -> None:
    async with FaultyMonitor(folder / "own.sock", cpus=2) as own:
        (folder / "own.sock").rename(folder / "vm.sock")
        (folder / "link").symlink_to(victim / "vm.sock")
        await user.create("vm", 2, connection="OnDemand")
        await user.wait_ready("vm")
        with swapping(folder / "vm.sock", folder / "link", folder / "aside") as swaps:
            begun, looks = swaps(), own.connections
            for _ in range(60):
                await user.touch("vm")
                await user.get("vm")
            await until(lambda: swaps() - begun > 1000 and own.connections > looks, 60, "a thousand swaps")
        await user.touch("vm")
        await user.wait_ready("vm")
        (folder / "vm.sock").unlink()


@contextmanager
def swapping(one: Path, other: Path, aside: Path) -> Iterator[Callable[[], int]]:
    """Exchange two names in a tight loop; yields how often that was done. They stand as before in the end."""

    def swap() -> None:
        for _ in range(2):
            one.rename(aside)
            other.rename(one)
            aside.rename(other)

    with again_and_again(swap) as done:
        yield done


@pytest.fixture
def local_server() -> Iterator[int]:
    """A trap on every address of this host, as a port: what a service beside the operator is."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        yield listener.getsockname()[1]
        Trap(listener).require_untouched()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.255.255.254",
        "2130706433",
        "0x7f000001",
        "0x7F.1",
        "0177.0.0.1",
        "017700000001",
        "localhost",
        "LOCALHOST",
        "0.0.0.0",  # noqa: S104 - nothing listens here
        "0",
        "::",
        "::1",
        "0:0:0:0:0:0:0:1",
        "::ffff:127.0.0.1",
        "::FFFF:7f00:1",
        "::ffff:0:0",
        "64:ff9b::127.0.0.1",
        "64:ff9b:1::7f00:1",
        "2002:7f00:1::",
        "fe80::1%lo",
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "ff02::1%lo",
        "224.0.0.1",
        "255.255.255.255",
    ],
)
async def test_no_spelling_of_an_address_of_this_host_or_link_is_connected_to(
    operator: OperatorProcess, user: User, local_server: int, host: str
) -> None:
    await user.create("vm", 2, (host, local_server))
    seen = await shows(user, "vm", "InvalidMonitor", STALLED, "spec.monitor.tcp", vcpus=None)
    assert "--allow-tcp" in seen.message


@pytest.mark.parametrize(
    "host", ["localhost.", "[::1]", "127.0.0.1 ", "127.0.0.1\0.example", "//127.0.0.1", "user@localhost", ""]
)
async def test_what_a_resolver_may_take_for_this_host_is_not_connected_to(
    operator: OperatorProcess, user: User, local_server: int, host: str
) -> None:
    await user.create("vm", 2, (host, local_server))
    seen = await user.wait("vm", lambda seen: seen.reason not in (None, "Plugging"), "a reason")
    assert seen.reason in {"InvalidMonitor", "MonitorUnreachable"}
    assert "spec.monitor.tcp" in seen.message


@pytest.mark.parametrize(
    "monitor",
    [
        pytest.param({"tcp": {"host": "192.0.2.1", "port": 1}}, id="plain-text-without-consent"),
        pytest.param({"tcp": {"host": "192.0.2.1", "port": 1, "insecure": False}}, id="plain-text-against-consent"),
        pytest.param(
            {"unix": {"path": "vm.sock"}, "tcp": {"host": "192.0.2.1", "port": 1, "insecure": True}}, id="two-monitors"
        ),
        pytest.param({}, id="no-monitor"),
    ],
)
async def test_a_monitor_that_is_not_one_is_an_unsupported_spec(
    operator: OperatorProcess, user: User, monitor: Mapping[str, Any]
) -> None:
    body = {
        "apiVersion": "vcpuset.dev/v1alpha1",
        "kind": "VCPUSet",
        "metadata": {"name": "vm"},
        "spec": {"vcpus": 2, "monitor": monitor},
    }
    path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{user.namespace}/vcpusets"
    assert (await user.control_plane.request("POST", path, body)).status == 201
    await shows(user, "vm", "UnsupportedSpec", STALLED, "spec.monitor", vcpus=None)


@pytest.mark.parametrize(
    "name",
    [
        "../../{victim}/secrets/monitor",
        "../../../namespaces/{victim}/secrets/monitor",
        "..%2F..%2F{victim}%2Fsecrets%2Fmonitor",
        "%2e%2e/%2e%2e/{victim}/secrets/monitor",
        "{victim}/monitor",
        "monitor/../../../{victim}/secrets/monitor",
        "monitor?watch=true",
        "monitor#",
        "?fieldSelector=metadata.name%3Dmonitor",
        "monitor\n",
        "monitor\0",
        "MONITOR",
        "\uff0e\uff0e",
        "..",
        ".",
        "",
    ],
)
async def test_a_name_that_is_no_secret_s_name_is_asked_for_nowhere(
    control_plane: ControlPlane, operator: OperatorProcess, user: User, name: str
) -> None:
    victim = await control_plane.namespace("victim")
    path = f"/api/v1/namespaces/{victim}/secrets"
    assert (await control_plane.request("POST", path, Authority().client().secret("monitor"))).status == 201
    since = control_plane.audit_offset()
    # A port on which nobody listens: the credentials are asked for before anybody could.
    monitor = {"host": "198.51.100.1", "port": 4444, "tls": {"secretName": name.format(victim=victim)}}
    await user.create("vm", 2, monitor)
    await shows(user, "vm", "CredentialsUnavailable", STALLED, "is not a valid Secret name", vcpus=None)

    def records() -> list[AuditEvent]:
        return [each for each in control_plane.audit_events(since) if each.user == ACCOUNT]

    # What was asked for before the status was written has its record before that.
    await until(
        lambda: any(each.namespace == user.namespace and each.verb == "patch" for each in records()), 60, "the record"
    )
    assert not [each for each in records() if "secrets" in each.request_uri or victim in each.request_uri]
