"""What Argo CD makes of a VCPUSet with the scripts of deploy/gitops/argocd, and what its actions do.

`tests/cluster` runs the same scripts and tests in Argo CD's own interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaError

from harness import gitops
from harness.argocd import PATCH, evaluate, read, script

CASES = gitops.cases()
ACTIONS = read("actions/action_test.yaml")


@pytest.mark.parametrize("case", CASES)
def test_each_reason_has_its_health_and_says_itself(case: str) -> None:
    obj, verdicts = CASES[case]
    health = evaluate(script("health"), obj)
    assert health["status"] == verdicts.argocd
    conditions = obj["status"].get("conditions")
    if conditions is None or conditions[0]["observedGeneration"] != obj["metadata"]["generation"]:
        assert health["message"] == "Waiting for the operator to observe the machine"
    else:
        assert health["message"] == f"{conditions[0]['reason']}: {conditions[0]['message']}"


def test_an_object_without_any_status_is_progressing() -> None:
    assert evaluate(script("health"), {"metadata": {"generation": 1}})["status"] == "Progressing"


@pytest.mark.parametrize("test", read("health_test.yaml")["tests"], ids=lambda test: test["inputPath"])
def test_argo_cds_own_tests_of_the_health_pass(test: dict[str, Any]) -> None:
    assert evaluate(script("health"), read(test["inputPath"])) == test["healthStatus"]


@pytest.mark.parametrize("test", ACTIONS["discoveryTests"], ids=lambda test: test["inputPath"])
def test_argo_cds_own_tests_of_the_list_of_actions_pass(test: dict[str, Any]) -> None:
    found = evaluate(script("actions/discovery"), read(f"actions/{test['inputPath']}"))
    assert [{"name": name, **each} for name, each in sorted(found.items())] == test["result"]


@pytest.mark.parametrize("test", ACTIONS["actionTests"], ids=lambda test: test["action"])
def test_argo_cds_own_tests_of_the_actions_pass(test: dict[str, Any]) -> None:
    made = evaluate(script(f"actions/{test['action']}/action"), read(f"actions/{test['inputPath']}"))
    assert made == read(f"actions/{test['expectedOutputPath']}")


def test_the_patch_of_the_config_map_has_the_scripts_as_they_are() -> None:
    data = yaml.safe_load(PATCH.read_text())["data"]
    assert data.pop("resource.customizations.health.vcpuset.dev_VCPUSet") == script("health")
    actions = yaml.safe_load(data.pop("resource.customizations.actions.vcpuset.dev_VCPUSet"))
    assert actions == {
        "discovery.lua": script("actions/discovery"),
        "definitions": [
            {"name": name, "action.lua": script(f"actions/{name}/action")} for name in ("suspend", "resume")
        ],
    }
    assert not data


@pytest.mark.parametrize("text", ["return string.upper('a')", "return os.time()", "return math.floor(1.5)"])
def test_the_interpreter_lacks_what_argo_cd_does_not_give_to_scripts(text: str) -> None:
    with pytest.raises(LuaError, match="attempt to index global"):
        evaluate(text, {})
