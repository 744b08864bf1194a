"""`vcpuset apply` on real machines: the operator's own reconciliation, without a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.guest import Guest
from harness.monitortls import MonitorTLS
from harness.pki import Authority
from harness.processes import Child
from harness.qmp import raw
from harness.saved import saved_guest
from harness.wait import until
from qmp.commandline import manifest, vcpuset

__all__: list[str] = []

PLENTY = ("--timeout", "300")

Records = Callable[[], list[Path]]


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Looks for records of unplug requests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return lambda: list((tmp_path / "state" / "vcpuset").glob("*"))


async def applied(root: Path, text: str, *arguments: object, status: int = 0) -> dict[str, Any]:
    """The set with its status after `vcpuset apply`."""
    words = ["apply", "-f", "-", "--socket-root", root, "-o", "yaml", *(arguments or PLENTY)]
    result = await vcpuset(*words, text=text, status=status)
    found: dict[str, Any] = yaml.safe_load(result.stdout)
    return found


def reason(document: dict[str, Any]) -> str:
    return str(document["status"]["conditions"][0]["reason"])


async def test_missing_vcpus_are_plugged_and_the_status_is_that_of_the_operator(q35: Guest, records: Records) -> None:
    root = q35.monitors[0].parent.parent
    result = await vcpuset("apply", "-f", "-", "--socket-root", root, *PLENTY, text=manifest(5))
    # On a busy host, a line of its own reports that it is plugging.
    assert result.output.splitlines()[-1] == "VCPUSet team-a/web: Converged: QEMU has 5 vCPUs, as declared."
    found = await applied(root, manifest(5))
    assert (found["kind"], found["metadata"]["name"], found["spec"]["vcpus"]) == ("VCPUSet", "web", 5)
    assert (found["status"]["vcpus"], found["status"]["machine"]["maxVCPUs"]) == (5, 64)
    assert reason(found) == "Converged"
    async with raw(q35.control) as client:
        assert await client.count() == 5
    assert records() == []


async def test_a_manifest_without_a_count_gets_that_of_the_machine(q35: Guest) -> None:
    root = q35.monitors[0].parent.parent
    found = await applied(root, manifest(5).replace("vcpus: 5, ", ""))
    assert (found["spec"]["vcpus"], reason(found)) == (2, "Converged")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (manifest(65), "InsufficientSlots. Declare at most status.machine.maxVCPUs"),
        (manifest(1, spec="unplug: {policy: Disabled}"), "UnplugDisabled. Declare at least status.vcpus"),
        (manifest(3, spec="suspend: true"), "Suspended. Set spec.suspend to false."),
    ],
    ids=["too-many", "too-few", "suspended"],
)
async def test_what_cannot_be_ends_with_1_and_the_remedy(q35: Guest, text: str, why: str) -> None:
    root = q35.monitors[0].parent.parent
    result = await vcpuset("apply", "-f", "-", "--socket-root", root, "--wait", *PLENTY, text=text, status=1)
    assert result.stderr.startswith(f"Error: VCPUSet team-a/web: {why}")


async def test_a_machine_that_is_not_there_yet_ends_with_3_or_is_waited_for(
    namespace_folder: Path, tmp_path: Path
) -> None:
    root = namespace_folder.parent
    for arguments, when in (((), "yet"), (("--wait", "--timeout", "0.5"), "within 0.5 s")):
        failed = await vcpuset(
            "apply", "-f", "-", "--socket-root", root, *(arguments or PLENTY), text=manifest(3), status=3
        )
        assert f"not Ready {when}: MonitorUnreachable. Start QEMU" in failed.stderr
    with _process(root, tmp_path, manifest(3), "--wait", *PLENTY) as waiting:
        await until(lambda: "MonitorUnreachable" in waiting.log_tail(), 60, "the first look")
        async with Guest(None, smp="2,maxcpus=64", memory=64, socket_dir=namespace_folder) as guest:
            assert await waiting.wait(60) == 0
            async with raw(guest.control) as client:
                assert await client.count() == 3


async def test_where_another_client_has_the_monitor_the_operator_is_to_be_stopped(q35: Guest) -> None:
    root = q35.monitors[0].parent.parent
    async with raw(q35.monitors[0]):
        failed = await vcpuset("apply", "-f", "-", "--socket-root", root, *PLENTY, text=manifest(3), status=3)
    assert "MonitorBusy" in failed.stderr
    assert "stop the operator first" in failed.stderr


async def test_vcpus_are_unplugged_by_the_guest_and_its_requests_are_known_until_then(
    namespace_folder: Path, records: Records
) -> None:
    root = namespace_folder.parent
    async with saved_guest(smp="2,maxcpus=64", socket_dir=namespace_folder) as guest:
        async with raw(guest.control) as client:
            await client.call("stop")  # a paused guest answers nothing
        text = manifest(1, spec="unplug: {timeoutSeconds: 3600, retrySeconds: 3600}")
        sent = await vcpuset("apply", "-f", "-", "--socket-root", root, *PLENTY, text=text, status=3)
        assert "Unplugging: 2 vCPUs present, 1 declared; unplug of slot 1 requested" in sent.stdout
        assert "The guest may still carry out unplug requests; vcpuset plan shows them." in sent.stderr
        (record,) = records()

        async def planned() -> dict[str, Any]:
            result = await vcpuset("plan", "-f", "-", "--socket-root", root, "-o", "json", text=text)
            (found,) = json.loads(result.stdout)["items"]
            return dict(found)

        plan = await planned()
        assert plan["unplug"] == []  # the request is with the guest
        assert plan["notes"] == [f"The unplug requests are those of an earlier vcpuset apply, recorded in {record}."]
        shown = await vcpuset("inspect", guest.monitors[0], "-f", "-", "-o", "json", text=text)
        assert json.loads(shown.stdout)["slots"][1]["pendingUnplug"]["attempts"] == 1

        again = await applied(root, text, *PLENTY, status=3)
        assert again["status"]["unplug"]["requests"][0]["attempts"] == 1, "a request that is not due is not repeated"
        async with raw(guest.control) as client:
            await client.call("cont")
        done = await applied(root, text, "--wait", *PLENTY)
        assert (done["status"]["vcpus"], reason(done)) == (1, "Converged")
        await guest.wait_online(1)
        assert records() == []
        assert (await planned())["notes"] == []


async def test_a_refusal_for_longer_than_its_timeout_ends_with_1(namespace_folder: Path, records: Records) -> None:
    root = namespace_folder.parent
    async with saved_guest(smp="2,maxcpus=64", socket_dir=namespace_folder) as guest:
        await guest.hold_cpus(1)
        text = manifest(1, spec="unplug: {timeoutSeconds: 1}")
        failed = await vcpuset("apply", "-f", "-", "--socket-root", root, "--wait", *PLENTY, text=text, status=1)
        assert "Error: VCPUSet team-a/web: UnplugRefused. Stop what uses the CPUs" in failed.stderr
        # Another count is another generation: its time begins again.
        (record,) = records()
        before = json.loads(record.read_text())["metadata"]["generation"]
        again = await applied(root, manifest(2), "--wait", *PLENTY)
        assert (again["metadata"]["generation"], reason(again)) == (before + 1, "Converged")


async def test_ctrl_c_ends_it_in_good_order_and_the_open_request_is_recorded(
    namespace_folder: Path, records: Records, tmp_path: Path
) -> None:
    root = namespace_folder.parent
    async with saved_guest(smp="2,maxcpus=64", socket_dir=namespace_folder) as guest:
        await guest.hold_cpus(1)
        text = manifest(1, spec="unplug: {timeoutSeconds: 3600}")
        with _process(root, tmp_path, text, "--wait", *PLENTY) as waiting:
            await until(lambda: "UnplugRefused" in waiting.log_tail(), 60, "the refusal")
            waiting.signal(signal.SIGINT)
            assert await waiting.wait(60) == 130
            assert "Error: VCPUSet team-a/web: interrupted: UnplugRefused." in waiting.log_tail()
            assert "Traceback" not in waiting.log_tail()
        (record,) = records()
        (request,) = json.loads(record.read_text())["status"]["unplug"]["requests"]
        assert (request["slot"], request["answer"]) == (1, "Busy")
        async with raw(guest.monitors[0]) as client:  # it is free again
            assert await client.count() == 2


async def test_a_request_that_cannot_be_recorded_is_not_sent(
    namespace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = namespace_folder.parent
    async with saved_guest(smp="2,maxcpus=64", socket_dir=namespace_folder) as guest:
        monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
        failed = await vcpuset("apply", "-f", "-", "--socket-root", root, *PLENTY, text=manifest(1), status=1)
        assert "/proc/nowhere/vcpuset/team-a.web.json cannot be written" in failed.stderr
        assert "XDG_STATE_HOME" in failed.stderr
        async with raw(guest.control) as client:
            assert await client.count() == 2
            assert all(each["source"] == 0 for each in await client.call("query-acpi-ospm-status"))


async def test_ready_waits_for_the_guest_s_agent_which_brings_vcpus_online(namespace_folder: Path) -> None:
    root = namespace_folder.parent
    agent = namespace_folder / "agent"
    async with saved_guest(
        smp="1,maxcpus=64", agent=True, append="online=none", agent_path=agent, socket_dir=namespace_folder
    ) as guest:
        spec = "guestAgent: {unix: {path: agent}, bringOnline: true}"
        found = await applied(root, manifest(3, spec=spec), "--wait", *PLENTY)
        assert (found["status"]["onlineVCPUs"], reason(found)) == (3, "Converged")
        await guest.wait_online(3)


async def test_a_monitor_on_tls_takes_a_folder_of_credentials(tmp_path: Path) -> None:
    authority = Authority()
    client = authority.client()
    own = tmp_path / "credentials"
    own.mkdir()
    for name, content in client.data().items():
        (own / name).write_bytes(content)
    tls = MonitorTLS(authority.server("vm.example").write(tmp_path / "qemu"), client.name)
    async with Guest(None, smp="2,maxcpus=8", memory=64, tls=tls) as guest:
        host, port = guest.tcp_address
        address = f"tcp: {{host: {host}, port: {port}, tls: {{secretName: monitor, serverName: vm.example}}}}"
        text = manifest(3).replace("unix: {path: qmp0}", address)
        failed = await vcpuset("apply", "-f", "-", *PLENTY, text=text, status=1)
        assert "apply reads no Secrets" in failed.stdout
        done = await vcpuset("apply", "-f", "-", "--tls-credentials", own, *PLENTY, text=text)
        assert "Converged" in done.stdout


@contextlib.contextmanager
def _process(root: Path, folder: Path, text: str, *arguments: str) -> Iterator[Child]:
    """`vcpuset apply` as a process of its own, which can be sent a signal."""
    file = folder / "web.yaml"
    file.write_text(text)
    words = ["apply", "-f", str(file), "--socket-root", str(root), *arguments]
    argv = [sys.executable, "-u", "-m", "vcpuset.cli.main", *words]
    child = Child.start(argv, name="vcpuset apply", log=folder / "log", env=dict(os.environ))
    try:
        yield child
    finally:
        child.kill()
