"""The operator that a kopf tutorial makes of the same job, to compare with: handlers for changes and a timer.

It is what one writes in an afternoon, and does the job while all goes well: each handler connects to the monitor,
looks, plugs or asks for CPUs all at once, waits for the guest, and puts the count into the status. Nothing in it is
slow on purpose; the timer looks as often as the other operator does. It knows one kind of monitor, and nothing of what
can go wrong.

Run by `kopf run`, with SOCKET_ROOT (the folder with a folder of sockets for each namespace) and RESYNC_SECONDS.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import kopf
from qemu.qmp import QMPClient, QMPError

__all__ = ["changed", "look"]

GROUP, VERSION, PLURAL = "vcpuset.dev", "v1alpha1", "vcpusets"
SOCKET_ROOT = Path(os.environ["SOCKET_ROOT"])
RESYNC_SECONDS = float(os.environ["RESYNC_SECONDS"])
GUEST_SECONDS = 10.0
POLL_SECONDS = 0.25


@kopf.on.create(GROUP, VERSION, PLURAL)
@kopf.on.update(GROUP, VERSION, PLURAL, field="spec")
async def changed(spec: kopf.Spec, namespace: str | None, patch: kopf.Patch, **_: Any) -> None:
    """A set is new or its spec has changed."""
    patch.status["vcpus"] = await bring(spec, namespace or "")


@kopf.timer(GROUP, VERSION, PLURAL, interval=RESYNC_SECONDS, initial_delay=RESYNC_SECONDS)
async def look(spec: kopf.Spec, namespace: str | None, patch: kopf.Patch, **_: Any) -> None:
    """It is time for a look."""
    patch.status["vcpus"] = await bring(spec, namespace or "")


async def bring(spec: kopf.Spec, namespace: str) -> int:
    """Bring a machine to its count; returns the count that it has."""
    target = spec["vcpus"]
    client = QMPClient()
    try:
        await client.connect(str(SOCKET_ROOT / namespace / spec["monitor"]["unix"]["path"]))
        try:
            return await resize(client, target)
        finally:
            await client.disconnect()
    except (QMPError, OSError) as error:
        raise kopf.TemporaryError(str(error), delay=5) from error


async def resize(client: QMPClient, target: int) -> int:
    """Plug what is missing or ask for what is too much, and wait for the guest."""
    slots: Any = await client.execute("query-hotpluggable-cpus")
    free = [slot for slot in reversed(slots) if "qom-path" not in slot]
    occupied = [slot for slot in slots if "qom-path" in slot]
    for slot in free[: max(0, target - len(occupied))]:
        name = f"cpu-{slot['props']['core-id']}"
        await client.execute("device_add", {"driver": slot["type"], "id": name, **slot["props"]})
    for slot in occupied[: max(0, len(occupied) - target)]:
        await client.execute("device_del", {"id": slot["qom-path"]})
    for _ in range(int(GUEST_SECONDS / POLL_SECONDS)):
        present: Any = await client.execute("query-cpus-fast")
        if len(present) == target:
            return target
        await asyncio.sleep(POLL_SECONDS)
    raise kopf.TemporaryError(f"the guest has not unplugged {len(present) - target} CPUs", delay=5)
