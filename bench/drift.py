"""How long a machine that another client has changed stays wrong: three ways to keep it at its count, within one run.

    operator            with default settings: it stays connected, and hears of events and new sockets
    operator, OnDemand  with `spec.monitor.connection: OnDemand`: observes every 60 s ± 10 %, and hears of new sockets
    15 s poll           a controller that connects every 15 s, as NeonVM's does, and repairs all at once

    unplugged           another client unplugs a CPU: from the moment in which it is gone
    plugged             another client plugs a CPU: from the moment QEMU has it (a guest needs time to release it)
    restarted           QEMU is killed and started again, with fewer CPUs: from the moment in which its socket is made

Each time ends when `query-cpus-fast`, read through a monitor of its own, shows the declared count again. Linux guests
are unplugged and plugged; machines without a guest (`-S`) are restarted, since what a boot takes is not the question.

What waits for a look takes as long as the next look is away. So each event comes at a random moment of the interval,
and since that takes its time, the slow ways have several machines each, and all go on at once. The other machines are
idle, but under TCG they cost something all the same: the times below a second are longer than on a host with nothing
else to do. Twelve rounds take six to eight minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.latency import bring, circumstances
from qemu.qmp import ConnectError, QMPError

from harness.controlplane import ControlPlane
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.saved import saved_guest
from harness.world import User

BOOTED, DECLARED = 2, 4
MAXCPUS = 240
"""Under TCG the boot CPUs and all plugs ever made count against it."""
FOREIGN_SLOT = 9
POLL_SECONDS = 0.002
"""How often the count is read at first; later it is every hundredth of the time that has passed."""
TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True)
class Way:
    """A way to keep machines at their count.

    interval_seconds  events come at a random moment of it
    machines          how many share the rounds
    spec              what the VCPUSets declare beside this; None: there are none, another client keeps the machines
    """

    name: str
    interval_seconds: float
    machines: int
    spec: Mapping[str, Any] | None


POLL = Way("15 s poll", 15.0, 2, None)
WAYS = (
    Way("operator", 15.0, 1, {}),
    Way("operator, OnDemand", 60.0, 4, {"connection": "OnDemand"}),
    POLL,
)
EVENTS = ("unplugged", "plugged", "restarted")

Times = dict[tuple[str, str], list[float]]
"""Seconds, by event and way."""


async def threads(observer: Raw) -> set[int]:
    """The threads of the machine's CPUs: they tell a CPU from the one that takes its place."""
    return {cpu["thread-id"] for cpu in await observer.call("query-cpus-fast")}


async def until_seen(observer: Raw, holds: Callable[[set[int]], bool]) -> float:
    """Read the CPUs until something holds for them; the time at which it did."""
    begun = time.time()
    while not holds(await threads(observer)):
        passed = time.time() - begun
        if passed > TIMEOUT_SECONDS:
            raise TimeoutError(f"not repaired within {TIMEOUT_SECONDS:g} s")
        await asyncio.sleep(max(POLL_SECONDS, passed / 100))
    return time.time()


async def unplugged(observer: Raw) -> float:
    """Another client unplugs a CPU; seconds until there is another."""
    cpus = await observer.call("query-cpus-fast")
    theirs = cpus[-1]["thread-id"]
    await observer.call("device_del", {"id": cpus[-1]["qom-path"]})
    gone = await until_seen(observer, lambda seen: theirs not in seen)
    return await until_seen(observer, lambda seen: len(seen) == DECLARED) - gone


async def plugged(observer: Raw) -> float:
    """Another client plugs a CPU; seconds until there is one less."""
    await observer.device_add(FOREIGN_SLOT, f"foreign-{random.getrandbits(32):08x}")
    plugged_at = time.time()
    return await until_seen(observer, lambda seen: len(seen) == DECLARED) - plugged_at


async def restarted(guest: Guest) -> float:
    """QEMU is killed and started again; seconds from the new socket to the count."""
    guest.kill()
    starting = asyncio.ensure_future(guest.start())
    async with _session(guest.control) as observer:
        repaired = await until_seen(observer, lambda seen: len(seen) == DECLARED)
    await starting
    return repaired - guest.monitors[0].lstat().st_mtime


@asynccontextmanager
async def _session(monitor: Path) -> AsyncIterator[Raw]:
    """A session with a QEMU that is just being started, as soon as there can be one."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            client = Raw()
            try:
                await client.connect(str(monitor))
            except ConnectError:
                await asyncio.sleep(POLL_SECONDS)
            else:
                break
    try:
        yield client
    finally:
        await client.disconnect()


async def keep_by_polling(monitor: Path) -> None:
    """Every 15 seconds, from a random moment on, bring a machine to its count; what fails is for the next time."""
    due = time.monotonic() + random.uniform(0, POLL.interval_seconds)
    while True:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        with contextlib.suppress(QMPError, OSError, EOFError):
            async with raw(monitor, hopeless=lambda: True) as client:
                await bring(client, DECLARED)
        due += POLL.interval_seconds


async def at_a_random_moment(way: Way, event: Callable[[], Awaitable[None]]) -> None:
    """Let an event happen at a random moment of the way's interval."""
    await asyncio.sleep(random.uniform(0, way.interval_seconds))
    await event()


class Run:
    """The machines, who keeps them, and the times."""

    def __init__(self, stack: AsyncExitStack, keepers: asyncio.TaskGroup, user: User, folder: Path) -> None:
        self.times: Times = defaultdict(list)
        self.version: Mapping[str, Any] = {}
        self._stack = stack
        self._keepers = keepers
        self._user = user
        self._folder = folder
        self.polling: list[asyncio.Task[None]] = []

    async def changes(self, way: Way, number: int, rounds: Iterator[int]) -> Callable[[], Awaitable[None]]:
        """Make a machine with a guest; what is returned lets a client change it as long as there are rounds."""
        monitor = self._folder / f"changed-{WAYS.index(way)}-{number}.sock"
        smp = f"{BOOTED},maxcpus={MAXCPUS}"
        guest = await self._stack.enter_async_context(saved_guest(smp=smp, monitor_paths=[monitor]))
        observer = await self._stack.enter_async_context(raw(guest.control))
        self.version = (await observer.call("query-version"))["qemu"]
        await self._keep(way, monitor)

        async def unplug() -> None:
            self._note("unplugged", way, await unplugged(observer))
            await guest.wait_online(DECLARED)

        async def plug() -> None:
            self._note("plugged", way, await plugged(observer))
            await guest.wait_online(DECLARED)

        async def go() -> None:
            await until_seen(observer, lambda seen: len(seen) == DECLARED)
            await guest.wait_online(DECLARED)
            for number in rounds:
                if way.spec is not None:
                    # A new generation: or so many changes by another client would be reported as contested.
                    await self._user.change(monitor.stem, unplug={"retrySeconds": 301 + number})
                await at_a_random_moment(way, unplug)
                await at_a_random_moment(way, plug)

        return go

    async def restarts(self, way: Way, number: int, rounds: Iterator[int]) -> Callable[[], Awaitable[None]]:
        """Make a machine without a guest; what is returned kills and starts it as long as there are rounds."""
        monitor = self._folder / f"restarted-{WAYS.index(way)}-{number}.sock"
        smp = f"{BOOTED},maxcpus={MAXCPUS}"
        guest = await self._stack.enter_async_context(Guest(None, smp=smp, monitor_paths=[monitor]))
        await self._keep(way, monitor)

        async def restart() -> None:
            self._note("restarted", way, await restarted(guest))

        async def go() -> None:
            async with raw(guest.control) as observer:
                await until_seen(observer, lambda seen: len(seen) == DECLARED)
            for _ in rounds:
                await at_a_random_moment(way, restart)

        return go

    async def _keep(self, way: Way, monitor: Path) -> None:
        if way.spec is None:
            self.polling.append(self._keepers.create_task(keep_by_polling(monitor)))
        else:
            await self._user.create(monitor.stem, DECLARED, monitor.name, **way.spec)

    def _note(self, event: str, way: Way, seconds: float) -> None:
        self.times[event, way.name].append(seconds)
        print(f"{event}, {way.name}: {seconds:.3f} s", flush=True)


def compared(seconds: float, base: float) -> str:
    """How much sooner or later than the base."""
    if seconds == base:
        return "1"
    return f"{base / seconds:.3g} x sooner" if seconds < base else f"{seconds / base:.3g} x later"


def table(times: Times) -> str:
    """The result as Markdown."""
    lines = ["| event | method | median | min | max | relative to polling |", "| --- | --- | --- | --- | --- | --- |"]
    for event in EVENTS:
        base = statistics.median(times[event, POLL.name])
        for way in WAYS:
            found = times[event, way.name]
            median = statistics.median(found)
            cells = (
                event,
                way.name,
                *(f"{each:.2f} s" for each in (median, min(found), max(found))),
                compared(median, base),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


async def measure(rounds: int) -> None:
    """The whole run."""
    root = Path(tempfile.mkdtemp(prefix="vcpuset-bench-"))
    try:
        async with ControlPlane() as control_plane, AsyncExitStack() as stack:
            await control_plane.install_crd()
            user = User(control_plane, await control_plane.namespace())
            folder = root / user.namespace
            folder.mkdir()
            await stack.enter_async_context(OperatorProcess(control_plane, socket_root=root))
            async with asyncio.TaskGroup() as keepers:
                run = Run(stack, keepers, user, folder)
                going = []
                for make in (run.changes, run.restarts):
                    for way in WAYS:
                        shared = iter(range(rounds))
                        going += [await make(way, number, shared) for number in range(way.machines)]
                await asyncio.gather(*(go() for go in going))
                for task in run.polling:
                    task.cancel()
    finally:
        shutil.rmtree(root)
    print(f"\n{circumstances(run.version)}, {rounds} rounds\n")
    print(table(run.times))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="how often each way meets each event")
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
