"""SECURITY.md, tried by a tenant: a user who may write VCPUSets, and pods with the directory of their namespace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from cluster.node.conftest import idle_pod, start_pod, temporary_namespace
from harness.node import Cluster, processes
from harness.nodevm import SOCKET_ROOT, NodeVM
from harness.world import User

__all__: list[str] = []

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

NO_CAPABILITIES: Final = "0000000000000000"
FILTERED: Final = "2"
"""In `Seccomp:` of proc_pid_status(5): by a filter."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def victim(installed: Cluster, user: User) -> NodeVM:
    """The machine of another tenant, in `user`'s namespace, and its VCPUSet `web`, Ready with 2."""
    made = NodeVM(installed, user.namespace, "web", "node-1")
    await made.start(cpu="500m")
    await user.create("web", vcpus=2, monitor="web/qmp.sock", nodeName="node-1")
    await user.wait_ready("web")
    await made.wait_online(2)
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tenant(installed: Cluster, victim: NodeVM) -> AsyncIterator[User]:
    """The tenant: they may write VCPUSets, and their pod `shell` has the directory of their namespace."""
    async with temporary_namespace(installed, "tenant") as own:
        await NodeVM(installed, own, "web", "node-1").make_directories()
        for role in ("vcpuset-view", "vcpuset-edit"):
            account = f"--serviceaccount={own}:default"
            await installed.kubectl("create", "rolebinding", role, "-n", own, f"--clusterrole={role}", account)
        await start_pod(installed, pod(own, f"{SOCKET_ROOT}/{own}"))
        found = User(installed.control_plane, own)
        await found.create("own", vcpus=2, monitor="web/qmp.sock", nodeName="node-1")
        yield found


def pod(namespace: str, directory: str) -> dict[str, Any]:
    """A pod that runs as root and mounts a directory of the node."""
    made = idle_pod(namespace, "shell")
    made["spec"]["nodeSelector"] = {"kubernetes.io/hostname": "node-1"}
    made["spec"]["volumes"] = [{"name": "monitors", "hostPath": {"path": directory, "type": "Directory"}}]
    made["spec"]["containers"][0]["volumeMounts"] = [{"name": "monitors", "mountPath": "/monitors"}]
    return made


async def test_no_link_of_a_tenants_pod_leads_the_agent_to_another_machine(
    installed: Cluster, user: User, victim: NodeVM, tenant: User
) -> None:
    theirs = f"{user.namespace}/web/qmp.sock"
    script = f"""
        cd /monitors
        ln -s ../{theirs} socket
        ln -s ../{user.namespace} folder
        ln -s {SOCKET_ROOT}/{theirs} absolute
        ln -s /proc/1/root{SOCKET_ROOT}/{theirs} process
        ! ln ../{theirs} hard 2>/dev/null
    """
    await installed.kubectl("exec", "-n", tenant.namespace, "shell", "--", "sh", "-euc", script)
    before = (await victim.log()).count("qmp_capabilities")
    for name, path in {
        "socket": "socket",
        "folder": "folder/web/qmp.sock",
        "absolute": "absolute",
        "process": "process",
    }.items():
        await tenant.create(name, vcpus=5, monitor=path, nodeName="node-1")
        seen = await tenant.wait_reason(name, "InvalidMonitor")
        assert "symbolic link" in seen.message
    assert (await victim.log()).count("qmp_capabilities") == before, "connections"
    assert (await user.get("web")).vcpus == 2


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["get", "secrets", "-n", "vcpuset-system"], id="secrets of the operator"),
        pytest.param(["create", "token", "-n", "vcpuset-system", "vcpuset-controller"], id="token of the controller"),
        pytest.param(["create", "token", "-n", "vcpuset-agent", "vcpuset-agent"], id="token of the agents"),
        pytest.param(["exec", "-n", "vcpuset-agent", "daemonset/vcpuset-agent", "--", "id"], id="shell of the agent"),
        pytest.param(["delete", "lease", "-n", "vcpuset-system", "vcpuset-controller"], id="lease"),
        pytest.param(["scale", "vcpuset", "web", "--replicas=3", "-n", "{victim}"], id="set of another tenant"),
        pytest.param(
            ["patch", "vcpuset", "own", "--subresource=status", "--type=merge", "-p", '{"status":{"vcpus":9}}'],
            id="status of their own set",
        ),
    ],
)
async def test_the_token_of_a_tenants_pod_does_not_open(
    installed: Cluster, user: User, tenant: User, tmp_path: Path, words: list[str]
) -> None:
    shell = ("exec", "-n", tenant.namespace, "shell", "--")
    token = await installed.kubectl(*shell, "cat", "/var/run/secrets/kubernetes.io/serviceaccount/token")
    config = tmp_path / "kubeconfig"
    installed.control_plane.write_kubeconfig(config, token.stdout, tenant.namespace)
    # It opens what it should: their own sets.
    await installed.kubectl("get", "vcpusets", kubeconfig=config)
    arguments = [each.format(victim=user.namespace) if each == "{victim}" else each for each in words]
    done = await installed.kubectl(*arguments, kubeconfig=config, check=False)
    assert done.returncode != 0
    assert "forbidden" in done.stderr.lower()


async def test_pod_security_keeps_a_baseline_tenant_from_the_directories_of_the_node(
    installed: Cluster, tenant: User
) -> None:
    async with temporary_namespace(installed, "baseline") as own:
        await installed.kubectl("label", "namespace", own, "pod-security.kubernetes.io/enforce=baseline")
        refused = await installed.apply(pod(own, SOCKET_ROOT), check=False)
    assert 'violates PodSecurity "baseline:latest": hostPath volumes' in refused.stderr


@pytest.mark.parametrize("namespace", ["vcpuset-agent", "vcpuset-system"])
async def test_the_operators_processes_have_no_capability_gain_no_privilege_and_have_a_seccomp_filter(
    installed: Cluster, namespace: str
) -> None:
    pods = await installed.pods(namespace, "app.kubernetes.io/part-of=vcpuset")
    assert pods
    for each in pods:
        pids = processes(installed.nodes["node-1"].cgroup("pids", each))
        found = [Path(f"/proc/{pid}") for pid in pids]
        (status,) = (_status(one) for one in found if b"vcpuset" in (one / "cmdline").read_bytes())
        assert set(status["Uid"].split()) == {"65532"}
        assert {status[each] for each in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {NO_CAPABILITIES}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", FILTERED)


async def test_a_privileged_pod_is_refused_in_the_operators_namespaces(installed: Cluster) -> None:
    for namespace, words in (("vcpuset-system", 'PodSecurity "restricted'), ("vcpuset-agent", "vcpuset-agent-pods")):
        body = pod(namespace, "/")
        body["spec"]["containers"][0]["securityContext"] = {"privileged": True}
        refused = await installed.apply(body, check=False)
        assert refused.returncode != 0
        assert words in refused.stderr


async def test_a_machine_in_a_restricted_namespace_is_reached_over_tcp(installed: Cluster, tenant: User) -> None:
    async with temporary_namespace(installed, "restricted") as own:
        await installed.kubectl("label", "namespace", own, "pod-security.kubernetes.io/enforce=restricted")
        vm = NodeVM(installed, own, "web", "node-1")
        manifest = vm.manifest("500m", "tcp:0.0.0.0:4444")
        spec = manifest["spec"]["template"]["spec"]
        del spec["volumes"], spec["containers"][0]["volumeMounts"]
        spec["securityContext"] |= {"runAsUser": 1000, "runAsGroup": 1000, "runAsNonRoot": True}
        await installed.apply(manifest)
        await vm.wait_online(2)
        user = User(installed.control_plane, own)
        await user.create("web", vcpus=3, monitor=((await vm.pod())["status"]["podIP"], 4444))
        await user.wait_ready("web")
        await vm.wait_online(3)


def _status(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
