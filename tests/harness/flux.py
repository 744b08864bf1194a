"""Flux's kustomize-controller on a control plane, and the sources that it applies.

    async with KustomizeController(control_plane), Sources() as sources:
        async with Delivery(control_plane, sources, namespace) as delivery:
            await delivery.commit(vcpuset, autoscaler)
            await delivery.create(wait=True, timeout="30s")
            await delivery.delivered()

Sources are ExternalArtifacts: archives that are served over HTTP on loopback, and announced in the object's status as
source-controller does for a Git repository. source-controller itself does not run.

The controller checks health at once, and then every 5 s. A timeout below 30 s counts as 30 s.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from harness.binaries import FLUX
from harness.controlplane import ControlPlane
from harness.processes import Child
from harness.runnable import Runnable
from harness.wait import until

__all__ = ["Delivery", "KustomizeController", "Sources"]

NAMESPACE: Final = "flux-system"
ACCOUNT: Final = "kustomize-controller"

START_SECONDS: Final = 120.0
WAIT_SECONDS: Final = 120.0

Manifest = dict[str, Any]


class KustomizeController(Runnable):
    """The controller, with the rights that `flux install` gives it; ends before the control plane."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._directory = Path()
        self._child: Child | None = None

    async def start(self) -> None:
        """Install Flux's definitions, start the controller and wait until it works.

        Raises:
            BinariesMissing: `make test-cluster` has not built it.
            ChildDied: it ended; the message has the end of its log.
            TimeoutError: it does not work within two minutes; the same.
        """
        program = FLUX.program("kustomize-controller")
        for folder in ("kustomize-crds", "source-crds"):
            await self._control_plane.install_crd(FLUX.program(folder))
        kubeconfig = await self._account()
        self._directory = Path(tempfile.mkdtemp(prefix="vcpuset-flux-"))
        child = self._child = Child.start(
            [
                program,
                "--metrics-addr=0",
                "--health-addr=0",
                "--log-encoding=console",
                "--feature-gates=ExternalArtifact=true,CancelHealthCheckOnNewRevision=true",
                "--interval-jitter-percentage=0",
            ],
            name="kustomize-controller",
            log=self._directory / "log",
            # It deletes other files in the folder for temporary files.
            env={
                **os.environ,
                "KUBECONFIG": str(kubeconfig),
                "RUNTIME_NAMESPACE": NAMESPACE,
                "TMPDIR": str(self._directory),
            },
            cwd=self._directory,
        )

        async def works() -> bool:
            return "Starting workers" in child.log.read_text(errors="replace")

        await child.until(works, START_SECONDS)

    async def _account(self) -> Path:
        """The kubeconfig of the controller's service account, which may do everything."""
        rights = ("--clusterrole=cluster-admin", f"--serviceaccount={NAMESPACE}:{ACCOUNT}")
        for words in (
            ("namespace", NAMESPACE),
            ("serviceaccount", ACCOUNT, "--namespace", NAMESPACE),
            ("clusterrolebinding", "cluster-reconciler-flux-system", *rights),
        ):
            await self._control_plane.kubectl("create", *words)
        return await self._control_plane.service_account_kubeconfig(NAMESPACE, ACCOUNT)

    async def stop(self) -> None:
        """End it and remove its folder. Safe to call again."""
        if self._child is not None:
            await self._child.stop()
            self._child = None
        if self._directory != Path():
            shutil.rmtree(self._directory, ignore_errors=True)


class Sources:
    """An HTTP server for the archives, in a thread of its own."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="vcpuset-sources-"))
        handler = functools.partial(_Quiet, directory=str(self._directory))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="sources")
        self._thread.start()

    def add(self, objects: tuple[Mapping[str, Any], ...], revision: str) -> Manifest:
        """Serve the objects as one file of a repository; returns the `status.artifact` of their source."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            # JSON is YAML, but the controller skips files with another suffix.
            text = "\n---\n".join(json.dumps(each) for each in objects).encode()
            entry = tarfile.TarInfo("machines.yaml")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
        digest = hashlib.sha256(packed.getvalue()).hexdigest()
        name = f"{digest}.tar.gz"
        (self._directory / name).write_bytes(packed.getvalue())
        return {
            "url": f"http://127.0.0.1:{self._server.server_address[1]}/{name}",
            "path": name,
            "digest": f"sha256:{digest}",
            "revision": f"{revision}@sha256:{digest}",
            "lastUpdateTime": "2026-01-02T12:00:00Z",
            "size": len(packed.getvalue()),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(timeout=30)
        self._server.server_close()
        shutil.rmtree(self._directory, ignore_errors=True)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the standard library
        """Say nothing."""


class Delivery:
    """A source in a namespace and the Kustomization that applies it; both are called `name`, and end with the context.

    retryInterval is 3 s, so that what fails is tried again soon.
    """

    def __init__(self, control_plane: ControlPlane, sources: Sources, namespace: str, name: str = "machines") -> None:
        self.name = name
        self._control_plane = control_plane
        self._sources = sources
        self._namespace = namespace
        self._numbers = itertools.count(1)
        self._revision = ""
        self._kustomization = f"/apis/kustomize.toolkit.fluxcd.io/v1/namespaces/{namespace}/kustomizations/{name}"
        self._source = f"/apis/source.toolkit.fluxcd.io/v1/namespaces/{namespace}/externalartifacts/{name}"

    async def commit(self, *objects: Mapping[str, Any]) -> None:
        """Make these objects the content of the source; they are applied at once."""
        artifact = self._sources.add(objects, f"commit-{next(self._numbers)}")
        condition = {
            "type": "Ready",
            "status": "True",
            "reason": "Succeeded",
            "message": "stored",
            "lastTransitionTime": "2026-01-02T12:00:00Z",
        }
        if not self._revision:
            await self._create(self._source, "source.toolkit.fluxcd.io/v1", "ExternalArtifact", {})
        await self._control_plane.ok(
            "PATCH", f"{self._source}/status", {"status": {"artifact": artifact, "conditions": [condition]}}
        )
        self._revision = artifact["revision"]

    async def create(self, **spec: Any) -> None:
        """Create the Kustomization; `spec` holds further fields."""
        needed = {
            "interval": "1h",
            "retryInterval": "3s",
            "path": "./",
            "prune": True,
            "sourceRef": {"kind": "ExternalArtifact", "name": self.name},
        }
        await self._create(self._kustomization, "kustomize.toolkit.fluxcd.io/v1", "Kustomization", {**spec, **needed})

    async def reconcile(self) -> None:
        """Have it applied again now, as `flux reconcile` does, and wait until that is done."""
        stamp = f"again-{next(self._numbers)}"
        annotations = {"reconcile.fluxcd.io/requestedAt": stamp}
        await self._control_plane.ok("PATCH", self._kustomization, {"metadata": {"annotations": annotations}})

        def is_done(status: Manifest) -> bool:
            return status.get("lastHandledReconcileAt") == stamp and not _condition(status, "Reconciling")

        await self._until(is_done, "reconciled")

    async def delivered(self) -> None:
        """Wait until the last commit is applied, and healthy if the Kustomization waits for health."""

        def is_ready(status: Manifest) -> bool:
            ready = _condition(status, "Ready")
            return ready.get("status") == "True" and status.get("lastAppliedRevision") == self._revision

        await self._until(is_ready, "ready")

    async def fails(self, reason: str) -> str:
        """Wait until the last commit is reported as failed for this reason; returns the message."""

        def has_failed(status: Manifest) -> bool:
            ready = _condition(status, "Ready")
            failed = (ready.get("status"), ready.get("reason")) == ("False", reason)
            return failed and status.get("lastAttemptedRevision") == self._revision

        status = await self._until(has_failed, f"failed, {reason}")
        return str(_condition(status, "Ready")["message"])

    async def progress(self, words: str) -> None:
        """Wait until the message of Reconciling has these words."""
        await self._control_plane.until_condition(self._kustomization, "Reconciling", "True", words=words)

    async def close(self) -> None:
        """Delete both and wait until they are gone, and with them what was applied."""
        for path in (self._kustomization, self._source):
            await self._control_plane.request("DELETE", path)
            await self._control_plane.until_gone(path)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _until(self, holds: Callable[[Manifest], bool], what: str) -> Manifest:
        """Wait until this holds for the status; returns the status as it was then."""
        last: Manifest = {}

        async def check() -> bool:
            nonlocal last
            last = (await self._control_plane.ok("GET", self._kustomization)).get("status", {})
            return holds(last)

        await until(check, WAIT_SECONDS, lambda: f"{self._namespace}/{self.name}: {what}; its status was {last}")
        return last

    async def _create(self, path: str, version: str, kind: str, spec: Mapping[str, Any]) -> None:
        metadata = {"name": self.name, "namespace": self._namespace}
        body = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
        await self._control_plane.ok("POST", path.rpartition("/")[0], body)


def _condition(status: Mapping[str, Any], kind: str) -> Manifest:
    """A condition; empty if it is not there."""
    return next((each for each in status.get("conditions", []) if each["type"] == kind), {})
