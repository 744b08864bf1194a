"""HorizontalPodAutoscalers of a real kube-controller-manager steer sets, as docs/autoscaling.md says.

The examples are the page's own. The metrics are numbers that the tests set; all else is real: the API server's scale
subresource, the autoscaler, the operator, QEMU, and where a guest's part matters, the guest.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from harness.audit import AuditEvent
from harness.cache import REPOSITORY
from harness.controllermanager import HPA_USER, ControllerManager
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.metricsserver import MetricsServer, Series
from harness.operator import OperatorProcess
from harness.processes import CommandFailed
from harness.qmp import count
from harness.saved import saved_guest
from harness.vmpod import VMPod
from harness.wait import until
from harness.world import Seen, User

# The metrics server lives in the module's event loop, and has to be answered from it during the tests.
pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE: Final = Page(REPOSITORY / "docs" / "autoscaling.md")
PODS: Final = Page(REPOSITORY / "docs" / "pods.md")

WAIT_SECONDS: Final = 90.0

QUIET_SYNCS: Final = 3
"""How many more looks of an autoscaler have to change nothing before a count is taken to be settled."""

Manifest = dict[str, Any]


def fragment(field: str) -> Manifest:
    """The page's excerpt of an autoscaler that sets this field of `behavior.scaleDown`."""
    examples: list[Manifest] = [block.document() for block in PAGE.blocks("yaml")]
    (found,) = [
        each for each in examples if "kind" not in each and field in each["spec"]["behavior"].get("scaleDown", {})
    ]
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control_plane() -> AsyncIterator[ControlPlane]:
    """An API server of this module's own: metrics APIs are cluster-wide."""
    async with ControlPlane() as running:
        await running.install_crd()
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def metrics(control_plane: ControlPlane) -> AsyncIterator[MetricsServer]:
    """The metrics, and an autoscaler controller that reads them."""
    async with MetricsServer(control_plane) as serving, ControllerManager(control_plane):
        yield serving


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """The agent of the node that the page's set names."""
    node = PAGE.manifest("VCPUSet", "web")["spec"]["nodeName"]
    async with OperatorProcess(control_plane, f"--node-name={node}", socket_root=socket_root) as running:
        yield running


class Scaled:
    """The page's machine and set in one namespace, and what an autoscaler makes of them.

    name     of the set, and of the folder with its monitor
    monitor  the socket for the operator; `control` is another one, for the tests
    since    the place in the audit log at which the set was made
    """

    def __init__(self, user: User, folder: Path, name: str = "web") -> None:
        self.user = user
        self.name = name
        self.monitor = folder / name / "qmp.sock"
        self.monitor.parent.mkdir()
        self.control = Path()
        self.since = user.control_plane.audit_offset()

    async def kubectl(self, *arguments: str) -> None:
        await self.user.control_plane.kubectl("--namespace", self.user.namespace, *arguments)

    async def apply(self, manifest: Manifest, *arguments: str) -> None:
        await self.user.control_plane.apply(manifest, "--namespace", self.user.namespace, *arguments)

    async def create(self, **spec: Any) -> Seen:
        """Apply the page's set, changed by `spec`, and wait until it is Ready."""
        manifest = PAGE.manifest("VCPUSet", "web")
        manifest["metadata"]["name"] = self.name
        manifest["spec"].update(spec, monitor={"unix": {"path": f"{self.name}/qmp.sock"}})
        await self.apply(manifest)
        return await self.user.wait_ready(self.name)

    def hpa_path(self, name: str) -> str:
        """The path of an autoscaler."""
        return f"/apis/autoscaling/v2/namespaces/{self.user.namespace}/horizontalpodautoscalers/{name}"

    async def hpa(self, name: str) -> Manifest:
        """An autoscaler as it is now."""
        found: Manifest = await self.user.control_plane.ok("GET", self.hpa_path(name))
        return found

    async def says(self, name: str, kind: str, status: str, reason: str, words: str = "") -> str:
        """Wait until an autoscaler has a condition; see `ControlPlane.until_condition`."""
        return await self.user.control_plane.until_condition(self.hpa_path(name), kind, status, reason, words)

    async def declared(self, vcpus: int) -> Seen:
        """Wait until the autoscaler has declared this count."""
        return await self.user.wait(
            self.name, lambda seen: bool(seen.body["spec"].get("vcpus") == vcpus), f"spec.vcpus {vcpus}", WAIT_SECONDS
        )

    async def settles(self, vcpus: int) -> None:
        """Wait until the count is declared, and the machine has it, and the autoscaler leaves it so."""
        await self.declared(vcpus)
        seen = await self.user.wait_ready(self.name)
        assert seen.vcpus == vcpus
        assert await count(self.control) == vcpus
        await self.keeps(vcpus)

    async def keeps(self, vcpus: int) -> None:
        """Check that some more looks of the autoscaler leave the declared count as it is."""
        since = self.user.control_plane.audit_offset()
        await until(
            lambda: len(self._requests(since, "get")) >= QUIET_SYNCS, WAIT_SECONDS, "the autoscaler to look some more"
        )
        seen = await self.user.get(self.name)
        assert seen.body["spec"]["vcpus"] == vcpus

    def changes(self) -> int:
        """How often the autoscaler has changed the count."""
        return len([each for each in self._requests(self.since) if each.is_write and each.code == 200])

    def _requests(self, since: int, verb: str = "") -> list[AuditEvent]:
        return [
            each
            for each in self.user.control_plane.audit_events(since)
            if (each.user, each.resource, each.subresource) == (HPA_USER, "vcpusets", "scale")
            and (each.namespace, each.name) == (self.user.namespace, self.name)
            and (not verb or each.verb == verb)
        ]


async def test_an_object_metric_drives_a_guest_up_and_down_with_one_write_for_each_change(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[web.monitor]) as guest:
        web.control = guest.control
        await web.create()
        metrics.set_object(user.namespace, "web", "busy_vcpus", "1.2")
        await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web"))
        await web.says("web", "ScalingActive", "True", "ValidMetricFound")
        await web.settles(2)
        assert web.changes() == 0
        for value, vcpus in (("2.3", 4), ("4.1", 7), ("1.7", 3), ("600m", 1)):
            metrics.set_object(user.namespace, "web", "busy_vcpus", value)
            await web.settles(vcpus)
            await guest.wait_online(vcpus)
        assert web.changes() == 4
        assert (await web.hpa("web"))["status"]["currentReplicas"] == 1


async def test_external_metrics_are_added_up_and_drive_a_guest_up_and_down(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    def waiting(*messages: str) -> None:
        of_the_queue = [Series(each, {"queue": "web", "host": str(host)}) for host, each in enumerate(messages)]
        metrics.set_external(user.namespace, "queue_messages_ready", *of_the_queue, Series("1k", {"queue": "mail"}))

    web = Scaled(user, folder)
    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[web.monitor]) as guest:
        web.control = guest.control
        await web.create()
        waiting("15", "5")
        await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web-by-queue"))
        await web.says("web-by-queue", "ScalingActive", "True", "ValidMetricFound")
        for messages, vcpus in ((("20", "17"), 4), (("30", "37"), 7), (("0", "25"), 3)):
            waiting(*messages)
            await web.settles(vcpus)
            await guest.wait_online(vcpus)
        assert web.changes() == 3


async def test_the_status_stays_truthful_and_the_tolerance_is_about_it_while_a_guest_keeps_its_cpus(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    async with saved_guest(smp="4,maxcpus=64", monitor_paths=[web.monitor]) as guest:
        web.control = guest.control
        await web.create(vcpus=4)
        await guest.hold_cpus(1, 2, 3)
        metrics.set_object(user.namespace, "web", "busy_vcpus", "1.2")
        await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web"))
        await web.declared(2)
        refused = await user.wait_reason("web", "UnplugRefused")
        assert refused.vcpus == 4
        await web.keeps(2)
        (current,) = (await web.hpa("web"))["status"]["currentMetrics"]
        assert current["object"]["current"]["averageValue"] == "300m", "the 1.2 are divided by what the machine has"

        # The trap: 2.5 / 0.6 = 4.17 are 5 vCPUs, but the 4 that the guest kept serve them within 10 %.
        metrics.set_object(user.namespace, "web", "busy_vcpus", "2.5")
        await web.settles(4)
        # The way out.
        await web.kubectl("patch", "hpa", "web", f"--patch={json.dumps(fragment('tolerance'))}")
        await web.settles(5)
        await guest.wait_online(5)
        assert web.changes() == 3


async def test_an_autoscaler_whose_bounds_exceed_the_sets_is_refused_with_the_rule_and_changes_nothing(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    async with Guest(None, smp="2,maxcpus=64", monitor_paths=[web.monitor]) as machine:
        web.control = machine.control
        before = (await web.create(maxVCPUs=3)).body["metadata"]["generation"]
        metrics.set_object(user.namespace, "web", "busy_vcpus", "5.6")
        await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web"))
        message = await web.says("web", "AbleToScale", "False", "FailedUpdateScale")
        assert "vcpus must be at most maxVCPUs" in message
        await web.settles(2)
        assert (await user.get("web")).body["metadata"]["generation"] == before

        await web.kubectl("patch", "hpa", "web", '--patch={"spec": {"maxReplicas": 3}}')
        await web.settles(3)
        await web.says("web", "AbleToScale", "True", "ReadyForNewScale")


async def test_without_a_metric_the_count_stays_but_for_the_autoscalers_own_bounds(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    async with Guest(None, smp="2,maxcpus=64", monitor_paths=[web.monitor]) as machine:
        web.control = machine.control
        await web.create()
        await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web"))
        await web.says("web", "ScalingActive", "False", "FailedGetObjectMetric")
        await web.settles(2)
        assert web.changes() == 0
        await web.kubectl("patch", "hpa", "web", '--patch={"spec": {"minReplicas": 3}}')
        await web.settles(3)
        assert web.changes() == 1


async def test_an_apply_that_names_the_count_conflicts_with_the_autoscaler_and_one_without_it_does_not(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    async with Guest(None, smp="2,maxcpus=64", monitor_paths=[web.monitor]) as machine:
        web.control = machine.control
        manifest = PAGE.manifest("VCPUSet", "web")
        manifest["spec"]["vcpus"] = 2
        await web.apply(manifest, "--server-side")
        await user.wait_ready("web")
        metrics.set_object(user.namespace, "web", "busy_vcpus", "2.3")
        autoscaler = PAGE.manifest("HorizontalPodAutoscaler", "web")
        autoscaler["spec"] |= fragment("stabilizationWindowSeconds")["spec"]
        await web.apply(autoscaler)
        await web.settles(4)

        with pytest.raises(CommandFailed, match=r'conflict with "kube-controller-manager".*\n?.*\.spec\.vcpus'):
            await web.apply(manifest, "--server-side")
        del manifest["spec"]["vcpus"]
        manifest["spec"]["unplug"] = {"retrySeconds": 77}
        await web.apply(manifest, "--server-side")
        await web.settles(4)
        assert (await user.get("web")).body["spec"]["unplug"]["retrySeconds"] == 77


async def test_a_set_without_a_count_is_adopted_and_then_follows_the_metric(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    metrics.set_object(user.namespace, "web", "busy_vcpus", "2.3")
    manifest = PAGE.manifest("VCPUSet", "web")
    await web.apply(manifest)
    await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web"))
    message = await web.says("web", "AbleToScale", "False", "FailedGetScale")
    assert 'the spec replicas field ".spec.vcpus" does not exist' in message
    async with Guest(None, smp="2,maxcpus=64", monitor_paths=[web.monitor]) as machine:
        web.control = machine.control
        await web.settles(4)
        manifest["spec"]["unplug"] = {"retrySeconds": 77}
        await web.apply(manifest)
        await web.settles(4)
        assert web.changes() == 1


async def test_a_count_that_a_client_side_apply_overwrites_is_put_back_by_the_autoscaler(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    async with Guest(None, smp="2,maxcpus=64", monitor_paths=[web.monitor]) as machine:
        web.control = machine.control
        await web.create(vcpus=2)
        metrics.set_external(user.namespace, "queue_messages_ready", Series("31", {"queue": "web"}))
        await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web-by-queue"))
        await web.settles(4)
        assert web.changes() == 1
        await web.create(vcpus=2)
        await web.settles(4)
        assert web.changes() == 2


async def test_two_sets_of_a_namespace_are_told_apart_and_two_autoscalers_of_one_set_are_not(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    """Pods that run the machines carry the labels which the selectors name: only then can selectors be ambiguous."""
    web, db = Scaled(user, folder), Scaled(user, folder, "db")

    def autoscaler(scaled: Scaled, name: str) -> Manifest:
        manifest = PAGE.manifest("HorizontalPodAutoscaler", "web")
        manifest["metadata"]["name"] = name
        spec = manifest["spec"]
        for reference in (spec["scaleTargetRef"], spec["metrics"][0]["object"]["describedObject"]):
            reference["name"] = scaled.name
        return manifest

    async with (
        Guest(None, smp="2,maxcpus=64", monitor_paths=[web.monitor]) as web_machine,
        Guest(None, smp="2,maxcpus=64", monitor_paths=[db.monitor]) as db_machine,
    ):
        for scaled, machine, load in ((web, web_machine, "2.3"), (db, db_machine, "1.7")):
            scaled.control = machine.control
            seen = await scaled.create()
            key, _, value = seen.status["selector"].partition("=")
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": scaled.name, "labels": {key: value, "app": "vm"}},
                "spec": {"containers": [{"name": "qemu", "image": "qemu"}]},
            }
            await scaled.apply(pod)
            metrics.set_object(user.namespace, scaled.name, "busy_vcpus", load)
            await scaled.apply(autoscaler(scaled, scaled.name))
        for scaled, vcpus in ((web, 4), (db, 3)):
            await scaled.settles(vcpus)
            await scaled.says(scaled.name, "ScalingActive", "True", "ValidMetricFound")
            assert scaled.changes() == 1

        await web.apply(autoscaler(web, "second"))
        for name in ("web", "second"):
            await web.says(name, "ScalingActive", "False", "AmbiguousSelector")
        await db.says("db", "ScalingActive", "True", "ValidMetricFound")


async def test_the_metrics_of_a_pod_drive_its_machine_and_its_cpu(
    metrics: MetricsServer, folder: Path, operator: OperatorProcess, user: User
) -> None:
    web = Scaled(user, folder)
    spec = PODS.manifest("VCPUSet", "web")["spec"]["pod"]
    async with (
        FaultyMonitor(web.monitor, cpus=2) as machine,
        VMPod(user, "web", limit="2200m") as pod,
        pod.obeying(),
    ):

        async def settles(vcpus: int) -> None:
            await web.declared(vcpus)
            await user.wait_ready("web")
            assert len(machine.cpus.occupied()) == vcpus
            await pod.wait_size(f"{vcpus}200m")
            await web.keeps(vcpus)

        assert (await web.create(pod=spec)).status["selector"] == "vm=web"
        metrics.set_pod(user.namespace, "web", "qemu", "1.2")
        await web.apply(PAGE.manifest("HorizontalPodAutoscaler", "web-by-pod"))
        await web.says("web-by-pod", "ScalingActive", "True", "ValidMetricFound")
        await settles(2)
        for usage, vcpus in (("2.3", 4), ("3500m", 6), ("620m", 2), ("550m", 1)):
            metrics.set_pod(user.namespace, "web", "qemu", usage)
            await settles(vcpus)
