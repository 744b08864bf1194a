"""docs/install.md, followed to the letter on a fresh cluster: from nothing to a resized Linux guest, and back.

All of the page's commands are typed on a node, in one terminal and in the page's order, but those of the image, which
no node here would pull. The page's variables get the test's values.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from harness.binaries import HELM
from harness.cache import REPOSITORY
from harness.container import WHY_NOT
from harness.controlplane import ControlPlane
from harness.docpage import Block, Page, Reader
from harness.guest import reported_online
from harness.guestimage import INITRAMFS, KERNEL, images
from harness.kubelet import Node, Nodes, cluster
from harness.processes import Child, CommandFailed, Completed, run
from harness.qmp import count
from harness.wait import until
from harness.world import User

# The pods are played in the module's event loop.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
]

PAGE: Final = Page(REPOSITORY / "docs" / "install.md")
NODE: Final = "node-1"
UPGRADED: Final = "registry.example.com/vcpuset:0.10"

SHIPPED: Final = ("crds", "deploy")
"""What the page's commands need of this repository; its links lead from one folder to another."""


class Followed:
    """Somebody who follows the page in one of its two ways, kustomize or helm, step by step."""

    def __init__(self, way: str, reader: Reader, control_plane: ControlPlane, nodes: Nodes) -> None:
        self.way = way
        self.reader = reader
        self.control_plane = control_plane
        self.nodes = nodes
        self.user = User(control_plane, "default")
        self.machine: Child | None = None
        self.control = reader.folder / "control"
        self._console = reader.folder / "console"
        reader.variables |= {
            "IMAGE": "registry.example.com/vcpuset:2",  # a tag that YAML takes for a number, as does the upgrade's
            "NETWORK": "127.0.0.0/8",
            "VM": (
                "-machine q35 -accel tcg -cpu qemu64 -m 192 -nodefaults -no-user-config -display none"
                f" -kernel {images() / KERNEL} -initrd {images() / INITRAMFS} -append console=ttyS0"
                f" -serial file:{self._console} -qmp unix:{self.control},server=on,wait=off"
            ),
        }

    def blocks(self) -> Iterator[Block]:
        """What the page has somebody type or write who goes this way, but the image and a roll-back."""
        other = {"kustomize", "helm"} - {self.way}
        for block in PAGE.blocks():
            if (
                block.language != "text"
                and not other & set(block.marks)
                and not {"variables", "image", "rollback"} & set(block.marks)
            ):
                yield block

    async def do(self, block: Block) -> Completed | None:
        """Do what a block says."""
        if block.language == "yaml":
            self.reader.write(block)
        elif "machine" in block.marks:
            self.machine = self.reader.start(block, "the machine")
            await until(self.guest_runs, 180, lambda: f"the guest to boot; QEMU said {self.machine_said()}")
        elif block.language == "console":
            for command, output in block.commands():
                seen = (await self.reader.run(command)).stdout
                assert without_age(seen) == without_age(output), block.where
        else:
            return await self.reader.run(block, timeout=400)
        return None

    async def has_upgraded(self) -> bool:
        """Whether all pods are of the new image. One of the old that still ends does not hold up the roll-out."""
        images_of_pods = "jsonpath={.items[*].spec.containers[*].image}"
        found = await self.control_plane.kubectl("get", "pods", "-A", "-o", images_of_pods)
        return set(found.stdout.split()) == {UPGRADED}

    def guest_runs(self) -> bool:
        """Whether the guest has booted."""
        assert self.machine is not None
        self.machine.require_running()
        return self.online() > 0

    def machine_said(self) -> str:
        """QEMU's messages."""
        return self.machine.log_tail() if self.machine is not None else ""

    def online(self) -> int:
        """How many CPUs the guest itself says that it uses."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return len(reported_online(text))

    async def has(self, vcpus: int) -> None:
        """Check that QEMU has so many CPUs, and wait until the guest says so too, a moment later."""
        assert await count(self.control) == vcpus
        await until(lambda: self.online() == vcpus, 60, lambda: f"{vcpus} CPUs in the guest, which has {self.online()}")


def without_age(table: str) -> list[list[str]]:
    """The cells of what `kubectl get` prints, but the last column."""
    return [line.split()[:-1] for line in table.splitlines()]


@pytest.fixture(params=["kustomize", "helm"])
def way(request: pytest.FixtureRequest) -> str:
    """How the page has the operator installed."""
    return str(request.param)


async def test_who_follows_the_page_gets_a_resized_machine_and_is_rid_of_all_but_the_machine_at_its_end(
    way: str, tmp_path: Path
) -> None:
    for shipped in SHIPPED:
        shutil.copytree(REPOSITORY / shipped, tmp_path / "copy" / shipped, symlinks=True)
    async with cluster(NODE, "node-2") as (control_plane, nodes):
        programs = [control_plane.kubectl_path.parent, HELM.folder]
        path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
        terminal = nodes.node(NODE).command
        with Reader(tmp_path / "copy", terminal, PATH=path, KUBECONFIG=str(control_plane.kubeconfig)) as reader:
            page = Followed(way, reader, control_plane, nodes)
            for block in page.blocks():
                if "upgrade" in block.marks:
                    reader.variables["IMAGE"] = UPGRADED
                if block.marks == ("uninstall", "bindings"):
                    await control_plane.kubectl("apply", "-f", REPOSITORY / "deploy/examples/monitor-credentials.yaml")
                try:
                    done = await page.do(block)
                except CommandFailed as failed:
                    said = "\n".join(f"{pod.name}: {pod.text()[-2000:]}" for pod in nodes.pods)
                    pytest.fail(f"{failed}\n{said}")
                await check(page, set(block.marks), "" if done is None else done.stdout)


async def check(page: Followed, marks: set[str], said: str) -> None:
    """See what a step of the page promises."""
    if marks == {"up"}:
        await page.has(4)
    elif marks == {"down"}:
        await page.has(2)
    elif marks == {"wrong"}:
        assert "Converged" in said
        assert "managing" in said
        assert "vcpuset-controller" in said
        await troubles(page)
    elif marks == {"upgrade"}:
        await until(page.has_upgraded, 60, "the last pod of the old image to be gone")
        await page.has(2)
    elif marks == {"uninstall", page.way}:
        await until(lambda: not page.nodes.pods, 60, "the pods to end")
        assert (await page.user.get("web")).body["spec"]["vcpus"] == 2
        await page.has(2)
    elif marks == {"uninstall", "bindings"}:
        found = await page.control_plane.kubectl("get", "rolebindings", "--all-namespaces", "--output=name")
        assert "vcpuset" not in found.stdout
    elif "everything" in marks:
        answer = await page.control_plane.request("GET", "/apis/vcpuset.dev/v1alpha1/vcpusets")
        assert answer.status == 404
        assert page.machine is not None
        page.machine.require_running()
        await page.has(2)


@contextlib.contextmanager
def closed_socket(path: Path) -> Iterator[None]:
    """A monitor as QEMU makes it with the usual umask, 022."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(0o755)
        yield


async def troubles(page: Followed) -> None:
    """Cause what the page's table of troubles tells of, on sets beside the one of the page."""
    user, folder = page.user, page.nodes.node(NODE).path("/run/vcpuset/default")
    await user.create("missing", monitor="missing/qmp.sock", nodeName=NODE)
    await user.create("elsewhere", monitor=("192.0.2.1", 4444))
    await user.create("nodeless", monitor="web/qmp.sock")
    (folder / "locked").mkdir(mode=0o700)
    with closed_socket(folder / "closed.sock"), closed_socket(folder / "locked" / "qmp.sock"):
        await user.create("closed", monitor="closed.sock", nodeName=NODE)
        await user.create("locked", monitor="locked/qmp.sock", nodeName=NODE)
        for name, reason, words in (
            ("missing", "MonitorUnreachable", "below the socket root (yet)"),
            ("closed", "MonitorUnreachable", "may not be connected to"),
            ("locked", "MonitorUnreachable", "may not be opened"),
            ("elsewhere", "InvalidMonitor", "--allow-tcp"),
            ("nodeless", "InvalidMonitor", ""),
        ):
            seen = await user.wait_reason(name, reason)
            assert words in seen.message, seen.message
    for name in ("missing", "elsewhere", "nodeless", "closed", "locked"):
        await user.delete(name)


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="needs systemd-tmpfiles")
async def test_the_folders_that_systemd_makes_at_boot_are_those_of_the_page(tmp_path: Path) -> None:
    nodes = {}
    for made in ("by hand", "at boot"):
        root = tmp_path / made
        (root / "run").mkdir(parents=True)
        nodes[made] = Node(made, root)
    with Reader(tmp_path / "terminal", nodes["by hand"].command) as reader:
        (by_hand,) = [each for each in PAGE.blocks("sh", "node") if "machine" not in each.marks]
        await reader.run(by_hand)
    file = tmp_path / "vcpuset.conf"
    file.write_text(PAGE.block("text", "tmpfiles").text)
    await run(["systemd-tmpfiles", "--create", f"--root={nodes['at boot'].root}", file])

    def folders(node: Node) -> list[tuple[str, int, int, int]]:
        found = sorted(each for each in node.path("/run").rglob("*") if each.is_dir())
        return [
            (str(each.relative_to(node.root)), each.stat().st_mode, each.stat().st_uid, each.stat().st_gid)
            for each in found
        ]

    assert len(folders(nodes["by hand"])) == 3
    assert folders(nodes["at boot"]) == folders(nodes["by hand"])
