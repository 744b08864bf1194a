"""What a guest itself says of its CPUs, by its agent: real guests, and Ready only when they use what they were given.

What only a scripted agent can show is in tests/qmp/test_agent.py and test_guests.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from harness.controlplane import ControlPlane
from harness.expect import AGENT, READY, RECONCILING, check_form, history, operators_writes, reasons, settled, shows
from harness.faults import Answer, Fault, Link
from harness.faultyagent import SYNC, FaultyAgent
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import Seen, User

UDEV_RULE = 'SUBSYSTEM=="cpu", ACTION=="add", TEST=="online", ATTR{online}=="0", ATTR{online}="1"'


def agent_at(path: str, *, bring_online: bool = False) -> dict[str, object]:
    """`spec.guestAgent`."""
    return {"unix": {"path": path}, "bringOnline": bring_online}


async def agent_is(user: User, name: str, reason: str) -> Seen:
    """Wait until GuestAgentConnected gives this reason for the spec as it stands, and check the whole of the status."""
    seen = await user.wait(
        name, lambda seen: seen.current and seen.condition(AGENT).get("reason") == reason, f"{AGENT} {reason}"
    )
    check_form(seen)
    return seen


def check_ready_waited(versions: Sequence[Seen]) -> None:
    """Check that Ready was never shown while a guest that could be asked used fewer CPUs than the machine had."""
    for seen in versions:
        if seen.states == READY and seen.condition(AGENT).get("status") == "True":
            assert seen.status["onlineVCPUs"] == seen.vcpus, seen.status


async def stop_agent(guest: Guest) -> None:
    await guest.shell("kill -9 $(pidof qemu-ga); while pidof qemu-ga; do :; done")


async def start_agent(guest: Guest) -> None:
    await guest.shell("(qemu-ga -m virtio-serial -p /dev/vport0p1 -t /run >/dev/null 2>&1 &)")


async def set_online(guest: Guest, cpu: int, online: int) -> None:
    """Somebody in the guest takes a CPU offline or sets it online."""
    await guest.shell(f"echo {online} > /sys/devices/system/cpu/cpu{cpu}/online")


async def _is_online(guest: Guest, cpu: int) -> bool:
    """Asked for in the guest, since its reports are a moment old."""
    return await guest.shell(f"cat /sys/devices/system/cpu/cpu{cpu}/online") == "1\n"


# Guests that can be asked.


async def test_a_set_is_ready_once_the_guest_uses_its_cpus_and_that_costs_few_writes_and_later_none(
    control_plane: ControlPlane, folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(
        smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, agent_path=folder / "ga.sock"
    ) as guest:
        created = await user.create("vm", 2, "vm.sock", guestAgent=agent_at("ga.sock"))
        seen = await shows(user, "vm", "Converged", READY, "as declared, and the guest uses them all.", vcpus=2)
        assert (seen.condition(AGENT)["reason"], seen.status["onlineVCPUs"]) == ("Connected", 2)

        costs = {}
        for vcpus in (6, 1, 4):
            await settled(control_plane)
            since = control_plane.audit_offset()
            before = await user.change("vm", vcpus=vcpus)
            seen = await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=vcpus)
            assert seen.status["onlineVCPUs"] == vcpus
            await guest.wait_online(vcpus)
            await settled(control_plane)
            writes = [each for each in operators_writes(user, since) if each.resource == "vcpusets"]
            assert {(each.subresource, each.code) for each in writes} == {("status", 200)}
            costs[before.body["metadata"]["generation"]] = len(writes)

        versions = await history(user, created)
        check_ready_waited(versions)
        for generation, writes_made in costs.items():
            about = [each for each in versions if each.body["metadata"]["generation"] == generation and each.current]
            # To a very slow host a guest seems to have left its CPUs offline: that is news, and so is its end.
            slow = [each for each in about if each.reason in {"GuestCPUsOffline", "UnplugPending"}]
            assert writes_made - 2 * len(slow) <= 3, reasons(about)
        expected = ["Converged", "Unplugging", "Converged"]
        shown = [reason for reason, _ in reasons(versions) if reason in expected]
        assert [reason for reason, _ in itertools.groupby(shown)] == expected


async def test_cpus_that_the_guest_leaves_offline_are_reported_with_the_rule_and_brought_online_if_wanted(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(
        smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, append="online=none",
        agent_path=folder / "ga.sock",
    ) as guest:  # fmt: skip
        created = await user.create("vm", 4, "vm.sock", guestAgent=agent_at("ga.sock"))
        left = ("the guest uses 2 of them and has left its CPUs 2-3 offline", UDEV_RULE, "spec.guestAgent.bringOnline")
        seen = await shows(user, "vm", "GuestCPUsOffline", RECONCILING, *left, vcpus=4)
        assert seen.status["onlineVCPUs"] == 2
        assert guest.online() == {0, 1}

        # Somebody helps in the guest, and nobody tells the operator.
        await set_online(guest, 2, 1)
        await set_online(guest, 3, 1)
        seen = await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=4)
        assert seen.status["onlineVCPUs"] == 4

        await user.change("vm", vcpus=6, guestAgent={"bringOnline": True})
        await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=6)
        await guest.wait_online({0, 1, 2, 3, 4, 5})

        # Somebody does the reverse: seen at the next look.
        ready = await user.get("vm")
        await set_online(guest, 1, 0)
        await user.touch("vm")
        await until(lambda: _is_online(guest, 1), 60, "CPU 1 to be online again")
        assert [reason for reason, _ in reasons(await history(user, ready))] == ["Converged"]

        await user.change("vm", guestAgent={"bringOnline": False})
        await user.wait_ready("vm")
        await set_online(guest, 1, 0)
        await user.touch("vm")
        await shows(user, "vm", "GuestCPUsOffline", RECONCILING, "has left its CPU 1 offline", UDEV_RULE, vcpus=6)

        # What is offline can be given back as well, and then all is well.
        await user.change("vm", vcpus=1)
        await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=1)
        check_ready_waited(await history(user, created))


async def test_a_suspended_set_leaves_cpus_offline_until_it_goes_on(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(
        smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, append="online=none",
        agent_path=folder / "ga.sock",
    ) as guest:  # fmt: skip
        await set_online(guest, 1, 0)
        await guest.wait_online({0})
        await user.create("vm", 2, "vm.sock", guestAgent=agent_at("ga.sock", bring_online=True), suspend=True)
        held = await user.wait_reason("vm", "Suspended")
        check_form(held)
        assert "the guest uses 1 of them; nothing is changed while spec.suspend is set" in held.message
        assert guest.online() == {0}
        await user.change("vm", suspend=False)
        await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=2)
        await guest.wait_online({0, 1})


async def test_a_restart_of_the_operator_does_not_show(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with saved_guest(
        smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, agent_path=folder / "ga.sock"
    ) as guest:
        await user.create("vm", 3, "vm.sock", guestAgent=agent_at("ga.sock"))
        ready = await shows(user, "vm", "Converged", READY, vcpus=3)
        for _ in range(2):
            await operator.stop()
            await operator.start()
            await _looked(operator, 2)  # one that asks the guest, and one with its answer
        await user.change("vm", vcpus=4)
        seen = await shows(user, "vm", "Converged", READY, vcpus=4)
        await guest.wait_online(4)
        versions = await history(user, ready)
        # The first version after the restarts is the user's, and up to it all were Ready.
        assert [each.body["metadata"]["generation"] for each in versions[:2]] == [1, 2]
        assert seen.status["onlineVCPUs"] == 4


async def test_a_paused_guest_is_not_asked(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with (
        saved_guest(
            smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, agent_path=folder / "ga.sock"
        ) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 2, "vm.sock", guestAgent=agent_at("ga.sock"))
        connected = await agent_is(user, "vm", "Connected")
        await client.call("stop")
        await user.change("vm", vcpus=3)
        await shows(
            user, "vm", "Converged", READY, "cannot be queried while the machine's run state is 'paused'", vcpus=3
        )
        await agent_is(user, "vm", "NotQueried")
        found = {str(each.condition(AGENT)["reason"]) for each in await history(user, connected)}
        assert found == {"Connected", "NotQueried"}, "no time-out"

        await client.call("cont")
        await user.touch("vm")
        await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=3)
        seen = await agent_is(user, "vm", "Connected")
        assert seen.status["onlineVCPUs"] == 3

        # Without the field nothing is left of it.
        await user.change("vm", guestAgent=None)
        seen = await shows(user, "vm", "Converged", READY, "QEMU has 3 vCPUs, as declared.", vcpus=3)
        assert "onlineVCPUs" not in seen.status
        assert len(seen.status["conditions"]) == 3


# Guests that cannot.


async def test_an_agent_that_is_killed_costs_neither_plug_nor_unplug_and_is_heard_again_when_it_is_back(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with saved_guest(
        smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, agent_path=folder / "ga.sock"
    ) as guest:
        await user.create("vm", 2, "vm.sock", guestAgent=agent_at("ga.sock"))
        await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=2)
        await stop_agent(guest)
        for vcpus in (4, 1):
            await user.change("vm", vcpus=vcpus)
            seen = await shows(
                user,
                "vm",
                "Converged",
                READY,
                "as declared; it is unknown whether the guest uses them",
                "qemu-guest-agent is not running in the guest",
                vcpus=vcpus,
            )
            assert seen.condition(AGENT)["reason"] == "NoAnswer"
            assert "qemu-guest-agent is not running in the guest" in seen.condition(AGENT)["message"]
            assert "onlineVCPUs" not in seen.status
            await guest.wait_online(vcpus)

        await start_agent(guest)
        seen = await agent_is(user, "vm", "Connected")
        assert (seen.states, seen.status["onlineVCPUs"]) == (READY, 1)
        await settled(user.control_plane)
        told = {(each["type"], each["reason"]) for each in await user.events("vm") if "GuestAgent" in each["reason"]}
        assert told == {("Normal", "GuestAgentConnected"), ("Warning", "GuestAgentNoAnswer")}


class _Counts(Fault):
    """Never answers; notes how many CPUs the machine has when the question comes."""

    def __init__(self, client: Raw) -> None:
        super().__init__()
        self._client = client
        self.found: list[int] = []

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        self.found.append(await self._client.count())
        await link.left()


async def test_a_machine_has_its_count_before_an_agent_is_asked_that_hangs(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
    ):
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        # Each time another agent: of this one the operator does not know yet that it hangs.
        for vcpus in (5, 1):
            counts = _Counts(client)
            async with FaultyAgent(folder / f"agent-{vcpus}", faults={SYNC: counts}):
                await user.change("vm", vcpus=vcpus, guestAgent=agent_at(f"agent-{vcpus}"))
                seen = await shows(user, "vm", "Converged", READY, f"agent-{vcpus} has not answered", vcpus=vcpus)
                assert seen.condition(AGENT)["reason"] == "NoAnswer"
            assert counts.found
            assert set(counts.found) == {vcpus}
        await guest.wait_online(1)


async def test_a_socket_that_is_missing_or_another_machines_is_reported_until_the_spec_names_the_right_one(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(
            smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, agent_path=folder / "ga.sock"
        ) as guest,
        saved_guest(smp="2,maxcpus=64", agent=True, agent_path=folder / "other.sock"),
    ):
        await user.create("vm", 4, "vm.sock", guestAgent=agent_at("missing.sock"))
        missing = "spec.guestAgent.unix.path: there is no"
        for vcpus in (4, 1):
            await user.change("vm", vcpus=vcpus)
            seen = await shows(user, "vm", "Converged", READY, missing, "missing.sock", vcpus=vcpus)
            assert seen.condition(AGENT)["reason"] == "Unreachable"
            assert missing in seen.condition(AGENT)["message"]
            await guest.wait_online(vcpus)

        await user.change("vm", guestAgent=agent_at("other.sock"))
        await shows(
            user, "vm", "Converged", READY, "reports 2 online CPUs", "names the socket of another machine", vcpus=1
        )
        await agent_is(user, "vm", "OtherMachine")

        await user.change("vm", guestAgent=agent_at("ga.sock"))
        await shows(user, "vm", "Converged", READY, "the guest uses them all", vcpus=1)
        assert (await agent_is(user, "vm", "Connected")).status["onlineVCPUs"] == 1


async def _looked(operator: OperatorProcess, passes: int) -> None:
    await until(lambda: _passes(operator) >= passes, 60, f"pass number {passes}")


def _passes(operator: OperatorProcess) -> int:
    """How many passes the operator has ended since it was started."""
    lines = [line for line in operator.metrics().splitlines() if line.startswith("controller_runtime_reconcile_total{")]
    assert lines
    return int(sum(float(line.split()[-1]) for line in lines))
