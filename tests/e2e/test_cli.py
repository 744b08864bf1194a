"""`vcpuset inspect` and `vcpuset plan` beside a running operator, with sets as kubectl prints them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Page, Reader
from harness.guest import Guest
from harness.monitortls import MonitorTLS
from harness.operator import OperatorProcess
from harness.pki import Authority
from harness.processes import run
from harness.saved import saved_guest
from harness.world import User

__all__: list[str] = []


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks without an occasion."""
    async with OperatorProcess(control_plane, "--resync-seconds=3600", socket_root=socket_root) as running:
        yield running


async def _vcpuset(*arguments: object, text: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "vcpuset.cli.main", *map(str, arguments), "--output=json", "--timeout=60"]
    found: dict[str, Any] = json.loads((await run(words, input=text, timeout=120)).stdout)
    return found


async def test_what_a_guest_refused_is_told_with_when_it_is_asked_again_and_what_comes_next(
    folder: Path, operator: OperatorProcess, user: User, control_plane: ControlPlane, socket_root: Path
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitors=2, socket_dir=folder) as guest:
        unplug = {"retrySeconds": 3600, "timeoutSeconds": 3600}
        await user.create("vm", 2, "qmp0", connection="OnDemand", unplug=unplug)
        await user.wait_ready("vm")
        await guest.hold_cpus(1)
        await user.change("vm", vcpus=1)
        refused = await user.wait_reason("vm", "UnplugRefused")
        # So often repeated that the next time is an hour away.
        request = {**refused.pending[0], "attempts": 20}
        printed = json.dumps({**refused.body, "status": {**refused.status, "unplug": {"requests": [request]}}})

        (found,) = (await _vcpuset("plan", "-f", "-", "--socket-root", socket_root, text=printed))["items"]
        assert found["status"]["reason"] == "UnplugRefused"
        assert found["status"]["message"] == refused.message
        assert (found["plug"], found["unplug"], found["standby"]) == ([], [], [])
        (blocker,) = found["blockers"]
        assert blocker["reason"] == "UnplugRefused"
        assert "slot 1" in blocker["message"]
        assert "device busy (_OST 0x82)" in blocker["message"]
        assert "The request is repeated at" in blocker["message"]

        shown = await _vcpuset("inspect", guest.monitors[1], "-f", "-", text=printed)
        assert shown["slots"][1]["pendingUnplug"] == {**request, "requestedAt": request["requestedAt"][:19] + "Z"}
        assert shown["slots"][1]["ost"]["words"] == "device busy (_OST 0x82)"


async def test_a_monitor_that_the_operator_keeps_is_told_and_another_one_will_do(
    folder: Path, operator: OperatorProcess, user: User, control_plane: ControlPlane, socket_root: Path
) -> None:
    async with saved_guest(smp="2,maxcpus=64", monitors=2, socket_dir=folder) as guest:
        await user.create("vm", 2, "qmp0")
        ready = await user.wait_ready("vm")
        text = json.dumps({**ready.body, "spec": {**ready.body["spec"], "vcpus": 3}})

        arguments = ["plan", "-f", "-", "--socket-root", socket_root, "--output=json", "--timeout=2"]
        busy = await run([sys.executable, "-m", "vcpuset.cli.main", *map(str, arguments)], input=text, check=False)
        assert busy.returncode == 1
        assert "vcpuset plan --monitor" in busy.stderr
        (found,) = (await _vcpuset("plan", "-f", "-", "--monitor", guest.monitors[1], text=text))["items"]
        assert found["plug"] == [{"slot": 2}]
        assert (await user.get("vm")).vcpus == 2


async def test_a_monitor_on_tls_is_looked_at_with_the_certificates_of_its_secret(
    user: User, control_plane: ControlPlane, tmp_path: Path
) -> None:
    page = Page(REPOSITORY / "docs" / "cli.md")
    authority = Authority()
    secrets = f"/api/v1/namespaces/{user.namespace}/secrets"
    made = await control_plane.request("POST", secrets, authority.client().secret("web-monitor"))
    assert made.status == 201, made
    programs = [str(control_plane.kubectl_path.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    place = {
        "PATH": os.pathsep.join(programs),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "KUBECONFIG": str(control_plane.kubeconfig),
    }
    tls = MonitorTLS(authority.server("vm-1.example.com").write(tmp_path / "qemu"), authority.client().name)
    async with Guest(None, smp="2,maxcpus=8", tls=tls) as guest:
        with Reader(tmp_path / "place", **place) as reader:
            await reader.run(page.block("sh", "secret").text.replace("get secret", f"get -n {user.namespace} secret"))
            look = page.block("sh", "tls").text.replace("192.0.2.10:4444", "{}:{}".format(*guest.tcp_address))
            shown = await reader.run(look.replace("vcpuset ", f"{sys.executable} -m vcpuset.cli.main ", 1))
            assert "2 present, 1 to 8 possible" in shown.stdout
