"""Argo CD's own libraries run the shipped customizations: health, actions, and their tests.

`tests/unit/test_argocd.py` runs the same scripts in another interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest

from harness import gitops
from harness.argocd import PATCH, read
from harness.binaries import ARGOCD
from harness.processes import run
from harness.world import manifest

Manifest = Mapping[str, Any]

PENDING_DELETION: Final = {"status": "Progressing", "message": "Pending deletion"}
"""The health that Argo CD gives to each object that is being deleted."""


async def asked(objects: Sequence[Manifest], **more: Any) -> list[Manifest]:
    """Argo CD's answer for each object: `health`, `actions`, and `results` by the names of the actions.

    more  `git`, the manifest, and `ignoreDifferences`: the answer has `outOfSync`, too
    """
    text = "".join(f"{json.dumps({'live': each, **more})}\n" for each in objects)
    done = await run([ARGOCD.program("argocd"), PATCH], input=text)
    return [json.loads(line) for line in done.stdout.splitlines()]


async def test_each_reason_has_the_health_that_the_page_says() -> None:
    cases = gitops.cases()
    answers = await asked([obj for obj, _ in cases.values()])
    found = {name: answer["health"]["status"] for name, answer in zip(cases, answers, strict=True)}
    assert found == {name: verdicts.argocd for name, (_, verdicts) in cases.items()}


async def test_argo_cd_itself_reports_the_deletion_of_a_set() -> None:
    obj, _ = gitops.cases()["Terminating-Held"]
    (answer,) = await asked([obj])
    assert answer["health"] == PENDING_DELETION


@pytest.mark.parametrize("by", ["client-side", "server-side"])
async def test_a_manifest_without_a_count_is_in_sync_with_every_count_and_one_with_a_count_is_not(by: str) -> None:
    def in_git(vcpus: int | None) -> dict[str, Any]:
        return manifest("default", "web", vcpus, maxVCPUs=8)

    def in_cluster(git: Manifest) -> dict[str, Any]:
        live: dict[str, Any] = read("testdata/healthy.yaml")  # of a manifest like this, with 4 vCPUs
        if by == "client-side":
            annotation = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(git)}
            live["metadata"]["annotations"] = annotation
        return live

    for vcpus, out_of_sync in ((None, False), (2, True), (4, False)):
        git = in_git(vcpus)
        (answer,) = await asked([in_cluster(git)], git=git)
        assert answer["outOfSync"] is out_of_sync, vcpus

    ignored = {"group": "vcpuset.dev", "kind": "VCPUSet", "jsonPointers": ["/spec/vcpus"]}
    (answer,) = await asked([in_cluster(in_git(2))], git=in_git(2), ignoreDifferences=[ignored])
    assert not answer["outOfSync"]


async def test_what_an_action_has_set_is_out_of_sync_only_if_the_manifest_says_otherwise() -> None:
    (answer,) = await asked([read("testdata/healthy.yaml")])
    suspended = answer["results"]["suspend"]
    cases: tuple[tuple[dict[str, Any], bool], ...] = (({}, False), ({"suspend": False}, True))
    for spec, out_of_sync in cases:
        (answer,) = await asked([suspended], git=manifest("default", "web", 4, maxVCPUs=8, **spec))
        assert answer["outOfSync"] is out_of_sync


async def test_argo_cds_own_tests_of_the_health_pass() -> None:
    tests = read("health_test.yaml")["tests"]
    answers = await asked([read(test["inputPath"]) for test in tests])
    assert [answer["health"] for answer in answers] == [test["healthStatus"] for test in tests]


async def test_argo_cds_own_tests_of_the_actions_pass() -> None:
    tests = read("actions/action_test.yaml")
    discovered = tests["discoveryTests"]
    answers = await asked([read(f"actions/{test['inputPath']}") for test in discovered])
    found = [
        # Its JSON leaves out what is false.
        sorted(({"disabled": False, **action} for action in answer["actions"]), key=lambda action: str(action["name"]))
        for answer in answers
    ]
    assert found == [test["result"] for test in discovered]

    done = tests["actionTests"]
    answers = await asked([read(f"actions/{test['inputPath']}") for test in done])
    made = [answer["results"][test["action"]] for answer, test in zip(answers, done, strict=True)]
    assert made == [read(f"actions/{test['expectedOutputPath']}") for test in done]
