"""The ScaledObject of docs/autoscaling.md, on a real API server that has KEDA's definition of it.

KEDA itself does not run here. The autoscaler that it makes, as its source has it, is on the page too, and drives a
machine in `test_autoscaler`.
"""

from __future__ import annotations

import copy
import json
from typing import Any, Final

import pytest

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.processes import CommandFailed

__all__: list[str] = []

PAGE: Final = Page(REPOSITORY / "docs" / "autoscaling.md")
KEDA: Final = REPOSITORY / "tests" / "harness" / "keda"

Manifest = dict[str, Any]


async def test_an_api_server_with_kedas_definition_accepts_the_pages_scaled_object_and_no_misspelled_field() -> None:
    async with ControlPlane() as control_plane:
        await control_plane.install_crd(KEDA)

        async def apply(manifest: Manifest) -> Manifest:
            command = ("apply", "--server-side", "--validate=strict", "--output=json", "--filename=-")
            done = await control_plane.kubectl(*command, input=json.dumps(manifest))
            applied: Manifest = json.loads(done.stdout)
            return applied

        page = PAGE.manifest("ScaledObject", "web")
        assert (await apply(page))["spec"] == page["spec"]

        misspelled, untyped = copy.deepcopy(page), copy.deepcopy(page)
        misspelled["spec"]["minReplicasCount"] = 1
        untyped["spec"]["maxReplicaCount"] = "16"
        for manifest, why in ((misspelled, r"\.spec\.minReplicasCount"), (untyped, r"spec\.maxReplicaCount")):
            with pytest.raises(CommandFailed, match=why):
                await apply(manifest)


def test_the_pages_scaled_object_is_about_the_pages_set_and_keda_makes_the_pages_autoscaler_of_it() -> None:
    """As KEDA's controllers/keda/hpa.go does; KEDA itself does not run here."""
    scaled = PAGE.manifest("ScaledObject", "web")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    spec = scaled["spec"]
    vcpuset = PAGE.manifest("VCPUSet", "web")
    kind = {key: vcpuset[key] for key in ("apiVersion", "kind")}
    assert spec["scaleTargetRef"] == {**kind, "name": vcpuset["metadata"]["name"]}
    assert vcpuset["spec"]["minVCPUs"] <= spec["minReplicaCount"] <= spec["maxReplicaCount"]
    assert spec["maxReplicaCount"] <= vcpuset["spec"]["maxVCPUs"]
    (trigger,) = spec["triggers"]
    # Otherwise KEDA takes "no data" for 0, and the machine is shrunk to minReplicaCount.
    assert trigger["metadata"]["ignoreNullValues"] == "false"
    name = scaled["metadata"]["name"]
    assert PAGE.manifest("HorizontalPodAutoscaler", f"keda-hpa-{name}")["spec"] == {
        "scaleTargetRef": spec["scaleTargetRef"],
        "minReplicas": spec["minReplicaCount"],
        "maxReplicas": spec["maxReplicaCount"],
        "metrics": [
            {
                "type": "External",
                "external": {
                    "metric": {
                        "name": f"s0-{trigger['type']}",
                        "selector": {"matchLabels": {"scaledobject.keda.sh/name": name}},
                    },
                    "target": {"type": trigger["metricType"], "averageValue": trigger["metadata"]["threshold"]},
                },
            }
        ],
    }
