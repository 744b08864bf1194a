"""libvirt beside the operator, according to docs/libvirt.md: what each of them sees, and what must not be mixed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from harness.cache import REPOSITORY
from harness.docpage import Page
from harness.libvirt import QEMU_USER, Libvirt, Machine
from harness.operator import OperatorProcess
from harness.processes import run
from harness.world import User

PAGE: Final = Page(REPOSITORY / "docs" / "libvirt.md")

VCPUSET: Final = PAGE.block("yaml", "vcpuset").document()["spec"]

MONITOR: Final = VCPUSET["monitor"]["unix"]["path"]

OPERATOR_GROUP: Final = 65532
"""As in the shipped DaemonSet."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def libvirt() -> AsyncIterator[Libvirt]:
    async with Libvirt() as running:
        yield running


@pytest.fixture
async def monitor(libvirt: Libvirt, folder: Path) -> Path:
    """Where the page's machine has its monitor for the operator, in folders that the page's commands have made."""
    text = PAGE.block("sh", "directory").text.replace("/run/vcpuset/default", str(folder))
    await libvirt.inside("sh", "-ec", text.replace("/run/vcpuset", str(folder.parent)))
    return folder / "web" / "qmp.sock"


@pytest.fixture
async def machine(libvirt: Libvirt, monitor: Path, namespace: str) -> AsyncIterator[Machine]:
    """The page's machine, which is not started."""
    text = PAGE.block("xml", "machine").text.replace("/run/vcpuset/default/web/qmp.sock", str(monitor))
    made = await libvirt.machine(namespace, text)
    yield made
    await made.virsh("destroy", check=False)
    await made.virsh("undefine", check=False)


async def started(machine: Machine, user: User, vcpus: int, **spec: Any) -> None:
    """The machine has booted, and the operator has brought it to its count."""
    await machine.start()
    await user.create("web", vcpus, MONITOR, unplug=VCPUSET["unplug"], **spec)
    await user.wait_ready("web")
    await machine.wait_online(vcpus)


async def enabled(machine: Machine, *options: str) -> int:
    """The count in `virsh dumpxml`."""
    vcpu = (await machine.xml(*options)).find("vcpu")
    assert vcpu is not None
    return int(vcpu.get("current") or vcpu.text or 0)


async def paths(machine: Machine) -> dict[int, str]:
    """The QOM paths of the machine's CPUs by their slots."""
    found = await machine.qmp("query-hotpluggable-cpus")
    return {each["props"]["socket-id"]: each["qom-path"] for each in found if "qom-path" in each}


async def test_libvirt_learns_of_the_operators_changes_when_its_daemon_is_restarted(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    await started(machine, user, 4)
    assert await machine.count() == 2
    assert await enabled(machine) == await enabled(machine, "--migratable") == 2
    assert (await machine.virsh("vcpuinfo")).stdout.count("VCPU:") == 2

    await machine.libvirt.restart_daemon()
    assert await machine.count() == 4
    assert await enabled(machine) == await enabled(machine, "--migratable") == 4
    assert (await machine.virsh("vcpuinfo")).stdout.count("VCPU:") == 4
    assert await machine.count(live=False) == 2, "the configuration for the next start is the administrator's"

    await user.change("web", vcpus=3)
    await user.wait_ready("web")
    await machine.wait_online(3)


async def test_each_start_succeeds_while_the_operator_waits_for_the_machine(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    """libvirt fails to start a machine that gets CPUs before it runs."""
    await user.create("web", 4, MONITOR)
    for _ in range(5):
        await machine.virsh("start")
        await user.wait_ready("web")
        assert await machine.count() == 2
        await machine.virsh("destroy")
        await user.wait_reason("web", "MonitorUnreachable")
    await machine.virsh("start", "--paused")
    await user.wait_reason("web", "MachineBusy")
    await machine.virsh("resume")
    await user.wait_ready("web")


async def test_a_machine_gets_its_count_back_after_a_restart_and_keeps_it_over_a_reset(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    await started(machine, user, 4)
    await machine.virsh("reset")
    await machine.wait_booted(2)
    await machine.wait_online(4)
    assert (await user.wait_ready("web")).vcpus == 4

    await machine.virsh("destroy")
    await user.wait_reason("web", "MonitorUnreachable")
    await machine.start()
    await user.wait_ready("web")
    await machine.wait_online(4)


async def test_what_setvcpus_changes_is_corrected_and_libvirt_does_not_notice(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    """Under TCG. With KVM, QEMU reports a CPU that has left by its name, which is what libvirt waits for."""
    await started(machine, user, 2, connection="OnDemand")
    await machine.virsh("setvcpus", "4", "--live")
    assert sorted(await paths(machine)) == [0, 1, 2, 3]
    await machine.wait_online(4)
    await user.touch("web")
    await machine.wait_online(2)
    await user.wait("web", lambda seen: seen.ready and seen.vcpus == 2, "the declared count")
    assert await machine.count() == 4
    await machine.libvirt.restart_daemon()
    assert await machine.count() == 2


async def test_setvcpus_is_refused_while_libvirt_does_not_know_the_operators_cpus(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    await started(machine, user, 4)
    for count in ("3", "5"):
        assert "Duplicate device ID 'vcpu2'" in await machine.refused("setvcpus", count, "--live")
    assert "failed to find appropriate hotpluggable vcpus" in await machine.refused("setvcpus", "1", "--live")
    assert (await user.get("web")).vcpus == 4
    assert (await user.get("web")).reason == "Converged"


async def test_cpus_that_libvirt_has_plugged_are_adopted_and_unplugged_like_the_operators_own(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    await machine.start()
    await machine.virsh("setvcpus", "4", "--live")
    await machine.wait_online(4)
    await user.create("web", None, MONITOR, unplug=VCPUSET["unplug"])
    seen = await user.wait("web", lambda seen: seen.ready, "the count to be adopted")
    assert seen.body["spec"]["vcpus"] == 4

    await user.scale("web", 3)
    await machine.wait_online(3)
    await user.scale("web", 5)
    await machine.wait_online(5)
    await user.wait_ready("web")
    assert {slot: path for slot, path in (await paths(machine)).items() if "peripheral" in path} == {
        slot: f"/machine/peripheral/vcpu{slot}" for slot in (2, 3, 4)
    }
    await user.scale("web", 1)
    await machine.wait_online(2)
    seen = await user.wait_reason("web", "BootVCPUsKept")
    assert seen.vcpus == 2


async def test_a_boot_vcpu_that_the_operator_has_unplugged_breaks_vcpuinfo_until_the_daemon_is_restarted(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    await machine.start()
    await user.create("web", 1, MONITOR)
    await user.wait_ready("web")
    assert "cannot get CPU affinity of process" in await machine.refused("vcpuinfo")
    await machine.libvirt.restart_daemon()
    assert (await machine.virsh("vcpuinfo")).stdout.count("VCPU:") == await machine.count() == 1


async def test_a_saved_machine_can_only_be_restored_with_the_count_that_it_had(
    machine: Machine, user: User, operator: OperatorProcess
) -> None:
    await started(machine, user, 4)
    image = machine.libvirt.directory / "saved"
    await machine.virsh("save", image)
    error = (await machine.libvirt.virsh("restore", image, check=False)).stderr
    assert "Unknown savevm section or instance 'cpu_common' 2" in error

    xml = (await machine.libvirt.virsh("save-image-dumpxml", image)).stdout
    corrected = machine.libvirt.directory / "corrected.xml"
    corrected.write_text(re.sub(r"(<vcpu[^>]* current=)'2'", r"\1'4'", xml))
    error = (await machine.libvirt.virsh("save-image-define", image, corrected, check=False)).stderr
    assert "State of vCPU '2' differs" in error

    await machine.start()
    await user.wait_ready("web")
    await user.change("web", suspend=True)
    await machine.libvirt.restart_daemon()
    await machine.virsh("save", image)
    await machine.libvirt.virsh("restore", image)
    assert (await machine.count(), len(await paths(machine))) == (4, 4)
    await user.change("web", suspend=None, vcpus=5)
    assert (await user.wait_ready("web")).vcpus == 5


async def test_a_machine_without_a_second_monitor_is_resized_through_libvirts_proxy(
    machine: Machine, user: User, monitor: Path, operator: OperatorProcess
) -> None:
    proxy = monitor.with_name("proxy.sock")
    text = PAGE.block("sh", "proxy").text.replace("/run/vcpuset/default/web/proxy.sock", str(proxy))
    words = ["sh", "-c", text.replace(" web ", f" {machine.name} ")]
    await machine.start()
    with contextlib.ExitStack() as stack:
        first = machine.libvirt.start_inside(*words, name="the proxy")
        stack.callback(first.kill)
        await user.create("web", 4, "web/proxy.sock", unplug=VCPUSET["unplug"])
        await user.wait_ready("web")
        await machine.wait_online(4)
        await user.scale("web", 3)
        await user.wait_ready("web")
        await machine.wait_online(3)

        await machine.virsh("destroy")
        await user.wait_reason("web", "MonitorUnreachable")
        await machine.start()
        await machine.wait_online(3)
        assert (await user.wait_ready("web")).vcpus == 3

        await machine.libvirt.restart_daemon()
        await user.scale("web", 4)
        await user.wait_reason("web", "MonitorUnreachable")
        first.kill()
        stack.callback(machine.libvirt.start_inside(*words, name="the proxy").kill)
        assert (await user.wait_ready("web")).vcpus == 4


async def test_the_socket_is_open_to_the_operators_group_alone(machine: Machine, monitor: Path) -> None:
    await machine.virsh("start")
    found = (await run(["stat", "--format=%u %g %a", monitor])).stdout.split()
    assert found == [str(QEMU_USER), str(OPERATOR_GROUP), "775"]

    async def connects(group: int) -> bool:
        script = f"import socket; socket.socket(socket.AF_UNIX).connect({str(monitor)!r})"
        words = ["setpriv", "--reuid=65532", f"--regid={group}", "--clear-groups", "/usr/bin/python3", "-c", script]
        return (await run(words, check=False)).returncode == 0

    assert await connects(OPERATOR_GROUP)
    assert not await connects(65533)
