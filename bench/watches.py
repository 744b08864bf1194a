"""What the watches of node agents cost one API server: 1, 10, 100 and 1,000 of them.

Each agent has a connection of its own and a watch on the sets of its node (`fieldSelector=spec.nodeName=…`), as
`vcpuset run --node-name` has; it is simulated, and does nothing with what it is told. Another client writes the status
of all sets and then changes their spec. Each write is told to the one agent whose set it is; the API server compares it
with the selectors of all.

    CPU        of the API server, and of etcd, for a write; without what the API server uses while nothing is written
    idle       CPU of the API server while nothing is written, of one core
    memory     of the API server, resident, when all agents watch
    restarted  how many watches the API server has ended, since it was late in writing to them; the agents go on where
               they were

The number of sets is the same in each row, so what grows with the rows is what the watches cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import uvloop
from bench.apiload import Connection, Load
from bench.measure import cpu_seconds, memory, say
from bench.scale import markdown

from harness.controlplane import ControlPlane
from harness.wait import until
from harness.world import API, manifest

AGENTS: Final = "1,10,100,1000"
SETS: Final = 1000
ROUNDS: Final = 2
"""How often each set is written, in each of the two ways."""
WRITERS: Final = 8
"""How many writes are under way at once."""
IDLE_SECONDS: Final = 30.0
WAIT_SECONDS: Final = 120.0
OPENING: Final = 20
"""How many agents connect at once."""


class Agents:
    """Agents that watch, each the sets of its node.

    told   how many changes they have been told of
    began  how many watches have begun: an agent whose watch is ended by the API server goes on where it was
    """

    def __init__(self, control_plane: ControlPlane, version: str) -> None:
        self._control_plane = control_plane
        self._version = version
        self._opening = asyncio.Semaphore(OPENING)
        self._watching: list[asyncio.Task[None]] = []
        self.told = 0
        self.began = 0

    async def open(self, agents: int) -> None:
        """Start the watches, and wait until the API server has answered all of them."""
        self._watching = [asyncio.create_task(self._watch(f"node-{number}")) for number in range(agents)]
        await self.wait(lambda: self.began >= agents, "all watches to begin")

    async def close(self) -> None:
        """End the watches."""
        for each in self._watching:
            each.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)

    async def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Wait for something. Raises what has ended an agent."""

        def held() -> bool:
            for each in self._watching:
                if each.done():
                    each.result()
            return holds()

        await until(held, WAIT_SECONDS, what)

    async def _watch(self, node: str) -> None:
        query = f"watch=1&allowWatchBookmarks=1&fieldSelector=spec.nodeName%3D{node}&resourceVersion="
        version = self._version
        async with self._opening:
            connection = await Connection.open(self._control_plane)
        while True:
            connection.send("GET", f"{API}/vcpusets?{query}{version}")
            await connection.head()
            self.began += 1
            unread = b""
            while chunk := await connection.chunk():
                *lines, unread = (unread + chunk).split(b"\n")
                for event in map(json.loads, lines):
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        assert event["object"]["spec"]["nodeName"] == node
                        self.told += 1


def status(vcpus: int) -> dict[str, Any]:
    """A status as long as the operator's."""
    condition = {"status": "False", "reason": "Converged", "message": f"The machine has {vcpus} vCPUs, as declared"}
    times = {"lastTransitionTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "observedGeneration": vcpus}
    conditions = [{"type": kind, **condition, **times} for kind in ("Ready", "Reconciling", "Stalled")]
    machine = {"uuid": "00000000-0000-0000-0000-000000000001", "minVCPUs": 1, "maxVCPUs": 8}
    return {"observedGeneration": vcpus, "vcpus": vcpus, "machine": machine, "conditions": conditions}


async def measure(agents: int, sets: int) -> list[str]:
    """The row of so many agents."""
    async with AsyncExitStack() as stack:
        control_plane = await stack.enter_async_context(ControlPlane())
        apiserver, etcd = control_plane.pids
        await control_plane.install_crd()
        namespace = await control_plane.namespace("w")
        load = Load(control_plane, namespace)
        names = [f"vm-{number}" for number in range(sets)]
        async with load.connected() as send:
            nodes = (f"node-{number % agents}" for number in range(sets))
            bodies = [manifest(namespace, name, 1, nodeName=node) for name, node in zip(names, nodes, strict=True)]
            await send([("POST", load.path, body) for body in bodies])
        listed = await control_plane.request("GET", f"{load.path}?limit=1")
        watches = Agents(control_plane, listed.body["metadata"]["resourceVersion"])
        await watches.open(agents)
        stack.push_async_callback(watches.close)
        say(f"{agents} agents: all watch")

        begun, used = time.monotonic(), cpu_seconds(apiserver)
        await asyncio.sleep(IDLE_SECONDS)
        idle = (cpu_seconds(apiserver) - used) / (time.monotonic() - begun)
        megabytes = memory(apiserver, "VmRSS")

        async def cost(path: str, bodies: Sequence[Mapping[str, Any]]) -> str:
            writes = watches.told + len(names) * len(bodies)
            async with load.connected(WRITERS) as send:
                begun, used, used_by_etcd = time.monotonic(), cpu_seconds(apiserver), cpu_seconds(etcd)
                for body in bodies:
                    await send([("PATCH", f"{load.path}/{name}{path}", body) for name in names])
                await watches.wait(lambda: watches.told >= writes, "the agents to be told")
                used += idle * (time.monotonic() - begun)
            per_write = 1000 / len(names) / len(bodies)
            cpu, cpu_of_etcd = cpu_seconds(apiserver) - used, cpu_seconds(etcd) - used_by_etcd
            return f"{cpu * per_write:.2f} ms ({cpu_of_etcd * per_write:.2f})"

        counts = range(2, 2 + ROUNDS)
        costs = [
            await cost("/status", [{"status": status(vcpus)} for vcpus in counts]),
            await cost("", [{"spec": {"vcpus": vcpus}} for vcpus in counts]),
        ]
        restarted = watches.began - agents
        say(f"{agents} agents: {costs[0]} per status write, {costs[1]} per spec change, {restarted} restarted")
    return [f"{agents}", *costs, f"{idle * 100:.1f} %", f"{megabytes:.0f} MB", f"{restarted}"]


async def measure_all(agents: Sequence[int], sets: int) -> None:
    """The whole run."""
    rows = [await measure(each, sets) for each in agents]
    head = ["agents", "CPU per status write (etcd)", "CPU per spec change (etcd)", "idle CPU", "memory", "restarted"]
    print(f"\n{os.cpu_count()} cores, {sets} sets\n\n{markdown(head, rows)}")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default=AGENTS, help="how many agents, one number after the other")
    parser.add_argument("--sets", type=int, default=SETS, help="how many sets they have together")
    given = parser.parse_args()
    uvloop.run(measure_all([int(each) for each in given.agents.split(",")], given.sets))


if __name__ == "__main__":
    main()
