"""The ScaledObjects of docs/autoscaling.md, on a real API server that has KEDA's definition of it.

KEDA itself does not run here. The autoscaler that it makes, as its source has it, is on the page too, and drives a
machine in `test_autoscaler`.
"""

from __future__ import annotations

import copy
import json
from typing import Any, Final

import pytest
import yaml

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.processes import CommandFailed

__all__: list[str] = []

PAGE: Final = Page(REPOSITORY / "docs" / "autoscaling.md")
NAMES: Final = ("web", "web-by-busy-vcpus")
KEDA: Final = REPOSITORY / "tests" / "harness" / "keda"

Manifest = dict[str, Any]


async def test_an_api_server_with_kedas_definition_accepts_the_pages_scaled_objects_and_no_misspelled_field() -> None:
    async with ControlPlane() as control_plane:
        await control_plane.install_crd(KEDA)

        async def apply(manifest: Manifest) -> Manifest:
            command = ("apply", "--server-side", "--validate=strict", "--output=json", "--filename=-")
            done = await control_plane.kubectl(*command, input=json.dumps(manifest))
            applied: Manifest = json.loads(done.stdout)
            return applied

        for name in NAMES:
            page = PAGE.manifest("ScaledObject", name)
            assert (await apply(page))["spec"] == page["spec"]

        misspelled, untyped = copy.deepcopy(page), copy.deepcopy(page)
        misspelled["spec"]["minReplicasCount"] = 1
        untyped["spec"]["maxReplicaCount"] = "16"
        for manifest, why in ((misspelled, r"\.spec\.minReplicasCount"), (untyped, r"spec\.maxReplicaCount")):
            with pytest.raises(CommandFailed, match=why):
                await apply(manifest)


@pytest.mark.parametrize("name", NAMES)
def test_a_scaled_object_of_the_page_is_about_the_pages_set_and_safe_without_data(name: str) -> None:
    scaled = PAGE.manifest("ScaledObject", name)
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    spec = scaled["spec"]
    vcpuset = PAGE.manifest("VCPUSet", "web")
    kind = {key: vcpuset[key] for key in ("apiVersion", "kind")}
    assert spec["scaleTargetRef"] == {**kind, "name": vcpuset["metadata"]["name"]}
    assert vcpuset["spec"]["minVCPUs"] <= spec["minReplicaCount"] <= spec["maxReplicaCount"]
    assert spec["maxReplicaCount"] <= vcpuset["spec"]["maxVCPUs"]
    (trigger,) = spec["triggers"]
    if trigger["type"] == "prometheus":
        # Otherwise KEDA takes "no data" for 0, and the machine is shrunk to minReplicaCount.
        assert trigger["metadata"]["ignoreNullValues"] == "false"
    else:
        assert trigger["metadata"]["aggregateFromKubeServiceEndpoints"] == "true"


def test_the_metrics_api_trigger_asks_the_service_of_the_agents_for_the_value() -> None:
    (trigger,) = PAGE.manifest("ScaledObject", "web-by-busy-vcpus")["spec"]["triggers"]
    service = yaml.safe_load((REPOSITORY / "deploy" / "parts" / "agent" / "service.yaml").read_text())
    (port,) = service["spec"]["ports"]
    host = "{name}.{namespace}.svc".format_map(service["metadata"])
    # `test_busy` asks an operator at this path, and finds this field.
    path = "/v1/namespaces/default/vcpusets/web/busy"
    assert trigger["metadata"]["url"] == f"http://{host}:{port['port']}{path}"
    assert trigger["metadata"]["valueLocation"] == "busyVCPUs"


def test_keda_makes_the_pages_autoscaler_of_the_pages_scaled_object() -> None:
    """As KEDA's controllers/keda/hpa.go does; KEDA itself does not run here."""
    scaled = PAGE.manifest("ScaledObject", "web")
    name, spec = scaled["metadata"]["name"], scaled["spec"]
    (trigger,) = spec["triggers"]
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
