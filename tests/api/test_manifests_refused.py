"""Manifests that can be known to be wrong are refused by the API server, with a message that names the field.

Each file in `bad/` is one such manifest. Its first line says what the refusal has to contain:

    # expect: spec.vcpus: Required value

The expectation begins with the field; `...` stands for anything. The refusal may name no other field, so that a
manifest is wrong in one way only; where a mistake must show in a second field, a line `# also: FIELD` says so.
"""

import asyncio
import re
from pathlib import Path
from typing import Final

import pytest

from harness.controlplane import Answer, ControlPlane
from harness.world import API

__all__: list[str] = []

BAD: Final = sorted((Path(__file__).parent / "bad").glob("*.yaml"))

AS_YAML: Final = {"Content-Type": "application/yaml"}

FIELD: Final = r"(?:spec|metadata)[\w.\[\]]*"


def expectation(manifest: Path) -> tuple[str, str, set[str]]:
    """The text expected in the refusal, the field it is about, and all fields that the refusal may name."""
    first, *rest = manifest.read_text().splitlines()
    found = re.fullmatch(rf'# expect: ((?:(?P<field>{FIELD}): |unknown field "(?P<unknown>{FIELD})").*)', first)
    assert found is not None, f"{manifest.name}: the first line must be `# expect: FIELD: MESSAGE`, not {first!r}"
    field = found["field"] or found["unknown"]
    also = {line.removeprefix("# also: ") for line in rest if line.startswith("# also: ")}
    return found[1], field, {field} | also


def refusal(answer: Answer) -> str:
    """What kubectl shows of it: a line `* FIELD: MESSAGE` for each cause, or a message without any."""
    causes = answer.body.get("details", {}).get("causes", ())
    lines = [f"* {each['field']}: {each['message']}" for each in causes]
    return "\n".join(lines) or str(answer.body["message"])


def fields_named(refusal: str) -> set[str]:
    """The fields that a refusal is about: lines `* FIELD: …`, or `unknown field`.

    Left out is what the API server adds without a field (`<nil>`), namely that it stopped checking.
    """
    causes = re.findall(rf"^\* \.?({FIELD}): ", refusal, re.MULTILINE)
    return set(causes) | set(re.findall(rf'unknown field "({FIELD})"', refusal))


def test_there_are_bad_manifests_for_every_field_that_a_user_sets() -> None:
    named = {expectation(manifest)[1] for manifest in BAD}
    assert named >= {
        "metadata.name",
        "spec",
        "spec.vcpus",
        "spec.minVCPUs",
        "spec.maxVCPUs",
        "spec.nodeName",
        "spec.monitor",
        "spec.monitor.unix.path",
        "spec.monitor.connection",
        "spec.monitor.tcp.host",
        "spec.monitor.tcp.port",
        "spec.monitor.tcp",
        "spec.monitor.tcp.insecure",
        "spec.monitor.tcp.tls.secretName",
        "spec.monitor.tcp.tls.serverName",
        "spec.guestAgent",
        "spec.guestAgent.unix",
        "spec.guestAgent.unix.path",
        "spec.guestAgent.bringOnline",
        "spec.pod",
        "spec.pod.selector",
        "spec.pod.selector.matchLabels",
        "spec.pod.container",
        "spec.pod.cpu.perVCPU",
        "spec.pod.cpu.overhead",
        "spec.pod.timeoutSeconds",
        "spec.unplug.policy",
        "spec.unplug.bootVCPUs",
        "spec.unplug.timeoutSeconds",
        "spec.unplug.retrySeconds",
        "spec.suspend",
    }


@pytest.mark.parametrize("manifest", BAD, ids=lambda path: path.stem)
async def test_a_bad_manifest_is_refused_and_the_message_names_the_field(
    control_plane: ControlPlane, namespace: str, manifest: Path
) -> None:
    expected, field, allowed = expectation(manifest)
    text = await asyncio.to_thread(manifest.read_text)
    path = f"{API}/namespaces/{namespace}/vcpusets?dryRun=All&fieldValidation=Strict"
    answer = await control_plane.request("POST", path, text, headers=AS_YAML)
    assert answer.status in {400, 422}, f"accepted: {answer.body}"
    said = refusal(answer)
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    assert re.search(pattern, said), f"{expected!r} is not in:\n{said}"
    named = fields_named(said)
    assert field in named
    assert named == allowed, f"the manifest is wrong in more than {field}:\n{said}"
