"""What one operator process bears: a hundred sets, an API server that goes away, and its own end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.controlplane import ControlPlane
from harness.faulty import Delay, Fault, FaultyMonitor, Hang, Silent
from harness.operator import OperatorProcess
from harness.processes import ReservedPort
from harness.qmp import count, device_add, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import Seen, User

SETS = 100
RSS_BYTES = 90_000_000
PATIENCE_SECONDS = 240.0


@dataclass
class Fleet:
    """So many machines, each with a set; the machines are those of `FaultyMonitor`, for a hundred QEMUs need 4 GB."""

    user: User
    machines: dict[str, FaultyMonitor]

    async def declare(self, vcpus: int) -> None:
        """Change all sets at once."""
        await asyncio.gather(*(self.user.change(name, vcpus=vcpus) for name in self.machines))

    async def settled(self, vcpus: int, operator: OperatorProcess) -> None:
        """Wait until each machine has so many CPUs, and each status says so."""

        async def late() -> list[str]:
            operator.require_running()
            items = (await self._list("/apis/vcpuset.dev/v1alpha1"))["items"]
            seen = {body["metadata"]["name"]: Seen(body) for body in items}
            return [
                f"{name} ({seen[name].reason}, {seen[name].vcpus}, {machine.cpus.occupied()})"
                for name, machine in self.machines.items()
                if not (seen[name].ready and seen[name].vcpus == len(machine.cpus.occupied()) == vcpus)
            ]

        missing: list[str] = []

        async def nobody_is() -> bool:
            nonlocal missing
            missing = await late()
            return not missing

        await until(nobody_is, PATIENCE_SECONDS, lambda: f"{vcpus} vCPUs everywhere, also at {missing}")

    async def events_posted(self, reason: str, words: str) -> None:
        """Wait until there is an Event with this reason and these words about each set."""

        async def posted() -> bool:
            items = (await self._list("/apis/events.k8s.io/v1", "events"))["items"]
            found = [each for each in items if each["reason"] == reason and words in each["note"]]
            return {each["regarding"]["name"] for each in found} >= self.machines.keys()

        await until(posted, PATIENCE_SECONDS, f"an Event {reason}, {words!r}, about each set", interval=0.2)

    async def looked_at(self, times: int) -> None:
        """Wait until the operator has looked at each machine so many times more."""

        def looks() -> dict[str, int]:
            return {name: len(machine.received("query-status")) for name, machine in self.machines.items()}

        before = looks()
        await until(
            lambda: all(number >= before[name] + times for name, number in looks().items()),
            PATIENCE_SECONDS,
            f"{times} more looks at each machine",
        )

    async def _list(self, api: str, plural: str = "vcpusets") -> dict[str, Any]:
        path = f"{api}/namespaces/{self.user.namespace}/{plural}"
        answer = await self.user.control_plane.request("GET", path)
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.body
        return found


@contextlib.asynccontextmanager
async def fleet(user: User, folder: Path, vcpus: int) -> AsyncIterator[Fleet]:
    """A hundred machines with so many boot CPUs, and a set for each that declares what is there."""
    async with contextlib.AsyncExitStack() as stack:
        machines = {}
        for number in range(SETS):
            name = f"vm-{number}"
            machines[name] = await stack.enter_async_context(FaultyMonitor(folder / f"{name}.sock", cpus=vcpus))
        await asyncio.gather(*(user.create(name, vcpus, f"{name}.sock") for name in machines))
        yield Fleet(user, machines)


@pytest.mark.timeout(1200)
async def test_a_hundred_idle_sets_cost_no_api_write_and_less_than_90_mb(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User
) -> None:
    """Also when they all changed before."""
    flags = (f"--namespace={user.namespace}", "--resync-seconds=2")
    async with (
        fleet(user, folder, vcpus=2) as machines,
        OperatorProcess(control_plane, *flags, socket_root=socket_root) as operator,
    ):
        await machines.settled(2, operator)
        await machines.declare(5)
        await machines.settled(5, operator)
        await machines.declare(1)
        await machines.settled(1, operator)
        await machines.events_posted("Converged", "QEMU has 1 vCPU,")
        # In the audit log they stand a moment later; a look takes longer.
        await machines.looked_at(1)

        start = control_plane.audit_offset()
        await machines.looked_at(3)
        await user.get("vm-0")
        await until(
            lambda: any(each.verb == "get" and each.name == "vm-0" for each in control_plane.audit_events(start)),
            60,
            "the record of the last request",
        )
        mine = [each for each in control_plane.audit_events(start) if each.namespace == user.namespace]
        assert [each for each in mine if each.is_write] == []
        assert operator.rss_bytes() < RSS_BYTES, operator.metrics()
        operator.require_running()


@pytest.mark.timeout(1200)
async def test_what_happens_while_the_api_server_is_away_is_dealt_with_by_the_same_process(
    socket_root: Path,
) -> None:
    """CPUs of a restarted QEMU come back at once; for a guest to be asked, the request must be written down first."""
    async with ControlPlane() as control_plane:
        await control_plane.install_crd()
        user = User(control_plane, await control_plane.namespace())
        folder = socket_root / user.namespace
        folder.mkdir()
        async with (
            saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "drifts.sock"]) as drifts,
            saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "restarts.sock"]) as restarts,
            OperatorProcess(control_plane, "--resync-seconds=2", socket_root=socket_root) as operator,
        ):
            for name in ("drifts", "restarts"):
                await user.create(name, 4, f"{name}.sock")
            for name in ("drifts", "restarts"):
                await user.wait_ready(name)

            await control_plane.stop_apiserver(kill=True)
            await device_add(drifts.control, 9, ident="stranger")
            await restarts.restart()
            await until(lambda: _has(restarts.control, 4), PATIENCE_SECONDS, f"the CPUs to be back; {operator.tail()}")
            await restarts.wait_online(4)
            await until(
                lambda: operator.text().count("/drifts/status: ") >= 2,
                PATIENCE_SECONDS,
                f"attempts to write the request down; {operator.tail()}",
            )
            assert await count(drifts.control) == 5
            operator.require_running()

            await control_plane.start_apiserver()
            await until(lambda: _has(drifts.control, 4), PATIENCE_SECONDS, f"the drift to be undone; {operator.tail()}")
            for name in ("drifts", "restarts"):
                await user.wait(name, lambda seen: seen.ready and seen.vcpus == 4 and not seen.pending, "4 vCPUs")
            await user.change("drifts", vcpus=6)
            await user.wait_ready("drifts", PATIENCE_SECONDS)
            await drifts.wait_online(6)
            operator.require_running()


@pytest.mark.parametrize(
    ("vcpus", "command", "fault", "afterwards"),
    [
        pytest.param(1, "device_del", None, 4, id="waits-for-the-guest"),
        pytest.param(7, "device_add", Delay(0.3), 7, id="plugs"),
        pytest.param(7, "query-cpus-fast", Hang(), 4, id="waits-for-a-hanging-machine"),
    ],
)
async def test_an_operator_that_is_asked_to_end_finishes_its_pass_and_gives_the_monitor_back(
    control_plane: ControlPlane,
    socket_root: Path,
    folder: Path,
    user: User,
    vcpus: int,
    command: str,
    fault: Fault | None,
    afterwards: int,
) -> None:
    """`command` is the one that is under way when SIGTERM comes; `afterwards` is what the machine has in the end."""
    async with FaultyMonitor(folder / "vm.sock", cpus=4) as machine:
        machine.cpus.unplug = {slot: Silent() for slot in range(8)}
        await user.create("vm", 4, "vm.sock")
        flags = f"--namespace={user.namespace}"
        async with OperatorProcess(control_plane, flags, socket_root=socket_root) as operator:
            await user.wait_ready("vm")
            seen = len(machine.received(command))
            if fault is not None:
                machine.faults[command] = fault
            await user.change("vm", vcpus=vcpus)
            await until(lambda: len(machine.received(command)) > seen, PATIENCE_SECONDS, f"the first {command}")

            assert await operator.stop() == 0, operator.tail()

            machine.faults.clear()
            async with raw(machine.path) as client:
                assert await client.count() == afterwards
            log = operator.text()
            assert "Traceback" not in log, log
            assert "Task was destroyed" not in log, log
        requests = machine.received("device_del")
        assert len(requests) == (3 if command == "device_del" else 0)
        seen_last = await user.get("vm")
        assert len(seen_last.pending) == len(requests)
        assert seen_last.ready == (command == "device_add")


@dataclass
class Nobody:
    """A cluster whose API server is not there."""

    kubeconfig: Path


async def test_an_operator_that_never_reached_the_api_server_ends_when_it_is_asked_to(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    """As the first process of a container it would be deaf to SIGTERM without a handler of its own."""
    async with contextlib.AsyncExitStack() as stack:
        port = ReservedPort()
        stack.callback(port.release)
        away = Nobody(tmp_path / "kubeconfig")
        text = control_plane.kubeconfig.read_text()
        away.kubeconfig.write_text(text.replace(control_plane.url, f"https://127.0.0.1:{port.number}"))
        operator = OperatorProcess(away)
        stack.push_async_exit(operator)  # not entered: it would wait until the operator is ready
        await operator.start(ready=False)
        await until(lambda: "retrying in" in operator.text(), PATIENCE_SECONDS, "the first failure")
        operator.require_running()
        assert await operator.stop() == 0, operator.tail()


async def _has(monitor: Path, vcpus: int) -> bool:
    return await count(monitor) == vcpus
