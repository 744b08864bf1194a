"""`make demo` does what the README promises; set-up, which make does first, is another matter."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from harness.controlplane import ControlPlane
from harness.processes import Completed, run
from harness.wait import until

TESTS = Path(__file__).resolve().parents[1]


async def demo(directory: Path, **environment: str) -> Completed:
    """Run the demo to its end, with `directory` for its temporary files."""
    env = {**os.environ, "PYTHONPATH": str(TESTS), "TMPDIR": str(directory), **environment}
    return await run([sys.executable, "-m", "harness.demo"], env=env, check=False, timeout=280)


def check_success(done: Completed) -> None:
    """Every step was right, and every witness was heard."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout
    rows = re.findall(
        r"^  (apply 2|scale to 6|scale to 3|undo drift) +(\d) +(\d) +(\d) +True", done.stdout, re.MULTILINE
    )
    counts = {"apply 2": "2", "scale to 6": "6", "scale to 3": "3", "undo drift": "3"}
    assert rows == [(step, count, count, count) for step, count in counts.items()]
    for line in ("kubectl  desired 6", "QEMU     query-cpus-fast shows 4", "guest    online: 6 (0,1,2,3,4,5)"):
        assert line in done.stdout


@pytest.fixture
def scratch() -> Iterator[Path]:
    """For all that the demo puts into files; it has to leave nothing there.

    QEMU's sockets need a short path, which pytest's own folders do not have.
    """
    folder = Path(tempfile.mkdtemp(prefix="vcpuset-"))
    yield folder
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert left == []


async def test_the_demo_succeeds_and_leaves_nothing_behind(scratch: Path) -> None:
    check_success(await demo(scratch))


async def test_a_kept_demo_has_its_status_page_and_ends_by_the_command_that_it_prints(scratch: Path) -> None:
    done = await demo(scratch, KEEP="1")
    owner = re.search(r"^  kill (\d+)$", done.stdout, re.MULTILINE)
    assert owner is not None, done.stdout + done.stderr
    try:
        check_success(done)
        page = re.search(r"The status page is at (http://127\.0\.0\.1:\d+/)$", done.stdout, re.MULTILINE)
        assert page is not None, done.stdout
        async with aiohttp.ClientSession() as client, client.get(page[1]) as answer:
            assert re.search(r'href="sets/vcpuset-demo-\d+/vm"', await answer.text())
    finally:
        os.kill(int(owner[1]), signal.SIGTERM)
        await until(lambda: not Path(f"/proc/{owner[1]}").exists(), 60, "the demo to end")


async def test_the_demo_uses_the_users_own_cluster_and_leaves_it_as_it_was(
    control_plane: ControlPlane, scratch: Path
) -> None:
    done = await demo(scratch, DEMO_CLUSTER="current", KUBECONFIG=str(control_plane.kubeconfig))
    check_success(done)
    assert control_plane.url in done.stdout
    left = await control_plane.kubectl("get", "vcpusets", "--all-namespaces", "--output=name")
    assert "vm" not in left.stdout
    await control_plane.kubectl("get", "crd", "vcpusets.vcpuset.dev")


async def test_the_demo_without_a_kubeconfig_for_the_users_cluster_says_what_is_missing(
    scratch: Path,
) -> None:
    done = await demo(scratch, DEMO_CLUSTER="current", KUBECONFIG="")
    assert done.returncode == 1
    assert "DEMO_CLUSTER=current needs KUBECONFIG to name a kubeconfig file" in done.stdout
