"""Starts without an API server that answers as it should, and credentials that change under a running operator."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from chaos.outage import TIMES, WAIT, outage
from harness.apifaults import Refuse
from harness.controlplane import ControlPlane
from harness.faultproxy import FaultProxy, Passes
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import User

__all__: list[str] = []

ATTEMPTS = 3


async def begins(operator: OperatorProcess, words: str) -> int:
    """Start an operator that cannot list; returns its process id once it has tried for some time, and is not ready."""
    await operator.start(ready=False)

    def tried() -> bool:
        operator.require_running()
        said = operator.text() if operator.log.exists() else ""
        return words in said and said.count("first list: ") >= ATTEMPTS

    await until(tried, WAIT, lambda: f"{ATTEMPTS} attempts to list; {operator.tail()}")
    assert _status(f"{operator.url}/readyz") == 503
    assert _status(f"{operator.url}/healthz") == 200
    # What the alert VCPUSetAPIServerUnreachable goes by.
    lines = (line.split() for line in operator.metrics().splitlines() if line.startswith("vcpuset_l"))
    shown = {name: float(value) for name, value in lines}
    assert shown["vcpuset_last_list_timestamp_seconds"] == 0
    assert shown["vcpuset_list_errors_total"] >= ATTEMPTS
    return operator.pid


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(Refuse(429, 1, "storage is (re)initializing"), "storage is (re)initializing", id="starting"),
        pytest.param(Refuse(503), "HTTP 503", id="unavailable"),
        pytest.param(Refuse(404), "apply the CRD in crds/", id="without the definition"),
        pytest.param(None, "Cannot connect to host", id="away"),
    ],
)
async def test_an_operator_that_cannot_list_waits_unready_and_works_as_soon_as_it_can(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path, fault: Passes | None, words: str
) -> None:
    async with (
        FaultProxy(control_plane, tmp_path) as proxy,
        FaultyMonitor(folder / "vm.sock", cpus=2) as machine,
    ):
        await user.create("vm", 4)
        operator = OperatorProcess(
            control_plane,
            f"--namespace={user.namespace}",
            kubeconfig=proxy.kubeconfig(control_plane.kubeconfig),
            socket_root=folder.parent,
            times=TIMES,
        )
        try:
            if fault is None:
                await proxy.shut()
                pid = await begins(operator, words)
                await proxy.reopen()
            else:
                with proxy.fault(fault):
                    pid = await begins(operator, words)
            await user.wait_ready("vm")
            assert len(machine.cpus.occupied()) == 4
            assert operator.pid == pid
            operator.require_running()
        finally:
            await operator.close()


async def test_an_operator_without_rights_says_what_helps_and_works_as_soon_as_it_has_them(
    control_plane: ControlPlane, user: User, folder: Path
) -> None:
    there = ("-n", user.namespace)
    await control_plane.kubectl("create", "serviceaccount", "late", *there)
    async with FaultyMonitor(folder / "vm.sock", cpus=2) as machine:
        await user.create("vm", 4)
        operator = OperatorProcess(
            control_plane,
            f"--namespace={user.namespace}",
            kubeconfig=await control_plane.service_account_kubeconfig(user.namespace, "late"),
            socket_root=folder.parent,
            times=TIMES,
        )
        try:
            pid = await begins(operator, "the roles in deploy/ grant the required permissions")
            account = f"--serviceaccount={user.namespace}:late"
            await control_plane.kubectl("create", "rolebinding", "late", "--clusterrole=cluster-admin", account, *there)
            await user.wait_ready("vm")
            assert len(machine.cpus.occupied()) == 4
            assert operator.pid == pid
            operator.require_running()
        finally:
            await operator.close()


async def test_a_token_that_is_replaced_in_its_file_and_then_revoked_is_read_again(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    """A token is bound to an object, and the API server accepts it for as long as that object is there."""
    there = ("-n", user.namespace)
    await control_plane.kubectl("create", "serviceaccount", "me", *there)
    account = f"--serviceaccount={user.namespace}:me"
    await control_plane.kubectl("create", "rolebinding", "me", "--clusterrole=cluster-admin", account, *there)
    tokens = {}
    for name in ("old", "new"):
        await control_plane.kubectl("create", "secret", "generic", name, *there)
        bound = ("--bound-object-kind=Secret", f"--bound-object-name={name}")
        tokens[name] = (await control_plane.kubectl("create", "token", "me", *there, *bound)).stdout.strip()
    token = tmp_path / "token"
    token.write_text(tokens["old"])
    config = yaml.safe_load(control_plane.kubeconfig.read_text())
    config["users"] = [{"name": "test", "user": {"tokenFile": str(token)}}]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))

    async with outage(control_plane, user, folder, tmp_path, kubeconfig=kubeconfig) as scene:
        await control_plane.kubectl("delete", "secret", "old", *there)
        # It is still in the file: the kubelet replaces it in time, others may be late.
        await until(lambda: _refused(user, tokens["old"]), WAIT, "the API server to forget that the token was good")
        scene.proxy.cut(lambda asked: asked.watch)
        await scene.failed(2)
        await scene.machine_is_kept()
        await scene.life_goes_on()
        token.write_text(tokens["new"])
        await scene.all_is_obeyed()
        assert {each.token for each in scene.proxy.requests if each.code == 401} == {tokens["old"]}
        assert scene.watches()[-1].token == tokens["new"]
        scene.check_pace()
        scene.check_writes()


async def _refused(user: User, token: str) -> bool:
    answer = await user.control_plane.kubectl(
        "auth", "whoami", "--token", token, "--kubeconfig=/dev/null", "--server", user.control_plane.url,
        "--certificate-authority", user.control_plane.directory / "certificates" / "apiserver.crt", check=False,
    )  # fmt: skip
    return "Unauthorized" in answer.stderr or "must be logged in" in answer.stderr


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own URL
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
