"""VCPUSets from a file, as written by hand or as kubectl prints them.

The API server checks every manifest against the schema, which an installed program does not have. Simple checks are
made here with the same meaning, and all errors are reported at once; the API server checks more (the form of hosts
and paths).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from vcpuset.cli.text import printable
from vcpuset.cli.values import NAMESPACE, VCPUSET
from vcpuset.domain.resource import VCPUSet
from vcpuset.kube.codec import API_VERSION, KIND, InvalidObject, decode
from vcpuset.kube.quantity import millicores

__all__ = [
    "FIELDS",
    "CPUQuantity",
    "Choice",
    "InvalidManifest",
    "Labels",
    "Manifest",
    "Number",
    "read",
    "without_nulls",
]


class InvalidManifest(Exception):
    """A file that cannot be used.

    problems  each a sentence with the field and the remedy
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(" ".join(self.problems))


@dataclass(frozen=True, slots=True)
class Manifest:
    """One VCPUSet of a file.

    created  whether it has a creation time, so that it can be compared with others
    node     `spec.nodeName`
    body     the object, as in the file
    record   the file that its unplug requests are from (see `record`); None: they are its own
    """

    vcpuset: VCPUSet
    created: bool
    node: str | None
    body: Mapping[str, Any]
    record: Path | None = None


@dataclass(frozen=True, slots=True)
class Number:
    """An integer from `least` to `most`."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Labels:
    """A mapping of strings to strings, not empty."""


@dataclass(frozen=True, slots=True)
class CPUQuantity:
    """A number of CPUs, or a string such as 500m."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these strings."""

    words: tuple[str, ...]


_COUNT: Final = Number(1, 4096)
_SECONDS: Final = Number(1, 86400)
_TLS: Final[Mapping[str, Any]] = {"secretName!": str, "serverName": str}
_UNIX: Final[Mapping[str, Any]] = {"path!": str}

FIELDS: Final[Mapping[str, Any]] = {
    "vcpus": _COUNT,
    "minVCPUs": _COUNT,
    "maxVCPUs": _COUNT,
    "nodeName": str,
    "monitor!": {
        "unix": _UNIX,
        "tcp": {"host!": str, "port!": Number(1, 65535), "tls": _TLS, "insecure": bool},
        "connection": Choice(("OnDemand", "Persistent")),
    },
    "pod": {
        "selector!": {"matchLabels!": Labels()},
        "container": str,
        "cpu": {"perVCPU!": CPUQuantity(), "overhead": CPUQuantity()},
        "timeoutSeconds": _SECONDS,
    },
    "guestAgent": {"unix!": _UNIX, "bringOnline": bool},
    "unplug": {
        "policy": Choice(("Enabled", "Disabled")),
        "bootVCPUs": Choice(("Unplug", "Keep")),
        "timeoutSeconds": _SECONDS,
        "retrySeconds": _SECONDS,
    },
    "suspend": bool,
}
"""The fields of `spec`, required ones with "!"; a test compares them with the resource definition."""


def read(text: str, namespace: str | None, now: datetime) -> list[Manifest]:
    """The VCPUSets of a text: YAML documents, JSON, or lists as `kubectl get -o yaml` prints them.

    namespace  for those without one (default: "default"); another one is rejected

    Raises InvalidManifest with all errors.
    """
    try:
        return _read(text, namespace, now)
    except RecursionError as error:
        words = "The file is nested too deeply, or a YAML alias in it is a part of its own anchor."
        raise InvalidManifest([words]) from error


def _read(text: str, namespace: str | None, now: datetime) -> list[Manifest]:
    found: list[Manifest] = []
    problems: list[str] = []
    bodies = list(_bodies(_documents(text)))
    if not bodies:
        raise InvalidManifest(["The file contains no VCPUSet."])
    for where, body in bodies:
        wrong = list(_envelope_problems(body, namespace))
        if not wrong:
            wrong = list(_spec_problems(body["spec"]))
        if wrong:
            name = _name_of(body)
            problems += [printable(f"{name or where}: {each}") for each in wrong]
            continue
        try:
            found.append(_manifest(body, namespace, len(found), now))
        except InvalidObject as error:
            problems.append(f"{error}.")
    if problems:
        raise InvalidManifest(problems)
    return found


class _Loader(yaml.SafeLoader):
    """YAML as the API server reads it: times remain text, and duplicate keys are errors."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - types-PyYAML declares it without ClassVar, and mypy rejects an override with it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; ConstructorError for a duplicate key, of which PyYAML would use the last."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _documents(text: str) -> list[Any]:
    if text.lstrip().startswith("{"):
        # YAML contains JSON, all but its tabs.
        try:
            return [json.loads(text)]
        except ValueError:
            pass
    try:
        return [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise InvalidManifest([f"The file is not YAML (or JSON): {error.problem or error.context}{where}."]) from error
    except (yaml.YAMLError, ValueError) as error:
        words = " ".join(str(error).split())
        raise InvalidManifest([f"The file is not YAML (or JSON): {words}."]) from error


def _bodies(documents: Iterable[Any], where: str = "document") -> Iterator[tuple[str, Any]]:
    """Every object, with its position in the file."""
    for number, document in enumerate(documents, 1):
        place = f"{where} {number}"
        if isinstance(document, dict) and str(document.get("kind", "")).endswith("List"):
            items = document.get("items")
            yield from _bodies(items if isinstance(items, list) else [], f"{place}, item")
        else:
            yield place, document


def _envelope_problems(body: object, namespace: str | None) -> Iterator[str]:
    if not isinstance(body, dict):
        yield f"expected a VCPUSet, a mapping of fields, and found {_kind_of(body)}."
        return
    if body.get("kind") != KIND:
        found = f"is {body['kind']!r}" if "kind" in body else "is missing"
        yield f"not a VCPUSet: kind {found}; remove objects of other kinds."
        return
    if body.get("apiVersion") != API_VERSION:
        found = f"is {body['apiVersion']!r}" if "apiVersion" in body else "is missing"
        yield f"apiVersion {found}: this version only supports {API_VERSION}."
        return
    yield from _unknown(body, ("apiVersion", "kind", "metadata", "spec", "status"), "")
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("name") in (None, ""):
        yield "metadata.name is missing: set a name."
    elif not isinstance(metadata["name"], str):
        yield _no_text("metadata.name", metadata["name"])
    elif (fault := VCPUSET.fault(metadata["name"])) is not None:
        yield f"metadata.name: {fault}."
    elif not isinstance(metadata.get("namespace") or "", str):
        yield _no_text("metadata.namespace", metadata["namespace"])
    elif metadata.get("namespace") and (fault := NAMESPACE.fault(metadata["namespace"])) is not None:
        yield f"metadata.namespace: {fault}."
    elif namespace and (metadata.get("namespace") or namespace) != namespace:
        yield f"metadata.namespace is {metadata['namespace']!r} and --namespace is {namespace!r}: leave one out."
    if not isinstance(body.get("spec"), dict):
        yield "spec is missing: set at least spec.monitor."


def _spec_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    wrong = list(_mapping_problems(spec, FIELDS, "spec"))
    yield from wrong
    if not wrong:
        yield from _rule_problems(spec)


def _mapping_problems(value: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> Iterator[str]:
    names = {name.removesuffix("!"): kind for name, kind in fields.items()}
    yield from _unknown(value, names, f"{where}.")
    for name in fields:
        if name.endswith("!") and value.get(name[:-1]) is None:
            yield f"{where}.{name[:-1]} is missing: it is required."
    for name, kind in names.items():
        if value.get(name) is not None:
            yield from _value_problems(value[name], kind, f"{where}.{name}")


def _value_problems(value: object, kind: object, where: str) -> Iterator[str]:
    match kind:
        case Mapping():
            if isinstance(value, dict):
                yield from _mapping_problems(value, kind, where)
            else:
                yield f"{where} must be a mapping of fields, but is {_kind_of(value)}."
        case Number(least, most):
            if isinstance(value, bool) or not isinstance(value, int):
                yield f"{where} must be a whole number from {least} to {most}, but is {_kind_of(value)}."
            elif not least <= value <= most:
                yield f"{where} is {value}: declare from {least} to {most}."
        case Labels():
            if not isinstance(value, dict) or not value:
                yield f"{where} must be a mapping of at least one label."
            else:
                wrong = {name: each for name, each in value.items() if not isinstance(each, str)}
                yield from (_no_text(f"{where}.{name}", each) for name, each in wrong.items())
        case CPUQuantity():
            if isinstance(value, bool) or millicores(value) is None:
                yield f"{where} is {value!r}: declare a CPU quantity, such as 1 or 500m."
        case Choice(words):
            if value not in words:
                yield f"{where} is {value!r}: choose {' or '.join(words)}.{_guess(value, words)}"
        case _:
            assert isinstance(kind, type), "FIELDS has no other kinds"
            if not isinstance(value, kind):
                yield (
                    f"{where} must be true or false, but is {_kind_of(value)}."
                    if kind is bool
                    else _no_text(where, value)
                )


def _rule_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    vcpus, least, most = spec.get("vcpus"), spec.get("minVCPUs"), spec.get("maxVCPUs")
    if least is not None and most is not None and least > most:
        yield f"spec.minVCPUs is {least} and spec.maxVCPUs {most}: the first must not be more than the second."
    elif vcpus is not None and least is not None and vcpus < least:
        yield f"spec.vcpus is {vcpus}, below spec.minVCPUs: declare at least {least}, or lower spec.minVCPUs."
    elif vcpus is not None and most is not None and vcpus > most:
        yield f"spec.vcpus is {vcpus}, above spec.maxVCPUs: declare at most {most}, or raise spec.maxVCPUs."
    unix, tcp = spec["monitor"].get("unix"), spec["monitor"].get("tcp")
    if (unix is None) == (tcp is None):
        found = "neither" if unix is None else "both"
        yield f"spec.monitor has {found} of unix and tcp: set exactly one."
    elif tcp is not None and (tcp.get("tls") is None) != (tcp.get("insecure") is True):
        found = "neither" if tcp.get("tls") is None else "both"
        yield (
            f"spec.monitor.tcp has {found} of tls and insecure: set tls to the Secret of a TLS monitor, or "
            "insecure: true to accept a connection that is neither encrypted nor authenticated."
        )
    pod = spec.get("pod") or {}
    if (pod.get("cpu") is None) != (pod.get("container") is None):
        missing, present = ("container", "cpu") if pod.get("container") is None else ("cpu", "container")
        yield f"spec.pod.{missing} is missing: it is required with spec.pod.{present}."
    agent = spec.get("guestAgent")
    if agent is not None and unix is not None and agent["unix"]["path"] == unix["path"]:
        yield "spec.guestAgent.unix.path is the monitor's: name the socket of the guest agent's channel."


def _unknown(value: Mapping[Any, Any], known: Iterable[str], prefix: str) -> Iterator[str]:
    known = tuple(known)
    for name in value:
        if name not in known:
            yield f"{prefix}{name} is not a field of VCPUSet.{_guess(name, known, prefix)}"


def _guess(word: object, known: Iterable[str], prefix: str = "") -> str:
    by_lower = {each.lower(): each for each in known}
    lower = str(word).lower()
    near = difflib.get_close_matches(lower, by_lower, n=1) or [each for each in by_lower if each.startswith(lower)]
    return f" Did you mean {prefix}{by_lower[near[0]]}?" if near else f" Known: {', '.join(by_lower.values())}."


_KINDS: Final[Mapping[type, Callable[[Any], str]]] = {
    dict: lambda _: "a mapping",
    list: lambda _: "a list",
    type(None): lambda _: "empty",
    bool: lambda value: "true" if value else "false",
    str: lambda value: f"the string {value!r}" if len(value) < 80 else "a string",
}


def _kind_of(value: object) -> str:
    return _KINDS.get(type(value), repr)(value)


def _no_text(where: str, value: object) -> str:
    """A string field whose value YAML reads as something else, such as 123 or yes."""
    remedy = ": quote it" if isinstance(value, int | float) else ""
    return f"{where} must be a string, but is {_kind_of(value)}{remedy}."


def _name_of(body: object) -> str | None:
    metadata = body.get("metadata") if isinstance(body, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{body.get('kind', 'object')} {name}" if isinstance(body, dict) and isinstance(name, str) else None


def _manifest(body: Mapping[str, Any], namespace: str | None, number: int, now: datetime) -> Manifest:
    metadata = body["metadata"]
    created = metadata.get("creationTimestamp")
    # The API server gives these to every object; a manifest by hand has none. One that is not created yet is younger
    # than all that are; among those, the order of the file counts.
    given = {
        "uid": f"not created yet: {number:06}",
        "resourceVersion": "0",
        "generation": 1,
        "creationTimestamp": (created or now.astimezone(UTC).isoformat()),
    }
    placed = {"namespace": metadata.get("namespace") or namespace or "default"}
    spec = without_nulls(body["spec"])
    vcpuset = decode({
        "metadata": given | without_nulls(metadata) | placed, "spec": spec, "status": body.get("status") or {},
    })  # fmt: skip
    return Manifest(vcpuset, created is not None, spec.get("nodeName"), body)


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As the API server reads it: null means that the field is not set."""
    return {
        name: without_nulls(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if value is not None
    }
