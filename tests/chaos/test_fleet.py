"""Nodes with an agent each and a controller, for a while in which nothing stands still.

Sets are created, resized, moved from one owner to another and deleted, and agents and controllers are killed, in an
order that a fixed seed decides, and then the seed of the run (`harness.effort`). A release runs ten nodes for five
minutes, `make test` fewer for less.

Installed is what `deploy/` ships, with its accounts, roles and policies: each pod is a process that runs as its
manifest says (`harness.kubelet`). The machines are simulated, and each can be reached on every node and over TCP, as if
it moved along with its set.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from harness.container import WHY_NOT
from harness.effort import LONG, SEED
from harness.kubelet import ALLOW_LOOPBACK, Nodes, cluster, install
from harness.simulation import Simulation
from harness.wait import until
from harness.world import User

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

FIXED_SEED: Final = 20261123
STORY_SECONDS: Final = 300.0 if LONG else 50.0
STEP_SECONDS: Final = 0.25
KILL_SECONDS: Final = 8.0 if LONG else 5.0
SETTLE_SECONDS: Final = 240.0

NODES: Final = tuple(f"node-{number}" for number in range(10 if LONG else 4))
OWNERS: Final = (None, *NODES)
"""None: the controller."""
MACHINES: Final = 60 if LONG else 24
BOOT_VCPUS: Final = (2, 4)
SLOTS: Final = 8
GROUP: Final = 65532
"""The agents' group."""
UNPLUG: Final = {"timeoutSeconds": 3, "retrySeconds": 5}
"""What an operator that was killed has written down and perhaps never asked is asked after three seconds, not sixty."""

AGENT: Final = "system:serviceaccount:vcpuset-agent:vcpuset-agent"
CONTROLLER: Final = "system:serviceaccount:vcpuset-system:vcpuset-controller"


@dataclass
class Machine:
    """A simulated machine, and what is declared of it; no owner and no count: it has no set."""

    name: str
    vcpus: int
    port: int = 0
    declared: int | None = None
    owner: str | None = None

    def place(self, owner: str | None) -> dict[str, Any]:
        """The part of a spec that says who serves it, and where; as a merge-patch, it moves a set there."""
        tcp = {"host": "127.0.0.1", "port": self.port, "insecure": True}
        monitor = {"unix": None, "tcp": tcp} if owner is None else {"unix": {"path": f"{self.name}.sock"}, "tcp": None}
        return {"nodeName": owner, "monitor": monitor}


@dataclass
class Fleet:
    """The cluster and its machines."""

    nodes: Nodes
    user: User
    simulation: Simulation
    machines: list[Machine]
    done: Counter[str] = field(default_factory=Counter)
    """What has happened, and how often."""

    async def step(self, chance: random.Random) -> None:
        """One change that a user makes."""
        machine = chance.choice(self.machines)
        owner, vcpus = chance.choice(OWNERS), chance.randint(1, SLOTS)
        what = chance.choices(("resize", "move", "move and resize", "delete"), (50, 20, 15, 15))[0]
        if machine.declared is None:
            what = "create"
            spec = {key: value for key, value in machine.place(owner).items() if value is not None}
            spec["monitor"] = {key: value for key, value in spec["monitor"].items() if value is not None}
            await self.user.create(machine.name, vcpus, spec.pop("monitor").get("tcp"), unplug=UNPLUG, **spec)
        elif what == "delete":
            await self.user.delete(machine.name)
        elif what == "resize":
            await self.user.change(machine.name, vcpus=vcpus)
        elif what == "move":
            await self.user.change(machine.name, **machine.place(owner))
        else:
            await self.user.change(machine.name, vcpus=vcpus, **machine.place(owner))
        if what == "delete":
            machine.declared = None
        if what in {"create", "move", "move and resize"}:
            machine.owner = owner
        if what in {"create", "resize", "move and resize"}:
            machine.declared = vcpus
        self.done[what] += 1

    def kill(self, chance: random.Random) -> None:
        """End an agent or a controller with SIGKILL; its node starts it again."""
        pod = chance.choice(sorted(self.nodes.pods, key=lambda pod: (pod.namespace, pod.node)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pod.pid, signal.SIGKILL)
            self.done["kill an agent" if pod.namespace == "vcpuset-agent" else "kill a controller"] += 1

    def look(self) -> None:
        """Take note of what the machines have come to."""
        machines = {machine.name: machine for machine in self.machines}
        for news in self.simulation.news():
            machines[news.machine].vcpus = news.vcpus

    async def unsettled(self) -> list[str]:
        """The sets that are not what they are declared to be, or do not say so."""
        self.look()
        wrong = []
        for machine in self.machines:
            if machine.declared is None:
                continue
            seen = await self.user.get(machine.name)
            # A request of a process that was killed may not have been sent: that cannot be known, and is said.
            is_reported = not seen.pending or "may still unplug" in seen.message
            if not (seen.ready and machine.vcpus == machine.declared == seen.vcpus and is_reported):
                wrong.append(f"{machine} {json.dumps(seen.status)}")
        return wrong


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: Path) -> None:
    """Connect a client of a TCP port to a unix socket."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    try:
        far_reader, far_writer = await asyncio.open_unix_connection(socket)
    except OSError:
        writer.close()
        return
    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))


@contextlib.asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[Fleet]:
    """All of it, with no set yet."""
    async with contextlib.AsyncExitStack() as stack:
        control_plane, nodes = await stack.enter_async_context(cluster(*NODES, status_in_audit=True))
        await install(control_plane, nodes, ALLOW_LOOPBACK)
        user = User(control_plane, await control_plane.namespace("tenant"))
        sockets = nodes.directory / "machines"
        sockets.mkdir()
        simulation = await stack.enter_async_context(
            Simulation(sockets, MACHINES, cpus=BOOT_VCPUS, slots=SLOTS, logs=folder)
        )
        machines = [Machine(f"vm-{number}", BOOT_VCPUS[number % len(BOOT_VCPUS)]) for number in range(MACHINES)]
        for node in NODES:
            (nodes.node(node).path("/run/vcpuset") / user.namespace).mkdir()
        for machine in machines:
            socket = sockets / f"{machine.name}.sock"
            os.chown(socket, -1, GROUP)
            socket.chmod(0o660)
            for node in NODES:
                os.link(socket, nodes.node(node).path("/run/vcpuset") / user.namespace / socket.name)

            async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: Path = socket) -> None:
                await relay(reader, writer, socket)

            server = await asyncio.start_server(served, "127.0.0.1")
            stack.callback(server.close)
            machine.port = server.sockets[0].getsockname()[1]
        yield Fleet(nodes, user, simulation, machines)


@pytest.mark.timeout(1500)
async def test_a_fleet_ends_as_declared_whoever_is_moved_or_killed_and_nobody_has_written_a_set_of_others() -> None:
    with tempfile.TemporaryDirectory(prefix="vcpuset-fleet-") as folder:
        async with fleet(Path(folder)) as all_of_it:
            control_plane = all_of_it.user.control_plane
            begun = time.monotonic()
            next_death = begun + KILL_SECONDS
            steps = int(STORY_SECONDS / STEP_SECONDS)
            for number in range(steps):
                if number in {0, steps // 2}:
                    seed = SEED if number else FIXED_SEED
                    chance, death = random.Random(seed), random.Random(seed + 1)
                await all_of_it.step(chance)
                if time.monotonic() > next_death:
                    next_death += KILL_SECONDS
                    all_of_it.kill(death)
                # The story has a pace, not only an order.
                await asyncio.sleep(max(0.0, begun + number * STEP_SECONDS - time.monotonic()))

            wrong: list[str] = []

            async def settled() -> bool:
                nonlocal wrong
                wrong = await all_of_it.unsettled()
                return not wrong

            def evidence() -> str:
                said = "\n".join(f"{pod.name} on {pod.node}: {pod.text()[-1500:]}" for pod in all_of_it.nodes.pods)
                return f"all sets to be as declared (seed {SEED}, {all_of_it.done}):\n" + "\n".join(wrong) + said

            await until(settled, SETTLE_SECONDS, evidence, interval=1.0)
            assert sum(machine.declared is not None for machine in all_of_it.machines) > MACHINES / 2

            writes = [
                event
                for event in control_plane.audit_events()
                if event.resource == "vcpusets" and event.user in {AGENT, CONTROLLER} and event.is_write
            ]
            written = [event for event in writes if event.code == 200]
            assert {(event.verb, event.subresource) for event in writes} == {("patch", "status")}
            # 504: on a very busy host the API server gives up.
            codes = Counter(event.code for event in writes)
            assert codes.keys() <= {200, 404, 409, 403, 504}, codes
            # Who wrote, and whose set it was when it had been written. The controller's sets name no node.
            strangers = [
                f"{event.user} on {event.node}: {event.name} of {event.result['spec'].get('nodeName')}"
                for event in written
                if event.result["spec"].get("nodeName") != (event.node if event.user == AGENT else None)
            ]
            assert strangers == []
            # All of them have worked.
            assert {event.node for event in written if event.user == AGENT} == set(NODES)
            assert any(event.user == CONTROLLER for event in written)
            # No agent has ended but those that were killed.
            agents = [pod for pod in all_of_it.nodes.pods if pod.namespace == "vcpuset-agent"]
            assert sum(pod.restarts for pod in agents) <= all_of_it.done["kill an agent"]
