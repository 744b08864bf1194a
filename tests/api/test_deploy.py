"""The shipped overlays on a real API server: all of it is accepted, and it grants what is needed and no more.

There is no controller manager or kubelet here, so no pod is started: the program is run beside the API server, with the
controller's arguments and service account.
"""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.operator import OperatorProcess
from harness.processes import free_port
from harness.wait import until

__all__: list[str] = []

DEPLOY: Final = REPOSITORY / "deploy"
OVERLAYS: Final = DEPLOY / "overlays"
Json = dict[str, Any]

HOLDER: Final = "jsonpath={.spec.holderIdentity}"
CONTROLLER: Final = "system:serviceaccount:vcpuset-system:vcpuset-controller"
AGENT: Final = "system:serviceaccount:vcpuset-agent:vcpuset-agent"
ACCOUNTS: Final = [pytest.param(AGENT, id="agent"), pytest.param(CONTROLLER, id="controller")]

INSECURE: Final = """\
apiVersion: vcpuset.dev/v1alpha1
kind: VCPUSet
metadata: {name: open}
spec:
  vcpus: 2
  monitor: {tcp: {host: 192.0.2.10, port: 4444, insecure: true}}
"""

PRIVATE: Final = """\
apiVersion: vcpuset.dev/v1alpha1
kind: VCPUSet
metadata: {name: private}
spec:
  vcpus: 2
  monitor: {unix: {path: vm/qmp.sock}}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ControlPlane]:
    """An API server of this module's own, since `deploy` is cluster-wide; set up by these two commands alone."""
    async with ControlPlane() as running:
        for overlay in ("agent", "controller"):
            # Pod security and deprecated fields are told by warnings only.
            await running.kubectl("apply", "--server-side", "--warnings-as-errors", "-k", OVERLAYS / overlay)
        await running.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/vcpusets.vcpuset.dev")

        async def warned() -> bool:
            done = await running.kubectl("create", "--dry-run=server", "-f", "-", input=INSECURE, check=False)
            return "INSECURE" in done.stderr

        # The API server takes a new policy into force some moments later.
        await until(warned, 60, "the warning of an insecure monitor", interval=0.5)
        yield running


async def deployment(cluster: ControlPlane) -> Json:
    """The Deployment as the API server has it."""
    got = json.loads(
        (await cluster.kubectl("get", "deploy/vcpuset-controller", "-n", "vcpuset-system", "-o", "json")).stdout
    )
    assert isinstance(got, dict)
    return got


BASE: Final = {
    ("CustomResourceDefinition", "vcpusets.vcpuset.dev"),
    ("ClusterRole", "vcpuset-view"),
    ("ClusterRole", "vcpuset-edit"),
    ("ClusterRole", "vcpuset-monitor-credentials"),
    ("ClusterRole", "vcpuset-pods"),
    ("PriorityClass", "vcpuset"),
    ("ValidatingAdmissionPolicy", "vcpuset-insecure-monitor"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-insecure-monitor"),
}
AGENT_PART: Final = {
    ("Namespace", "vcpuset-agent"),
    ("ServiceAccount", "vcpuset-agent"),
    ("ClusterRole", "vcpuset-agent"),
    ("ClusterRoleBinding", "vcpuset-agent"),
    ("Role", "vcpuset-agent-readiness"),
    ("RoleBinding", "vcpuset-agent-readiness"),
    ("ValidatingAdmissionPolicy", "vcpuset-agent-node"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-agent-node"),
    ("ValidatingAdmissionPolicy", "vcpuset-agent-adoption"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-agent-adoption"),
    ("ValidatingAdmissionPolicy", "vcpuset-agent-events"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-agent-events"),
    ("ValidatingAdmissionPolicy", "vcpuset-agent-pods"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-agent-pods"),
    ("ValidatingAdmissionPolicy", "vcpuset-agent-vm-pods"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-agent-vm-pods"),
    ("DaemonSet", "vcpuset-agent"),
    ("Service", "vcpuset-agent"),
    ("NetworkPolicy", "vcpuset-agent"),
}
CONTROLLER_PART: Final = {
    ("Namespace", "vcpuset-system"),
    ("ServiceAccount", "vcpuset-controller"),
    ("ClusterRole", "vcpuset-controller"),
    ("ClusterRoleBinding", "vcpuset-controller"),
    ("Role", "vcpuset-leader-election"),
    ("RoleBinding", "vcpuset-leader-election"),
    ("ValidatingAdmissionPolicy", "vcpuset-controller-adoption"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-controller-adoption"),
    ("ValidatingAdmissionPolicy", "vcpuset-controller-node"),
    ("ValidatingAdmissionPolicyBinding", "vcpuset-controller-node"),
    ("Deployment", "vcpuset-controller"),
    ("Service", "vcpuset-controller"),
    ("PodDisruptionBudget", "vcpuset-controller"),
    ("NetworkPolicy", "vcpuset-controller"),
}


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        pytest.param("agent", BASE | AGENT_PART, id="agent"),
        pytest.param("controller", BASE | CONTROLLER_PART, id="controller"),
        pytest.param("both", BASE | AGENT_PART | CONTROLLER_PART, id="both"),
    ],
)
async def test_everything_is_named_for_the_project_and_nothing_else_is_applied(
    cluster: ControlPlane, overlay: str, expected: set[tuple[str, str]]
) -> None:
    built = (await cluster.kubectl("kustomize", OVERLAYS / overlay)).stdout
    parts = {(part["kind"], part["metadata"]["name"]) for part in yaml.safe_load_all(built)}
    assert parts == expected


async def test_the_image_is_replaced_by_a_kustomization_of_the_users_own(cluster: ControlPlane, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copytree(REPOSITORY / "crds", tmp_path / "crds")
    overlay = {
        "resources": ["deploy/overlays/both"],
        "images": [{"name": "vcpuset", "newName": "registry.example.com/vcpuset", "newTag": "1.2.3"}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    built = (await cluster.kubectl("kustomize", tmp_path)).stdout
    assert built.count("image: registry.example.com/vcpuset:1.2.3") == 2
    assert "image: vcpuset" not in built


async def test_two_replicas_run_of_which_a_lease_lets_one_work_and_a_rollout_takes_none_away(
    cluster: ControlPlane,
) -> None:
    spec = (await deployment(cluster))["spec"]
    assert spec["replicas"] == 2
    assert "--leader-elect" in spec["template"]["spec"]["containers"][0]["args"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


async def test_the_controller_does_its_work_with_the_arguments_and_rights_of_the_deployment(
    cluster: ControlPlane,
) -> None:
    template = (await deployment(cluster))["spec"]["template"]["spec"]
    container = template["containers"][0]
    words: list[str] = [*container["command"], *container["args"]]
    assert words[:2] == ["vcpuset", "run"]
    # Only where it listens is the test's own, and what a pod finds in a file.
    arguments = [word for word in words[2:] if not word.startswith("--http-address=")]
    arguments += ["--leader-elect-namespace=vcpuset-system", "--allow-tcp=127.0.0.0/8"]
    rights = await cluster.service_account_kubeconfig("vcpuset-system", template["serviceAccountName"])
    namespace = await cluster.namespace()
    nobody_listens = INSECURE.replace("192.0.2.10, port: 4444", f"127.0.0.1, port: {free_port()}")
    await cluster.kubectl("create", "-n", namespace, "-f", "-", input=nobody_listens)
    async with OperatorProcess(cluster, *arguments, kubeconfig=rights) as operator:

        async def reported() -> bool:
            row = await cluster.kubectl("get", "vcs", "open", "-n", namespace, "--no-headers")
            return "MonitorUnreachable" in row.stdout

        async def told() -> bool:
            events = await cluster.kubectl("get", "events.events.k8s.io", "-n", namespace, "--no-headers")
            return "MonitorUnreachable" in events.stdout

        await until(reported, 60, lambda: f"the status to say why; the operator's log ends with:\n{operator.tail()}\n")
        await until(told, 60, lambda: f"the event; the operator's log ends with:\n{operator.tail()}\n")
        lease = await cluster.kubectl("get", "lease/vcpuset-controller", "-n", "vcpuset-system", "-o", HOLDER)
        assert lease.stdout != ""
        assert await operator.stop() == 0
        # Also the rights to make, keep and give back the Lease.
        assert "forbidden" not in operator.text().lower()
    lease = await cluster.kubectl("get", "lease/vcpuset-controller", "-n", "vcpuset-system", "-o", HOLDER)
    assert lease.stdout == ""


# --- rights ---------------------------------------------------------------------------------------------------------


async def may(cluster: ControlPlane, user: str, verb: str, resource: str, *more: str) -> bool:
    """Whether the API server would let `user` do it."""
    resource, _, subresource = resource.partition("/")
    about = [f"--subresource={subresource}"] if subresource else []  # `TYPE/X` would ask about an object named X
    answer = await cluster.kubectl("auth", "can-i", verb, resource, *about, f"--as={user}", *more, check=False)
    return {"yes": True, "no": False}[answer.stdout.strip()]


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("list", "vcpusets.vcpuset.dev"),
        ("watch", "vcpusets.vcpuset.dev"),
        ("patch", "vcpusets.vcpuset.dev/status"),
        ("patch", "vcpusets.vcpuset.dev/scale"),
        ("create", "events.events.k8s.io"),
        ("patch", "events.events.k8s.io"),
    ],
)
@pytest.mark.parametrize("account", ACCOUNTS)
async def test_the_operator_may(cluster: ControlPlane, account: str, verb: str, resource: str) -> None:
    assert await may(cluster, account, verb, resource, "--all-namespaces")


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("get", "vcpusets.vcpuset.dev"),
        ("create", "vcpusets.vcpuset.dev"),
        ("update", "vcpusets.vcpuset.dev"),
        ("patch", "vcpusets.vcpuset.dev"),
        ("delete", "vcpusets.vcpuset.dev"),
        ("get", "vcpusets.vcpuset.dev/scale"),
        ("update", "vcpusets.vcpuset.dev/scale"),
        ("update", "vcpusets.vcpuset.dev/finalizers"),
        ("list", "events.events.k8s.io"),
        ("create", "events"),
        ("get", "secrets"),
        ("list", "pods"),
        ("create", "pods/exec"),
        ("list", "nodes"),
        ("list", "namespaces"),
        ("list", "customresourcedefinitions.apiextensions.k8s.io"),
        ("create", "leases.coordination.k8s.io"),
        ("escalate", "clusterroles.rbac.authorization.k8s.io"),
    ],
)
@pytest.mark.parametrize("account", ACCOUNTS)
async def test_the_operator_may_not(cluster: ControlPlane, account: str, verb: str, resource: str) -> None:
    assert not await may(cluster, account, verb, resource, "--all-namespaces")


async def test_the_controller_may_list_the_pods_of_the_agents_and_no_others(cluster: ControlPlane) -> None:
    for verb in ("get", "list", "watch", "patch", "delete"):
        assert await may(cluster, CONTROLLER, verb, "pods", "-n", "vcpuset-agent") == (verb == "list")
    for namespace in ("vcpuset-system", "default"):
        assert not await may(cluster, CONTROLLER, "list", "pods", "-n", namespace)
    assert not await may(cluster, AGENT, "list", "pods", "-n", "vcpuset-agent")


@pytest.mark.parametrize(
    ("account", "own", "other"),
    [
        pytest.param(CONTROLLER, {"get", "update", "create"}, {"create"}, id="controller"),
        pytest.param(AGENT, set(), set(), id="agent"),
    ],
)
async def test_the_controller_may_keep_its_own_lease_and_no_other_and_the_agent_none(
    cluster: ControlPlane, account: str, own: set[str], other: set[str]
) -> None:
    async def rights(name: str) -> set[str]:
        verbs = ("get", "list", "watch", "create", "update", "patch", "delete")
        what = f"leases.coordination.k8s.io/{name}"
        # Of "TYPE/X" it is asked about an object named X.
        asked = {
            verb: await cluster.kubectl(
                "auth", "can-i", verb, what, f"--as={account}", "-n", "vcpuset-system", check=False
            )
            for verb in verbs
        }
        return {verb for verb, answer in asked.items() if answer.stdout.strip() == "yes"}

    assert await rights("vcpuset-controller") == own
    assert await rights("kube-scheduler") == other


@pytest.mark.parametrize("account", ACCOUNTS)
async def test_the_operator_has_no_rights_but_those_and_what_everyone_has(cluster: ControlPlane, account: str) -> None:
    async def rights(user: str) -> set[str]:
        listed = await cluster.kubectl("auth", "can-i", "--list", "--no-headers", f"--as={user}")
        return {" ".join(line.split()) for line in listed.stdout.splitlines()}

    stranger = "system:serviceaccount:vcpuset-system:stranger"
    assert await rights(account) - await rights(stranger) == {
        "vcpusets.vcpuset.dev [] [] [list watch]",
        "vcpusets.vcpuset.dev/status [] [] [patch]",
        "vcpusets.vcpuset.dev/scale [] [] [patch]",
        "events.events.k8s.io [] [] [create patch]",
    }


async def test_secrets_are_read_by_name_and_only_where_a_namespace_has_bound_the_role(cluster: ControlPlane) -> None:
    async def rights(namespace: str) -> set[str]:
        verbs = ("get", "list", "watch", "create", "update", "patch", "delete")
        return {verb for verb in verbs if await may(cluster, CONTROLLER, verb, "secrets", "-n", namespace)}

    assert await rights("default") == set()
    await cluster.kubectl("apply", "--server-side", "-f", DEPLOY / "examples" / "monitor-credentials.yaml")

    async def granted() -> bool:
        return await rights("default") == {"get"}

    await until(granted, 60, "the controller to be allowed to get Secrets of the namespace, and nothing else")
    assert await rights("kube-system") == set()


VIEW: Final = {
    ("list", "vcpusets.vcpuset.dev"),
    ("get", "vcpusets.vcpuset.dev/status"),
    ("get", "vcpusets.vcpuset.dev/scale"),
}
EDIT: Final = {
    ("create", "vcpusets.vcpuset.dev"),
    ("update", "vcpusets.vcpuset.dev"),
    ("delete", "vcpusets.vcpuset.dev"),
    ("patch", "vcpusets.vcpuset.dev/scale"),
}
NOBODY: Final = {("patch", "vcpusets.vcpuset.dev/status")}


@pytest.mark.parametrize(
    ("roles", "granted"),
    [
        pytest.param(["vcpuset-view"], VIEW, id="viewers read"),
        pytest.param(["vcpuset-view", "vcpuset-edit"], VIEW | EDIT, id="editors read and change"),
    ],
)
async def test_the_roles_for_people_grant(
    cluster: ControlPlane, roles: list[str], granted: set[tuple[str, str]]
) -> None:
    namespace = await cluster.namespace()
    for role in roles:
        await cluster.kubectl("create", "rolebinding", role, f"--clusterrole={role}", "--user=jo", "-n", namespace)

    async def told() -> set[tuple[str, str]]:
        asked = VIEW | EDIT | NOBODY
        return {(verb, what) for verb, what in asked if await may(cluster, "jo", verb, what, "-n", namespace)}

    async def as_granted() -> bool:
        return await told() == granted

    # A binding takes force some moments after it is written.
    await until(as_granted, 60, f"jo to have the rights {sorted(granted)}")


async def test_the_roles_for_people_join_the_clusters_own(cluster: ControlPlane) -> None:
    # No controller is here to join them; the labels are what it goes by.
    ours = "app.kubernetes.io/name=vcpuset"
    joined = {}
    for whole in ("view", "edit", "admin"):
        label = f"rbac.authorization.k8s.io/aggregate-to-{whole}=true"
        found = await cluster.kubectl("get", "clusterroles", f"--selector={ours},{label}", "-o=name")
        joined[whole] = {line.partition("/")[2] for line in found.stdout.split()}
    assert joined == {
        "view": {"vcpuset-view"},
        "edit": {"vcpuset-view", "vcpuset-edit"},
        "admin": {"vcpuset-view", "vcpuset-edit"},
    }


# --- warning --------------------------------------------------------------------------------------------------------


async def test_kubectl_warns_of_an_insecure_monitor_and_lets_it_pass(cluster: ControlPlane) -> None:
    namespace = await cluster.namespace()
    created = await cluster.kubectl("create", "-n", namespace, "-f", "-", input=INSECURE)
    assert created.stdout == "vcpuset.vcpuset.dev/open created\n"
    assert created.stderr.startswith("Warning: ")
    assert "INSECURE MONITOR: spec.monitor.tcp is neither encrypted nor authenticated." in created.stderr


async def test_kubectl_does_not_warn_when_an_insecure_set_is_scaled_or_reported_on(cluster: ControlPlane) -> None:
    namespace = await cluster.namespace()
    await cluster.kubectl("create", "-n", namespace, "-f", "-", input=INSECURE)
    scaled = await cluster.kubectl("scale", "-n", namespace, "vcs/open", "--replicas=3")
    assert scaled.stderr == ""
    status = ("--subresource=status", "--type=merge", "-p", '{"status": {"vcpus": 2}}')
    reported = await cluster.kubectl("patch", "-n", namespace, "vcs", "open", *status)
    assert reported.stderr == ""


async def test_kubectl_does_not_warn_of_a_unix_monitor(cluster: ControlPlane) -> None:
    created = await cluster.kubectl("create", "--dry-run=server", "-f", "-", input=PRIVATE)
    assert created.stderr == ""


async def test_a_refused_manifest_is_refused_for_its_own_fault(cluster: ControlPlane) -> None:
    manifest = INSECURE.replace(", insecure: true", "")
    refused = await cluster.kubectl("create", "--dry-run=server", "-f", "-", input=manifest, check=False)
    assert refused.returncode == 1
    assert "spec.monitor.tcp: Invalid value: exactly one of tls and insecure must be set" in refused.stderr
    assert "Warning" not in refused.stderr
