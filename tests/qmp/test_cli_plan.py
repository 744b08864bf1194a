"""`vcpuset plan` on real machines: it tells what a pass would do, and changes nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.acpi import Acpi
from harness.faults import Hang
from harness.faulty import GREETING, FaultyMonitor
from harness.guest import Guest
from harness.monitortls import MonitorTLS
from harness.pki import Authority
from harness.qmp import Raw, raw
from harness.saved import saved_guest
from harness.wait import until
from qmp.commandline import manifest, vcpuset

__all__: list[str] = []


async def plans(root: Path, text: str, *arguments: object, status: int = 0) -> list[dict[str, Any]]:
    """What is planned for each manifest of a text."""
    result = await vcpuset("plan", "-f", "-", "--socket-root", root, "-o", "json", *arguments, text=text, status=status)
    items: list[dict[str, Any]] = json.loads(result.stdout)["items"]
    return items


async def planned(root: Path, text: str, *arguments: object, status: int = 0) -> dict[str, Any]:
    (found,) = await plans(root, text, *arguments, status=status)
    return found


def in_the_way(found: dict[str, Any]) -> list[str]:
    return [each["reason"] for each in found["blockers"]]


@pytest.fixture
async def control(q35: Guest) -> AsyncIterator[Raw]:
    async with raw(q35.control) as client:
        yield client


async def test_a_plug_is_reported_with_its_slots_and_is_not_done(q35: Guest, control: Raw) -> None:
    root = q35.monitors[0].parent.parent
    before = await control.slots()
    found = await planned(root, manifest(5))

    assert found["plug"] == [{"slot": slot} for slot in (2, 3, 4)]
    assert found["standby"] == list(range(5, 64))
    assert (found["desiredVCPUs"], found["reachableVCPUs"]) == (5, 5)
    assert (found["status"]["reason"], found["expected"]["reason"]) == ("Plugging", "Converged")
    assert found["blockers"] == []
    assert await control.slots() == before


async def test_the_count_that_is_adopted_is_told_and_not_written(q35: Guest, control: Raw) -> None:
    root = q35.monitors[0].parent.parent
    text = manifest(5).replace("vcpus: 5, ", "")
    before = await control.count()
    found = await planned(root, text)

    assert (found["desiredVCPUs"], found["adopt"], found["plug"], found["blockers"]) == (None, before, [], [])
    assert (found["status"]["reason"], found["expected"]["reason"]) == ("Adopting", "Converged")
    page = (await vcpuset("plan", "-f", "-", "--socket-root", root, text=text)).stdout
    assert "Desired:   not set\n" in page
    assert f"Actions:   set spec.vcpus to {before}\n" in page


def credentials(folder: Path) -> tuple[Path, MonitorTLS]:
    """A folder with the client's, and the monitor of a server `vm.example` that lets that client in."""
    authority = Authority()
    client = authority.client()
    own = folder / "credentials"
    own.mkdir()
    for name, text in client.data().items():
        (own / name).write_bytes(text)
    return own, MonitorTLS(authority.server("vm.example").write(folder / "qemu"), client.name)


async def test_a_set_with_a_monitor_on_tls_takes_a_folder_of_credentials(tmp_path: Path) -> None:
    folder, made = credentials(tmp_path)
    async with Guest(None, smp="2,maxcpus=8", memory=64, tls=made) as guest:
        host, port = guest.tcp_address
        declared = manifest(3).replace(
            "unix: {path: qmp0}",
            f"tcp: {{host: {host}, port: {port}, tls: {{secretName: monitor, serverName: vm.example}}}}",
        )
        found = await planned(tmp_path, declared, status=1)
        assert in_the_way(found) == ["CredentialsUnavailable"]
        assert "plan reads no Secrets" in found["blockers"][0]["message"]
        assert "--tls-credentials" in found["blockers"][0]["message"]
        for way in ((), ("--monitor", f"{host}:{port}")):
            found = await planned(tmp_path, declared, "--tls-credentials", folder, *way)
            assert found["plug"] == [{"slot": 2}]
        (folder / "tls.key").unlink()
        failed = await vcpuset("plan", "-f", "-", "--tls-credentials", folder, text=declared, status=1)
        assert f"Error: {folder} has no tls.key" in failed.stderr


@pytest.mark.parametrize("declared", ["", ", serverName: vm.example"], ids=["host", "serverName"])
async def test_another_monitor_on_tls_is_taken_for_the_set_s_machine_unless_told_otherwise(
    tmp_path: Path, declared: str
) -> None:
    folder, made = credentials(tmp_path)
    async with Guest(None, smp="2,maxcpus=8", memory=64, tls=made) as guest:
        host, port = guest.tcp_address
        options = ("--tls-credentials", folder, "--monitor", f"{host}:{port}")
        its_host = "other.example" if declared else "vm.example."
        of_set = f"tcp: {{host: {its_host}, port: 4444, tls: {{secretName: monitor{declared}}}}}"
        found = await planned(tmp_path, manifest(3).replace("unix: {path: qmp0}", of_set), *options)
        assert found["plug"] == [{"slot": 2}]

        of_another = "tcp: {host: vm.test, port: 4444, tls: {secretName: monitor}}"
        another = manifest(3).replace("unix: {path: qmp0}", of_another)
        found = await planned(tmp_path, another, *options, status=1)
        assert in_the_way(found) == ["CredentialsUnavailable"]
        assert "is not for vm.test but for vm.example" in found["blockers"][0]["message"]
        assert "(--tls-server-name)" in found["blockers"][0]["message"]
        found = await planned(tmp_path, another, *options, "--tls-server-name", "vm.example")
        assert found["plug"] == [{"slot": 2}]


@pytest.mark.parametrize("left", [("--monitor", "host:1"), ("--tls-credentials", "."), ()])
async def test_a_server_name_without_the_monitor_that_it_is_for_is_refused(left: tuple[str, ...]) -> None:
    result = await vcpuset("plan", "-f", "-", "--tls-server-name", "vm", *left, text=manifest(3), status=2)
    assert "--tls-server-name requires --monitor and --tls-credentials" in result.stderr


async def test_an_unplug_is_told_in_its_order_and_nobody_is_asked(q35: Guest, control: Raw) -> None:
    root = q35.monitors[0].parent.parent
    acpi = Acpi(control)
    await acpi.leave_legacy()
    for slot in (2, 4):
        await control.device_add(slot)
        await acpi.insert(slot)
    found = await planned(root, manifest(2))

    assert [each["slot"] for each in found["unplug"]] == [4, 2]
    assert found["standby"] == [1]
    assert found["status"]["reason"] == "Unplugging"
    assert [each["status"] for each in found["status"]["conditions"]] == ["False", "True", "False"]
    assert in_the_way(found) == ["UnplugPending"], "QEMU is paused"
    for slot in (1, 2, 4):
        assert not (await acpi.flags(slot)).removing

    shown = (await vcpuset("plan", "-f", "-", "--socket-root", root, text=manifest(2))).stdout
    assert "Actions:   unplug slots 4, 2 (in this order)\nStandby:   slot 1\n" in shown


async def test_only_queries_are_sent_whatever_is_declared(namespace_folder: Path) -> None:
    async with FaultyMonitor(namespace_folder / "qmp0", cpus=4) as monitor:
        for vcpus in (1, 4, 8, 4096):
            await planned(namespace_folder.parent, manifest(vcpus))
        sent = {command.name for command in monitor.commands} - {"qmp_capabilities"}
        assert len(monitor.commands) >= 4 * 6
        assert all(name.startswith("query-") for name in sent)


async def test_everything_in_the_way_is_told_and_not_only_the_first(q35: Guest) -> None:
    spec = "suspend: true, unplug: {policy: Disabled, bootVCPUs: Keep}"
    found = await planned(q35.monitors[0].parent.parent, manifest(1, spec=spec))

    assert in_the_way(found) == ["Suspended", "UnplugDisabled", "BootVCPUsKept", "WaitingForGuest"]
    assert all(each["remedy"] for each in found["blockers"])
    assert found["status"]["reason"] == "Suspended"
    assert (found["plug"], found["unplug"], found["expected"]) == ([], [], None)


async def test_requests_in_the_status_are_not_made_again_before_their_time(q35: Guest, control: Raw) -> None:
    root = q35.monitors[0].parent.parent
    acpi = Acpi(control)
    await acpi.leave_legacy()
    for slot in (2, 3):
        await control.device_add(slot)
        await acpi.insert(slot)
    threads = {cpu["qom-path"]: cpu["thread-id"] for cpu in await control.call("query-cpus-fast")}

    def printed(seconds: int, **more: object) -> str:
        path = "/machine/peripheral/vcpu3"
        # QEMU's socket must be older than the request.
        at = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
        request = {"slot": 3, "path": path, "threadID": threads[path], "requestedAt": at, "attempts": 20}
        body = yaml.safe_load(manifest(3))
        body["spec"]["unplug"] = {"retrySeconds": 86400}
        return json.dumps({**body, "status": {"unplug": {"requests": [{**request, **more}]}}})

    waiting = await planned(root, printed(0))
    assert waiting["unplug"] == []
    assert "UnplugPending" in in_the_way(waiting)
    assert any("The request is repeated at" in each["message"] for each in waiting["blockers"])
    refused = await planned(root, printed(0, answer="InUse"))
    assert [each["slot"] for each in refused["unplug"]] == [2], "the next candidate"
    assert "UnplugRefused" in in_the_way(refused)
    older = await planned(root, printed(3600))
    assert [each["slot"] for each in older["unplug"]] == [3], "that was asked of an earlier QEMU"


async def test_a_guest_that_left_cpus_offline_is_told_or_what_is_done_about_it(namespace_folder: Path) -> None:
    async with saved_guest(
        agent=True,
        append="online=none",
        agent_path=namespace_folder / "agent",
        monitor_paths=[namespace_folder / "qmp0"],
    ) as guest:
        async with raw(guest.control) as client:
            await client.device_add(1)
        await until(lambda: len(guest.present()) == 2, 60, "the guest to know of a second CPU")
        agent = "guestAgent: {unix: {path: agent}, bringOnline: %s}"

        left = await planned(namespace_folder.parent, manifest(2, spec=agent % "false"))
        assert in_the_way(left) == ["GuestCPUsOffline"]
        assert left["guest"]["offlineCPUs"] == [1]
        assert "udev rule" in left["blockers"][0]["message"]
        assert left["status"]["conditions"][3]["type"] == "GuestAgentConnected"

        helped = await planned(namespace_folder.parent, manifest(2, spec=agent % "true"))
        assert (helped["bringOnline"], in_the_way(helped)) == ([1], [])
        assert helped["expected"]["reason"] == "Converged"
        assert len(guest.online()) == 1, "nothing was set online"

        missing = await planned(namespace_folder.parent, manifest(2, spec="guestAgent: {unix: {path: none}}"))
        assert in_the_way(missing) == ["Unreachable"]
        assert missing["status"]["reason"] == "Converged"


async def test_a_monitor_that_cannot_be_looked_at_ends_with_1_and_says_what_helps(namespace_folder: Path) -> None:
    root = namespace_folder.parent
    nothing = await planned(root, manifest(2), status=1)
    assert (nothing["machine"], nothing["status"]["reason"]) == (None, "MonitorUnreachable")
    (namespace_folder / "file").touch()
    assert in_the_way(await planned(root, manifest(2, "file", spec="suspend: true"), status=1)) == [
        "InvalidMonitor",
        "Suspended",
    ]
    outside = await planned(root, manifest(2, "../x"), status=1)
    assert "must not leave the namespace's directory" in outside["blockers"][0]["message"]

    result = await vcpuset("plan", "-f", "-", text=manifest(2), status=1)
    assert result.stderr.startswith("Error: VCPUSet team-a/web: ")
    assert "--socket-root" in result.stderr
    assert result.stderr.count("\n") == 1


async def test_a_busy_and_a_hanging_monitor_are_told_apart(namespace_folder: Path) -> None:
    root = namespace_folder.parent
    async with FaultyMonitor(namespace_folder / "qmp0", faults={GREETING: Hang()}) as monitor:
        for connection in ("Persistent", "OnDemand"):
            spec = f"monitor: {{unix: {{path: qmp0}}, connection: {connection}}}"
            text = manifest(2).replace("monitor: {unix: {path: qmp0}}", spec)
            busy = await planned(root, text, "--timeout", "2", status=1)
            assert in_the_way(busy) == ["MonitorBusy"]
            kept = connection == "Persistent"
            assert ("vcpuset plan --monitor" in busy["blockers"][0]["remedy"]) is kept
        another = await planned(root, manifest(2), "--monitor", str(monitor.path), "--timeout", "2", status=1)
        assert "vcpuset plan --monitor" not in another["blockers"][0]["remedy"]
        monitor.faults = {"query-status": Hang()}
        assert in_the_way(await planned(root, manifest(2), "--timeout", "2", status=1)) == ["MonitorTimeout"]


async def test_a_second_monitor_of_the_machine_can_be_looked_through(q35: Guest) -> None:
    async with raw(q35.monitors[0]):
        result = await vcpuset("plan", "-f", "-", "--monitor", q35.control, text=manifest(4))
    assert "plug slots 2, 3" in result.stdout
    assert f"Observed through {q35.control}" in result.stdout


async def test_of_two_sets_with_one_monitor_the_older_keeps_it(q35: Guest, tmp_path: Path) -> None:
    root = q35.monitors[0].parent.parent
    os.link(q35.monitors[0], q35.monitors[0].parent / "other-name")
    older = yaml.safe_load(manifest(4, "other-name", name="older"))
    older["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"

    younger, keeper = await plans(root, f"{manifest(3)}---\n{json.dumps(older)}")
    assert younger["status"]["reason"] == "MonitorConflict"
    assert "team-a/older" in younger["blockers"][0]["message"]
    assert younger["plug"] == []
    assert [each["slot"] for each in keeper["plug"]] == [2, 3]
    (tmp_path / "sets.yaml").write_text(f"{manifest(3)}---\n{manifest(4, name='db')}")
    first, second = await plans(root, "", "-f", tmp_path / "sets.yaml")
    assert (first["status"]["reason"], second["status"]["reason"]) == ("Plugging", "MonitorConflict")
    assert "by their order here" in second["notes"][0]
    other_node, _ = await plans(root, f"{manifest(3, spec='nodeName: node-7')}---\n{manifest(4)}")
    assert other_node["status"]["reason"] == "Plugging"
    assert "node-7" in other_node["notes"][0]


async def test_a_deleted_set_is_left_alone_and_its_monitor_is_the_next_one_s(q35: Guest) -> None:
    root = q35.monitors[0].parent.parent
    times = "creationTimestamp: 2026-01-01T00:00:00Z, deletionTimestamp: 2026-01-02T00:00:00Z"
    deleted = manifest(3).replace("namespace: team-a", f"namespace: team-a, {times}")
    first, second = await plans(root, f"{deleted}---\n{manifest(4, name='db')}")
    assert (first["status"]["reason"], second["status"]["reason"]) == ("Terminating", "Plugging")
    assert in_the_way(first) == ["Terminating"]


async def test_a_file_that_cannot_be_used_ends_with_1_and_a_line_for_each_thing_wrong(tmp_path: Path) -> None:
    path = tmp_path / "web.yaml"
    path.write_text(manifest(0, spec="suspended: true"))
    result = await vcpuset("plan", "-f", path, status=1)
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"Error: {path}: VCPUSet web: spec.suspended is not a field of VCPUSet. Did you mean spec.suspend?",
        f"Error: {path}: VCPUSet web: spec.vcpus is 0: declare from 1 to 4096.",
    ]
    path.write_bytes(b"\xff\xfe")
    assert "is not valid UTF-8" in (await vcpuset("plan", "-f", path, status=1)).stderr
    assert "No such file" in (await vcpuset("plan", "-f", tmp_path / "none", status=2)).stderr
    assert "Missing option '-f'" in (await vcpuset("plan", status=2)).stderr


async def test_a_machine_that_hangs_does_not_hang_the_command(q35: Guest) -> None:
    q35.freeze()
    try:
        found = await planned(q35.monitors[0].parent.parent, manifest(4), "--timeout", "2", status=1)
    finally:
        os.kill(q35.pid, signal.SIGCONT)
    assert in_the_way(found) == ["MonitorBusy"]


@pytest.mark.parametrize(
    ("options", "vcpus", "reasons", "plugged"),
    [
        pytest.param(
            {"qemu": "qemu-system-ppc64", "machine": "pseries", "smp": "4,threads=4,cores=4,maxcpus=16"},
            11,
            ["UnsupportedVCPUCount"],
            [1],
            id="whole-cores",
        ),
        pytest.param(
            {"qemu": "qemu-system-s390x", "machine": "s390-ccw-virtio", "smp": "2,maxcpus=4"},
            1,
            ["UnplugUnsupported"],
            [],
            id="plug-only",
        ),
        pytest.param({"machine": "microvm", "smp": "2"}, 3, ["HotplugUnsupported"], [], id="no-hotplug"),
        pytest.param({"machine": "none", "smp": "1"}, 2, ["HotplugUnsupported"], [], id="no-machine"),
        pytest.param({"machine": "x-remote", "smp": "1"}, 1, ["HotplugUnsupported"], [], id="no-cpus"),
    ],
)
async def test_what_a_machine_cannot_do_is_told(
    namespace_folder: Path, options: dict[str, Any], vcpus: int, reasons: list[str], plugged: list[int]
) -> None:
    cpu = "qemu64" if options["machine"] == "microvm" else None
    async with Guest(None, cpu=cpu, memory=256, socket_dir=namespace_folder, **options) as guest:
        found = await planned(namespace_folder.parent, manifest(vcpus))
        assert in_the_way(found) == reasons
        assert [each["slot"] for each in found["plug"]] == plugged
        shown = (await vcpuset("inspect", guest.monitors[0])).stdout
        assert f"{found['machine']['vcpus']} present" in shown
        assert "LAST _OST" not in shown


@pytest.mark.parametrize("smp", ["1,maxcpus=8", "2,maxcpus=8"])
async def test_a_machine_whose_cpus_share_one_thread_can_only_grow(namespace_folder: Path, smp: str) -> None:
    async with (
        Guest(None, smp=smp, extra=["-icount", "2"], socket_dir=namespace_folder) as guest,
        raw(guest.control) as control,
    ):
        assert in_the_way(await planned(namespace_folder.parent, manifest(3))) == []
        await control.device_add(2)
        await Acpi(control).leave_legacy()
        found = await planned(namespace_folder.parent, manifest(1))
        assert in_the_way(found) == ["UnplugUnsupported"]
        assert "all CPUs in one thread" in found["blockers"][0]["message"]
        assert "thread=multi" in found["blockers"][0]["message"]
        assert found["unplug"] == []


async def test_a_machine_that_is_not_made_yet_is_busy_until_it_is(namespace_folder: Path) -> None:
    root = namespace_folder.parent
    async with Guest(None, smp="2,maxcpus=8", extra=["-preconfig"], socket_dir=namespace_folder) as guest:
        found = await planned(root, manifest(3), status=1)
        assert in_the_way(found) == ["MachineBusy"]
        assert "x-exit-preconfig" in found["blockers"][0]["message"]
        async with raw(guest.control) as control:
            await control.call("x-exit-preconfig")
            assert in_the_way(await planned(root, manifest(3))) == ["MachineBusy"], "started with -S"
            await control.call("cont")
            await control.call("stop")
        assert (await planned(root, manifest(3)))["plug"] == [{"slot": 2}]
