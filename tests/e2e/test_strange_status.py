"""Statuses that this operator cannot read, as whoever may write statuses can make them: the other sets are served.

The first version's definition admits them, this one's does not.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from harness.controlplane import ControlPlane
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.qmp import count
from harness.wait import until
from harness.world import API, User

__all__: list[str] = []

FIRST_VERSION = Path(__file__).parent / "first_version"

EARLY, LATE = "0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-10:00"
"""Times that the API server stores, and that are none in UTC."""

STRANGE: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("unplug.startedAt", {"unplug": {"startedAt": LATE}}),
    "two": (
        "unplug.requests.requestedAt",
        {
            "unplug": {
                "requests": [
                    {"slot": 1, "path": "/machine/peripheral/vcpu1", "threadID": 1, "requestedAt": EARLY, "attempts": 1}
                ]
            }
        },
    ),
    "three": (
        "conditions.lastTransitionTime",
        {
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "Converged", "message": "", "lastTransitionTime": LATE}
            ]
        },
    ),
}
"""Sets, and what is strange about them: the field, and the status."""


async def test_sets_with_strange_times_are_reported_and_left_alone_and_the_others_are_served(tmp_path: Path) -> None:
    async with ControlPlane() as control_plane:
        await control_plane.install_crd(FIRST_VERSION)
        user = User(control_plane, await control_plane.namespace())
        folder = tmp_path / user.namespace
        folder.mkdir()

        async def write(name: str, status: dict[str, Any]) -> None:
            path = f"{API}/namespaces/{user.namespace}/vcpusets/{name}/status"
            answer = await control_plane.request("PATCH", path, {"status": status})
            assert answer.status == 200, answer.body

        async with (
            Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "vm.sock"]) as guest,
            OperatorProcess(control_plane, "--sweep-seconds=1", socket_root=tmp_path) as operator,
        ):

            def reports() -> list[int]:
                """How often each strange set was reported."""
                lines = operator.text().splitlines()
                return [
                    sum(f"/{name} cannot be understood" in line and f"`status.{field}`" in line for line in lines)
                    for name, (field, _) in STRANGE.items()
                ]

            await user.create("vm", vcpus=2)
            await user.wait_ready("vm")
            for name, (_, status) in STRANGE.items():
                await user.create(name, vcpus=2)
                await user.wait_reason(name, "MonitorUnreachable")
                await write(name, status)
            await until(lambda: all(reports()), 60, lambda: f"three reports; the operator said {operator.text()}")
            await until(lambda: operator.sets_served() == 1, 60, "the strange sets not to be served any more")

            # Lists that have them do no harm, and do not report them each time.
            before = lists(operator)
            await until(lambda: lists(operator) >= before + 3, 60, "more lists")
            await user.change("vm", vcpus=3)
            await user.wait_ready("vm")
            assert await count(guest.control) == 3
            already = reports()
            assert max(already) <= 2, "the watch and the list, once each"
            assert is_healthy(operator)

            # Nor do they keep a new process from beginning.
            operator.kill()
            await operator.start()
            await user.change("vm", vcpus=4)
            await user.wait_ready("vm")
            assert await count(guest.control) == 4
            assert all(now > then for now, then in zip(reports(), already, strict=True))

            # Once the status is mended, the set is served again.
            await write("two", {"unplug": None})
            await user.wait_reason("two", "MonitorUnreachable")
            await until(lambda: operator.sets_served() == 2, 60, "the mended set to be served")
            assert "Traceback" not in operator.text()
            operator.require_running()


def lists(operator: OperatorProcess) -> float:
    """How many lists have succeeded, by the operator's metrics."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(operator.metrics())
        for sample in family.samples
        if sample.name == "vcpuset_lists_total"
    )


def is_healthy(operator: OperatorProcess) -> bool:
    """Whether /healthz says so."""
    with urllib.request.urlopen(f"{operator.url}/healthz", timeout=10) as answer:  # noqa: S310 - our own URL
        return bool(answer.status == 200)
