"""The first version's definition is replaced by this one's, as docs/install.md has it, under a running operator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import count, execute
from harness.wait import until
from harness.world import User

FIRST_VERSION = Path(__file__).parent / "first_version"


async def test_a_new_definition_leaves_sets_and_machines_as_they_are_and_its_fields_work(
    tmp_path: Path,
) -> None:
    async with ControlPlane() as control_plane:
        await control_plane.install_crd(FIRST_VERSION)
        user = User(control_plane, await control_plane.namespace())
        folder = tmp_path / user.namespace
        folder.mkdir()
        async with (
            Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
            OperatorProcess(control_plane, "--sweep-seconds=2", socket_root=tmp_path) as operator,
        ):
            await user.create("vm", vcpus=4)
            # Of the fields that came later the first version's API server keeps nothing.
            early = await user.create("early", vcpus=2, monitor="other.sock", connection="OnDemand")
            assert "connection" not in early.body["spec"]["monitor"]
            before = await user.wait_ready("vm")
            threads = await vcpus(guest)

            since = control_plane.audit_offset()
            await control_plane.kubectl("apply", "--server-side", "-k", REPOSITORY / "crds")
            await control_plane.kubectl("wait", "--for=condition=Established", "crd/vcpusets.vcpuset.dev")
            await until(lambda: keeps_new_fields(user), 60, "the new definition to be in force")
            after = await user.get("vm")
            for field in ("uid", "generation", "resourceVersion"):
                assert after.body["metadata"][field] == before.body["metadata"][field]
            # What has a default now is shown with it, and it is what was done before.
            monitor = {**before.body["spec"]["monitor"], "connection": "Persistent"}
            assert after.body["spec"] == {**before.body["spec"], "monitor": monitor}
            assert after.status == before.status
            assert await vcpus(guest) == threads
            written = [event for event in control_plane.audit_events(since) if event.is_write and event.name == "vm"]
            assert written == []

            assert await held(guest)
            await user.change("vm", vcpus=5, monitor={"unix": {"path": "vm.sock"}, "connection": "OnDemand"})
            await user.wait_ready("vm")
            assert await count(guest.control) == 5
            # A watch that began with the old definition may have told the set without its new field: then the next list
            # puts that right.
            await until(lambda: free(guest), 60, lambda: f"the monitor to be free; the operator said {operator.text()}")
            # Nor does the watch owe what it has told in its own way: it would never tell it again.
            await until(lambda: owes_nothing(operator), 60, lambda: f"no set to be missing; {operator.metrics()}")
            operator.require_running()


async def keeps_new_fields(user: User) -> bool:
    """Whether a field that the first version did not have is kept."""
    seen = await user.change("early", monitor={"connection": "OnDemand"})
    return bool(seen.body["spec"]["monitor"].get("connection") == "OnDemand")


def owes_nothing(operator: OperatorProcess) -> bool:
    """Whether the watch has brought all that lists have shown, as /healthz goes by it."""
    return "\nvcpuset_watch_missing 0.0\n" in operator.metrics()


async def vcpus(guest: Guest) -> list[Any]:
    """The CPUs and the host's threads that they run in: other ones would have been unplugged and plugged."""
    return [each["thread-id"] for each in await execute(guest.control, "query-cpus-fast")]


async def held(guest: Guest) -> bool:
    """Whether somebody keeps the machine's monitor: QEMU greets one client at a time."""
    reader, writer = await asyncio.open_unix_connection(guest.monitors[0])
    try:
        async with asyncio.timeout(2):
            await reader.readline()
    except TimeoutError:
        return True
    finally:
        writer.close()
    return False


async def free(guest: Guest) -> bool:
    """Whether nobody keeps it."""
    return not await held(guest)
