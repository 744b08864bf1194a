"""VCPUSets from files: what is taken, and what is said of the rest."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from harness.cache import REPOSITORY
from vcpuset.cli.manifests import FIELDS, Choice, CPUQuantity, InvalidManifest, Labels, Manifest, Number, read
from vcpuset.domain.resource import TLS, Request, TCPMonitor, UnixMonitor, UnplugPolicy

__all__: list[str] = []

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)

BY_HAND = """
apiVersion: vcpuset.dev/v1alpha1
kind: VCPUSet
metadata:
  name: web
spec:
  vcpus: 4
  monitor:
    unix:
      path: web/qmp.sock
"""

PRINTED = """
apiVersion: v1
kind: List
metadata: {resourceVersion: ""}
items:
- apiVersion: vcpuset.dev/v1alpha1
  kind: VCPUSet
  metadata:
    annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}"}
    creationTimestamp: "2026-01-01T00:00:00Z"
    generation: 3
    name: web
    namespace: team-a
    resourceVersion: "12"
    uid: 6f2c1b58-0000-4000-8000-000000000000
  spec:
    guestAgent: {bringOnline: false, unix: {path: web/agent.sock}}
    monitor: {connection: Persistent, unix: {path: web/qmp.sock}}
    nodeName: node-1
    unplug: {bootVCPUs: Unplug, policy: Enabled, retrySeconds: 300, timeoutSeconds: 60}
    vcpus: 3
  status:
    observedGeneration: 3
    vcpus: 4
    unplug:
      requests:
      - {slot: 3, path: /machine/peripheral/vcpu3, threadID: 77, requestedAt: "2026-01-02T11:59:00Z", attempts: 1}
"""


def manifest(text: str, namespace: str | None = None) -> Manifest:
    (found,) = read(text, namespace, NOW)
    return found


def changed(**spec: object) -> str:
    """The manifest by hand with these fields of its spec; None: without."""
    body = yaml.safe_load(BY_HAND)
    body["spec"] = {name: value for name, value in (body["spec"] | spec).items() if value is not None}
    return yaml.safe_dump(body)


def problems(text: str, namespace: str | None = None) -> tuple[str, ...]:
    with pytest.raises(InvalidManifest) as error:
        read(text, namespace, NOW)
    return error.value.problems


def test_a_manifest_by_hand_has_neither_uid_nor_status() -> None:
    found = manifest(BY_HAND)

    assert str(found.vcpuset) == "default/web"
    assert found.vcpuset.spec.vcpus == 4
    assert found.vcpuset.spec.monitor == UnixMonitor("web/qmp.sock")
    assert not found.created
    assert found.node is None


def test_a_set_as_kubectl_prints_it_keeps_what_its_status_says() -> None:
    found = manifest(PRINTED)

    assert str(found.vcpuset) == "team-a/web"
    assert (found.created, found.node, found.vcpuset.generation) == (True, "node-1", 3)
    assert found.vcpuset.created_at == datetime(2026, 1, 1, tzinfo=UTC)
    requested_at = datetime(2026, 1, 2, 11, 59, tzinfo=UTC)
    assert found.vcpuset.status.pending_unplugs == (Request(3, "/machine/peripheral/vcpu3", 77, requested_at),)


def test_documents_lists_and_json_with_tabs_are_taken() -> None:
    body = yaml.safe_load(BY_HAND)
    several = f"{BY_HAND}---\n---\n{PRINTED}"

    assert [str(each.vcpuset) for each in read(several, None, NOW)] == ["default/web", "team-a/web"]
    assert manifest(json.dumps(body, indent="\t")).vcpuset.spec.vcpus == 4
    assert manifest(json.dumps({"kind": "VCPUSetList", "items": [body]})).vcpuset.spec.vcpus == 4


def test_times_without_quotes_and_nulls_are_taken_as_the_api_server_does() -> None:
    text = PRINTED.replace('"2026-01-01T00:00:00Z"', "2026-01-01T00:00:00Z").replace('"2026-01-02', "2026-01-02")
    assert manifest(text.replace('11:59:00Z"', "11:59:00Z")).created
    assert not manifest(BY_HAND.replace("name: web", "name: web\n  creationTimestamp: null")).created
    assert manifest(changed(unplug={"policy": None})).vcpuset.spec.unplug.policy is UnplugPolicy.ENABLED


def test_a_tcp_monitor_is_taken() -> None:
    text = changed(monitor={"tcp": {"host": "192.0.2.1", "port": 4444, "insecure": True}})
    assert manifest(text).vcpuset.spec.monitor == TCPMonitor("192.0.2.1", 4444)


def test_a_monitor_on_tls_is_taken() -> None:
    tls = {"secretName": "monitor", "serverName": "vm.example"}
    text = changed(monitor={"tcp": {"host": "192.0.2.1", "port": 4444, "tls": tls}})
    assert manifest(text).vcpuset.spec.monitor == TCPMonitor("192.0.2.1", 4444, TLS("monitor", "vm.example"))


def test_of_sets_that_are_not_created_yet_the_first_is_the_senior_and_those_that_are_go_before_them() -> None:
    one, two = BY_HAND, BY_HAND.replace("name: web", "name: db")
    found = read(f"{one}---\n{two}---\n{PRINTED}", None, NOW)

    assert [each.vcpuset.name for each in sorted(found, key=lambda each: each.vcpuset.seniority)] == [
        "web",  # team-a's, which exists
        "web",
        "db",
    ]
    assert min(found, key=lambda each: each.vcpuset.seniority).created


def test_the_namespace_is_the_manifests_else_the_options_else_default() -> None:
    assert manifest(BY_HAND, "team-b").vcpuset.namespace == "team-b"
    assert manifest(PRINTED, "team-a").vcpuset.namespace == "team-a"
    for unset in ('""', "~"):
        assert manifest(BY_HAND.replace("name: web", f"name: web\n  namespace: {unset}")).vcpuset.namespace == "default"
    (problem,) = problems(PRINTED, "team-b")
    assert "metadata.namespace is 'team-a' and --namespace is 'team-b'" in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "contains no VCPUSet", id="empty"),
        pytest.param("# nothing\n---\n", "contains no VCPUSet", id="comments"),
        pytest.param("kind: List\nitems: []", "contains no VCPUSet", id="empty-list"),
        pytest.param("a: [", "not YAML (or JSON): ", id="not-yaml"),
        pytest.param("a: 1\na: 2", "duplicate key 'a' in line 2, column 1", id="a-key-twice"),
        pytest.param("!!python/object:os.system {}", "could not determine a constructor", id="python"),
        pytest.param("\x00", "special characters are not allowed", id="binary"),
        pytest.param(
            "hello", "document 1: expected a VCPUSet, a mapping of fields, and found the string 'hello'", id="s"
        ),
        pytest.param("- 1", "found a list", id="list"),
        pytest.param("kind: Pod\nmetadata: {name: x}", "Pod x: not a VCPUSet: kind is 'Pod'", id="another-kind"),
        pytest.param("spec: {}", "kind is missing", id="no-kind"),
        pytest.param(BY_HAND.replace("v1alpha1", "v2"), "apiVersion is 'vcpuset.dev/v2': this version", id="version"),
        pytest.param(BY_HAND.replace("name: web", "nam: web"), "metadata.name is missing", id="no-name"),
        pytest.param(
            BY_HAND.replace("name: web", "name: 123"),
            "metadata.name must be a string, but is 123: quote it.",
            id="a-number-as-name",
        ),
        pytest.param(
            BY_HAND.replace("name: web", "name: yes"),
            "metadata.name must be a string, but is true: quote it.",
            id="a-yes-as-name",
        ),
        pytest.param(
            BY_HAND.replace("name: web", "name: web\n  namespace: 7"),
            "metadata.namespace must be a string, but is 7: quote it.",
            id="a-number-as-namespace",
        ),
        pytest.param(
            BY_HAND.replace("name: web", 'name: "a\\e[31m\\n"'),
            r"'a\x1b[31m\n' cannot be the name of a VCPUSet",
            id="escape",
        ),
        pytest.param(BY_HAND.replace("name: web", f"name: {'x' * 64}"), "use up to 63 lower-case letters", id="long"),
        pytest.param(
            BY_HAND.replace("name: web", "name: web\n  namespace: ../x"),
            "metadata.namespace: '../x' cannot be the name of a namespace",
            id="a-path-as-namespace",
        ),
        pytest.param('{"a":' * 100_000, "nested too deeply", id="deep-json"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep-yaml"),
        pytest.param(
            "&a\nkind: List\nitems: [*a]", "a YAML alias in it is a part of its own anchor", id="endless-list"
        ),
        pytest.param(BY_HAND.replace("metadata:", "metadata: &m\n  labels: *m"), "its own anchor", id="endless-labels"),
        pytest.param(BY_HAND.split("spec:", maxsplit=1)[0], "spec is missing", id="no-spec"),
        pytest.param(changed(monitor=None), "spec.monitor is missing", id="no-monitor"),
        pytest.param(changed(vcpus=0), "spec.vcpus is 0: declare from 1 to 4096", id="too-few"),
        pytest.param(changed(vcpus=4097), "spec.vcpus is 4097: declare from 1 to 4096", id="too-many"),
        pytest.param(
            changed(vcpus="6"), "spec.vcpus must be a whole number from 1 to 4096, but is the string '6'", id="t"
        ),
        pytest.param(changed(vcpus=True), "but is true", id="vcpus-true"),
        pytest.param(changed(vcpus=2.5), "but is 2.5", id="vcpus-broken"),
        pytest.param(changed(minVCPUs=5), "below spec.minVCPUs: declare at least 5", id="below-min"),
        pytest.param(changed(maxVCPUs=3), "above spec.maxVCPUs: declare at most 3", id="above-max"),
        pytest.param(changed(minVCPUs=4, maxVCPUs=3), "the first must not be more than the second", id="min-max"),
        pytest.param(changed(vcpu=4), "spec.vcpu is not a field of VCPUSet. Did you mean spec.vcpus?", id="typo"),
        pytest.param(changed(MaxVcpus=4), "Did you mean spec.maxVCPUs?", id="case"),
        pytest.param(changed(colour="red"), "Known: vcpus, minVCPUs, ", id="no-idea"),
        pytest.param(changed(unplug={"retry": 5}), "Did you mean spec.unplug.retrySeconds?", id="nested"),
        pytest.param(f"{BY_HAND}\nstate: x", "state is not a field of VCPUSet. Did you mean status?", id="top"),
        pytest.param(
            changed(unplug={"policy": "enabled"}), "choose Enabled or Disabled. Did you mean Enabled?", id="ch"
        ),
        pytest.param(changed(unplug=5), "spec.unplug must be a mapping of fields, but is 5", id="no-mapping"),
        pytest.param(changed(suspend="yes"), "spec.suspend must be true or false, but is the string 'yes'", id="bool"),
        pytest.param(changed(monitor={}), "neither of unix and tcp: set exactly one", id="neither"),
        pytest.param(
            changed(monitor={"unix": {"path": "a"}, "tcp": {"host": "h", "port": 1}}), "has both of", id="both"
        ),
        pytest.param(
            changed(monitor={"tcp": {"host": "h", "port": 1}}),
            "tcp has neither of tls and insecure",
            id="neither TLS nor",
        ),
        pytest.param(
            changed(monitor={"tcp": {"host": "h", "port": 1, "insecure": True, "tls": {"secretName": "s"}}}),
            "tcp has both of tls and insecure",
            id="TLS and insecure",
        ),
        pytest.param(
            changed(monitor={"tcp": {"host": "h", "port": 1, "tls": {}}}),
            "spec.monitor.tcp.tls.secretName is missing",
            id="TLS without a Secret",
        ),
        pytest.param(changed(monitor={"tcp": {"port": 70000}}), "spec.monitor.tcp.port is 70000", id="port"),
        pytest.param(changed(monitor={"unix": {}}), "spec.monitor.unix.path is missing", id="no-path"),
        pytest.param(changed(guestAgent={"unix": {"path": "web/qmp.sock"}}), "is the monitor's", id="agent"),
        pytest.param(
            BY_HAND.replace("name: web", "name: web\n  creationTimestamp: yesterday"),
            "metadata.creationTimestamp: yesterday is not a usable time",
            id="creation",
        ),
    ],
)
def test_what_cannot_be_used_is_told_by_its_field(text: str, words: str) -> None:
    found = problems(text)

    assert any(words in each for each in found), found
    for each in found:
        assert each[-1] in ".?"
        assert "\n" not in each


def test_all_that_is_wrong_is_told_at_once() -> None:
    text = f"{changed(vcpus=0, vcpu=1, suspend=3)}---\nkind: Pod\n"

    assert len(problems(text)) == 4


def test_the_fields_and_their_limits_are_those_of_the_resource_definition() -> None:
    crd = yaml.safe_load((REPOSITORY / "crds" / "vcpusets.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]

    assert dict(FIELDS) == _fields(schema)


def _fields(schema: dict[str, Any]) -> dict[str, Any]:
    required = schema.get("required", ())
    return {f"{name}!" if name in required else name: _kind(entry) for name, entry in schema["properties"].items()}


def _kind(entry: dict[str, Any]) -> object:
    match entry.get("type"):
        case None:
            assert entry["x-kubernetes-int-or-string"]
            return CPUQuantity()
        case "object" if "additionalProperties" in entry:
            return Labels()
        case "object":
            return _fields(entry)
        case "integer":
            return Number(entry["minimum"], entry["maximum"])
        case "string" if "enum" in entry:
            return Choice(tuple(entry["enum"]))
        case kind:
            return {"string": str, "boolean": bool}[kind]
