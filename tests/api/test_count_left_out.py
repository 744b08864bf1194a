"""A manifest whose count is left to an autoscaler, as docs/autoscaling.md says, on a real API server."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page, Reader
from harness.processes import CommandFailed
from harness.world import User

__all__: list[str] = []

PAGE: Final = Page(REPOSITORY / "docs" / "autoscaling.md")


@pytest.fixture
async def reader(tmp_path: Path, control_plane: ControlPlane, namespace: str) -> AsyncIterator[Reader]:
    """Somebody who works in the namespace, and has kubectl."""
    kubeconfig = Path(shutil.copy(control_plane.kubeconfig, tmp_path / "kubeconfig"))
    path = os.pathsep.join([str(control_plane.kubectl_path.parent), os.environ["PATH"]])
    with Reader(tmp_path / "place", PATH=path, KUBECONFIG=str(kubeconfig)) as following:
        await following.run(f"kubectl config set-context --current --namespace={namespace}")
        yield following


@pytest.mark.parametrize(
    ("how", "mark"),
    [("--server-side", "hand-over"), ("--server-side=false", "left-out")],
    ids=["server-side", "client-side"],
)
async def test_a_count_that_apply_owns_is_handed_over_before_it_is_left_out(
    reader: Reader, user: User, how: str, mark: str
) -> None:
    manifest: dict[str, Any] = PAGE.manifest("VCPUSet", "web")
    path = reader.folder / "web.yaml"

    path.write_text(yaml.safe_dump(manifest))
    await reader.run(f"kubectl apply {how} --filename=web.yaml")
    if mark == "left-out":  # an autoscaler has written since, which does not help here
        await reader.run("kubectl scale vcpuset web --replicas=5")

    before = (await user.get("web")).body["spec"]["vcpus"]
    del manifest["spec"]["vcpus"]
    manifest["spec"]["unplug"] = {"retrySeconds": 77}
    path.write_text(yaml.safe_dump(manifest))
    with pytest.raises(CommandFailed, match=r"spec\.vcpus: Required value"):
        await reader.run(f"kubectl apply {how} --filename=web.yaml")

    await reader.run(PAGE.block("sh", mark))
    spec = (await user.get("web")).body["spec"]
    assert (spec["vcpus"], spec["unplug"]["retrySeconds"]) == (before, 77)

    await reader.run("kubectl scale vcpuset web --replicas=7")
    manifest["spec"]["unplug"] = {"retrySeconds": 78}
    path.write_text(yaml.safe_dump(manifest))
    await reader.run(f"kubectl apply {how} --filename=web.yaml")
    spec = (await user.get("web")).body["spec"]
    assert (spec["vcpus"], spec["unplug"]["retrySeconds"]) == (7, 78)
