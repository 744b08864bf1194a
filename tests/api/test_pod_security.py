"""Pod security, judged by the API server's own admission on Pods made from the shipped templates."""

import copy
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import pytest
import pytest_asyncio

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.processes import Completed
from harness.wait import until

__all__: list[str] = []

Json = dict[str, Any]
WORKLOADS: Final = {"vcpuset-agent": "daemonset/vcpuset-agent", "vcpuset-system": "deployment/vcpuset-controller"}


async def pod(cluster: ControlPlane, home: str) -> Json:
    """A Pod as the controller of the workload in namespace `home` would make it."""
    got = await cluster.kubectl("get", WORKLOADS[home], "-n", home, "-o", "json")
    template = json.loads(got.stdout)["spec"]["template"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "labels": template["metadata"]["labels"]},
        "spec": template["spec"],
    }


async def admit(cluster: ControlPlane, namespace: str, body: Json) -> Completed:
    """Ask the API server whether it would take a Pod."""
    return await cluster.kubectl(
        "create", "-n", namespace, "--dry-run=server", "-f", "-", input=json.dumps(body), check=False
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ControlPlane]:
    """An API server with both kinds installed, and the policy on the agent's namespace in force."""
    async with ControlPlane() as running:
        await running.kubectl("apply", "--server-side", "-k", REPOSITORY / "deploy" / "overlays" / "both")
        rooted = await pod(running, "vcpuset-agent")
        rooted["spec"]["hostNetwork"] = True

        async def in_force() -> bool:
            return (await admit(running, "vcpuset-agent", rooted)).returncode != 0

        # The API server takes a new policy into force some moments later.
        await until(in_force, 60, "the policy vcpuset-agent-pods", interval=0.5)
        yield running


@pytest.mark.parametrize("home", WORKLOADS)
async def test_the_shipped_pod_is_admitted_to_its_namespace_without_a_warning(cluster: ControlPlane, home: str) -> None:
    admitted = await admit(cluster, home, await pod(cluster, home))
    assert (admitted.returncode, admitted.stderr) == (0, "")


async def test_the_agents_pod_falls_short_of_restricted_by_its_folder_alone(cluster: ControlPlane) -> None:
    body = await pod(cluster, "vcpuset-agent")
    refused = await admit(cluster, "vcpuset-system", body)
    assert refused.stderr.strip().endswith(
        'violates PodSecurity "restricted:latest": restricted volume types (volume "sockets" uses restricted volume '
        'type "hostPath")'
    )
    body["spec"]["volumes"] = [{"name": "sockets", "emptyDir": {}}]
    assert (await admit(cluster, "vcpuset-system", body)).returncode == 0


async def test_the_controllers_namespace_refuses_a_looser_pod(cluster: ControlPlane) -> None:
    body = await pod(cluster, "vcpuset-system")
    del body["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"]
    refused = await admit(cluster, "vcpuset-system", body)
    assert 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation' in refused.stderr


Change = Callable[[Json], object]


def inside(change: Change) -> Change:
    """A change of the container's security context."""
    return lambda spec: change(spec["containers"][0]["securityContext"])


def another(**fields: object) -> Change:
    """A second container, like the first but for these fields."""
    return lambda spec: spec["containers"].append({**copy.deepcopy(spec["containers"][0]), "name": "more", **fields})


def initially(**fields: object) -> Change:
    """An init container, like the first but for these fields and for what only a container has that stays."""
    left_out = {"livenessProbe", "readinessProbe", "startupProbe", "ports"}

    def change(spec: Json) -> None:
        like = {key: value for key, value in spec["containers"][0].items() if key not in left_out}
        spec["initContainers"] = [{**copy.deepcopy(like), "name": "first", **fields}]

    return change


def to_another_host(*place: str) -> Change:
    """A probe or hook of the container, by its place in it, that asks another host."""

    def change(spec: Json) -> None:
        fields = spec["containers"][0]
        for name in place[:-1]:
            fields = fields.setdefault(name, {})
        fields.pop("httpGet", None)  # a probe has one handler
        fields[place[-1]] = {"host": "169.254.169.254", "port": 80}

    return change


LOOSER: Final[dict[str, tuple[Change, str]]] = {
    "another folder of the node": (
        lambda spec: spec["volumes"].append({"name": "etc", "hostPath": {"path": "/etc"}}),
        "pods in this namespace may mount no hostPath other than /run/vcpuset",
    ),
    "a folder by way of ..": (
        lambda spec: spec["volumes"][0]["hostPath"].update(path="/run/vcpuset/../.."),
        "must not contain '..'",
    ),
    "a claim, which may be a folder of the node": (
        lambda spec: spec["volumes"].append({"name": "x", "persistentVolumeClaim": {"claimName": "x"}}),
        "pods in this namespace may mount no hostPath other than /run/vcpuset",
    ),
    "the folder writable": (
        lambda spec: spec["containers"][0]["volumeMounts"][0].update(readOnly=False),
        "/run/vcpuset must be mounted read-only",
    ),
    "the folder writable in another container": (
        another(volumeMounts=[{"name": "sockets", "mountPath": "/x"}]),
        "/run/vcpuset must be mounted read-only",
    ),
    "the folder writable in an init container": (
        initially(volumeMounts=[{"name": "sockets", "mountPath": "/x"}]),
        "/run/vcpuset must be mounted read-only",
    ),
    "the node's network": (lambda spec: spec.update(hostNetwork=True), "must not use the network, ports"),
    "the node's processes": (lambda spec: spec.update(hostPID=True), "must not use the network, ports"),
    "the node's IPC": (lambda spec: spec.update(hostIPC=True), "must not use the network, ports"),
    "a port of the node": (
        lambda spec: spec["containers"][0]["ports"][0].update(hostPort=8080),
        "must not use the network, ports",
    ),
    "root": (lambda spec: spec["securityContext"].update(runAsUser=0), "must not run as root"),
    "root in the container": (inside(lambda context: context.update(runAsUser=0)), "must not run as root"),
    "the image's user, unchecked": (
        lambda spec: spec["securityContext"].update(runAsNonRoot=False),
        "must not run as root",
    ),
    "no security context": (lambda spec: spec.pop("securityContext"), "must not run as root"),
    "no seccomp": (lambda spec: spec["securityContext"].pop("seccompProfile"), "must set a seccomp profile"),
    "no seccomp in the container": (
        inside(lambda context: context.update(seccompProfile={"type": "Unconfined"})),
        "must set a seccomp profile",
    ),
    "a privileged container": (
        inside(lambda context: context.update(privileged=True, allowPrivilegeEscalation=True)),
        "no privileges, no capabilities",
    ),
    "escalation": (inside(lambda context: context.pop("allowPrivilegeEscalation")), "no privileges, no capabilities"),
    "a capability": (
        inside(lambda context: context["capabilities"].update(add=["SYS_ADMIN"])),
        "no privileges, no capabilities",
    ),
    "the default capabilities": (inside(lambda context: context.pop("capabilities")), "no privileges, no capabilities"),
    "a writable root": (inside(lambda context: context.pop("readOnlyRootFilesystem")), "a read-only root"),
    "a bare second container": (another(securityContext={}), "no privileges, no capabilities"),
    **{
        f"a {where} to another host": (
            to_another_host(*where.split(".")),
            "must not name a host",
        )
        for where in (
            *("livenessProbe.httpGet", "readinessProbe.httpGet", "startupProbe.httpGet", "startupProbe.tcpSocket"),
            *("lifecycle.postStart.httpGet", "lifecycle.preStop.httpGet", "lifecycle.preStop.tcpSocket"),
        )
    },
    "kernel parameters": (
        lambda spec: spec["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
        "must not set sysctls",
    ),
    "another SELinux label": (
        inside(lambda context: context.update(seLinuxOptions={"type": "spc_t"})),
        "must not set sysctls",
    ),
    "no AppArmor": (
        inside(lambda context: context.update(appArmorProfile={"type": "Unconfined"})),
        "must not set sysctls",
    ),
}


@pytest.mark.parametrize("looser", LOOSER)
async def test_the_agents_namespace_refuses_a_pod_with(cluster: ControlPlane, looser: str) -> None:
    change, message = LOOSER[looser]
    body = await pod(cluster, "vcpuset-agent")
    change(body["spec"])
    refused = await admit(cluster, "vcpuset-agent", body)
    assert refused.returncode != 0
    assert message in refused.stderr


async def test_the_agents_namespace_lets_nobody_add_a_container_to_a_running_pod(cluster: ControlPlane) -> None:
    body = await pod(cluster, "vcpuset-agent")
    await cluster.kubectl("create", "-n", "vcpuset-agent", "-f", "-", input=json.dumps(body))
    ephemeral = {"spec": {"ephemeralContainers": [{"name": "debug", "image": "busybox"}]}}
    path = "/api/v1/namespaces/vcpuset-agent/pods/probe/ephemeralcontainers"
    answer = await cluster.request("PATCH", path, ephemeral)
    assert "ephemeral containers are not allowed" in answer.body["message"]
