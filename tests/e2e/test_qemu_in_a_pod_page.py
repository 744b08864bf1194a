"""docs/qemu-in-a-pod.md as far as it goes without a node: its manifests, and QEMU as the image qemux/qemu starts it.

tests/cluster/node/test_node.py runs deploy/examples/vm-pod.yaml on a real kubelet.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page, Reader
from harness.operator import OperatorProcess
from harness.sockets import listening
from harness.wait import until
from harness.world import User

__all__: list[str] = []

PAGE: Final = Page(REPOSITORY / "docs" / "qemu-in-a-pod.md")
IMAGE: Final = "-nodefaults -machine type=q35,smm=off,graphics=off,vmport=off,dump-guest-core=off,hpet=off"
"""How src/config.sh of qemux/qemu 7.48 begins the command line of QEMU."""


def container() -> dict[str, Any]:
    """That of the manifest for qemux/qemu."""
    text = (REPOSITORY / "deploy" / "examples" / "vm-pod-qemux.yaml").read_text()
    (deployment,) = (each for each in yaml.safe_load_all(text) if each["kind"] == "Deployment")
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.fixture
def reader(tmp_path: Path, control_plane: ControlPlane) -> Iterator[Reader]:
    """Somebody with kubectl, in a folder with the manifests."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "deploy").symlink_to(REPOSITORY / "deploy")
    path = os.pathsep.join([str(control_plane.kubectl_path.parent), os.environ["PATH"]])
    with Reader(folder, PATH=path, KUBECONFIG=str(control_plane.kubeconfig)) as following:
        yield following


async def test_an_api_server_accepts_each_manifest_of_the_page(reader: Reader, control_plane: ControlPlane) -> None:
    for block in PAGE.blocks("sh", "pod"):
        applied = await reader.run(f"{block.text.strip()} --warnings-as-errors --dry-run=server")
        assert "deployment.apps/web created" in applied.stdout
        assert applied.stderr == ""
    plain, with_pod = PAGE.blocks("yaml", "vcpuset")
    for example in (plain, with_pod):
        applied = await control_plane.kubectl("create", "--dry-run=server", "-f", "-", input=example.text)
        assert applied.stdout.startswith("vcpuset.vcpuset.dev/web created")
    cpu, limits = with_pod.document()["spec"]["pod"]["cpu"], container()["resources"]["limits"]
    assert (cpu, limits["cpu"]) == ({"perVCPU": 1, "overhead": "500m"}, "2500m"), "that of the 2 vCPUs at the start"


def test_the_page_shows_what_the_manifest_adds_to_the_container() -> None:
    shown, found = PAGE.block("yaml", "container").document(), container()
    assert shown.pop("command") == found["command"]
    for name, entries in shown.items():
        assert [each for each in entries if each not in found[name]] == []


async def test_qemu_with_the_smp_and_qmp_of_the_manifest_is_brought_to_the_count_of_the_page(
    reader: Reader, control_plane: ControlPlane, user: User, socket_root: Path
) -> None:
    folder = socket_root / user.namespace / "web"
    directories = PAGE.block("sh", "node").text.replace("65532", str(os.getgid()))
    await reader.run(
        directories.replace("/run/vcpuset/default", str(folder.parent)).replace("/run/vcpuset", str(socket_root))
    )
    found = container()
    variables = {each["name"]: each["value"] for each in found["env"]}
    assert variables["QMP"].startswith(f"unix:{found['volumeMounts'][-1]['mountPath']}/qmp.sock,")
    *_, script = found["command"]
    umask, entry_point = script.split(" && exec ")
    assert entry_point == "/usr/bin/tini -s /run/entry.sh"
    qmp = variables["QMP"].replace("/run/monitor", str(folder))
    reader.start(
        f"{umask}\nexec qemu-system-x86_64 {IMAGE} -accel tcg -cpu max,l3-cache=on,migratable=no "
        f"-smp {variables['SMP']} -m 64 -display none -qmp {qmp}"
    )
    await until(lambda: str(folder / "qmp.sock") in listening(), 30, "QEMU to listen")
    socket = (folder / "qmp.sock").stat()
    assert socket.st_gid == folder.stat().st_gid
    assert socket.st_mode & (stat.S_IWGRP | stat.S_IWOTH) == stat.S_IWGRP, "the group may connect, and no others"

    async with OperatorProcess(control_plane, socket_root=socket_root):
        spec = PAGE.blocks("yaml", "vcpuset")[0].document()["spec"]
        await user.create("web", spec["vcpus"], spec["monitor"]["unix"]["path"])
        assert (await user.wait_ready("web")).vcpus == spec["vcpus"]
        most = int(variables["SMP"].rpartition("maxcpus=")[2])
        await user.change("web", vcpus=most)
        assert (await user.wait_ready("web")).vcpus == most
