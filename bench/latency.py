"""How long a change takes: 2 → 8 → 2 vCPUs on one guest, three ways, alternating within one run.

    raw       qemu.qmp sends the same commands in bulk: the least that QEMU and the guest need
    operator  from the moment the API server has accepted the patch
    1 CPU/s   a controller that polls once a second and changes one CPU each time

Each time ends when `query-cpus-fast`, read through a monitor of its own, shows the count. Absolute times depend on the
machine (here: software emulation); the ratio to `raw` within one run is what can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

from harness.controlplane import ControlPlane
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import Raw, raw
from harness.saved import saved_guest
from harness.wait import until
from harness.world import User

LOW, HIGH = 2, 8
POLL_SECONDS = 0.002
"""How often the count is read while a change is timed: the resolution of all times."""
MAXCPUS = 240
"""Under TCG the boot CPUs and all plugs ever made count against it."""

Change = Callable[[int], Awaitable[None]]


async def bring(client: Raw, target: int) -> None:
    """What the operator sends, without the operator."""
    slots = await client.slots()
    occupied = [slot for slot in slots if "qom-path" in slot]
    for index, slot in enumerate(slots):
        if "qom-path" not in slot and len(occupied) < target:
            await client.call("device_add", {"driver": slot["type"], "id": f"vcpu{index}", **slot["props"]})
            occupied.append(slot)
    for slot in reversed(occupied[target:]):
        await client.call("device_del", {"id": slot["qom-path"]})


async def bulk(monitor: Path, target: int) -> None:
    """The same on a connection of its own."""
    async with raw(monitor) as client:
        await bring(client, target)


async def one_by_one(monitor: Path, target: int) -> None:
    """One CPU each second, on a connection of its own each time."""
    while True:
        async with raw(monitor) as client:
            present = await client.count()
        if present == target:
            return
        await bulk(monitor, present + (1 if present < target else -1))
        await asyncio.sleep(1)


async def timed(observer: Raw, change: Change, target: int) -> float:
    """Seconds from the start of a change (from its end, where it returns at once) to the count."""
    begun = time.monotonic()
    changing = asyncio.ensure_future(change(target))
    await until(lambda: _has(observer, target), 120, f"{target} vCPUs", interval=POLL_SECONDS)
    seconds = time.monotonic() - begun
    await changing
    return seconds


async def _has(observer: Raw, target: int) -> bool:
    return await observer.count() == target


async def settle(guest: Guest, target: int) -> None:
    """Wait until the guest has finished with a change, so that the next one does not meet it half done."""
    await guest.wait_online(target)
    await asyncio.sleep(0.5)


def table(times: dict[tuple[str, int], list[float]], ways: list[str]) -> str:
    """The result as Markdown."""
    lines = ["| change | method | median | min | max | relative to raw |", "| --- | --- | --- | --- | --- | --- |"]
    for target, name in ((HIGH, f"{LOW} → {HIGH}"), (LOW, f"{HIGH} → {LOW}")):
        base = statistics.median(times["raw", target])
        for way in ways:
            found = times[way, target]
            median = statistics.median(found)
            ratio = f"{median / base:.2f} x ({(median - base) * 1000:+.0f} ms)" if way != "raw" else "1"
            cells = (name, way, *(f"{each * 1000:.0f} ms" for each in (median, min(found), max(found))), ratio)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


async def measure(rounds: int) -> None:
    """The whole run."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    root = Path(tempfile.mkdtemp(prefix="vcpuset-bench-"))
    ways = ["raw", "operator", "1 CPU/s"]
    writes: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    try:
        async with ControlPlane() as control_plane:
            await control_plane.install_crd()
            user = User(control_plane, await control_plane.namespace())
            folder = root / user.namespace
            folder.mkdir()
            sockets = [folder / "vm.sock", root / "tool.sock"]
            async with (
                saved_guest(smp=f"{LOW},maxcpus={MAXCPUS}", monitor_paths=sockets) as guest,
                OperatorProcess(control_plane, socket_root=root) as operator,
                raw(guest.control) as observer,
            ):
                await user.create("vm", LOW, "vm.sock", suspend=True)
                await user.wait_ready("vm")

                async def patch(target: int) -> None:
                    await user.change("vm", vcpus=target)

                async def by_operator(target: int) -> float:
                    offset = control_plane.audit_offset()
                    # The patch itself is not the operator's work: time begins when the API server has accepted it.
                    await patch(target)
                    seconds = await timed(observer, _nothing, target)
                    await user.wait_ready("vm")
                    await settle(guest, target)
                    mine = [each for each in control_plane.audit_events(offset) if each.user_agent == "vcpuset"]
                    status = sum(each.subresource == "status" for each in mine)
                    events = sum(each.resource == "events" for each in mine)
                    writes[target].append((len(mine), status, events))
                    return seconds

                for number in range(rounds):
                    for way in ways:
                        for target in (HIGH, LOW):
                            if way == "operator":
                                await user.change("vm", suspend=False)
                                await user.wait_ready("vm")
                                seconds = await by_operator(target)
                                await user.change("vm", suspend=True)
                                await user.wait_ready("vm")
                            else:
                                act = bulk if way == "raw" else one_by_one
                                seconds = await timed(observer, partial(act, sockets[1]), target)
                                await settle(guest, target)
                            times[way, target].append(seconds)
                    print(f"round {number + 1} of {rounds}", flush=True)
                version = (await observer.call("query-version"))["qemu"]
                memory = operator.rss_bytes() / 1e6
    finally:
        shutil.rmtree(root)
    print(f"\n{circumstances(version)}, {rounds} rounds\n")
    print(table(times, ways))
    print()
    for target, name in ((HIGH, "plug"), (LOW, "unplug")):
        requests, status, events = (statistics.median(column) for column in zip(*writes[target], strict=True))
        print(
            f"{name}: {requests:.0f} API requests per change: {status:.0f} status writes, {events:.0f} Events (median)"
        )
    print(f"operator's resident memory: {memory:.0f} MB")


def circumstances(version: Mapping[str, int]) -> str:
    """What the times depend on; `version` is QEMU's, as it tells it."""
    qemu = ".".join(str(version[part]) for part in ("major", "minor", "micro"))
    return f"QEMU {qemu} under TCG, {os.cpu_count()} cores, Python {platform.python_version()}"


async def _nothing(_: int) -> None:
    return None


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each way is timed in each direction")
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
