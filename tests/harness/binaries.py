"""Which Go programs the tests and the demo use (etcd, kube-apiserver, helm, …), and where they are.

They are built from the modules pinned beside this file (build/*/go.mod) and kept in the cache folder under a name made
from those pins, so that changing a pin asks for a new build. For the control plane `KUBEBUILDER_ASSETS`, the variable
that the Go operators' tests use, takes precedence.

Each module is apart, with a go.mod of its own: the demo need not wait for what only tests start, and changing the pins
of one builds nothing else.
"""

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from harness.cache import cache_dir, digest

__all__ = [
    "ARGOCD",
    "BUILDS",
    "CONTROLLER_MANAGER",
    "CONTROL_PLANE",
    "FLUX",
    "HELM",
    "KEDA",
    "KUBE_ROUTER",
    "METRICS_SERVER",
    "NODE",
    "Binaries",
    "BinariesMissing",
    "Build",
    "binaries",
    "controller_manager",
    "kubernetes_version",
]

BUILD_RECIPE: Final = "1"
"""Raise this when the way of building changes the programs although the module does not."""


class BinariesMissing(Exception):
    """A program is not where it should be; the message says what to do."""


@dataclass(frozen=True)
class Build:
    """Programs that are built from one Go module.

    name      the folder of the module below build/, and of what is built below the cache folder
    packages  Go packages by the programs that they become; those of the module itself start with `vcpuset.dev/`
    takes     how long the build takes, for people
    folders   copies of folders of Go modules, such as one with manifests: module and path, by the names that they get;
              the module with `@version` if go.mod does not have it, because nothing in it is compiled
    """

    name: str
    packages: Mapping[str, str]
    takes: str
    folders: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def module(self) -> Path:
        """The folder with go.mod, go.sum and perhaps sources."""
        return Path(__file__).resolve().parent / "build" / self.name

    @property
    def folder(self) -> Path:
        """Where the programs belong that are built from the module as it is."""
        files = [self.module / "go.mod", self.module / "go.sum", *sorted(self.module.rglob("*.go"))]
        pins = [file.read_bytes() for file in files]
        copies = [f"{name} {module} {path}" for name, (module, path) in self.folders.items()]
        return cache_dir() / self.name / digest([*pins, *copies, BUILD_RECIPE, platform.machine()])

    @property
    def is_there(self) -> bool:
        """Whether all programs have been built, and all folders copied."""
        return all(os.access(self.folder / name, os.X_OK) for name in (*self.packages, *self.folders))

    def program(self, name: str) -> Path:
        """One of the programs, or of the folders.

        Raises:
            BinariesMissing: it is not there.
        """
        path = self.folder / name
        if not os.access(path, os.X_OK):
            raise BinariesMissing(
                f"{name} is not built ({path}): run `make setup`, or `make test-cluster` for its own programs"
            )
        return path


CONTROL_PLANE: Final = Build(
    "controlplane",
    {
        "etcd": "go.etcd.io/etcd/server/v3",
        "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
        "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    },
    "10 to 20 minutes on two cores, with 4 GB of temporary disk space",
)

CONTROLLER_MANAGER: Final = Build(
    "controllermanager",
    {"kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager"},
    "3 to 4 minutes on two cores right after the control plane, otherwise longer",
)

HELM: Final = Build("helm", {"helm": "helm.sh/helm/v4/cmd/helm"}, "3 to 5 minutes on two cores")

NODE: Final = Build(
    "node",
    {name: f"k8s.io/kubernetes/cmd/{name}" for name in ("kubelet", "kube-proxy", "kube-scheduler")},
    "1 to 2 minutes on two cores right after the controller manager, otherwise longer",
)

KUBE_ROUTER: Final = Build(
    "kuberouter",
    {"kube-router": "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router"},
    "3 to 5 minutes on two cores",
)

KEDA: Final = Build(
    "keda",
    {f"keda-{name}": f"github.com/kedacore/keda/v2/cmd/{name}" for name in ("operator", "adapter", "webhooks")},
    "10 to 15 minutes on two cores",
    {"config": ("github.com/kedacore/keda/v2", "config")},
)

METRICS_SERVER: Final = Build(
    "metricsserver",
    {"metrics-server": "sigs.k8s.io/metrics-server/cmd/metrics-server"},
    "2 minutes on two cores",
    {"manifests": ("sigs.k8s.io/metrics-server", "manifests")},
)

FLUX: Final = Build(
    "flux",
    {"kustomize-controller": "github.com/fluxcd/kustomize-controller", "kstatus": "vcpuset.dev/flux/kstatus"},
    "4 to 8 minutes on two cores",
    {
        "kustomize-crds": ("github.com/fluxcd/kustomize-controller", "config/crd/bases"),
        "source-crds": ("github.com/fluxcd/source-controller@v1.9.6", "config/crd/bases"),
    },
)

ARGOCD: Final = Build("argocd", {"argocd": "vcpuset.dev/argocd"}, "2 to 4 minutes on two cores right after the others")

BUILDS: Final = {
    each.name: each
    for each in (CONTROL_PLANE, CONTROLLER_MANAGER, NODE, KUBE_ROUTER, METRICS_SERVER, KEDA, HELM, FLUX, ARGOCD)
}
"""In the order in which they are built: what has most in common with the one before comes next."""


@dataclass(frozen=True)
class Binaries:
    """Paths of the control plane's programs."""

    etcd: Path
    kube_apiserver: Path
    kubectl: Path

    @classmethod
    def within(cls, folder: Path) -> Self | None:
        """The programs in `folder`, or None unless all of them are there and executable."""
        paths = [folder / name for name in CONTROL_PLANE.packages]
        return cls(*paths) if all(os.access(path, os.X_OK) for path in paths) else None


def kubernetes_version() -> str:
    """The Kubernetes version that go.mod pins, such as `v1.36.3`."""
    text = (CONTROL_PLANE.module / "go.mod").read_text()
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)", text, re.MULTILINE)
    if found is None:
        raise BinariesMissing(f"{CONTROL_PLANE.module / 'go.mod'} pins no k8s.io/kubernetes")
    return found[1]


def binaries() -> Binaries:
    """The programs of `KUBEBUILDER_ASSETS` if that is set, else those in the cache folder.

    Raises:
        BinariesMissing: they are not there.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folder = Path(assets) if assets else CONTROL_PLANE.folder
    found = Binaries.within(folder)
    if found is not None:
        return found
    if assets:
        raise BinariesMissing(
            f"KUBEBUILDER_ASSETS={assets}: not all of {', '.join(CONTROL_PLANE.packages)} are there; correct or unset "
            "the variable"
        )
    raise BinariesMissing(f"the control plane is not built ({folder} lacks a program): run `make setup`")


def controller_manager() -> Path:
    """The kube-controller-manager in `KUBEBUILDER_ASSETS`, else the one in the cache folder, else the one in PATH.

    One from PATH may be of another version; Kubernetes allows it to be one minor version older than the API server.

    Raises:
        BinariesMissing: there is none.
    """
    (name,) = CONTROLLER_MANAGER.packages
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folders = [*([Path(assets)] if assets else []), CONTROLLER_MANAGER.folder]
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return folder / name
    installed = shutil.which(name)
    if installed is not None:
        return Path(installed)
    raise BinariesMissing(f"{name} is neither in {', '.join(map(str, folders))} nor in PATH: run `make setup`")
