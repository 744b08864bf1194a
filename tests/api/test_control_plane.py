"""The test tooling's own API server: what the other tests take for granted."""

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.audit import AuditEvent
from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.processes import Child, CommandFailed, run
from harness.wait import until

SERVICE_ACCOUNT = """
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader}
rules: [{apiGroups: [vcpuset.dev], resources: [vcpusets], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: reader}]
"""


async def test_kubectl_reports_what_the_server_said(control_plane: ControlPlane, namespace: str) -> None:
    found = await control_plane.kubectl("get", "namespace", namespace, "--output=name")
    assert found.stdout == f"namespace/{namespace}\n"
    with pytest.raises(CommandFailed, match=r"exit status 1\n.*namespaces \"nowhere\" not found"):
        await control_plane.kubectl("get", "namespace", "nowhere")
    missing = await control_plane.kubectl("get", "namespace", "nowhere", check=False)
    assert missing.returncode == 1


async def test_the_crd_is_known_to_kubectl(control_plane: ControlPlane, namespace: str) -> None:
    listed = await control_plane.kubectl("get", "vcs", "--namespace", namespace, "--output=name")
    assert listed.stdout == ""


async def test_a_service_account_has_the_rights_it_was_given_and_no_others(
    control_plane: ControlPlane, namespace: str
) -> None:
    await control_plane.kubectl("apply", "--namespace", namespace, "-f", "-", input=SERVICE_ACCOUNT)
    kubeconfig = await control_plane.service_account_kubeconfig(namespace, "reader")
    await control_plane.kubectl("get", "vcpusets", kubeconfig=kubeconfig)
    with pytest.raises(CommandFailed, match=r"cannot list resource .*secrets"):
        await control_plane.kubectl("get", "secrets", kubeconfig=kubeconfig)


async def test_the_audit_log_counts_requests_to_vcpusets_by_user(control_plane: ControlPlane, namespace: str) -> None:
    before = control_plane.audit_offset()
    path = f"/apis/vcpuset.dev/v1alpha1/namespaces/{namespace}/vcpusets"
    await control_plane.request("GET", "/api/v1/namespaces")  # of no concern: not recorded
    await control_plane.request("GET", f"{path}/absent")
    await control_plane.request("PATCH", f"{path}/absent/status", {})

    def ours() -> list[AuditEvent]:
        return [each for each in control_plane.audit_events(before) if each.namespace == namespace]

    await until(lambda: len(ours()) >= 2, 60, "two audit events")
    read, write = ours()
    assert (read.user, read.verb, read.resource, read.subresource) == ("admin", "get", "vcpusets", "")
    assert (read.namespace, read.name, read.code, read.is_write) == (namespace, "absent", 404, False)
    assert write.subresource == "status"
    assert write.is_write
    assert write.request_uri.startswith(f"{path}/absent/status")


async def test_the_api_server_comes_back_on_its_port_with_its_data() -> None:
    async with ControlPlane() as own:
        namespace = await own.namespace()
        for kill in (False, True):
            await own.stop_apiserver(kill=kill)
            with pytest.raises(ConnectionRefusedError):
                await own.request("GET", "/readyz")
            await own.start_apiserver()
            await own.kubectl("get", "namespace", namespace)
        folder = own.directory
    assert not folder.exists()


async def test_a_server_that_cannot_start_is_reported_with_its_log_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("etcd", "kube-apiserver", "kubectl"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho no disk left\nexit 3\n")
        program.chmod(0o755)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "bin"))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(Exception, match=r"(?s)etcd ended with status 3.*no disk left"):
        async with ControlPlane():
            pass
    assert list(temporary.iterdir()) == []


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    child = Child.start(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], name="deaf", log=tmp_path / "log"
    )
    await until(lambda: "ready" in child.log_tail(), 30, "the trap to be set")
    assert await child.stop(timeout=0.2) == -signal.SIGKILL


async def test_children_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from harness.processes import Child\n"
        "child = Child.start(['sleep', '600'], name='sleep', log=pathlib.Path(sys.argv[1]) / 'log')\n"
        "(pathlib.Path(sys.argv[1]) / 'new').write_text(str(child.pid))\n"
        "(pathlib.Path(sys.argv[1]) / 'new').rename(pathlib.Path(sys.argv[1]) / 'pid')\n"
        "time.sleep(600)\n"
    )
    parent = Child.start(
        ["python3", "-c", script, tmp_path],
        name="parent",
        log=tmp_path / "parent.log",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")},
    )
    try:
        await until((tmp_path / "pid").exists, 60, lambda: f"the grandchild; {parent.log_tail()}")
        grandchild = int((tmp_path / "pid").read_text())
        os.kill(grandchild, 0)  # it lives
    finally:
        os.kill(parent.pid, signal.SIGKILL)  # the parent alone, not its group, and without a chance to clean up
        await parent.wait(30)

    def gone() -> bool:
        try:
            state = Path(f"/proc/{grandchild}/stat").read_text().rpartition(") ")[2][0]
        except FileNotFoundError:
            return True
        return state == "Z"  # dead; collecting it is up to init

    await until(gone, 30, "the grandchild's death")


async def test_a_command_that_hangs_is_killed_at_its_deadline() -> None:
    mark = f"600.{random.getrandbits(40)}"
    with pytest.raises(TimeoutError, match=rf"^sleep {mark}: no end within 0.5 s"):
        await run(["sleep", mark], timeout=0.5)
    assert mark.encode() not in b"".join(_command_lines())


def _command_lines() -> Iterator[bytes]:
    """Of all processes of the machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            yield path.read_bytes()
