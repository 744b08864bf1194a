"""A status page with sets and machines that a test gives it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from harness.processes import free_port
from unit.domain.builders import NOW, a_set, a_spec, ago
from vcpuset.app.page.pages import StatusPage
from vcpuset.domain.machine import Machine
from vcpuset.domain.reasons import State
from vcpuset.domain.resource import UID, Condition, Request, Status, VCPUSet
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Scope
from vcpuset.qmp.meters import Meters
from vcpuset.runtime.listening import serving

__all__ = ["Pages"]


class Pages:
    """The page, and behind it a cache as in the operator.

    machines  those that were observed
    """

    def __init__(self, scope: Scope | None = None) -> None:
        self.machines: dict[UID, Machine] = {}
        self.meters = Meters(lambda _: None, lambda: NOW)
        self.cache = Cache(lambda before, after: self.page.journal.moved(before, after))
        self.page = StatusPage(
            self.cache, self.meters, self.machines.get, scope or Scope(), lambda: "There are no VCPUSets."
        )
        self.url = f"http://127.0.0.1:{free_port()}"
        self._version = 0

    def put(
        self,
        name: str,
        desired: int | None = 2,
        current: int | None = 2,
        state: State = State.READY,
        reason: str = "Converged",
        message: str = "",
        *,
        namespace: str = "default",
        online: int | None = None,
        since: float = 60,
        requests: tuple[Request, ...] = (),
        machine: Machine | None = None,
    ) -> VCPUSet:
        """The cache takes a set in a state since so many seconds."""
        self._version += 1
        uid, spec = UID(f"uid-{namespace}-{name}"), a_spec(desired)
        before = self.cache.get(uid)
        generation = 1 if before is None else before.generation + (before.spec != spec)
        conditions = tuple(
            Condition(kind, "True" if kind == state.value else other, reason, message, ago(since), generation)
            for kind, other in (
                ("Ready", "Unknown" if state is State.UNKNOWN else "False"),
                ("Reconciling", "False"),
                ("Stalled", "False"),
            )
        )
        status = Status(generation, current, online, 1, 8, pending_unplugs=requests, conditions=conditions)
        vcpuset = replace(
            a_set(spec, generation=generation, status=status),
            name=name,
            namespace=namespace,
            uid=uid,
            resource_version=str(self._version),
        )
        if machine is not None:
            self.machines[uid] = machine
        self.cache.put(vcpuset)
        return vcpuset

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """While this is open, it is served at `url`; its streams end first."""
        port = int(self.url.rpartition(":")[2])
        async with serving(self.page.routes(), ("127.0.0.1", port), "--http-address", ""):
            try:
                yield
            finally:
                self.page.close()
