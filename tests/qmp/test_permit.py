"""A process that must not act any more sends nothing, whatever it was about to do."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from harness.faulty import FaultyMonitor
from harness.faultyagent import FaultyAgent
from vcpuset.domain.errors import AgentUnreachable, MonitorUnreachable, NotLeading
from vcpuset.domain.resource import UID, Spec, UnixMonitor, VCPUSet
from vcpuset.qmp.agent import Agent
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Session
from vcpuset.qmp.sockets import open_socket

__all__: list[str] = []


class Permit:
    """Given until it is taken away."""

    def __init__(self) -> None:
        self.given = True

    def __call__(self) -> None:
        if not self.given:
            raise NotLeading("another replica may work by now")


@pytest.mark.parametrize("command", ["device_add", "device_del"])
async def test_a_session_sends_no_command_without_a_permit_and_is_over(namespace_folder: Path, command: str) -> None:
    permit = Permit()
    path = namespace_folder / "vm.sock"
    async with FaultyMonitor(path, cpus=2) as machine:
        with open_socket(path.parent.parent, path.parent.name, path.name) as endpoint:
            session = await Session.open(endpoint, lambda: None, permit=permit)
        slots = (await session.observe()).slots
        assert slots is not None
        permit.given = False

        with pytest.raises(MonitorUnreachable, match="another replica may work by now"):
            await (session.plug(slots[5]) if command == "device_add" else session.unplug(slots[1]))

        permit.given = True
        with pytest.raises(MonitorUnreachable):
            await session.observe()
        await session.close()
        # Whoever comes next finds all that was sent before carried out.
        with open_socket(path.parent.parent, path.parent.name, path.name) as endpoint:
            following = await Session.open(endpoint, lambda: None)
        assert (await following.observe()).vcpus == 2
        await following.close()
        assert machine.received(command) == []


async def test_monitors_open_no_session_without_a_permit(namespace_folder: Path) -> None:
    permit = Permit()
    permit.given = False
    monitors = Monitors(namespace_folder.parent, lambda _: None, permit=permit)
    vcpuset = VCPUSet(
        uid=UID("uid"),
        namespace=namespace_folder.name,
        name="vm",
        generation=1,
        resource_version="1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        spec=Spec(vcpus=2, monitor=UnixMonitor("vm.sock")),
    )
    async with FaultyMonitor(namespace_folder / "vm.sock") as machine:
        with await monitors.resolve(vcpuset) as endpoint, pytest.raises(MonitorUnreachable, match="another replica"):
            await monitors.session(vcpuset.uid, endpoint)
        assert machine.commands == []


async def test_an_agent_is_not_asked_to_bring_cpus_online_without_a_permit(namespace_folder: Path) -> None:
    permit = Permit()
    path = namespace_folder / "agent.sock"
    async with FaultyAgent(path, offline={1, 2}) as guest:
        with open_socket(path.parent.parent, path.parent.name, path.name) as endpoint:
            agent = await Agent.open(endpoint, permit=permit)
        offline = (await agent.cpus()).offline
        permit.given = False

        with pytest.raises(AgentUnreachable, match="another replica may work by now"):
            await agent.bring_online(offline)

        await agent.close()
        assert guest.received("guest-set-vcpus") == []
        assert guest.online == {0}
