"""The VCPUSet resource as users and other tools meet it: what is accepted, defaulted, shown, scaled and refused.

Against a real API server, with kubectl. What must be refused in a spec is in test_manifests_refused.py.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane

__all__: list[str] = []

CRD: Final = REPOSITORY / "crds" / "vcpusets.yaml"
GOOD: Final = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "good").glob("*.yaml"))}
Json = dict[str, Any]

TIME: Final = "2026-01-02T03:04:05Z"


def vcpuset(name: str = "vm", **spec: object) -> str:
    """A manifest, as JSON, with 4 vCPUs and a unix monitor unless `spec` says otherwise; None leaves a field out."""
    fields = {"vcpus": 4, "monitor": {"unix": {"path": "vm/qmp.sock"}}, **spec}
    return json.dumps(
        {
            "apiVersion": "vcpuset.dev/v1alpha1",
            "kind": "VCPUSet",
            "metadata": {"name": name},
            "spec": {key: value for key, value in fields.items() if value is not None},
        }
    )


def condition(kind: str, status: str = "True", reason: str = "Converged", **changes: object) -> Json:
    """A complete condition."""
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": "4 vCPUs as declared",
        "lastTransitionTime": TIME,
        "observedGeneration": 1,
        **changes,
    }


def request(slot: int = 3, **changes: object) -> Json:
    """A complete entry of status.unplug.requests, but for the optional answer; None leaves a field out."""
    entry = {
        "slot": slot,
        "path": f"/machine/peripheral/vcpu{slot}",
        "threadID": 4711,
        "requestedAt": "2026-01-02T03:04:05.678901Z",
        "attempts": 1,
        **changes,
    }
    return {key: value for key, value in entry.items() if value is not None}


FULL_STATUS: Final[Json] = {
    "observedGeneration": 1,
    "vcpus": 5,
    "onlineVCPUs": 3,
    "machine": {"minVCPUs": 1, "maxVCPUs": 64, "uuid": "6b1a7e0c-7c0e-4a53-9f0e-0d1c2b3a4f5e"},
    "selector": "vcpuset.dev/name=vm",
    "unplug": {
        "startedAt": TIME,
        "requests": [request(4), request(3, answer="InUse", attempts=2), request(2, answer="OfALaterVersion")],
    },
    "conditions": [
        condition("Ready", "False", "UnplugPending"),
        condition("Reconciling", reason="UnplugPending"),
        condition("Stalled", "False", "UnplugPending"),
        condition("GuestAgentConnected", reason="Connected"),
    ],
}


class Sets:
    """The VCPUSets of one namespace, through kubectl."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self._control_plane = control_plane
        self._namespace = namespace

    async def kubectl(self, *arguments: str, input: str | None = None) -> str:  # noqa: A002 - the name that subprocess.run uses
        """What kubectl prints when it succeeds."""
        done = await self._control_plane.kubectl("--namespace", self._namespace, *arguments, input=input)
        return done.stdout

    async def refused(self, *arguments: str, input: str | None = None) -> str:  # noqa: A002 - as kubectl
        """What kubectl says when it fails, as it must."""
        done = await self._control_plane.kubectl("--namespace", self._namespace, *arguments, input=input, check=False)
        assert done.returncode != 0, f"accepted: {done.stdout}"
        return done.stderr

    async def create(self, *manifests: str) -> Json:
        """Create them; the first as the API server has stored it."""
        made = await self.kubectl("create", "-o", "json", "-f", "-", input="\n---\n".join(manifests))
        first, _ = json.JSONDecoder().raw_decode(made)
        assert isinstance(first, dict)
        return first

    async def get(self, name: str = "vm") -> Json:
        """The object as the API server has it."""
        got = json.loads(await self.kubectl("get", "vcs", name, "-o", "json"))
        assert isinstance(got, dict)
        return got

    async def report(self, status: Json, name: str = "vm") -> str:
        """Write a status as the operator does."""
        patch = json.dumps({"status": status})
        return await self.kubectl("patch", "vcs", name, "--subresource=status", "--type=merge", "-p", patch)


@pytest.fixture
async def sets(control_plane: ControlPlane, namespace: str) -> Sets:
    return Sets(control_plane, namespace)


# --- the file itself ----------------------------------------------------------------------------------------------


def schema_nodes(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every field of the schema, with its path."""
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from schema_nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield f"{path}[]", schema["items"]
        yield from schema_nodes(schema["items"], f"{path}[]")


def version() -> Json:
    versions = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    assert [one["name"] for one in versions] == ["v1alpha1"]
    found = versions[0]
    assert isinstance(found, dict)
    return found


FIELDS: Final = dict(schema_nodes(version()["schema"]["openAPIV3Schema"]))


def test_every_field_is_described_for_its_users() -> None:
    # The API server allows no description in metadata, which has its own.
    undescribed = [
        path for path, node in FIELDS.items() if not path.startswith(".metadata") and "description" not in node
    ]
    assert undescribed == []


def test_every_string_and_every_list_has_a_limit() -> None:
    limits = {"string": "maxLength", "array": "maxItems"}
    unlimited = [
        path for path, node in FIELDS.items() if (limit := limits.get(node.get("type", ""))) and limit not in node
    ]
    assert unlimited == []


def test_every_number_of_the_spec_has_both_limits() -> None:
    numbers = {
        path: node for path, node in FIELDS.items() if path.startswith(".spec") and node.get("type") == "integer"
    }
    assert len(numbers) == 7
    assert [path for path, node in numbers.items() if not {"minimum", "maximum"} <= node.keys()] == []


# --- what is accepted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", GOOD.values(), ids=GOOD.keys())
async def test_a_good_manifest_is_accepted_and_stored_as_it_was_written(sets: Sets, manifest: str) -> None:
    written = yaml.safe_load(manifest)
    stored = await sets.create(manifest)
    # A part of an object is completed: what was left out there is set to its default.
    for part in ("unplug", "monitor", "guestAgent"):
        assert stored["spec"].pop(part, {}).items() >= written["spec"].pop(part, {}).items()
    assert stored["spec"] == written["spec"]


async def test_what_is_left_out_gets_the_documented_defaults_and_no_others(sets: Sets) -> None:
    stored = await sets.create(vcpuset())
    assert stored["spec"] == {
        "vcpus": 4,
        "monitor": {"unix": {"path": "vm/qmp.sock"}, "connection": "Persistent"},
        "unplug": {"policy": "Enabled", "bootVCPUs": "Unplug", "timeoutSeconds": 60, "retrySeconds": 300},
    }


async def test_a_part_of_unplug_keeps_the_defaults_of_the_rest(sets: Sets) -> None:
    stored = await sets.create(vcpuset(unplug={"timeoutSeconds": 5}))
    assert stored["spec"]["unplug"] == {
        "policy": "Enabled",
        "bootVCPUs": "Unplug",
        "timeoutSeconds": 5,
        "retrySeconds": 300,
    }


async def test_a_guest_agent_only_reports_unless_it_is_told_to_bring_vcpus_online(sets: Sets) -> None:
    stored = await sets.create(vcpuset(guestAgent={"unix": {"path": "vm/agent.sock"}}))
    assert stored["spec"]["guestAgent"] == {"unix": {"path": "vm/agent.sock"}, "bringOnline": False}


async def test_a_new_set_is_not_taken_for_a_finished_one(sets: Sets) -> None:
    stored = await sets.create(vcpuset())
    assert stored["status"] == {"observedGeneration": -1}
    assert stored["metadata"]["generation"] == 1


async def test_node_and_monitor_may_be_changed(sets: Sets) -> None:
    await sets.create(vcpuset(nodeName="node-1"))
    tcp = {"host": "127.0.0.1", "port": 4444, "insecure": True}
    patch = json.dumps({"spec": {"nodeName": None, "monitor": {"unix": None, "tcp": tcp}}})
    await sets.kubectl("patch", "vcs", "vm", "--type=merge", "-p", patch)
    spec = (await sets.get())["spec"]
    assert spec["monitor"] == {"tcp": tcp, "connection": "Persistent"}
    assert "nodeName" not in spec


async def test_connection_and_guest_agent_may_be_changed_and_the_agent_removed(sets: Sets) -> None:
    await sets.create(vcpuset())

    async def change(**spec: object) -> Json:
        patch = json.dumps({"spec": spec})
        await sets.kubectl("patch", "vcs", "vm", "--type=merge", "-p", patch)
        found = (await sets.get())["spec"]
        assert isinstance(found, dict)
        return found

    changed = await change(monitor={"connection": "OnDemand"}, guestAgent={"unix": {"path": "vm/agent.sock"}})
    assert changed["monitor"] == {"unix": {"path": "vm/qmp.sock"}, "connection": "OnDemand"}
    assert changed["guestAgent"] == {"unix": {"path": "vm/agent.sock"}, "bringOnline": False}
    changed = await change(monitor={"connection": None}, guestAgent=None)
    assert changed["monitor"] == {"unix": {"path": "vm/qmp.sock"}, "connection": "Persistent"}
    assert "guestAgent" not in changed


async def test_a_monitor_cannot_be_moved_onto_the_agents_socket(sets: Sets) -> None:
    await sets.create(vcpuset(guestAgent={"unix": {"path": "vm/agent.sock"}}))
    patch = json.dumps({"spec": {"monitor": {"unix": {"path": "vm/agent.sock"}}}})
    refusal = await sets.refused("patch", "vcs", "vm", "--type=merge", "-p", patch)
    assert "spec.guestAgent.unix.path: Invalid value" in refusal
    assert "must not be the socket of the monitor" in refusal


async def test_a_guard_rail_cannot_be_moved_past_the_count(sets: Sets) -> None:
    await sets.create(vcpuset())
    refusal = await sets.refused("patch", "vcs", "vm", "--type=merge", "-p", '{"spec": {"maxVCPUs": 3}}')
    assert "spec.vcpus: Invalid value: vcpus must be at most maxVCPUs" in refusal


async def test_a_set_is_gone_as_soon_as_it_is_deleted(sets: Sets) -> None:
    await sets.create(vcpuset())
    await sets.kubectl("delete", "vcs", "vm", "--wait=false")
    assert "NotFound" in await sets.refused("get", "vcs", "vm")


# --- scale ----------------------------------------------------------------------------------------------------------


async def test_kubectl_scale_changes_the_count(sets: Sets) -> None:
    await sets.create(vcpuset())
    await sets.kubectl("scale", "vcs/vm", "--replicas=6")
    stored = await sets.get()
    assert stored["spec"]["vcpus"] == 6
    assert stored["metadata"]["generation"] == 2


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        pytest.param(0, "spec.vcpus in body should be greater than or equal to 1", id="none at all"),
        pytest.param(1, "vcpus must be at least minVCPUs", id="fewer than minVCPUs"),
        pytest.param(9, "vcpus must be at most maxVCPUs", id="more than maxVCPUs"),
        pytest.param(4097, "spec.vcpus in body should be less than or equal to 4096", id="more than any machine has"),
    ],
)
async def test_kubectl_scale_cannot_pass_a_limit(sets: Sets, replicas: int, message: str) -> None:
    await sets.create(vcpuset(minVCPUs=2, maxVCPUs=8))
    refusal = await sets.refused("scale", "vcs/vm", f"--replicas={replicas}")
    assert "spec.vcpus: Invalid value" in refusal
    assert message in refusal
    assert (await sets.get())["spec"]["vcpus"] == 4


async def test_the_scale_subresource_shows_the_observed_count_and_the_selector(
    sets: Sets, control_plane: ControlPlane, namespace: str
) -> None:
    await sets.create(vcpuset())
    await sets.report(FULL_STATUS)
    scale = await control_plane.request("GET", f"/apis/vcpuset.dev/v1alpha1/namespaces/{namespace}/vcpusets/vm/scale")
    assert scale.status == 200
    assert scale.body["spec"] == {"replicas": 4}
    assert scale.body["status"] == {"replicas": 5, "selector": "vcpuset.dev/name=vm"}


# --- what kubectl shows ---------------------------------------------------------------------------------------------


async def test_sets_are_selected_by_node_on_the_server(sets: Sets) -> None:
    await sets.create(vcpuset("first", nodeName="n1"), vcpuset("second", nodeName="n2"), vcpuset("nowhere"))

    async def names(selector: str) -> list[str]:
        found = await sets.kubectl("get", "vcs", f"--field-selector={selector}", "-o", "name")
        return [line.partition("/")[2] for line in found.split()]

    assert await names("spec.nodeName=n1") == ["first"]
    assert await names("spec.nodeName=") == ["nowhere"]
    assert await names("spec.nodeName!=n1") == ["nowhere", "second"]


async def test_kubectl_get_shows_both_counts_and_why_they_differ(sets: Sets) -> None:
    await sets.create(vcpuset(nodeName="node-1"))
    await sets.report(FULL_STATUS)
    header, row = (await sets.kubectl("get", "vcs")).splitlines()
    assert header.split() == ["NAME", "DESIRED", "CURRENT", "READY", "REASON", "AGE"]
    assert row.split()[:5] == ["vm", "4", "5", "False", "UnplugPending"]
    header, row = (await sets.kubectl("get", "vcs", "-o", "wide")).splitlines()
    assert header.split() == ["NAME", "DESIRED", "CURRENT", "ONLINE", "READY", "REASON", "NODE", "AGE", "MESSAGE"]
    assert row.split()[1:7] == ["4", "5", "3", "False", "UnplugPending", "node-1"]
    assert row.endswith("4 vCPUs as declared")


async def test_kubectl_explain_tells_what_a_field_does(sets: Sets) -> None:
    everything = " ".join((await sets.kubectl("explain", "vcs", "--recursive=false")).split())
    assert "Deleting the VCPUSet leaves the machine as it is" in everything
    policy = " ".join((await sets.kubectl("explain", "vcs.spec.unplug.policy")).split())
    assert "ENUM: Enabled Disabled" in policy
    assert "vCPUs are only added" in policy
    connection = " ".join((await sets.kubectl("explain", "vcs.spec.monitor.connection")).split())
    assert "ENUM: OnDemand Persistent" in connection
    assert "no other client can use this monitor" in connection
    agent = " ".join((await sets.kubectl("explain", "vcs.spec.guestAgent")).split())
    assert "Ready waits for that number" in agent
    assert "does not block plug or unplug" in agent
    assert "bringOnline <boolean>" in agent


# --- status ---------------------------------------------------------------------------------------------------------


async def test_a_full_status_is_stored_as_it_was_written_and_touches_nothing_else(sets: Sets) -> None:
    before = await sets.create(vcpuset())
    await sets.report(FULL_STATUS)
    after = await sets.get()
    assert after["status"] == FULL_STATUS
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"]


async def test_conditions_keep_the_order_they_are_written_in(sets: Sets) -> None:
    await sets.create(vcpuset())
    for order in (["Ready", "Reconciling", "Stalled"], ["Stalled", "Ready", "Reconciling"]):
        await sets.report({"conditions": [condition(kind) for kind in order]})
        assert [one["type"] for one in (await sets.get())["status"]["conditions"]] == order


async def test_kubectl_wait_sees_the_ready_condition(sets: Sets) -> None:
    await sets.create(vcpuset())
    wait = asyncio.create_task(sets.kubectl("wait", "--for=condition=Ready", "--timeout=50s", "vcs/vm"))
    await sets.report({"observedGeneration": 1, "conditions": [condition("Ready")]})
    assert "condition met" in await wait


async def test_a_spec_cannot_be_changed_through_the_status(sets: Sets) -> None:
    await sets.create(vcpuset())
    patch = json.dumps({"spec": {"vcpus": 8}, "status": {"vcpus": 4}})
    await sets.kubectl("patch", "vcs", "vm", "--subresource=status", "--type=merge", "-p", patch)
    stored = await sets.get()
    assert stored["spec"]["vcpus"] == 4
    assert stored["status"]["vcpus"] == 4


async def test_a_status_cannot_be_written_with_the_spec(sets: Sets) -> None:
    await sets.create(vcpuset())
    patch = json.dumps({"spec": {"vcpus": 8}, "status": {"vcpus": 8}})
    await sets.kubectl("patch", "vcs", "vm", "--type=merge", "-p", patch)
    stored = await sets.get()
    assert stored["spec"]["vcpus"] == 8
    assert stored["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        pytest.param({"observedGeneration": -2}, "status.observedGeneration: Invalid value: -2", id="generation"),
        pytest.param({"vcpus": -1}, "status.vcpus: Invalid value: -1", id="negative count"),
        pytest.param({"onlineVCPUs": -1}, "status.onlineVCPUs: Invalid value: -1", id="fewer than none online"),
        pytest.param({"machine": {"uuid": "x" * 37}}, "status.machine.uuid: Too long", id="UUID too long"),
        pytest.param({"vcpus": "4"}, "status.vcpus: Invalid value", id="count as a string"),
        pytest.param({"selector": ""}, "status.selector: Invalid value", id="empty selector, which autoscalers refuse"),
        pytest.param(
            {"unplug": {"startedAt": "yesterday"}}, "status.unplug.startedAt: Invalid value", id="time in words"
        ),
        pytest.param(
            {"unplug": {"startedAt": 1767323045}}, "status.unplug.startedAt: Invalid value", id="time as a number"
        ),
        pytest.param(
            {"unplug": {"startedAt": "0001-01-01T00:00:00Z"}},
            'status.unplug.startedAt: Invalid value: "0001-01-01T00:00:00Z"',
            id="time before any computer",
        ),
        pytest.param(
            {"unplug": {"requests": [request(requestedAt="9999-12-31T23:59:59.9999999Z")]}},
            'status.unplug.requests[0].requestedAt: Invalid value: "9999-12-31T23:59:59.9999999Z"',
            id="time after the last year",
        ),
        pytest.param(
            {"conditions": [condition("Ready", lastTransitionTime="2026-01-02T03:04:05+99:99")]},
            'status.conditions[0].lastTransitionTime: Invalid value: "2026-01-02T03:04:05+99:99"',
            id="time of a zone that is none",
        ),
        pytest.param(
            {"unplug": {"requests": [{"slot": 3}]}},
            "status.unplug.requests[0].threadID: Required value",
            id="request that names no vCPU",
        ),
        pytest.param(
            {"unplug": {"requests": [request(attempts=0)]}},
            "status.unplug.requests[0].attempts: Invalid value: 0",
            id="request never made",
        ),
        pytest.param(
            {"unplug": {"requests": [request(3), request(3)]}},
            'status.unplug.requests[1]: Duplicate value: {"slot":3}',
            id="one slot twice",
        ),
        pytest.param(
            {"unplug": {"requests": [request(slot) for slot in range(4097)]}},
            "status.unplug.requests: Too many: 4097: must have at most 4096 items",
            id="too many requests",
        ),
        pytest.param(
            {"conditions": [condition("Ready"), condition("Ready", "False")]},
            'status.conditions[1]: Duplicate value: {"type":"Ready"}',
            id="one condition twice",
        ),
        pytest.param(
            {"conditions": [condition(f"Type{number}") for number in range(17)]},
            "status.conditions: Too many: 17: must have at most 16 items",
            id="too many conditions",
        ),
        pytest.param(
            {"conditions": [condition("Ready", "Yes")]},
            'status.conditions[0].status: Unsupported value: "Yes"',
            id="condition neither True nor False",
        ),
        pytest.param(
            {"conditions": [condition("Ready", reason="not one word")]},
            'status.conditions[0].reason: Invalid value: "not one word"',
            id="reason not one word",
        ),
        pytest.param(
            {"conditions": [condition("Ready", reason="")]},
            'status.conditions[0].reason: Invalid value: ""',
            id="reason empty",
        ),
    ],
)
async def test_a_status_of_the_wrong_shape_is_refused(sets: Sets, tmp_path: Path, status: Json, message: str) -> None:
    await sets.create(vcpuset())
    patch = tmp_path / "patch.json"  # one of them is too long for a command line
    patch.write_text(json.dumps({"status": status}))
    refusal = await sets.refused("patch", "vcs", "vm", "--subresource=status", "--type=merge", f"--patch-file={patch}")
    assert message in refusal
    assert (await sets.get())["status"] == {"observedGeneration": -1}


async def test_a_status_with_as_many_requests_as_there_can_be_is_stored(sets: Sets, tmp_path: Path) -> None:
    await sets.create(vcpuset())
    patch = tmp_path / "patch.json"
    patch.write_text(json.dumps({"status": {"unplug": {"requests": [request(slot) for slot in range(4096)]}}}))
    await sets.kubectl("patch", "vcs", "vm", "--subresource=status", "--type=merge", f"--patch-file={patch}")
    assert len((await sets.get())["status"]["unplug"]["requests"]) == 4096
