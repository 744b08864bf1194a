"""Which etcd, kube-apiserver, kubectl, kube-controller-manager and helm the tests and the demo use, and where they are.

They are built from the modules pinned beside this file (build/*/go.mod) and kept in the cache folder under a name made
from those pins, so that changing a pin asks for a new build. `KUBEBUILDER_ASSETS`, the variable that the Go operators'
tests use, takes precedence.

kube-controller-manager is apart, with a go.mod of its own: only the tests of autoscaling start it, the demo need not
wait for it, and the folders that `KUBEBUILDER_ASSETS` names usually lack it. So is helm, for the tests of the chart.
"""

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from harness.cache import cache_dir, digest

__all__ = [
    "CONTROLLER_MANAGER",
    "CONTROLLER_MANAGER_MODULE",
    "CONTROL_PLANE_MODULE",
    "HELM",
    "HELM_MODULE",
    "NAMES",
    "Binaries",
    "BinariesMissing",
    "binaries",
    "built_folder",
    "controller_manager",
    "helm",
    "kubernetes_version",
]

CONTROL_PLANE_MODULE: Final = Path(__file__).resolve().parent / "build" / "controlplane"
"""The folder with the go.mod that pins the control plane."""

CONTROLLER_MANAGER_MODULE: Final = CONTROL_PLANE_MODULE.with_name("controllermanager")
"""The folder with the go.mod that pins kube-controller-manager: the same versions, and what it needs besides."""

HELM_MODULE: Final = CONTROL_PLANE_MODULE.with_name("helm")
"""The folder with the go.mod that pins helm."""

NAMES: Final = ("etcd", "kube-apiserver", "kubectl")
CONTROLLER_MANAGER: Final = "kube-controller-manager"
HELM: Final = "helm"

BUILD_RECIPE: Final = "1"
"""Raise this when the way of building changes the programs although go.mod does not."""


class BinariesMissing(Exception):
    """The control plane's programs are not where they should be; the message says what to do."""


@dataclass(frozen=True)
class Binaries:
    """Paths of the control plane's programs."""

    etcd: Path
    kube_apiserver: Path
    kubectl: Path

    @classmethod
    def within(cls, folder: Path) -> Self | None:
        """The programs in `folder`, or None unless all of them are there and executable."""
        paths = [folder / name for name in NAMES]
        return cls(*paths) if all(os.access(path, os.X_OK) for path in paths) else None


def kubernetes_version() -> str:
    """The Kubernetes version that go.mod pins, such as `v1.36.3`."""
    text = (CONTROL_PLANE_MODULE / "go.mod").read_text()
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)", text, re.MULTILINE)
    if found is None:
        raise BinariesMissing(f"{CONTROL_PLANE_MODULE / 'go.mod'} pins no k8s.io/kubernetes")
    return found[1]


def built_folder(module: Path) -> Path:
    """Where the programs belong that are built from this module with its present pins."""
    pins = [(module / name).read_bytes() for name in ("go.mod", "go.sum")]
    return cache_dir() / module.name / digest([*pins, BUILD_RECIPE, platform.machine()])


def binaries() -> Binaries:
    """The programs of `KUBEBUILDER_ASSETS` if that is set, else those in the cache folder.

    Raises:
        BinariesMissing: they are not there.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folder = Path(assets) if assets else built_folder(CONTROL_PLANE_MODULE)
    found = Binaries.within(folder)
    if found is not None:
        return found
    if assets:
        raise BinariesMissing(
            f"KUBEBUILDER_ASSETS={assets}: not all of {', '.join(NAMES)} are there; correct or unset the variable"
        )
    raise BinariesMissing(f"the control plane is not built ({folder} lacks a program): run `make setup`")


def controller_manager() -> Path:
    """The kube-controller-manager in `KUBEBUILDER_ASSETS`, else the one in the cache folder, else the one in PATH.

    One from PATH may be of another version; Kubernetes allows it to be one minor version older than the API server.

    Raises:
        BinariesMissing: there is none.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folders = [*([Path(assets)] if assets else []), built_folder(CONTROLLER_MANAGER_MODULE)]
    for folder in folders:
        if os.access(folder / CONTROLLER_MANAGER, os.X_OK):
            return folder / CONTROLLER_MANAGER
    installed = shutil.which(CONTROLLER_MANAGER)
    if installed is not None:
        return Path(installed)
    raise BinariesMissing(
        f"{CONTROLLER_MANAGER} is neither in {', '.join(map(str, folders))} nor in PATH: run `make setup`"
    )


def helm() -> Path:
    """The helm in the cache folder. One from PATH may be of a version with other commands and other checks.

    Raises:
        BinariesMissing: it is not there.
    """
    path = built_folder(HELM_MODULE) / HELM
    if not os.access(path, os.X_OK):
        raise BinariesMissing(f"helm is not built ({path}): run `make setup`")
    return path
