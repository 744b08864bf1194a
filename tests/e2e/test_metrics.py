"""What a real operator's metrics say of a real machine, whose guest is played by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from harness.acpi import Acpi, Status
from harness.controlplane import ControlPlane
from harness.faulty import FaultyMonitor, Silent
from harness.faultyagent import FaultyAgent
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import raw
from harness.wait import until
from harness.world import User

__all__: list[str] = []

WAIT = 90.0


class Shown:
    """The metrics of an operator, and those of one set in them."""

    def __init__(self, operator: OperatorProcess, user: User, name: str) -> None:
        self._operator = operator
        self._of_set = {"namespace": user.namespace, "name": name}

    def value(self, name: str, /, **labels: str) -> float | None:
        """The sample with exactly these labels."""
        for family in text_string_to_metric_families(self._operator.metrics()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return None

    def of_set(self, name: str, /, **labels: str) -> float | None:
        """A sample of the set."""
        return self.value(name, **self._of_set, **labels)

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait until something holds; fails with all metrics."""
        await until(holds, WAIT, lambda: f"{what} in\n{self._operator.metrics()}")


async def test_plugs_refusals_unplugs_and_their_times_are_in_the_metrics(
    control_plane: ControlPlane, folder: Path, socket_root: Path, user: User
) -> None:
    flags = (f"--namespace={user.namespace}", "--resync-seconds=3600")
    async with (
        Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
        raw(guest.control) as client,
        OperatorProcess(control_plane, *flags, socket_root=socket_root) as operator,
    ):
        acpi = Acpi(client)
        await acpi.leave_legacy()
        shown = Shown(operator, user, "vm")

        await user.create("vm", 4, "vm.sock")
        await user.wait_ready("vm")
        await shown.until("a plugged machine", lambda: shown.of_set("vcpuset_current_vcpus") == 4)
        assert shown.of_set("vcpuset_desired_vcpus") == 4
        assert shown.of_set("vcpuset_online_vcpus") is None
        assert shown.of_set("vcpuset_not_ready_seconds") == 0
        assert shown.of_set("vcpuset_state", state="Ready", reason="Converged") == 1
        assert shown.value("vcpuset_sets", state="Ready", reason="Converged") == 1
        assert shown.value("vcpuset_plugs_total", result="done") == 2
        assert shown.value("vcpuset_qmp_command_duration_seconds_count", command="device_add") == 2
        assert (shown.value("vcpuset_qmp_command_duration_seconds_count", command="query-cpus-fast") or 0) >= 2
        assert shown.value("vcpuset_convergence_seconds_count") == 1
        assert (shown.value("rest_client_requests_total", method="PATCH", code="200") or 0) >= 1

        for slot in (2, 3):
            await acpi.insert(slot)
        await user.change("vm", vcpus=3)

        async def removing() -> bool:
            return (await acpi.flags(3)).removing

        await until(removing, WAIT, "a request for slot 3")
        assert shown.of_set("vcpuset_pending_unplugs") == 1
        await acpi.refuse(3, Status.BUSY)
        await shown.until("a refusal", lambda: shown.value("vcpuset_unplugs_total", result="refused") == 1)

        # The next candidate is asked for in its place.
        async def removing_next() -> bool:
            return (await acpi.flags(2)).removing

        await until(removing_next, WAIT, "a request for slot 2")
        assert (shown.of_set("vcpuset_not_ready_seconds") or 0) >= 0
        await acpi.eject(2)
        await user.wait_ready("vm")
        await shown.until("an unplugged machine", lambda: shown.of_set("vcpuset_current_vcpus") == 3)
        assert shown.value("vcpuset_unplugs_total", result="done") == 1
        assert shown.value("vcpuset_unplugs_total", result="timed_out") == 0
        assert shown.value("vcpuset_convergence_seconds_count") == 2

        await user.delete("vm")
        await shown.until("no series of a set that is gone", lambda: shown.of_set("vcpuset_desired_vcpus") is None)
        assert shown.value("vcpuset_sets", state="Ready", reason="Converged") == 0


async def test_a_guest_that_does_not_answer_in_time_and_one_that_leaves_cpus_offline_are_in_the_metrics(
    control_plane: ControlPlane, folder: Path, socket_root: Path, user: User
) -> None:
    flags = (f"--namespace={user.namespace}", "--resync-seconds=3600")
    async with (
        FaultyMonitor(folder / "vm.sock") as monitor,
        FaultyAgent(folder / "ga.sock", offline={1}) as agent,
        OperatorProcess(control_plane, *flags, socket_root=socket_root) as operator,
    ):
        monitor.cpus.unplug[1] = Silent()
        shown = Shown(operator, user, "vm")

        await user.create("vm", 2, "vm.sock", guestAgent={"unix": {"path": "ga.sock"}})
        await user.wait_reason("vm", "GuestCPUsOffline")
        await shown.until("CPUs that are offline", lambda: shown.of_set("vcpuset_online_vcpus") == 1)
        assert shown.of_set("vcpuset_current_vcpus") == 2
        assert shown.value("vcpuset_sets", state="Reconciling", reason="GuestCPUsOffline") == 1
        agent.online = {0, 1}
        await user.touch("vm")
        await user.wait_ready("vm")
        await shown.until("CPUs that are online", lambda: shown.of_set("vcpuset_online_vcpus") == 2)

        await user.change("vm", vcpus=1, unplug={"timeoutSeconds": 1})
        await user.wait_reason("vm", "UnplugTimedOut")
        await shown.until("a time-out", lambda: shown.value("vcpuset_unplugs_total", result="timed_out") == 1)
        assert shown.value("vcpuset_sets", state="Stalled", reason="UnplugTimedOut") == 1
        assert shown.of_set("vcpuset_pending_unplugs") == 1
