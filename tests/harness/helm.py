"""Helm, as a user would run it; its caches and settings are the test's own, not those of whoever runs the tests."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.binaries import HELM
from harness.cache import REPOSITORY
from harness.processes import Completed, run

__all__ = ["CHART", "render", "run_helm", "settings"]

CHART = REPOSITORY / "deploy" / "helm" / "vcpuset"


async def run_helm(
    *arguments: str | Path, kubeconfig: Path | None = None, check: bool = True, timeout: float = 120
) -> Completed:
    """Run helm, against the API server of `kubeconfig`, or none.

    Raises:
        BinariesMissing: `make setup` has not been run.
        CommandFailed: exit status not 0, and `check` is set; the message holds all that helm said.
        TimeoutError: no end within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="vcpuset-helm-") as home:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HELM_")}
        env |= {f"HELM_{kind}_HOME": f"{home}/{kind.lower()}" for kind in ("CACHE", "CONFIG", "DATA")}
        env["KUBECONFIG"] = str(kubeconfig or os.devnull)
        return await run([HELM.program("helm"), *arguments], env=env, check=check, timeout=timeout)


async def render(*arguments: str | Path, chart: Path = CHART) -> list[dict[str, Any]]:
    """The objects that `helm template` makes."""
    text = (await run_helm("template", "vcpuset", chart, *arguments)).stdout
    return [each for each in yaml.safe_load_all(text) if each]


def settings(values: Mapping[str, object]) -> list[str]:
    """Values, by their paths, as options of helm."""
    return [f"--set-json={path}={json.dumps(value)}" for path, value in values.items()]
