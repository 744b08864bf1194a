"""`vcpuset inspect` on real machines: what it prints is what QEMU and the guest say, for people and for programs."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from harness.acpi import Acpi
from harness.faults import Hang
from harness.faulty import GREETING, FaultyMonitor
from harness.guest import Guest
from harness.monitortls import MonitorTLS
from harness.pki import Authority
from harness.qmp import raw
from harness.saved import saved_guest
from harness.wait import until
from qmp.commandline import manifest, vcpuset

__all__: list[str] = []


@pytest.fixture
async def worked_on(q35: Guest) -> Guest:
    """A machine whose "guest" has given slot 4 back, is at work on 3, and has refused 5 (of 0 to 5)."""
    async with raw(q35.control) as client:
        acpi = Acpi(client)
        await acpi.leave_legacy()
        for slot in (2, 3, 4, 5):
            await client.device_add(slot)
            await acpi.insert(slot)
        await client.device_del(5)
        await acpi.refuse(5, 0x81)
        await client.device_del(4)
        await acpi.eject(4)
        await client.device_del(3)
        await acpi.forget_removal(3)
        await acpi.ost(3, 3, 0x84)
    return q35


async def test_a_machine_is_printed_slot_by_slot(worked_on: Guest) -> None:
    lines = (await vcpuset("inspect", worked_on.monitors[0])).stdout.splitlines()

    table = [re.split(r"  +", line) for line in lines if re.match(r"\d", line)]
    assert [row[0] for row in table] == ["0", "1", "2", "3", "4", "5", "6-63"]
    assert [row[1] for row in table] == ["boot", "boot", "plugged", "plugged", "free", "plugged", "free"]
    assert table[3][2:] == [
        "/machine/peripheral/vcpu3", "core 3, thread 0, socket 0", "in progress", "in progress (_OST 0x84)",
    ]  # fmt: skip
    assert table[4][-1] == "unplugged (_OST 0x0)"
    assert table[5][-1] == "device in use (_OST 0x81)"
    assert table[6][3] == "core 6-63, thread 0, socket 0"
    assert "vCPUs:      5 present, 1 to 64 possible" in lines
    assert any(line.startswith("QEMU:       ") and line.endswith(", x86_64") for line in lines)


async def test_json_and_yaml_hold_the_same_and_all_that_qemu_shows(worked_on: Guest) -> None:
    path = worked_on.monitors[0]
    shown = json.loads((await vcpuset("inspect", path, "--output=json")).stdout)
    assert yaml.safe_load((await vcpuset("inspect", path, "-o", "yaml")).stdout) == shown

    async with raw(worked_on.control) as client:
        slots = await client.slots()
        threads = {cpu["qom-path"]: cpu["thread-id"] for cpu in await client.call("query-cpus-fast")}
        version = (await client.call("query-version"))["qemu"]
    assert shown["qemuVersion"].startswith("{major}.{minor}.{micro}".format(**version))
    assert shown["machine"] == {
        "arch": "x86_64",
        "runState": "paused",
        "changeable": True,
        "migrating": False,
        "uuid": None,
        "hotplug": True,
        "guestAcceptsUnplugs": True,
        "vcpus": 5,
        "minVCPUs": 1,
        "maxVCPUs": 64,
    }
    assert (shown["guest"], shown["vcpuset"]) == (None, None)
    for found, slot in zip(shown["slots"], slots, strict=True):
        held_by = slot.get("qom-path")
        assert (found["props"], found["driver"], found["vcpus"]) == (slot["props"], slot["type"], slot["vcpus-count"])
        assert (found["path"], found["threadID"]) == (held_by, threads.get(held_by))
        assert found["state"] == ("Free" if held_by is None else "Plugged" if "peripheral/" in held_by else "Boot")
        assert found["deviceID"] == (f"vcpu{found['slot']}" if found["state"] == "Plugged" else None)
        assert found["online"] is None
    assert shown["slots"][5]["ost"] == {
        "source": 3, "status": 0x81, "answer": "InUse", "words": "device in use (_OST 0x81)",
    }  # fmt: skip
    assert [slot["slot"] for slot in shown["slots"] if slot["unplugInProgress"]] == [3]


async def test_a_guest_that_has_not_booted_is_said_to_take_no_requests(q35: Guest) -> None:
    shown = await vcpuset("inspect", q35.monitors[0])
    assert "the guest does not accept requests" in shown.stdout


async def test_a_machine_is_found_by_link_by_prefix_and_by_tcp(namespace_folder: Path) -> None:
    async with Guest(None, memory=64, socket_dir=namespace_folder, tcp=True) as guest:
        link = namespace_folder / "link"
        link.symlink_to(guest.monitors[0])
        host, port = guest.tcp_address
        for monitor in (link, f"unix:{link},server=on,wait=off", f"{host}:{port}", f"tcp:{host}:{port}"):
            assert json.loads((await vcpuset("inspect", monitor, "-o", "json")).stdout)["machine"]["vcpus"] == 1


async def test_a_monitor_on_tls_takes_a_folder_of_credentials(tmp_path: Path) -> None:
    authority = Authority()
    folder = tmp_path / "credentials"
    folder.mkdir()
    options = ("--tls-credentials", folder)
    tls = MonitorTLS(authority.server("vm.example").write(tmp_path / "qemu"), authority.client().name)
    async with Guest(None, memory=64, tls=tls) as guest:
        monitor = "{}:{}".format(*guest.tcp_address)
        failed = await vcpuset("inspect", monitor, *options, status=1)
        assert f"Error: {folder} has no ca.crt and no tls.crt and no tls.key" in failed.stderr
        for name, text in authority.client().data().items():
            (folder / name).write_bytes(text)
        shown = await vcpuset("inspect", monitor, *options, "--tls-server-name", "vm.example", "-o", "json")
        assert json.loads(shown.stdout)["machine"]["vcpus"] == 1
        failed = await vcpuset("inspect", monitor, *options, status=1)
        assert "is not for 127.0.0.1 but for vm.example: set spec.monitor.tcp.tls.serverName" in failed.stderr
        assert "(--tls-server-name)" in failed.stderr
        (folder / "tls.key").unlink()
        (folder / "tls.key").mkdir()
        failed = await vcpuset("inspect", monitor, *options, status=1)
        assert f"{folder}/tls.key cannot be read: Is a directory" in failed.stderr
        failed = await vcpuset("inspect", monitor, "--timeout", "0.5", status=1)
        assert "or waits for TLS, which spec.monitor.tcp.tls and --tls-credentials enable" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("./qmp.sock", "--tls-credentials", "."), "requires a HOST:PORT monitor; qmp.sock is a unix socket"),
        (("host:1", "--tls-server-name", "vm"), "--tls-server-name requires --tls-credentials"),
        (("host:1", "--tls-credentials", "nowhere"), "Directory 'nowhere' does not exist"),
    ],
)
async def test_options_of_tls_that_make_no_sense_are_refused(arguments: tuple[str, ...], words: str) -> None:
    refused = await vcpuset("inspect", *arguments, status=2)
    assert words in " ".join(refused.stderr.split())


async def test_what_the_guest_uses_is_told_if_its_agent_is_named(namespace_folder: Path) -> None:
    agent = namespace_folder / "agent"
    async with saved_guest(
        agent=True, append="online=none", agent_path=agent, monitor_paths=[namespace_folder / "qmp0"]
    ) as guest:
        arguments = ("inspect", guest.monitors[0], "--guest-agent", agent)
        everything = json.loads((await vcpuset(*arguments, "-o", "json")).stdout)
        assert everything["guest"]["onlineVCPUs"] == 1
        assert [slot["online"] for slot in everything["slots"][:2]] == [True, None]

        async with raw(guest.control) as client:
            await client.device_add(1)
            await until(lambda: len(guest.present()) == 2, 60, "the guest to know of a second CPU")
            shown = (await vcpuset(*arguments)).stdout
            assert "1 of 2 online; offline (guest CPU numbers): 1" in shown
            assert [line.split()[-1] for line in shown.splitlines() if line[:1].isdigit()] == [
                "unknown",
                "unknown",
                "-",
            ]

            await client.call("stop")
        assert "not queried: the guest cannot answer in the run state 'paused'" in (await vcpuset(*arguments)).stdout


async def test_an_agent_that_cannot_be_asked_costs_nothing_but_what_it_would_have_said(namespace_folder: Path) -> None:
    async with (
        FaultyMonitor(namespace_folder / "agent") as not_an_agent,
        FaultyMonitor(namespace_folder / "qmp") as monitor,
    ):
        shown = await vcpuset("inspect", monitor.path, "--guest-agent", not_an_agent.path, "-o", "json")
        document = json.loads(shown.stdout)
        assert document["guest"]["reason"] == "Unreachable"
        assert document["machine"]["vcpus"] == 2
        missing = await vcpuset("inspect", monitor.path, "--guest-agent", namespace_folder / "none", "-o", "json")
        assert json.loads(missing.stdout)["guest"]["message"].startswith("There is no ")


async def test_a_monitor_that_another_client_holds_is_an_error_with_its_remedy(q35: Guest) -> None:
    async with raw(q35.monitors[0]):
        result = await vcpuset("inspect", q35.monitors[0], "--timeout", "2", status=1)
    assert result.stdout == ""
    assert "another client holds this monitor" in result.stderr
    assert "add a second monitor to QEMU (-qmp) and inspect that one" in result.stderr


async def test_a_monitor_that_hangs_is_an_error_that_names_the_deadline(namespace_folder: Path) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", faults={"query-cpus-fast": Hang()}) as monitor:
        result = await vcpuset("inspect", monitor.path, "--timeout", "2", status=1)
        assert "has not answered a query within 2 s" in result.stderr
        monitor.faults = {GREETING: Hang()}
        assert "does not greet" in (await vcpuset("inspect", monitor.path, "--timeout", "2", status=1)).stderr


async def test_the_requests_of_a_set_are_shown_at_their_slots(worked_on: Guest) -> None:
    shown = json.loads((await vcpuset("inspect", worked_on.monitors[0], "-o", "json")).stdout)
    thread = shown["slots"][2]["threadID"]
    requested_at = "2200-01-01T00:00:00Z"  # in the future, which counts as now
    requests = [
        {"slot": 2, "path": "/machine/peripheral/vcpu2", "threadID": thread},
        {"slot": 9, "path": "/machine/peripheral/vcpu9", "threadID": 1},
    ]
    body = yaml.safe_load(manifest(3))
    written = [{**each, "requestedAt": requested_at, "attempts": 3} for each in requests]
    body["status"] = {"unplug": {"requests": written}}

    arguments = ("inspect", worked_on.monitors[0], "-f", "-")
    joined = json.loads((await vcpuset(*arguments, "-o", "json", text=json.dumps(body))).stdout)
    assert [slot["slot"] for slot in joined["slots"] if slot["pendingUnplug"]] == [2]
    assert [each["slot"] for each in joined["vcpuset"]["voidUnplugs"]] == [9]
    assert ", 3 times, no answer" in (await vcpuset(*arguments, text=json.dumps(body))).stdout
    assert "2 VCPUSets" in (await vcpuset(*arguments, text=manifest(1) + "---\n" + manifest(2), status=1)).stderr


async def test_the_largest_machine_is_printed_whole(namespace_folder: Path) -> None:
    async with FaultyMonitor(namespace_folder / "qmp", cpus=3, slots=4096) as monitor:
        document = json.loads((await vcpuset("inspect", monitor.path, "-o", "json")).stdout)
        assert [slot["slot"] for slot in document["slots"]] == list(range(4096))
        assert "3-4095" in (await vcpuset("inspect", monitor.path)).stdout
        assert {command.name for command in monitor.commands if not command.name.startswith("query-")} == {
            "qmp_capabilities"
        }


def _in_terminal(arguments: list[str], **environment: str) -> str:
    """What a command prints on a terminal of its own, which is 200 columns wide."""
    main, side = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "vcpuset.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=side,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **environment},
        )
        os.close(side)
        chunks = []
        while True:
            try:
                chunk = os.read(main, 1 << 16)
            except OSError:  # EIO: the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        assert process.stderr is not None
        with process, process.stderr:
            assert process.wait(60) == 0, process.stderr.read()
    finally:
        os.close(main)
    return b"".join(chunks).decode()


async def test_a_terminal_gets_colours_unless_it_does_not_want_them_and_a_pipe_gets_none(q35: Guest) -> None:
    arguments = ["inspect", str(q35.monitors[0]), "--timeout", "60"]
    environment = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    coloured = await asyncio.to_thread(_in_terminal, arguments)
    plain = await asyncio.to_thread(_in_terminal, arguments, NO_COLOR="1")
    with tempfile.TemporaryFile("w+") as file:
        command = [sys.executable, "-m", "vcpuset.cli.main", *arguments]
        forced = {**environment, "FORCE_COLOR": "1", "COLUMNS": "20"}
        await asyncio.to_thread(subprocess.run, command, stdout=file, check=True, timeout=60, env=forced)
        file.seek(0)
        piped = file.read()

    assert "\x1b[36mboot" in coloured
    assert "\u2500" in coloured, "a line below the titles"
    assert re.search(r"\x1b\[[0-9;]*3\dm", plain) is None, "no colour"
    assert piped.isascii()
    assert "\x1b" not in piped
    assert "0     boot   /machine/unattached/device[0]  core 0, thread 0, socket 0     -" in piped
    for shown in (coloured, plain):
        assert "/machine/unattached/device[0]" in shown, "brackets are no markup"
