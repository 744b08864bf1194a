"""How many vCPUs of one set are busy, as JSON: for KEDA, and for the metrics API."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from vcpuset.kube.cache import Cache
from vcpuset.qmp.meters import OLDEST_SECONDS, Meters

__all__ = ["busy"]


async def busy(cache: Cache, meters: Meters, namespace: str, name: str) -> tuple[int, dict[str, Any]]:
    """HTTP status and answer: 200, or 404 if there is no value. What was not measured is never reported as 0."""
    uid = next((each.uid for each in cache if (each.name, each.namespace) == (name, namespace)), None)
    if uid is None:
        return _none("NotServed", f"this operator does not manage a VCPUSet {namespace}/{name}")
    found = await meters.ask(uid)
    if found is not None:
        demand = meters.demand(uid)
        return 200, {
            "busyVCPUs": round(found.busy, 3),
            **({} if demand is None else {"demandVCPUs": round(demand, 3)}),
            "vcpus": found.vcpus,
            "windowSeconds": round(found.seconds, 3),
            "source": found.source.value,
            "time": found.time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }
    if not meters.has_source(uid):
        return _none(
            "NoSource",
            "neither QEMU (query-stats: it needs KVM and QEMU 7.1) nor a guest agent (spec.guestAgent: Linux, version "
            "7.1) says how busy the vCPUs are",
        )
    return _none("NoSample", f"there are no two samples, or none in the last {OLDEST_SECONDS:g} s")


def _none(reason: str, message: str) -> tuple[int, dict[str, Any]]:
    return 404, {"reason": reason, "message": message}
