"""Flux's kustomize-controller applies VCPUSets and autoscalers from a source, as docs/gitops.md says.

All is real but the source: the test announces and serves the archives (`harness.flux`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from harness import gitops
from harness.binaries import FLUX
from harness.cache import REPOSITORY
from harness.controllermanager import ControllerManager
from harness.controlplane import ControlPlane
from harness.docpage import Page
from harness.expect import history
from harness.flux import Delivery, KustomizeController, Sources
from harness.guest import Guest
from harness.operator import OperatorProcess
from harness.processes import run
from harness.qmp import count
from harness.saved import saved_guest
from harness.wait import until
from harness.world import Seen, User, manifest

Manifest = dict[str, Any]

EXAMPLE: Final[Manifest] = yaml.safe_load((REPOSITORY / "deploy" / "gitops" / "flux" / "machines.yaml").read_text())
"""The Kustomization that users are shown."""

PAGE: Final = Page(REPOSITORY / "docs" / "gitops.md")

EXPRESSIONS: Final = EXAMPLE["spec"]["healthCheckExprs"]

SHORTEST: Final = "30s"
"""The shortest time for which Flux waits for health."""

SLOTS: Final = "2,maxcpus=8"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def control_plane() -> AsyncIterator[ControlPlane]:
    """An API server of this module's own: Flux and the autoscaler serve all of it."""
    async with ControlPlane() as running:
        await running.install_crd()
        await running.kubectl("apply", "--server-side", "-f", REPOSITORY / "deploy" / "base" / "user-roles.yaml")
        async with ControllerManager(running), KustomizeController(running):
            yield running


@pytest.fixture(scope="module")
def sources() -> Iterator[Sources]:
    """Where the archives are served."""
    with Sources() as serving:
        yield serving


@pytest.fixture
async def delivery(user: User, sources: Sources) -> AsyncIterator[Delivery]:
    """A source and its Kustomization in the user's namespace."""
    async with Delivery(user.control_plane, sources, user.namespace) as delivery:
        yield delivery


def autoscaler(user: User, low: int, high: int) -> Manifest:
    """An autoscaler without a metric, which only keeps the count of `web` within its bounds."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "web", "namespace": user.namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": "vcpuset.dev/v1alpha1", "kind": "VCPUSet", "name": "web"},
            "minReplicas": low,
            "maxReplicas": high,
        },
    }


def note(user: User, text: str = "") -> Manifest:
    """Another object for the source."""
    metadata = {"name": "note", "namespace": user.namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"text": text}}


def machine(folder: Path, name: str = "web") -> Guest:
    """A machine without a guest: vCPUs can be plugged, but not unplugged."""
    return Guest(None, smp=SLOTS, monitor_paths=[folder / f"{name}.sock"])


async def least(user: User) -> int:
    """`minReplicas` of the autoscaler."""
    path = f"/apis/autoscaling/v2/namespaces/{user.namespace}/horizontalpodautoscalers/web"
    return int((await user.control_plane.ok("GET", path))["spec"]["minReplicas"])


async def declared(user: User, vcpus: int) -> Seen:
    """Wait until `web` declares this count."""
    return await user.wait("web", lambda seen: bool(seen.body["spec"].get("vcpus") == vcpus), f"spec.vcpus {vcpus}")


async def counts(user: User, since: Seen) -> list[int]:
    """The counts that `web` has declared since then, in their order."""
    found = [seen.body["spec"].get("vcpus") for seen in await history(user, since)]
    return [vcpus for vcpus, _ in itertools.groupby(found) if vcpus is not None]


# --- health -------------------------------------------------------------------------------------------------------


async def test_kstatus_and_the_shipped_expressions_give_the_verdicts_of_the_page_for_each_reason() -> None:
    cases = gitops.cases()
    (expressions,) = EXPRESSIONS
    text = "".join(f"{json.dumps(obj)}\n" for obj, _ in cases.values())
    done = await run([FLUX.program("kstatus"), json.dumps(expressions)], input=text)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    found = {name: (each["kstatus"], each["expressions"]) for name, each in zip(cases, said, strict=True)}
    assert found == {name: (each.kstatus, each.expressions) for name, (_, each) in cases.items()}


async def test_the_shipped_kustomization_is_valid_with_a_timeout(control_plane: ControlPlane, namespace: str) -> None:
    example = {**EXAMPLE, "metadata": {"name": "machines", "namespace": namespace}}
    words = ("create", "--dry-run=server", "--validate=strict", "--filename=-")
    await control_plane.kubectl(*words, input=json.dumps(example))
    assert EXAMPLE["spec"]["timeout"]


async def test_a_stalled_set_is_a_failure_at_once_and_a_mended_one_is_healthy(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    async with machine(folder):
        await delivery.commit(manifest(user.namespace, "web", 9))
        await delivery.create(wait=True, timeout="10m")
        message = await delivery.fails("HealthCheckFailed")
        assert "failed early due to stalled resources" in message
        assert f"VCPUSet/{user.namespace}/web status: 'Failed'" in message

        await delivery.commit(manifest(user.namespace, "web", 8))
        await delivery.delivered()
        assert (await user.wait_ready("web")).vcpus == 8


async def test_with_the_shipped_expressions_a_suspended_set_is_healthy_and_a_stalled_one_is_not(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    async with machine(folder):
        await delivery.commit(manifest(user.namespace, "web", 4, suspend=True))
        await delivery.create(wait=True, timeout="10m", healthCheckExprs=EXPRESSIONS)
        await delivery.delivered()
        assert (await user.get("web")).reason == "Suspended"

        await delivery.commit(manifest(user.namespace, "web", 9))
        assert "failed early due to stalled resources" in await delivery.fails("HealthCheckFailed")


async def test_what_is_never_healthy_fails_after_the_timeout_with_its_cause(
    folder: Path, operator: OperatorProcess, user: User, sources: Sources
) -> None:
    """The three wait at the same time, for Flux's shortest timeout."""
    control_plane = user.control_plane

    async def suspended() -> None:
        async with Delivery(control_plane, sources, user.namespace, "suspended") as delivery:
            await delivery.commit(manifest(user.namespace, "web", 4, suspend=True))
            await delivery.create(wait=True, timeout=SHORTEST)
            message = await delivery.fails("HealthCheckFailed")
            assert f"timeout waiting for: [VCPUSet/{user.namespace}/web status: 'InProgress'" in message

    async def without_an_operator() -> None:
        async with Delivery(control_plane, sources, user.namespace, "unserved") as delivery:
            await delivery.commit(manifest(user.namespace, "elsewhere", 2, nodeName="node-9"))
            await delivery.create(wait=True, timeout=SHORTEST)
            message = await delivery.fails("HealthCheckFailed")
            assert f"timeout waiting for: [VCPUSet/{user.namespace}/elsewhere status: 'InProgress'" in message

    async def applied_by_a_tenant() -> None:
        await create("serviceaccount", "tenant")
        await bind("vcpuset-edit")
        async with Delivery(control_plane, sources, user.namespace, "tenant") as delivery:
            await delivery.commit(manifest(user.namespace, "tenants", 2, "tenants.sock"))
            await delivery.create(wait=True, timeout=SHORTEST, serviceAccountName="tenant")
            message = await delivery.fails("HealthCheckFailed")
            assert 'cannot get resource "vcpusets"' in message
            assert (await user.get("tenants")).ready, "it is applied and fine"
            await bind("vcpuset-view")
            await delivery.delivered()

    async def create(*words: str) -> None:
        await control_plane.kubectl("--namespace", user.namespace, "create", *words)

    async def bind(role: str) -> None:
        await create("rolebinding", role, f"--clusterrole={role}", f"--serviceaccount={user.namespace}:tenant")

    async with machine(folder), machine(folder, "tenants"):
        await asyncio.gather(suspended(), without_an_operator(), applied_by_a_tenant())


async def test_without_a_timeout_flux_waits_for_almost_the_interval(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    await delivery.commit(manifest(user.namespace, "web", 2))  # there is no machine
    await delivery.create(wait=True)
    await delivery.progress("with a timeout of 59m30s")


async def test_a_commit_that_mends_a_set_in_progress_does_not_wait_for_the_timeout(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    """With the feature gate CancelHealthCheckOnNewRevision, which is off by default."""
    async with machine(folder):
        await delivery.commit(manifest(user.namespace, "web", 2, "absent.sock"))
        await delivery.create(wait=True, timeout="1h")
        await delivery.progress("Running health checks")
        await delivery.commit(manifest(user.namespace, "web", 2))
        await delivery.delivered()


# --- the count ----------------------------------------------------------------------------------------------------


async def test_a_set_without_a_count_is_left_to_the_autoscaler_from_the_same_source_and_pruned_at_the_end(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    def web(**spec: Any) -> Manifest:
        return manifest(user.namespace, "web", None, **spec)

    async with saved_guest(smp="2,maxcpus=64", monitor_paths=[folder / "web.sock"]) as guest:
        await delivery.commit(web(), autoscaler(user, 4, 8), note(user))
        await delivery.create(wait=True, timeout="10m")
        await delivery.delivered()
        await declared(user, 4)
        await user.wait_ready("web")
        await guest.wait_online(4)

        before = await user.get("web")
        await delivery.reconcile()
        assert (await user.get("web")).body["metadata"]["resourceVersion"] == before.body["metadata"]["resourceVersion"]

        # Changes of the set in the source leave the count alone.
        await delivery.commit(web(unplug={"retrySeconds": 100}), autoscaler(user, 4, 8), note(user))
        await delivery.delivered()
        assert (await user.get("web")).body["spec"]["unplug"]["retrySeconds"] == 100
        await delivery.commit(web(unplug={"retrySeconds": 100}), autoscaler(user, 1, 3), note(user))
        await delivery.delivered()
        await declared(user, 3)
        await user.wait_ready("web")
        await guest.wait_online(3)
        assert await counts(user, before) == [4, 3]

        await delivery.commit(note(user))
        await delivery.delivered()
        answer = await user.control_plane.kubectl("get", "vcpusets,hpa", "-n", user.namespace, "-o", "name")
        assert not answer.stdout
        assert await count(guest.control) == 3


async def test_a_count_in_the_source_overwrites_that_of_the_autoscaler_at_each_reconcile(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    async with machine(folder):
        await delivery.commit(manifest(user.namespace, "web", 2), autoscaler(user, 4, 8))
        await delivery.create()
        await delivery.delivered()
        before = await declared(user, 4)
        await delivery.reconcile()
        await until(lambda: _has_been(user, before, 2), 60, "the count of the source")
        await declared(user, 4)
        assert await counts(user, before) == [4, 2, 4]


async def _has_been(user: User, since: Seen, vcpus: int) -> bool:
    return vcpus in await counts(user, since)


async def test_a_count_in_the_source_that_flux_ignores_is_for_new_sets_only(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    ignore = PAGE.block("yaml").document()["spec"]["ignore"]
    async with machine(folder):
        await delivery.commit(manifest(user.namespace, "web", 3))
        await delivery.create(wait=True, timeout="10m", ignore=ignore)
        await delivery.delivered()
        new = await declared(user, 3)
        await user.scale("web", 5)
        await delivery.reconcile()
        changed = manifest(user.namespace, "web", 4, unplug={"retrySeconds": 100})
        await delivery.commit(changed)
        await delivery.delivered()
        assert (await user.get("web")).body["spec"]["unplug"]["retrySeconds"] == 100
        await delivery.commit(changed, autoscaler(user, 6, 8))
        await delivery.delivered()
        await declared(user, 6)
        await delivery.reconcile()
        assert await counts(user, new) == [3, 5, 6]


async def test_a_set_that_flux_applies_only_if_it_is_not_present_is_neither_changed_nor_checked_for_health(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    def web(vcpus: int, **spec: Any) -> Manifest:
        body = manifest(user.namespace, "web", vcpus, **spec)
        body["metadata"]["annotations"] = {"kustomize.toolkit.fluxcd.io/ssa": "IfNotPresent"}
        return body

    async with machine(folder):
        await delivery.commit(web(9), note(user))
        await delivery.create(wait=True, timeout="10m")
        await delivery.delivered()
        assert (await user.get("web")).reason == "InsufficientSlots", "delivered, although it is stalled"
        await delivery.commit(web(4, unplug={"retrySeconds": 100}), note(user, "changed"))
        await delivery.delivered()
        seen = await user.get("web")
        assert (seen.body["spec"]["vcpus"], seen.reason) == (9, "InsufficientSlots")
        assert seen.body["spec"]["unplug"]["retrySeconds"] == 300


# --- the bounds ---------------------------------------------------------------------------------------------------


async def test_bounds_that_exclude_the_present_count_are_refused_until_the_autoscaler_has_followed(
    folder: Path, operator: OperatorProcess, user: User, delivery: Delivery
) -> None:
    def web(low: int, high: int) -> Manifest:
        return manifest(user.namespace, "web", None, minVCPUs=low, maxVCPUs=high)

    async with machine(folder):
        await delivery.commit(web(1, 4), autoscaler(user, 2, 4))
        await delivery.create(wait=True, timeout="10m")
        await delivery.delivered()
        await declared(user, 2)

        # Wider bounds, and what needs them, in one commit.
        await delivery.commit(web(1, 8), autoscaler(user, 5, 8))
        await delivery.delivered()
        await declared(user, 5)

        # Narrower ones are not valid while the count is outside of them, and then nothing of the commit is applied.
        await delivery.commit(web(6, 8), autoscaler(user, 6, 8))
        message = await delivery.fails("ReconciliationFailed")
        assert "vcpus must be at least minVCPUs" in message
        assert await least(user) == 5
        await delivery.commit(web(1, 8), autoscaler(user, 6, 8))
        await delivery.delivered()
        await declared(user, 6)
        await delivery.commit(web(6, 8), autoscaler(user, 6, 8))
        await delivery.delivered()

        # Another way out.
        await delivery.commit(web(7, 8), autoscaler(user, 7, 8))
        await delivery.fails("ReconciliationFailed")
        await user.scale("web", 7)
        await delivery.delivered()
