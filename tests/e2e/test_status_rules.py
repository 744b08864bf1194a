"""What holds for every status: few writes and none without news, stable times, Events on transitions, nothing held.

The number of writes is the API server's own count (its audit log).
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from harness.acpi import Acpi
from harness.controlplane import ControlPlane
from harness.expect import (
    HELD,
    READY,
    RECONCILING,
    STALLED,
    check_form,
    history,
    operators_writes,
    reasons,
    settled,
    shows,
)
from harness.faults import Error
from harness.faulty import FaultyMonitor, Refuse, Silent, Working
from harness.faultyagent import FaultyAgent
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that looks at every machine every second: many chances to write what is no news."""
    async with OperatorProcess(control_plane, "--resync-seconds=1", socket_root=socket_root) as running:
        yield running


async def test_nothing_is_written_while_nothing_changes(
    control_plane: ControlPlane, folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Sets in all kinds of states, each looked at several times: not one write, not one Event."""
    (folder / "file").write_text("")
    async with (
        FaultyMonitor(folder / "converged", cpus=2, slots=4) as converged,
        FaultyMonitor(folder / "ceiling", cpus=2, slots=4) as ceiling,
        FaultyMonitor(folder / "suspended", cpus=2, slots=4) as suspended,
        FaultyMonitor(folder / "over", status="shutdown", cpus=2, slots=4) as over,
        FaultyMonitor(folder / "migrating", status="inmigrate", cpus=2, slots=4) as migrating,
        FaultyMonitor(folder / "refused", cpus=2, slots=4) as refused,
        FaultyMonitor(folder / "silent", cpus=2, slots=4) as silent,
        FaultyMonitor(folder / "asked", cpus=2, slots=4) as asked,
        FaultyAgent(folder / "agent", offline={1}) as agent,
    ):
        agent.online = {0, 1}
        # A request that the guest refuses or ignores is repeated, which costs writes.
        refused.faults["device_del"] = Error("GenericError", "cpu hot-unplug with SMI wasn't enabled by firmware")
        silent.cpus.unplug = {1: Working()}
        slow = {"timeoutSeconds": 1, "retrySeconds": 3600}
        await user.create("converged", 3, "converged")
        await user.create("ceiling", 9, "ceiling")
        await user.create("suspended", 3, "suspended", suspend=True)
        await user.create("over", 3, "over")
        await user.create("migrating", 3, "migrating")
        await user.create("refused", 1, "refused", unplug=slow)
        await user.create("silent", 1, "silent", unplug=slow)
        await user.create("asked", 2, "asked", guestAgent={"unix": {"path": "agent"}})
        await user.create("missing", 3, "missing")
        await user.create("invalid", 3, "file")
        steady = {
            "converged": ("Converged", READY, 3),
            "ceiling": ("InsufficientSlots", STALLED, 4),
            "suspended": ("Suspended", HELD, 2),
            "over": ("MachineNotRunning", RECONCILING, 2),
            "migrating": ("MachineBusy", RECONCILING, 2),
            "refused": ("UnplugUnsupported", STALLED, 2),
            "silent": ("UnplugTimedOut", STALLED, 2),
            "asked": ("Converged", READY, 2),
            "missing": ("MonitorUnreachable", RECONCILING, None),
            "invalid": ("InvalidMonitor", STALLED, None),
        }
        before = {
            name: await shows(user, name, reason, states, vcpus=vcpus)
            for name, (reason, states, vcpus) in steady.items()
        }
        await settled(control_plane)
        since = control_plane.audit_offset()
        monitors = [converged, ceiling, suspended, over, migrating, refused, silent, asked]
        looks = [_looks(monitor) for monitor in monitors]
        answers = len(agent.received("guest-get-vcpus"))
        # A machine that is busy is looked at with a growing pause, all others every second.
        await until(
            lambda: all(
                _looks(monitor) >= old + (1 if monitor is migrating else 3)
                for monitor, old in zip(monitors, looks, strict=True)
            ),
            90,
            "several looks at every machine",
        )
        await until(lambda: len(agent.received("guest-get-vcpus")) >= answers + 3, 90, "several answers of the guest")
        await settled(control_plane)
        assert operators_writes(user, since) == []
        for name, seen in before.items():
            assert (await user.get(name)).body == seen.body


async def test_a_change_costs_two_writes_for_a_plug_and_three_for_an_unplug(
    control_plane: ControlPlane, folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest:
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        for vcpus, most in ((6, 2), (3, 3), (8, 2), (1, 3)):
            await settled(control_plane)
            since = control_plane.audit_offset()
            await user.change("vm", vcpus=vcpus)
            await user.wait("vm", lambda seen: seen.ready and not seen.pending, "Ready")
            await guest.wait_online(vcpus)
            await settled(control_plane)
            writes = [each for each in operators_writes(user, since) if each.resource == "vcpusets"]
            assert {each.subresource for each in writes} == {"status"}
            assert 1 <= len(writes) <= most, f"{vcpus} vCPUs cost {len(writes)} writes"
            assert {each.code for each in writes} == {200}, "no write was refused and made again"


async def test_every_version_of_a_status_obeys_the_rules_and_events_are_its_transitions_without_progress(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with FaultyMonitor(folder / "vm.sock", cpus=2, slots=4) as monitor:
        monitor.cpus.unplug = {2: Refuse(), 1: Silent()}
        created = await user.create("vm", 3, "vm.sock", unplug={"timeoutSeconds": 1, "retrySeconds": 3600})
        await user.wait_reason("vm", "Converged")
        await user.change("vm", vcpus=9)
        await user.wait_reason("vm", "InsufficientSlots")
        monitor.cpus.eject(3)
        await user.change("vm", vcpus=1)
        await user.wait_reason("vm", "UnplugRefused", stalled=True)
        monitor.cpus.eject(1)
        monitor.cpus.unplug = {}
        await user.change("vm", vcpus=2, suspend=True)
        await user.wait_reason("vm", "Converged")
        await user.change("vm", vcpus=4)
        await user.wait_reason("vm", "Suspended")
        await user.change("vm", suspend=None)
        await user.wait_reason("vm", "Converged")

        versions = await history(user, created)
        written = [seen for seen in versions if seen.status.get("conditions")]
        assert len(written) > 8
        for seen in written:
            check_form(seen)
        for old, new in itertools.pairwise(written):
            assert new.status["observedGeneration"] >= old.status["observedGeneration"]
            for kind in ("Ready", "Reconciling", "Stalled"):
                then, now = old.condition(kind), new.condition(kind)
                if then["status"] == now["status"]:
                    assert then["lastTransitionTime"] == now["lastTransitionTime"]
                else:
                    assert then["lastTransitionTime"] <= now["lastTransitionTime"]

        transitions = [reason for reason, _ in itertools.groupby(reason for reason, _ in reasons(versions))]
        progress = {"Plugging", "Unplugging", "UnplugPending"}

        await settled(user.control_plane)
        expected = [reason for reason in transitions if reason not in progress]
        assert [each["reason"] for each in await user.events("vm")] == expected
        for each in await user.events("vm"):
            assert each["reportingController"] == "vcpuset.dev/operator"
            assert (each["regarding"]["kind"], each["regarding"]["uid"]) == ("VCPUSet", created.body["metadata"]["uid"])


async def test_deleting_a_set_leaves_the_machine_as_it_is_and_frees_its_monitor(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        await user.create("vm", 5, "vm.sock")
        await user.wait_ready("vm")
        await user.change("vm", vcpus=4)
        await user.wait_reason("vm", "UnplugPending")
        await user.delete("vm")
        async with raw(folder / "vm.sock") as freed:
            assert await freed.count() == 5
            await acpi.eject(4)
            assert await freed.count() == 4
        assert guest.returncode is None

        # A new set of that name is a new set: nothing is left of the old one.
        await user.create("vm", 4, "vm.sock")
        seen = await shows(user, "vm", "Converged", READY, vcpus=4)
        assert seen.pending == []


async def test_a_set_that_is_given_to_another_node_is_let_go_at_once_and_taken_back_as_it_is(
    control_plane: ControlPlane, folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        Guest(None, smp="4,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        await user.create("vm", 2, "vm.sock")
        await user.wait_reason("vm", "UnplugPending")
        await user.change("vm", nodeName="elsewhere")
        async with raw(folder / "vm.sock"):
            await settled(control_plane)
            left = await user.get("vm")
            since = control_plane.audit_offset()
            for slot in (3, 2):
                await acpi.eject(slot)
            # A set that came later is looked at several times meanwhile.
            async with FaultyMonitor(folder / "other.sock") as other:
                await user.create("other", 2, "other.sock")
                await until(lambda: _looks(other) >= 4, 60, "four looks at another machine")
            await settled(control_plane)
            assert operators_writes(user, since, "vm") == []
            assert (await user.get("vm")).body == left.body
        assert await client.count() == 2

        await user.change("vm", nodeName=None)
        seen = await shows(user, "vm", "Converged", READY, vcpus=2)
        assert seen.pending == []


def _looks(monitor: FaultyMonitor) -> int:
    """How often the operator has looked at a machine."""
    return len(monitor.received("query-status"))
