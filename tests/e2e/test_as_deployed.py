"""The operator in a cluster as `deploy/` installs it: the rendered pods run, with their accounts' rights and no others.

All is real but the nodes (see `harness.kubelet`): the pods' arguments, users, tokens and probes are those of the
manifests, the machines are QEMU's. The one thing that is added is the network that the test's TLS monitor lies in.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from harness.audit import AuditEvent
from harness.cache import REPOSITORY
from harness.container import WHY_NOT
from harness.controlplane import ControlPlane
from harness.guest import Guest
from harness.kubelet import ALLOW_LOOPBACK, Nodes, cluster, install
from harness.monitortls import MonitorTLS
from harness.pki import Authority
from harness.qmp import count
from harness.wait import until
from harness.world import User

# The pods are played in the module's event loop.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
]

GROUP: Final = 65532
"""The agents' group."""

NODES: Final = ("node-a", "node-b")
AGENT: Final = "system:serviceaccount:vcpuset-agent:vcpuset-agent"
CONTROLLER: Final = "system:serviceaccount:vcpuset-system:vcpuset-controller"

SERIES_SECONDS: Final = 180.0
"""The count of an Event is written a minute after it repeated."""


@dataclass(frozen=True)
class World:
    """A cluster with both shapes installed, a machine on each node, and one with a TLS monitor."""

    control_plane: ControlPlane
    nodes: Nodes
    user: User
    machines: dict[str, Guest]
    """By the name of their set: node-a, node-b, tls."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The cluster, after each machine has been resized twice."""
    async with cluster(*NODES) as (control_plane, nodes):
        await install(control_plane, nodes, ALLOW_LOOPBACK)
        user = User(control_plane, await control_plane.namespace("tenant"))
        folders = {node: nodes.node(node).path("/run/vcpuset") / user.namespace for node in NODES}
        for folder in folders.values():
            folder.mkdir()
        machines = {
            node: Guest(None, smp="2,maxcpus=64", monitor_paths=[folder / "qmp.sock"])
            for node, folder in folders.items()
        }
        authority = Authority()
        mine = authority.client()
        tls = MonitorTLS(authority.server().write(tmp_path_factory.mktemp("machine") / "tls"), mine.name)
        machines["tls"] = Guest(None, smp="2,maxcpus=64", monitors=0, tls=tls)
        for path, body in (
            ("/api/v1/namespaces/{}/secrets", mine.secret("monitor")),
            ("/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings", credentials_binding()),
        ):
            answer = await control_plane.request("POST", path.format(user.namespace), body)
            assert answer.status == 201, answer.body
        try:
            for name, machine in machines.items():
                await machine.start()
                for socket in machine.monitors:
                    shared(socket)
                if name in NODES:
                    await user.create(name, vcpus=None, monitor="qmp.sock", nodeName=name)
                else:
                    host, port = machine.tcp_address
                    tcp = {"host": host, "port": port, "tls": {"secretName": "monitor"}}
                    await user.create(name, vcpus=None, monitor=tcp)
            for name, machine in machines.items():
                assert (await user.wait_ready(name)).body["spec"]["vcpus"] == 2
                await user.change(name, vcpus=4)
                await user.wait_ready(name)
                # Converged twice for one generation, so that there is an Event with a count.
                machine.kill()
                for socket in machine.monitors:
                    socket.unlink()
                await user.wait_reason(name, "MonitorUnreachable")
                await machine.start()
                for socket in machine.monitors:
                    shared(socket)
                await until_count(machine, 4)
                await user.wait_ready(name)
            yield World(control_plane, nodes, user, machines)
        finally:
            for machine in machines.values():
                await machine.stop()


def credentials_binding() -> dict[str, Any]:
    """The shipped example that lets the controller read the Secrets of a namespace."""
    example = REPOSITORY / "deploy" / "examples" / "monitor-credentials.yaml"
    binding: dict[str, Any] = yaml.safe_load(example.read_text())
    del binding["metadata"]["namespace"]
    return binding


async def until_count(machine: Guest, vcpus: int) -> None:
    """Wait until QEMU has so many vCPUs."""

    async def reached() -> bool:
        return await count(machine.control) == vcpus

    await until(reached, 90, f"{vcpus} vCPUs in QEMU", interval=0.2)


def told_by_kernel(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def shared(socket: Path) -> None:
    """Let the agents connect, as a setgid folder and QEMU's umask do."""
    os.chown(socket, -1, GROUP)
    socket.chmod(0o660)


async def test_each_machine_is_resized_by_its_own_operator(world: World) -> None:
    for name, machine in world.machines.items():
        assert await count(machine.control) == 4, name
    written = {
        (event.user, event.name)
        for event in world.control_plane.audit_events()
        if event.subresource == "status" and event.resource == "vcpusets"
    }
    assert written == {(AGENT, "node-a"), (AGENT, "node-b"), (CONTROLLER, "tls")}


async def test_the_pods_run_as_the_manifests_say(world: World) -> None:
    assert sorted(each.node for each in world.nodes.pods if each.namespace == "vcpuset-agent") == list(NODES)
    for pod in world.nodes.pods:
        status = told_by_kernel(pod.pid)
        assert set(status["Uid"].split()) == {"65532"}
        assert int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert pod.restarts == 0, pod.text()


# --- rights: keep this at the end, it ends the pods ------------------------------------------------------------------


async def roles(control_plane: ControlPlane) -> dict[str, list[dict[str, Any]]]:
    """The rules of each role that is bound to an operator's account."""
    found = {}
    for kinds in ("clusterrolebindings", "rolebindings"):
        listed = await control_plane.kubectl("get", kinds, "--all-namespaces", "-o", "json")
        for binding in json.loads(listed.stdout)["items"]:
            accounts = [each["name"] for each in binding.get("subjects", ()) if each["kind"] == "ServiceAccount"]
            if {"vcpuset-agent", "vcpuset-controller"} & set(accounts):
                kind, name = binding["roleRef"]["kind"], binding["roleRef"]["name"]
                namespace = ["-n", binding["metadata"]["namespace"]] if kind == "Role" else []
                role = await control_plane.kubectl("get", kind, name, *namespace, "-o", "json")
                found[f"{kind} {name}"] = json.loads(role.stdout)["rules"]
    return found


def granted(rules: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Verb, group and resource of all that rules allow."""
    return [
        (verb, group, resource)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


def used(events: Iterable[AuditEvent]) -> set[tuple[str, str, str, str]]:
    """The role that allowed a request, and the request as rules name it; of requests that went well."""
    return {
        (
            event.allowed_by.partition(" of ")[2].partition(" to ")[0].replace('"', "").partition("/")[0],
            event.verb,
            event.group,
            f"{event.resource}/{event.subresource}" if event.subresource else event.resource,
        )
        for event in events
        if event.code in {200, 201}
    }


async def test_every_right_is_used_none_is_granted_twice_and_no_request_is_refused(world: World) -> None:
    control_plane = world.control_plane

    async def counted() -> bool:
        return {(CONTROLLER, "patch"), (AGENT, "patch")} <= {
            (event.user, event.verb) for event in control_plane.audit_events() if event.resource == "events"
        }

    await until(counted, SERIES_SECONDS, "the counts of repeated Events", interval=0.5)
    # A watch is recorded when it ends; and a leader that ends gives its Lease back.
    for workload, namespace in (("daemonset/vcpuset-agent", "agent"), ("deployment/vcpuset-controller", "system")):
        await control_plane.kubectl("delete", "-n", f"vcpuset-{namespace}", workload)
    await until(lambda: not world.nodes.pods, 60, "the pods to end")

    shipped = await roles(control_plane)
    assert set(shipped) == {
        "ClusterRole vcpuset-agent",
        "ClusterRole vcpuset-controller",
        "ClusterRole vcpuset-monitor-credentials",
        "Role vcpuset-agent-readiness",
        "Role vcpuset-leader-election",
    }
    rights = [(role, *right) for role, rules in shipped.items() for right in granted(rules)]
    assert len(rights) == len(set(rights))

    def mine() -> list[AuditEvent]:
        return [event for event in control_plane.audit_events() if event.user in {AGENT, CONTROLLER}]

    await until(lambda: set(rights) <= used(mine()), 60, lambda: f"uses of {set(rights) - used(mine())}")
    assert [event for event in mine() if event.code in {401, 403}] == []
