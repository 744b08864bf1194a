"""How busy a machine is, asked of a real operator over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp

from e2e.test_metrics import Shown
from harness.controlplane import ControlPlane
from harness.cpus import kvm_counters
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User

WAIT = 90.0


async def busy(client: aiohttp.ClientSession, user: User, name: str) -> tuple[int, dict[str, Any]]:
    """Ask the operator."""
    async with client.get(f"/v1/namespaces/{user.namespace}/vcpusets/{name}/busy") as answer:
        return answer.status, await answer.json()


async def test_busy_vcpus_are_told_and_what_nobody_measured_is_not_found(
    control_plane: ControlPlane, folder: Path, socket_root: Path, user: User
) -> None:
    flags = (f"--namespace={user.namespace}", "--resync-seconds=3600")
    async with (
        FaultyMonitor(folder / "kvm.sock") as counted,
        FaultyMonitor(folder / "tcg.sock"),
        OperatorProcess(control_plane, *flags, socket_root=socket_root) as operator,
        aiohttp.ClientSession(operator.url) as client,
    ):
        counted.stats = [kvm_counters("/a", exits=1), kvm_counters("/b", exits=1, blocking=True)]

        async def ask(name: str) -> tuple[int, dict[str, Any]]:
            return await busy(client, user, name)

        status, answer = await ask("web")
        assert (status, answer["reason"]) == (404, "NotServed")
        for name in ("kvm", "tcg"):
            await user.create(name, 2, f"{name}.sock")
            await user.wait_ready(name)
        status, answer = await ask("tcg")
        assert (status, answer["reason"]) == (404, "NoSource")
        assert "spec.guestAgent" in answer["message"]
        before = (await user.get("kvm")).body["metadata"]["resourceVersion"]
        status, answer = await ask("kvm")
        assert (status, answer["reason"]) == (404, "NoSample")

        async def measured() -> bool:
            nonlocal answer
            status, answer = await ask("kvm")  # once the first sample is not fresh any more, this takes the second
            return status == 200

        await until(measured, WAIT, "two samples")
        assert (answer["busyVCPUs"], answer["vcpus"], answer["source"]) == (1, 2, "KVM")
        assert answer["windowSeconds"] >= 5
        assert answer["time"].endswith("Z")

        shown = Shown(operator, user, "kvm")
        assert shown.of_set("vcpuset_busy_vcpus") == 1
        assert (shown.of_set("vcpuset_busy_seconds_total") or 0) >= 1
        assert Shown(operator, user, "tcg").of_set("vcpuset_busy_seconds_total") is None
        assert (await user.get("kvm")).body["metadata"]["resourceVersion"] == before, "it was written to the API server"


async def test_the_load_of_a_linux_guest_is_seen_through_its_agent(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        saved_guest(
            smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"], agent=True, agent_path=folder / "ga.sock"
        ) as guest,
        aiohttp.ClientSession(operator.url) as client,
    ):
        await user.create("vm", 2, "vm.sock", guestAgent={"unix": {"path": "ga.sock"}})
        await user.wait_ready("vm")
        answer: dict[str, Any] = {}

        async def shows(least: float, most: float) -> bool:
            nonlocal answer
            status, answer = await busy(client, user, "vm")
            return status == 200 and least <= answer["busyVCPUs"] <= most

        await until(lambda: shows(0, 0.5), WAIT, lambda: f"an idle guest: {answer}")
        assert (answer["vcpus"], answer["source"]) == (2, "GuestAgent")
        await guest.shell("(while :; do :; done) & echo $! > /run/load; (while :; do :; done) & echo $! >> /run/load")
        # Without KVM a guest does not count the time in which a busy host does not run its vCPUs.
        await until(lambda: shows(0.75, 2), WAIT, lambda: f"two busy loops: {answer}")
        await guest.shell("kill $(cat /run/load)")
        await until(lambda: shows(0, 0.5), WAIT, lambda: f"an idle guest again: {answer}")


async def test_a_standby_says_that_it_does_not_manage_the_set(
    control_plane: ControlPlane, folder: Path, socket_root: Path, user: User
) -> None:
    """The metrics API asks all replicas, and relies on it."""
    flags = (f"--namespace={user.namespace}", "--leader-elect", f"--leader-elect-namespace={user.namespace}")
    async with (
        FaultyMonitor(folder / "vm.sock"),
        OperatorProcess(control_plane, *flags, socket_root=socket_root) as leader,
    ):
        await user.create("vm", 2, "vm.sock")
        await user.wait_ready("vm")
        async with (
            OperatorProcess(control_plane, *flags, socket_root=socket_root) as standby,
            aiohttp.ClientSession(leader.url) as leaders,
            aiohttp.ClientSession(standby.url) as standbys,
        ):
            assert (await busy(standbys, user, "vm"))[1]["reason"] == "NotServed"
            # Which of the two depends on whether it has asked QEMU already.
            assert (await busy(leaders, user, "vm"))[1]["reason"] in {"NoSource", "NoSample"}
