"""Objects of another version of the definition: what this operator cannot read of them, and whom that concerns.

The definition is this version's without its closed lists of values and its limits for times, as a later version's may
be, and an operator is rolled back to this version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.expect import READY, STALLED, settled, shows
from harness.faulty import FaultyMonitor, Silent
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import API, User

__all__: list[str] = []

EARLY, LATE = "0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-10:00"
"""Times that the API server stores, and that are none in UTC."""

THEIRS = {
    "type": "example.com/Audited",
    "status": "True",
    "reason": "Fine",
    "message": "",
    "lastTransitionTime": "2026-01-02T03:04:05.678+01:00",
    "shade": "blue",
}
"""A condition of another owner, with a field that only the later definition has."""


def relaxed(schema: Any) -> Any:  # noqa: ANN401 - JSON
    """A schema without closed lists of values and without patterns, that keeps fields which it does not know."""
    if isinstance(schema, list):
        return [relaxed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: relaxed(value) for key, value in schema.items() if key not in {"enum", "pattern"}}
    if kept.get("type") == "object" and "properties" in kept:
        kept["x-kubernetes-preserve-unknown-fields"] = True
    return kept


def newer(folder: Path) -> Path:
    """A folder with the definition of a later version."""
    crd = yaml.safe_load((REPOSITORY / "crds" / "vcpusets.yaml").read_text())
    for version in crd["spec"]["versions"]:
        fields = version["schema"]["openAPIV3Schema"]["properties"]
        fields.update({name: relaxed(fields[name]) for name in ("spec", "status")})
    folder.mkdir()
    (folder / "vcpusets.yaml").write_text(yaml.safe_dump(crd))
    return folder


async def test_what_a_later_version_wrote_is_read_as_far_as_it_can_be_and_what_cannot_be_obeyed_is_reported(
    tmp_path: Path,
) -> None:
    async with ControlPlane() as control_plane:
        await control_plane.install_crd(newer(tmp_path / "newer"))
        user = User(control_plane, await control_plane.namespace())
        folder = tmp_path / user.namespace
        folder.mkdir()

        async def write(status: dict[str, Any]) -> None:
            path = f"{API}/namespaces/{user.namespace}/vcpusets/vm/status"
            answer = await control_plane.request("PATCH", path, {"status": status})
            assert answer.status == 200, answer.body

        async with (
            FaultyMonitor(folder / "vm.sock", cpus=4) as monitor,
            OperatorProcess(control_plane, socket_root=tmp_path) as operator,
        ):
            monitor.cpus.unplug = {slot: Silent() for slot in range(4)}
            await user.create("vm", 2, unplug={"timeoutSeconds": 3600, "retrySeconds": 3600})
            await until(lambda: len(monitor.received("device_del")) == 2, 60, "two requests")
            before = await user.wait_reason("vm", "UnplugPending")

            # A status that cannot be read as a whole: the requests are known all the same, and not made again.
            await operator.stop()
            sent = len(monitor.received("device_del"))
            # So many attempts that the next one is due in an hour.
            first, second = ({**each, "attempts": 20} for each in before.pending)
            ready, *rest = before.status["conditions"]
            await write(
                {
                    "unplug": {
                        "startedAt": EARLY,
                        "requests": [{**first, "answer": "OnStrike"}, {**second, "requestedAt": LATE}],
                    },
                    "conditions": [{**ready, "lastTransitionTime": LATE}, THEIRS, *rest],
                }
            )
            await operator.start()
            seen = await user.wait(
                "vm", lambda seen: LATE not in str(seen.status) and EARLY not in str(seen.status), "times in order"
            )
            assert [each["slot"] for each in seen.pending] == [first["slot"], second["slot"]]
            assert seen.reason in {"Unplugging", "UnplugPending"}
            kinds = ["Ready", THEIRS["type"], "Reconciling", "Stalled"]
            assert [each["type"] for each in seen.status["conditions"]] == kinds
            for slot in (3, 2):
                monitor.cpus.eject(slot)
            seen = await user.wait_ready("vm")
            assert seen.vcpus == 2
            assert len(monitor.received("device_del")) == sent
            assert [each["type"] for each in seen.status["conditions"]] == kinds
            assert seen.status["conditions"][1] == THEIRS

            # A condition of another owner goes as it came, without a write.
            await write({"conditions": [each for each in seen.status["conditions"] if each != THEIRS]})

            # A spec that cannot be obeyed.
            await user.change("vm", vcpus=6, unplug={"policy": "Sometimes"})
            words = ("spec.unplug.policy: Invalid enum value 'Sometimes'", "upgrade the operator, or correct the field")
            await shows(user, "vm", "UnsupportedSpec", STALLED, *words, vcpus=2)
            await settled(control_plane)
            last = (await user.events("vm"))[-1]
            assert (last["type"], last["reason"]) == ("Warning", "UnsupportedSpec")
            assert unsupported(operator) == 1
            assert monitor.received("device_add") == []

            await user.change("vm", unplug={"policy": "Enabled"})
            await shows(user, "vm", "Converged", READY, vcpus=6)
            assert unsupported(operator) == 0
            assert "cannot be read by this version" not in operator.text()
            operator.require_running()


def unsupported(operator: OperatorProcess) -> float:
    """How many sets have a spec that cannot be obeyed, by the operator's metrics."""
    (value,) = [
        sample.value
        for family in text_string_to_metric_families(operator.metrics())
        for sample in family.samples
        if sample.name == "vcpuset_sets" and sample.labels == {"state": "Stalled", "reason": "UnsupportedSpec"}
    ]
    return value
