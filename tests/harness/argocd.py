"""Argo CD's customizations of deploy/gitops/argocd, run by a Lua interpreter as Argo CD runs them.

Argo CD's interpreter (gopher-lua) has Lua 5.1 and, for the scripts in argocd-cm, no library but the base functions,
`table` and a part of `os`. Actions and their tests are in the layout of its `resource_customizations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import yaml
from lupa.lua51 import LuaRuntime, lua_type

from harness.cache import REPOSITORY

__all__ = ["CUSTOMIZATIONS", "PATCH", "evaluate", "read", "script"]

_FOLDER: Final = REPOSITORY / "deploy" / "gitops" / "argocd"

CUSTOMIZATIONS: Final = _FOLDER / "resource_customizations" / "vcpuset.dev" / "VCPUSet"
"""The scripts, with tests in Argo CD's format: health_test.yaml, actions/action_test.yaml."""

PATCH: Final = _FOLDER / "argocd-cm.yaml"
"""The same scripts as a patch of the ConfigMap argocd-cm."""

_REMOVED: Final = ("string", "io", "os", "math", "debug", "package", "require", "python")


def script(name: str) -> str:
    """A script, such as `health` or `actions/suspend/action`."""
    return (CUSTOMIZATIONS / f"{name}.lua").read_text(encoding="utf-8")


def evaluate(text: str, obj: Mapping[str, Any]) -> Any:  # noqa: ANN401 - what a script returns
    """What a script returns for an object: tables become dicts and lists.

    Raises:
        lupa.LuaError: the script failed, for example because it uses what Argo CD does not have.
    """
    lua = LuaRuntime(unpack_returned_tuples=True)
    for name in _REMOVED:
        lua.globals()[name] = None
    lua.globals()["obj"] = lua.table_from(obj, recursive=True)
    return _value(lua.execute(text))


def read(path: str) -> Any:  # noqa: ANN401 - YAML
    """A file in YAML, by its path below `CUSTOMIZATIONS`."""
    return yaml.safe_load((CUSTOMIZATIONS / path).read_text(encoding="utf-8"))


def _value(value: Any) -> Any:  # noqa: ANN401 - Lua's
    if lua_type(value) != "table":
        return value
    found = {key: _value(each) for key, each in value.items()}
    return list(found.values()) if found and all(isinstance(key, int) for key in found) else found
