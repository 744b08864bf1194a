"""The generated reference pages: the API from the CRD, and the values of the Helm chart from its values.yaml.

`harness.pages` puts both into the pages. The texts are those of the two files; nothing is written here a second time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from harness.cache import REPOSITORY

__all__ = ["Undocumented", "api", "values", "values_of"]

DEFINITION: Final = REPOSITORY / "crds" / "vcpusets.yaml"
CHART: Final = REPOSITORY / "deploy" / "helm" / "vcpuset"

_COMMENT: Final = re.compile(r"^(?P<indent> *)#(?: (?P<text>.*))?$")
_KEY: Final = re.compile(r"^(?P<indent> *)(?P<off># )?(?P<key>[A-Za-z]\w*):(?: +(?P<value>\S.*))?$")


class Undocumented(ValueError):
    """A value of the chart has no comment."""


# --- the API ------------------------------------------------------------------------------------------------------


def api() -> str:
    """Every field of a VCPUSet, with one table for each object in it, in the order of the CRD."""
    definition = yaml.safe_load(DEFINITION.read_text())["spec"]
    (version,) = definition["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    names = definition["names"]
    scale = version["subresources"]["scale"]
    fields = ", ".join(f"`{each['jsonPath'][1:]}`" for each in version["selectableFields"])
    facts = {
        "API version and kind": f"`{definition['group']}/{version['name']}`, `{names['kind']}`",
        "for kubectl": f"`{names['plural']}`, `{names['singular']}` or `{names['shortNames'][0]}`",
        "scope": definition["scope"],
        "scale subresource": (
            f"replicas `{scale['specReplicasPath'][1:]}` and `{scale['statusReplicasPath'][1:]}`,"
            f" selector `{scale['labelSelectorPath'][1:]}`"
        ),
        "`--field-selector`": fields,
    }
    lines = [schema["description"], "", _table(("what", "value"), list(facts.items()))]
    for name in ("spec", "status"):
        lines += [each for section in _objects(name, schema["properties"][name]) for each in ("", section)]
    columns = [
        (column["name"], "with `-o wide`" if column.get("priority") else "yes", column["description"])
        for column in version["additionalPrinterColumns"]
    ]
    return "\n".join([*lines, "", "### Columns of kubectl get", "", _table(("column", "shown", "meaning"), columns)])


def _objects(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """The section of an object, and those of the objects in it."""
    required = schema.get("required", ())
    rows, rules, inner = [], _rules("", schema), []
    for name, field in schema["properties"].items():
        whole, item = f"{path}.{name}", field.get("items", field)
        if "properties" in item:
            inner.append((whole + ("[]" if item is not field else ""), item))
        default = "**required**" if name in required else _default(field)
        rows.append((f"`{name}`", _type(whole, field), default, _cell(field["description"])))
        if "properties" not in field:
            rules += _rules(name, field)
    yield "\n".join(
        [
            f"### `{path}`",
            "",
            *([schema["description"], ""] if "description" in schema else []),
            _table(("field", "type", "default", "meaning"), rows),
            *(["", "The API server checks:", "", *rules] if rules else []),
        ]
    )
    for whole, field in inner:
        yield from _objects(whole, field)


def _rules(name: str, schema: Mapping[str, Any]) -> list[str]:
    """The messages of the CEL rules of a field, or of an object."""
    found = [
        (rule.get("fieldPath", "").removeprefix(".") or name, rule["message"])
        for rule in schema.get("x-kubernetes-validations", ())
    ]
    return [f"* {f'`{where}` ' if where and not text.startswith(where) else ''}{_cell(text)}" for where, text in found]


def _type(path: str, schema: Mapping[str, Any]) -> str:
    if schema.get("type") == "array":
        return f"list of {_type(f'{path}[]', schema['items'])}s"
    if "properties" in schema:
        return f"[object](#{re.sub(r'[^a-z0-9]', '', path.lower())})"
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "additionalProperties" in schema:
        return f"map of {schema['additionalProperties']['type']}s"
    if "enum" in schema:
        return " or ".join(f"`{each}`" for each in schema["enum"])
    name = "time" if schema.get("format") == "date-time" else schema["type"]
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{name}, {low} to {high}"
    return f"{name}, at least {low}" if low is not None else str(name)


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    text = default if isinstance(default, str) else json.dumps(default)
    return "" if default in (None, {}) else f"`{text}`"


# --- the chart ----------------------------------------------------------------------------------------------------


def values() -> str:
    """Every value of the chart, with one table for each of its parts."""
    return values_of((CHART / "values.yaml").read_text())


def values_of(text: str) -> str:
    """The tables of a values.yaml whose values all have a comment above them.

    A value that is commented out has no default: `# name: example`. A comment is about the key below it; one
    above an empty line is for readers of the file.

    Raises:
        Undocumented: a value has no comment.
    """
    parts: dict[str, list[tuple[str, str, str]]] = {"": []}
    comments = _comments(text)
    for path, default in _leaves(comments, yaml.safe_load(text)):
        meaning = comments[path][0]
        if not meaning:
            raise Undocumented(f"{path} in values.yaml has no comment above it that says what it is")
        first, _, rest = path.partition(".")
        parts.setdefault(first if rest else "", []).append((f"`{path}`", default, _cell(meaning)))
    head = ("value", "default", "meaning")
    sections = [_table(head, parts.pop(""))]
    for name, rows in parts.items():
        about = comments[name][0]
        sections += [f"### `{name}`", *([_cell(about)] if about else []), _table(head, rows)]
    return "\n\n".join(sections)


def _comments(text: str) -> dict[str, tuple[str, bool]]:
    """By the path of each key of the file: the comment above it, and whether the key is commented out."""
    found: dict[str, tuple[str, bool]] = {}
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        key = _KEY.match(line)
        comment = _COMMENT.match(line)
        if key and (not key["off"] or key["value"]) and not (key["off"] and not above):
            indent = len(key["indent"])
            parents = [(depth, name) for depth, name in parents if depth < indent]
            path = ".".join([*(name for _, name in parents), key["key"]])
            found[path] = (" ".join(above), bool(key["off"]))
            if not key["off"]:
                parents.append((indent, key["key"]))
            above = []
        elif comment:
            above.append(comment["text"] or "")
        else:
            above = []
    return found


def _leaves(
    comments: Mapping[str, tuple[str, bool]], given: Mapping[str, Any], above: str = ""
) -> Iterator[tuple[str, str]]:
    """Path and default of each value, in the order of the file. A map whose keys have no comments is one value."""
    for path, (_, is_off) in comments.items():
        name = path.removeprefix(above)
        if not path.startswith(above) or "." in name:
            continue
        if any(comment for other, (comment, _) in comments.items() if other.startswith(f"{path}.")):
            yield from _leaves(comments, given[name], f"{path}.")
        else:
            yield path, "" if is_off else f"`{json.dumps(given[name], ensure_ascii=False)}`"


# --- Markdown -----------------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    """A text in one line of a table: `|` would end the cell, `<` would begin a tag."""
    outside = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in outside)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
