"""The unplug requests that `vcpuset apply` has sent, in a file, where the operator has the status in the cluster.

A guest may carry out a request long after the command has ended, and QEMU does not show it. So each request is in the
record before it is sent, as for the operator: the next `vcpuset apply`, `plan` or `inspect -f` finds it there. There is
a record only while requests are open. It is a VCPUSet as kubectl prints one.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vcpuset.cli.manifests import InvalidManifest, Manifest, read, without_nulls
from vcpuset.domain.errors import Unavailable, VCPUSetError
from vcpuset.domain.resource import Status, VCPUSet
from vcpuset.kube.codec import API_VERSION, KIND, encode_status

__all__ = ["LocalSet", "RecordFailed", "remembered"]

_REMEDY: Final = "set XDG_STATE_HOME to a directory that you may write to"
_NEVER: Final = datetime.min.replace(tzinfo=UTC)


class RecordFailed(VCPUSetError):
    """The record cannot be read or written."""


def _path(vcpuset: VCPUSet) -> Path:
    """In the place for the state of a user's programs (XDG Base Directory Specification). Raises RecordFailed."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    except RuntimeError as error:
        raise RecordFailed(f"there is no home directory for the record of unplug requests: {_REMEDY}") from error
    # No name can lead out of the folder: a valid one has no "/".
    return state / "vcpuset" / f"{vcpuset.namespace}.{vcpuset.name}.json"


def remembered(manifest: Manifest) -> Manifest:
    """The manifest with the status in its record, unless its own status has later requests, or there is no record.

    Raises RecordFailed.
    """
    vcpuset = manifest.vcpuset
    path = _path(vcpuset)
    try:
        (kept,) = read(path.read_text(), None, datetime.now(UTC))
    except FileNotFoundError:
        return manifest
    except OSError as error:
        raise RecordFailed(f"the record {path} cannot be read: {error.strerror}; {_REMEDY}") from error
    except (InvalidManifest, ValueError) as error:
        raise RecordFailed(f"the record {path} is damaged; delete it, which forgets its unplug requests") from error
    if _latest(kept.vcpuset.status) <= _latest(vcpuset.status):
        return manifest
    changed = kept.vcpuset.spec != vcpuset.spec
    vcpuset = replace(vcpuset, generation=kept.vcpuset.generation + changed, status=kept.vcpuset.status)
    return replace(manifest, vcpuset=vcpuset, record=path)


def _latest(status: Status) -> datetime:
    return max((request.requested_at for request in status.pending_unplugs), default=_NEVER)


class LocalSet:
    """One VCPUSet in place of the API server, for a `Reporter`, a `Recorder` and `Pods`.

    changed  called with the set when its count was written, as by the watch
    """

    def __init__(self, manifest: Manifest, changed: Callable[[VCPUSet], None]) -> None:
        self._path = _path(manifest.vcpuset)
        self._changed = changed
        self._version = 0
        self._body = {each: manifest.body[each] for each in ("apiVersion", "kind", "metadata", "spec")}
        self.vcpuset = replace(manifest.vcpuset, resource_version="0")
        """The set as it stands."""

    def document(self) -> dict[str, Any]:
        """The set with its status, as kubectl prints it."""
        status = self.vcpuset.status
        shown = without_nulls(encode_status(status)) if status.ready is not None else {}
        metadata = {
            **without_nulls(self._body["metadata"]),
            "namespace": self.vcpuset.namespace,
            "generation": self.vcpuset.generation,
        }
        spec = without_nulls(self._body["spec"])
        return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec, "status": shown}

    async def write_status(self, vcpuset: VCPUSet, status: Status) -> VCPUSet:
        """As `Cluster.write_status`; only unplug requests are also kept in the record. Raises RecordFailed."""
        self._put(replace(vcpuset, status=status))
        await asyncio.to_thread(self._keep)
        return self.vcpuset

    async def write_count(self, vcpuset: VCPUSet, count: int) -> None:
        """As `Cluster.write_count`."""
        self._body["spec"] = {**self._body["spec"], "vcpus": count}
        spec = replace(vcpuset.spec, vcpus=count)
        self._put(replace(vcpuset, spec=spec, generation=vcpuset.generation + 1))
        self._changed(self.vcpuset)

    async def list_pods(self, namespace: str, selector: str) -> list[Mapping[str, Any]]:
        """Raises Unavailable."""
        raise Unavailable("vcpuset apply reads no pods: leave out spec.pod.cpu, and resize the pod yourself")

    async def resize_pod(self, namespace: str, name: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises Unavailable."""
        raise Unavailable("vcpuset apply resizes no pods")

    async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        """Nothing: there is nowhere to post it."""

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> None:
        """Nothing, likewise."""

    def _put(self, vcpuset: VCPUSet) -> None:
        self._version += 1
        self.vcpuset = replace(vcpuset, resource_version=str(self._version))

    def _keep(self) -> None:
        """Write the record, or delete it if no request is open."""
        try:
            if not self.vcpuset.status.pending_unplugs:
                self._path.unlink(missing_ok=True)
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_suffix(".new")
            draft.write_text(json.dumps(self.document()))
            draft.replace(self._path)
        except OSError as error:
            raise RecordFailed(
                f"unplug requests must be recorded before they are sent, and {self._path} cannot be written: "
                f"{error.strerror}; {_REMEDY}"
            ) from error
