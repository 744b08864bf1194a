"""The Secrets of monitors on TLS: read one by one by name, and kept for seconds, or until the API server answers again.

Secrets are never listed or watched: so the operator only needs `get`, in the namespaces where an administrator granted
it. A change is found when a session is opened and the copy is older than `FRESH_SECONDS`, and at once when a connection
with the copy has failed. A Secret is read once for all sets that share it.

While the API server cannot be reached the last copy is used, and only occasionally a pass waits for a new one, two
seconds at most, so that machines stay at their target. If a Secret is gone, or may no longer be read, no new session is
opened; an open session continues, because it needs no credentials.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from vcpuset.domain.credentials import Credentials
from vcpuset.domain.errors import APIError, CredentialsUnavailable, Forbidden, ObjectGone
from vcpuset.domain.resource import UID

__all__ = ["DOUBTED_SECONDS", "FRESH_SECONDS", "ROLE", "Secrets"]

FRESH_SECONDS: Final = 10.0
"""How long a copy is considered current."""

DOUBTED_SECONDS: Final = 1.0
"""The same for a copy with which a connection has just failed: all sets that share it fail at the same time."""

PATIENT_SECONDS: Final = 2.0
"""How long to wait for a response if there is a copy. It takes 3 ms; an API server that is away never responds."""

ROLE: Final = "vcpuset-monitor-credentials"
"""The ClusterRole that is shipped for this, without a binding."""

_log = logging.getLogger(__name__)

_Name = tuple[str, str]
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


class _Cluster(Protocol):
    """The needed part of `Cluster`."""

    async def read_secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """The entries of a Secret."""


@dataclass
class _Copy:
    """What is known of one Secret.

    users    the sets that it was read for; never empty
    lock     held while it is read, so that others wait for the same response
    content  its content, or why that cannot be used; None: not read yet
    read_at  loop time of the last response, or of the last attempt
    """

    users: set[UID] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    content: Credentials | str | None = None
    read_at: float = 0.0


class Secrets:
    """A `CredentialStore`. Keeps what its sets need, and forgets a Secret with the last set that named it."""

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster = cluster
        self._copies: dict[_Name, _Copy] = {}
        self._named: dict[UID, _Name] = {}
        self._away_until = -math.inf
        """Loop time until which copies are used without a request: the API server has just not responded."""

    async def fetch(self, uid: UID, namespace: str, name: str, doubted: Credentials | None = None) -> Credentials:
        """The credentials in a Secret of the set's own namespace.

        doubted  a connection with these has just failed

        Raises CredentialsUnavailable, with what is missing and the remedy.
        """
        # The schema requires this too. A name with "/" or ".." in it would lead to another namespace.
        if _NAME.fullmatch(name) is None:
            raise CredentialsUnavailable(f"spec.monitor.tcp.tls.secretName: {name[:253]!r} is not a valid Secret name")
        copy = self._copy(uid, (namespace, name))
        in_doubt = doubted is not None and copy.content == doubted
        if isinstance(copy.content, Credentials) and not in_doubt and self._now() < self._away_until:
            return copy.content
        async with copy.lock:
            in_doubt = doubted is not None and copy.content == doubted
            if copy.content is None or self._now() >= copy.read_at + (DOUBTED_SECONDS if in_doubt else FRESH_SECONDS):
                held = isinstance(copy.content, Credentials)
                await self._read(copy, namespace, name, PATIENT_SECONDS if held else None)
        if isinstance(copy.content, Credentials):
            return copy.content
        raise CredentialsUnavailable(copy.content)

    def forget(self, uid: UID) -> None:
        """The set no longer names a Secret."""
        if (name := self._named.pop(uid, None)) is not None:
            users = self._copies[name].users
            users.discard(uid)
            if not users:
                del self._copies[name]

    @property
    def held(self) -> int:
        """How many Secrets are kept."""
        return len(self._copies)

    def _copy(self, uid: UID, name: _Name) -> _Copy:
        if self._named.get(uid) != name:
            self.forget(uid)
            self._named[uid] = name
        copy = self._copies.setdefault(name, _Copy())
        copy.users.add(uid)
        return copy

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _read(self, copy: _Copy, namespace: str, name: str, seconds: float | None) -> None:
        source = f"Secret {namespace}/{name}"
        content: Credentials | str
        try:
            async with asyncio.timeout(seconds):
                content = Credentials.of(source, await self._cluster.read_secret(namespace, name))
            self._away_until = -math.inf
        except CredentialsUnavailable as error:
            content = str(error)
        except ObjectGone:
            content = f"there is no {source}: create it, with ca.crt, tls.crt and tls.key"
        except Forbidden as error:
            content = (
                f"{source} may not be read by this operator: an administrator must bind the ClusterRole {ROLE} to "
                f"its service account, with a RoleBinding in the namespace {namespace} ({error})"
            )
        except (APIError, TimeoutError) as error:
            words = str(error) or "no answer yet"
            content = copy.content or f"{source} cannot be read: {words}"
            # With many Secrets, waiting for each would leave no time for the machines.
            self._away_until = self._now() + FRESH_SECONDS
            if isinstance(copy.content, Credentials):
                _log.warning("%s cannot be read, using its previous contents: %s", source, words)
        # The same value remains the same object: so a TLS context made from it is also kept.
        if content != copy.content:
            copy.content = content
        copy.read_at = self._now()
