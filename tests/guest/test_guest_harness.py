"""The test guest itself: what other tests build on must be what it says."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from harness import qmp
from harness.guest import Guest, GuestError, parse_cpu_list
from harness.guestimage import images
from harness.saved import saved_guest
from harness.wait import until

IN_USE = 0x82
"""The _OST status with which Linux refuses an eject."""


async def test_a_booting_guest_has_no_hotplug_state_until_its_acpi_is_up_and_then_reports_its_cpus() -> None:
    async with Guest() as guest:
        assert await qmp.execute(guest.control, "query-acpi-ospm-status") == []
        await guest.ready()
        assert guest.online() == guest.present() == {0}
        assert len(await qmp.execute(guest.control, "query-acpi-ospm-status")) == 64


async def test_a_restored_guest_sets_plugged_cpus_online_and_gives_them_back() -> None:
    async with saved_guest() as guest:
        assert guest.online() == {0}
        await qmp.device_add(guest.monitors[0], 1, 2)
        await guest.wait_online({0, 1, 2})

        async def usable() -> bool:
            # Linux widens the affinity of running tasks, which nproc counts, a moment after a CPU is online.
            return await guest.shell("nproc") == "3\n"

        await until(usable, 60, "nproc to be 3")
        await qmp.device_del(guest.monitors[0], 1)
        await guest.wait_online({0, 2})
        await _until_count(guest, 2)


async def test_boot_cpus_are_given_back_too() -> None:
    async with saved_guest(smp="2,maxcpus=64") as guest:
        assert guest.online() == {0, 1}
        await qmp.device_del(guest.monitors[0], 1)
        await guest.wait_online({0})
        await _until_count(guest, 1)


async def test_a_held_cpu_is_refused_while_others_go_and_goes_itself_when_released() -> None:
    async with saved_guest() as guest:
        await qmp.device_add(guest.control, 1, 2)
        await guest.wait_online(3)
        await guest.hold_cpus(2)
        await qmp.device_del(guest.control, 2, 1)

        async def answers() -> bool:
            return await _last_answer(guest, 2) == IN_USE and await qmp.count(guest.control) == 2

        await until(answers, 60, "the refusal of slot 2 and the removal of slot 1")
        await guest.wait_online({0, 2})
        await guest.release_cpus()
        await qmp.device_del(guest.control, 2)
        await guest.wait_online({0})


async def test_with_online_none_a_plugged_cpu_stays_offline_until_somebody_sets_it_online() -> None:
    async with saved_guest(append="online=none") as guest:
        await qmp.device_add(guest.control, 1)
        await until(lambda: guest.present() == {0, 1}, 60, "the guest to see the CPU")
        assert guest.online() == {0}
        await guest.shell("echo 1 >/sys/devices/system/cpu/cpu1/online")
        await guest.wait_online({0, 1})


async def test_with_acpi_off_the_guest_never_learns_of_plugs_and_qemu_refuses_every_unplug() -> None:
    async with saved_guest(append="acpi=off") as guest:
        await qmp.device_add(guest.control, 1)
        with pytest.raises(ExecuteError, match="device unplug request for not supported device type"):
            await qmp.device_del(guest.control, 1)
        assert await guest.shell("cat /sys/devices/system/cpu/present") == "0\n"
        assert await qmp.execute(guest.control, "query-acpi-ospm-status") == []


async def test_the_guest_agent_answers_after_a_restore() -> None:
    async with saved_guest(agent=True) as guest:
        reader, writer = await asyncio.open_unix_connection(guest.agent_path)
        writer.write(b'{"execute": "guest-get-vcpus"}\n')
        async with asyncio.timeout(60):
            reply = json.loads(await reader.readline())
        writer.close()
        assert [cpu["logical-id"] for cpu in reply["return"]] == [0]


async def test_a_killed_machine_leaves_dead_sockets_and_restarts_on_the_same_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    async with Guest(None, monitor_paths=paths, tcp=True) as guest:
        first = guest.pid
        await qmp.device_add(paths[1], 1)
        guest.kill()
        assert guest.returncode == -signal.SIGKILL
        assert all(path.is_socket() for path in paths)
        dead_monitors: list[Path | tuple[str, int]] = [paths[0], guest.tcp_address]
        for dead in dead_monitors:
            with pytest.raises(ConnectionRefusedError):
                await (asyncio.open_unix_connection(dead) if isinstance(dead, Path) else asyncio.open_connection(*dead))
        await guest.restart()
        assert guest.pid != first
        assert [await qmp.count(monitor) for monitor in [paths[1], *dead_monitors]] == [1, 1, 1]
    assert not any(path.exists() for path in paths)
    assert not guest.directory.exists()


async def test_a_qemu_that_does_not_start_is_an_error_with_its_own_words() -> None:
    with pytest.raises(GuestError, match="unsupported machine type"):
        async with Guest(None, machine="no-such-machine"):
            pass


async def test_a_file_that_is_no_saved_state_is_an_error(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_bytes(b"nonsense")
    guest = Guest(images(), restore=state)
    try:
        with pytest.raises(GuestError, match="started from the saved state"):
            await guest.start()
    finally:
        await guest.stop()


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0,2-3\n", {0, 2, 3}), ("", set())],
)
def test_a_cpu_list_of_the_kernel_is_understood(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


async def _until_count(guest: Guest, cpus: int) -> None:
    async def reached() -> bool:
        return await qmp.count(guest.control) == cpus

    await until(reached, 60, f"{cpus} CPUs in QEMU")


async def _last_answer(guest: Guest, slot: int) -> int:
    status: int = (await qmp.execute(guest.control, "query-acpi-ospm-status"))[slot]["status"]
    return status
