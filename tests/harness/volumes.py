"""A pod's volumes, as folders of the test: what the kubelet puts there before a container starts, and renews later.

Known are the kinds that the operator's manifests have: projected (with the pod's token, the cluster's certificate and
the downward API), hostPath and emptyDir. Any other kind is an error, never left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from harness.container import Identity, Mount
from harness.controlplane import ControlPlane

__all__ = ["VolumeMissing", "Volumes", "field", "token"]

Manifest = Mapping[str, Any]

DEFAULT_TOKEN_SECONDS: Final = 3600


class VolumeMissing(Exception):
    """What a volume is to show is not there (yet); the kubelet tries again."""


def field(pod: Manifest, address: str, path: str) -> str:
    """A field of a pod by the path that the downward API knows."""
    if path == "status.podIP":
        return address
    value: Any = pod
    for step in path.split("."):
        value = value[step]
    return str(value)


async def token(control_plane: ControlPlane, pod: Manifest, audience: str | None, seconds: int) -> str:
    """A token of a pod's service account that is bound to the pod, and so names its node."""
    meta, account = pod["metadata"], pod["spec"]["serviceAccountName"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
    answer = await control_plane.request(
        "POST",
        f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token",
        {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [audience] if audience else [],
                "expirationSeconds": seconds,
                "boundObjectRef": bound,
            },
        },
    )
    if answer.status != 201:
        raise VolumeMissing(f"no token for {meta['namespace']}/{account}: {answer.status} {answer.body}")
    return str(answer.body["status"]["token"])


class Volumes:
    """The volumes of one pod on one node.

    directory  an empty folder for those that live and end with the pod
    host       the folder that plays the node's file system
    """

    def __init__(self, control_plane: ControlPlane, pod: Manifest, address: str, directory: Path, host: Path) -> None:
        self._control_plane = control_plane
        self._pod = pod
        self._address = address
        self._directory = directory
        self._host = host

    async def mounts(self, container: Manifest, identity: Identity) -> list[Mount]:
        """What the container sees where.

        Raises:
            VolumeMissing: something is not there yet.
            NotImplementedError: a kind of volume that nobody plays.
        """
        await self.renew(identity)
        volumes: Mapping[str, Manifest] = {each["name"]: each for each in self._pod["spec"].get("volumes", ())}
        return [
            Mount(
                self._source(volumes[each["name"]], identity),
                Path(each["mountPath"]),
                bool(each.get("readOnly", False)),
            )
            for each in container.get("volumeMounts", ())
        ]

    async def renew(self, identity: Identity) -> None:
        """Write the projected volumes again, with new tokens. The old ones stay valid until their time is over."""
        for volume in self._pod["spec"].get("volumes", ()):
            if "projected" in volume:
                for source in volume["projected"]["sources"]:
                    for path, text, secret in await self._projected(source):
                        _write(self._directory / volume["name"] / path, text, identity if secret else None)

    def projected(self, name: str) -> Path:
        """The first file of this name in a projected volume, such as `token`."""
        return next(each for each in sorted(self._directory.rglob(name)) if each.is_file())

    def _source(self, volume: Manifest, identity: Identity) -> Path:
        if "projected" in volume:
            return self._directory / str(volume["name"])
        if "emptyDir" in volume:
            path = self._directory / str(volume["name"])
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
            return path
        if "hostPath" in volume:
            path = self._host / str(volume["hostPath"]["path"]).lstrip("/")
            kind = volume["hostPath"].get("type", "")
            if kind == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True)
            elif kind not in {"", "Directory"}:
                raise NotImplementedError(f"hostPath of type {kind}")
            if not path.is_dir():
                raise VolumeMissing(f"hostPath type check failed: {volume['hostPath']['path']} is not a directory")
            return path
        raise NotImplementedError(f"volume {volume}")

    async def _projected(self, source: Manifest) -> Sequence[tuple[str, str, bool]]:
        """Path, content and whether it is a secret, of each file of a source."""
        match source:
            case {"serviceAccountToken": wanted}:
                seconds = wanted.get("expirationSeconds", DEFAULT_TOKEN_SECONDS)
                made = await token(self._control_plane, self._pod, wanted.get("audience"), seconds)
                return [(wanted["path"], made, True)]
            case {"configMap": wanted}:
                namespace = self._pod["metadata"]["namespace"]
                path = f"/api/v1/namespaces/{namespace}/configmaps/{wanted['name']}"
                answer = await self._control_plane.request("GET", path)
                if answer.status != 200:
                    raise VolumeMissing(f'configmap "{wanted["name"]}" not found')
                return [(each["path"], answer.body["data"][each["key"]], False) for each in wanted["items"]]
            case {"downwardAPI": wanted}:
                return [
                    (each["path"], field(self._pod, self._address, each["fieldRef"]["fieldPath"]), False)
                    for each in wanted["items"]
                ]
            case _:
                raise NotImplementedError(f"projected volume of {source}")


def _write(path: Path, text: str, owner: Identity | None) -> None:
    """Put a file in its place in one step, as the kubelet does. A secret is readable for its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.touch(mode=0o600)
    new.write_text(text)
    if owner is None:
        new.chmod(0o644)
    else:
        os.chown(new, owner.user, -1)
    new.rename(path)
