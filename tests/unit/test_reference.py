"""The generated reference pages name everything, and refuse what nobody has described."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from harness import reference
from harness.reference import Undocumented


def fields(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field of an object of the CRD, and of the objects in it: the object's path, and the field's name."""
    for name, field in schema.get("properties", {}).items():
        yield path, name
        item = field.get("items", field)
        yield from fields(f"{path}.{name}{'[]' if item is not field else ''}", item)


def test_the_api_reference_has_one_row_for_each_field_of_the_crd_in_the_table_of_its_object() -> None:
    (version,) = yaml.safe_load(reference.DEFINITION.read_text())["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]["properties"]
    expected = [each for name in ("spec", "status") for each in fields(name, schema[name])]
    tables = re.findall(r"^### `(\S+)`$(.*?)(?=^### |\Z)", reference.api(), re.MULTILINE | re.DOTALL)
    rows = [(path, name) for path, table in tables for name in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)]
    assert sorted(rows) == sorted(expected)
    assert len(rows) == len(set(rows))


def test_each_row_has_four_cells_and_each_object_leads_to_its_table() -> None:
    text = reference.api()
    for row in re.findall(r"^\| `\w+` \|.*$", text, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row
    anchors = {re.sub(r"[^a-z0-9]", "", each.lower()) for each in re.findall(r"^### `(\S+)`$", text, re.MULTILINE)}
    assert set(re.findall(r"\[object\]\(#(\w+)\)", text)) <= anchors


def test_the_types_defaults_and_rules_are_those_of_the_crd() -> None:
    text = reference.api()
    assert "| `vcpus` | integer, 1 to 4096 |  | The desired number" in text
    assert "| `timeoutSeconds` | integer, 1 to 86400 | `60` | How long the guest" in text
    assert "| `connection` | `OnDemand` or `Persistent` | `Persistent` | " in text
    assert "| `monitor` | [object](#specmonitor) | **required** | " in text
    assert "* vcpus must be at least minVCPUs\n" in text
    assert "* exactly one of unix or tcp must be set" in text


def test_the_reference_of_the_chart_has_each_value_of_its_schema() -> None:
    schema = json.loads((reference.CHART / "values.schema.json").read_text())
    named = re.findall(r"^\| `([\w.]+)` \|", reference.values(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {each.partition(".")[0] for each in named} == schema["properties"].keys() - {"global"}
    for part in ("image", "agent", "controller", "metricsAPI", "networkPolicy", "monitoring"):
        known = schema["properties"][part]["properties"].keys()
        assert {each.split(".")[1] for each in named if each.startswith(f"{part}.")} == known


def test_a_comment_is_about_the_value_below_it_and_a_value_that_is_commented_out_has_no_default() -> None:
    text = """\
# For readers of the file.

# How loud, from 1
# to 3.
# volume: 2
# A | B.
names: [a]
# The part.
part:
  # On or off.
  enabled: true
  # Whatever keys.
  labels:
    app.example.com/name: x
"""
    assert (
        reference.values_of(text)
        == """\
| value | default | meaning |
| --- | --- | --- |
| `volume` |  | How loud, from 1 to 3. |
| `names` | `["a"]` | A \\| B. |

### `part`

The part.

| value | default | meaning |
| --- | --- | --- |
| `part.enabled` | `true` | On or off. |
| `part.labels` | `{"app.example.com/name": "x"}` | Whatever keys. |"""
    )


@pytest.mark.parametrize("text", ["a: 1\n", "# A.\na: 1\nb: 2\n", "# P.\npart:\n  # A.\n  a: 1\n  b: 2\n"])
def test_a_value_without_a_comment_is_refused_with_its_name(text: str) -> None:
    with pytest.raises(Undocumented, match=r"(a|b|part\.b) in values\.yaml has no comment"):
        reference.values_of(text)
