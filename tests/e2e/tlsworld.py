"""A machine whose monitor speaks TLS, the set for it, and the Secret between the two."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

from harness.audit import AuditEvent
from harness.expect import check_form
from harness.guest import Guest
from harness.monitortls import MonitorTLS
from harness.pki import Authority, Credentials
from harness.qmp import count
from harness.saved import saved_guest
from harness.wait import until
from harness.world import Seen, User

__all__ = ["ACCOUNT", "SECRET", "Connection", "Web", "serving"]

ROLE: Final = "vcpuset-monitor-credentials"
ACCOUNT: Final = "system:serviceaccount:vcpuset-system:vcpuset-controller"
SECRET: Final = "monitor-web"  # noqa: S105 - its name

Connection = Literal["OnDemand", "Persistent"]


class Web:
    """A machine on TLS, the set `web` for it, and the Secret between the two.

    ours    signs the certificates of both ends
    client  what the operator shows, by the Secret
    guest   its monitor allows that client only; has 2 CPUs
    """

    def __init__(self, user: User, guest: Guest, ours: Authority, client: Credentials) -> None:
        self.user = user
        self.guest = guest
        self.ours = ours
        self.client = client
        self._namespace = f"/api/v1/namespaces/{user.namespace}"
        self._bindings = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{user.namespace}/rolebindings"

    async def put(self, credentials: Credentials | None = None, **changed: bytes | None) -> None:
        """Have the Secret hold these; `changed` as in `Credentials.secret`."""
        body = dict((credentials or self.client).secret(SECRET, **changed))
        # A Secret keeps its type for life, and the other one has to have both of its keys.
        body["type"] = "Opaque"
        status = await self._request("PUT", f"{self._namespace}/secrets/{SECRET}", body)
        if status == 404:
            status = await self._request("POST", f"{self._namespace}/secrets", body)
        assert status in {200, 201}

    async def read(self) -> None:
        """Wait until the operator has read what the Secret holds now."""
        since = self.user.control_plane.audit_offset()
        # The first one may have begun before.
        await until(lambda: len(self.reads(since)) >= 2, 120, "the operator to read the Secret again")

    def reads(self, since: int) -> list[AuditEvent]:
        """The requests of the operator for Secrets of this namespace or this name, whatever became of them."""
        return [
            each
            for each in self.user.control_plane.audit_events(since)
            if each.user == ACCOUNT
            and each.resource == "secrets"
            and (each.namespace == self.user.namespace or each.name == SECRET)
        ]

    async def take_away(self) -> None:
        """Delete the Secret."""
        assert (await self._request("DELETE", f"{self._namespace}/secrets/{SECRET}")) == 200

    async def allow(self) -> None:
        """Let the operator read the namespace's Secrets, as an administrator does."""
        body = {
            "metadata": {"name": ROLE},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": ROLE},
            "subjects": [{"kind": "ServiceAccount", "name": "vcpuset-controller", "namespace": "vcpuset-system"}],
        }
        assert await self._request("POST", self._bindings, body) == 201

    async def forbid(self) -> None:
        """Undo `allow`."""
        assert await self._request("DELETE", f"{self._bindings}/{ROLE}") == 200

    async def serve(
        self,
        server: Credentials | None = None,
        *,
        allow: str | None = None,
        check: bool = True,
        priority: str | None = None,
    ) -> None:
        """Restart QEMU: with this certificate, for a client of this name."""
        folder = (server or self.ours.server()).write(self.guest.directory / "tls")
        self.guest.tls = MonitorTLS(folder, allow or self.client.name, check=check, priority=priority)
        await self.guest.restart()

    async def declare(self, connection: Connection = "OnDemand", vcpus: int = 2, **tls: str) -> None:
        """Create the set: by default one that connects for each observation, so with the certificates of the moment."""
        host, port = self.guest.tcp_address
        monitor = {"host": host, "port": port, "tls": {"secretName": SECRET, **tls}}
        await self.user.create("web", vcpus, monitor, connection=connection)

    async def ready(self, vcpus: int) -> None:
        """Wait until the machine has so many, and the status says so and no more."""
        await self.user.wait("web", lambda seen: seen.ready and seen.vcpus == vcpus, f"Ready with {vcpus}", 120)
        assert await count(self.guest.control) == vcpus

    async def says(self, reason: str, *words: str) -> Seen:
        """Wait until the set gives this reason in these words."""
        seen = await self.user.wait(
            "web",
            lambda seen: seen.reason == reason and all(word in seen.message for word in words),
            f"{reason} with {words}",
            120,
        )
        check_form(seen)
        return seen

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> int:
        return (await self.user.control_plane.request(method, path, body)).status


@asynccontextmanager
async def serving(user: User, folder: Path, *, linux: bool = False) -> AsyncIterator[Web]:
    """A machine with 2 CPUs and its certificates in `folder`, a Secret that fits, the right to read it; no set yet."""
    ours = Authority()
    client = ours.client("vcpuset")
    tls = MonitorTLS(ours.server().write(folder), client.name)
    smp = "2,maxcpus=64"
    async with saved_guest(smp=smp, tls=tls) if linux else Guest(None, smp=smp, memory=64, tls=tls) as guest:
        web = Web(user, guest, ours, client)
        await web.put()
        await web.allow()
        yield web
