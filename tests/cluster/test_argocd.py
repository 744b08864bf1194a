"""Argo CD's own libraries run the shipped customizations: their verdicts, their tests, and what the actions make.

`tests/unit/test_argocd.py` has the same, for each of the scripts, in another interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from harness import gitops
from harness.argocd import PATCH, read
from harness.binaries import ARGOCD
from harness.processes import run

Manifest = Mapping[str, Any]

PENDING_DELETION: Final = {"status": "Progressing", "message": "Pending deletion"}
"""What Argo CD says of each object that is being deleted."""


async def asked(objects: Sequence[Manifest]) -> list[Manifest]:
    """What Argo CD makes of each object: `health`, `actions`, and `results` by the names of the actions."""
    text = "".join(f"{json.dumps(each)}\n" for each in objects)
    done = await run([ARGOCD.program("argocd"), PATCH], input=text)
    return [json.loads(line) for line in done.stdout.splitlines()]


async def test_each_reason_has_the_health_that_the_page_says() -> None:
    cases = gitops.cases()
    answers = await asked([obj for obj, _ in cases.values()])
    found = {name: answer["health"]["status"] for name, answer in zip(cases, answers, strict=True)}
    assert found == {name: verdicts.argocd for name, (_, verdicts) in cases.items()}


async def test_a_set_that_is_being_deleted_is_so_for_argo_cd_itself() -> None:
    obj, _ = gitops.cases()["Terminating-Held"]
    (answer,) = await asked([obj])
    assert answer["health"] == PENDING_DELETION


async def test_its_own_tests_of_the_health_pass() -> None:
    tests = read("health_test.yaml")["tests"]
    answers = await asked([read(test["inputPath"]) for test in tests])
    assert [answer["health"] for answer in answers] == [test["healthStatus"] for test in tests]


async def test_its_own_tests_of_the_actions_pass() -> None:
    tests = read("actions/action_test.yaml")
    discovered = tests["discoveryTests"]
    answers = await asked([read(f"actions/{test['inputPath']}") for test in discovered])
    found = [sorted(answer["actions"], key=lambda action: str(action["name"])) for answer in answers]
    assert found == [test["result"] for test in discovered]

    done = tests["actionTests"]
    answers = await asked([read(f"actions/{test['inputPath']}") for test in done])
    made = [answer["results"][test["action"]] for answer, test in zip(answers, done, strict=True)]
    assert made == [read(f"actions/{test['expectedOutputPath']}") for test in done]
