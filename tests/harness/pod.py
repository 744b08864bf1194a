"""One pod on a node: its process, its probes, its status; see `harness.kubelet`."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from harness.container import PROGRAM, SOURCE, Identity, contained
from harness.controlplane import ControlPlane
from harness.processes import Child
from harness.volumes import VolumeMissing, Volumes, field

__all__ = ["Pod"]

POLL_SECONDS: Final = 0.1
RESTART_SECONDS: Final = 1.0
"""Until a container that has ended is started again; from 10 s to 5 min in a cluster."""
EAGER_SECONDS: Final = 0.5

Manifest = Mapping[str, Any]

EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - what manifests say; nothing here listens there

_VARIABLE: Final = re.compile(r"\$\$|\$\((\w+)\)")


class _Probe:
    """What a probe has found of late."""

    def __init__(self, spec: Manifest | None, ports: Manifest, *, eager: bool = False) -> None:
        """`eager`: a first success is looked for more often, so that tests do not wait for it longer than need be."""
        self._spec = spec or {}
        self._ports = ports
        self._period = float(self._spec.get("periodSeconds", 10))
        self._eager = eager
        self._due = 0.0 if eager else asyncio.get_running_loop().time() + self._period
        self.failures = 0
        self.passed = spec is None
        """Whether the last one went well."""

    @property
    def exhausted(self) -> bool:
        """Whether it has failed as often as it may."""
        return self.failures >= int(self._spec.get("failureThreshold", 3))

    async def look(self, address: str, session: aiohttp.ClientSession) -> None:
        """Probe, if it is time to."""
        now = asyncio.get_running_loop().time()
        if not self._spec or now < self._due:
            return
        self._due = now + (EAGER_SECONDS if self._eager and not self.passed else self._period)
        wanted = self._spec["httpGet"]
        port = self._ports.get(wanted["port"], wanted["port"])
        url = f"{wanted.get('scheme', 'HTTP').lower()}://{address}:{port}{wanted['path']}"
        timeout = aiohttp.ClientTimeout(total=self._spec.get("timeoutSeconds", 1))
        try:
            async with session.get(url, timeout=timeout, allow_redirects=False) as answer:
                self.passed = 200 <= answer.status < 400
        except (aiohttp.ClientError, TimeoutError):
            self.passed = False
        self.failures = 0 if self.passed else self.failures + 1


class Pod:
    """A pod from its binding to its end. It has one container.

    address    its own loopback address
    directory  a folder that is made for it, and removed with the node's
    host       the node's file system
    """

    def __init__(
        self, control_plane: ControlPlane, manifest: Manifest, address: str, directory: Path, host: Path
    ) -> None:
        self._control_plane = control_plane
        self._manifest = manifest
        self.namespace: str = manifest["metadata"]["namespace"]
        self.name: str = manifest["metadata"]["name"]
        self.node: str = manifest["spec"]["nodeName"]
        self.address = address
        self.log = directory / "log"
        """All that the container has said, over its restarts."""
        self.restarts = 0
        self.ended = False
        self._directory = directory
        (self._container,) = manifest["spec"]["containers"]
        self._identity = Identity.of(manifest["spec"], self._container)
        self._volumes = Volumes(control_plane, manifest, address, directory / "volumes", host)
        self._child: Child | None = None
        self._grace: float | None = None
        """Seconds that it has from SIGTERM on; None: nobody wants it to end."""
        self._task: asyncio.Task[None] | None = None
        self._reported: Manifest = {}
        self._started_at = ""
        self._waiting = "ContainerCreating"

    # --- use ------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The process id of the container's program."""
        assert self._child is not None, f"{self.name} has not been started"
        return self._child.pid

    @property
    def token(self) -> str:
        """The service account's token that the pod has now."""
        return self._volumes.projected("token").read_text()

    @property
    def url(self) -> str:
        """Where the container's first port answers, such as http://127.7.7.7:8080."""
        return f"http://{self.address}:{self._container['ports'][0]['containerPort']}"

    def text(self) -> str:
        """What it has said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """End the program with SIGKILL; it is started again."""
        assert self._child is not None
        self._child.kill()

    async def rotate_token(self) -> None:
        """Give it a new token now, as the kubelet does when four fifths of the old one's time have passed."""
        await self._volumes.renew(self._identity)

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to run it."""
        self._directory.mkdir()
        self._task = asyncio.create_task(self._life())

    def seen(self, manifest: Manifest) -> None:
        """Hear what the API server says of it now."""
        if "deletionTimestamp" in manifest["metadata"]:
            self._grace = float(manifest["metadata"]["deletionGracePeriodSeconds"])

    def raise_failure(self) -> None:
        """Raise what playing it has failed with, if it has."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def stop(self) -> None:
        """End its process and forget it, without a word to the API server. Safe to call again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._child is not None:
            await self._child.stop(timeout=20)
        self.ended = True

    async def _life(self) -> None:
        ports = {each.get("name"): each["containerPort"] for each in self._container.get("ports", ())}
        async with aiohttp.ClientSession() as session:
            while self._grace is None:
                if await self._run():
                    await self._attend(ports, session)
                await self._report(ready=False)
                if self._grace is None:
                    await asyncio.sleep(RESTART_SECONDS)
            if self._child is not None:
                await self._child.stop(timeout=self._grace)
            self.ended = True
            # The uid: a StatefulSet's pod may be there again under the name.
            body = {"gracePeriodSeconds": 0, "preconditions": {"uid": self._manifest["metadata"]["uid"]}}
            await self._request("DELETE", "", body)

    async def _run(self) -> bool:
        """Start the container; False: not possible yet."""
        try:
            mounts = await self._volumes.mounts(self._container, self._identity)
        except VolumeMissing as missing:
            with self.log.open("a") as log:
                log.write(f"kubelet: {missing}\n")
            return False
        environment = self._environment()
        command = contained(mounts, self._command(environment), self._identity, self.name)
        self._child = Child.start(command, name=self.name, log=self.log, env=environment, cwd=Path("/"))
        self._started_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return True

    async def _attend(self, ports: Manifest, session: aiohttp.ClientSession) -> None:
        """Probe and report until the container ends, by itself or by its liveness probe, or is wanted to end."""
        assert self._child is not None
        readiness = _Probe(self._container.get("readinessProbe"), ports, eager=True)
        liveness = _Probe(self._container.get("livenessProbe"), ports)
        startup = _Probe(self._container.get("startupProbe"), ports, eager=True)
        while self._child.returncode is None and self._grace is None:
            if not startup.passed:  # once it has, it is not made again
                await startup.look(self.address, session)
            if startup.passed:
                await readiness.look(self.address, session)
                await liveness.look(self.address, session)
            if liveness.exhausted or startup.exhausted:
                await self._child.stop(timeout=self._manifest["spec"]["terminationGracePeriodSeconds"])
                break
            await self._report(ready=readiness.passed)
            await asyncio.sleep(POLL_SECONDS)
        if self._grace is None:
            self.restarts += 1
            self._waiting = "CrashLoopBackOff"

    # --- container ------------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        address = urlsplit(self._control_plane.url)
        found = {
            "PATH": os.environ["PATH"],
            "HOME": "/",
            "HOSTNAME": self.name,
            "KUBERNETES_SERVICE_HOST": str(address.hostname),
            "KUBERNETES_SERVICE_PORT": str(address.port),
            "PYTHONPATH": str(SOURCE),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for each in self._container.get("env", ()):
            if "valueFrom" in each:
                found[each["name"]] = field(self._manifest, self.address, each["valueFrom"]["fieldRef"]["fieldPath"])
            else:
                found[each["name"]] = _expanded(each.get("value", ""), found)
        return found

    def _command(self, environment: Mapping[str, str]) -> list[str]:
        image, words = self._container["image"], [*self._container.get("command", ["vcpuset"])]
        words += self._container.get("args", ())
        name = image.partition("@")[0].rpartition("/")[2].partition(":")[0]
        assert (name, words[0]) == ("vcpuset", "vcpuset"), f"no image {image} with a program {words[0]} here"
        expanded = [_expanded(each, environment) for each in words[1:]]
        return [*PROGRAM, *(each.replace(EVERYWHERE, self.address) for each in expanded)]

    # --- report ---------------------------------------------------------------------------------------------------

    async def _report(self, *, ready: bool) -> None:
        running = self._child is not None and self._child.returncode is None
        state = {"running": {"startedAt": self._started_at}} if running else {"waiting": {"reason": self._waiting}}
        last: Manifest = {}
        if self._child is not None and self._child.returncode is not None:
            last = {"terminated": {"exitCode": max(0, self._child.returncode)}}
        kinds = {"PodReadyToStartContainers": True, "Initialized": True, "ContainersReady": ready, "Ready": ready}
        status = {
            "phase": "Running" if self._child is not None else "Pending",
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "conditions": [{"type": kind, "status": str(value)} for kind, value in kinds.items()],
            "containerStatuses": [
                {
                    "name": self._container["name"],
                    "image": self._container["image"],
                    "imageID": "",
                    "ready": ready,
                    "started": running,
                    "restartCount": self.restarts,
                    "state": state,
                    "lastState": last,
                }
            ],
        }
        if status != self._reported and await self._request("PATCH", "/status", {"status": status}):
            self._reported = status

    async def _request(self, method: str, subresource: str, body: Manifest) -> bool:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}{subresource}"
        try:
            answer = await self._control_plane.request(method, path, body)
        except OSError:  # away: it is told at the next occasion
            return False
        assert answer.status in {200, 404, 409}, f"{method} {path}: {answer.status} {answer.body}"
        return True


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` replaced; an unknown name stays as it is, and `$$` is a dollar."""
    return _VARIABLE.sub(
        lambda found: "$" if found[0] == "$$" else variables.get(str(found[1]), found[0]),
        text,
    )
