"""What outages of the API server are tested with: machines, somebody who changes them, and the record of requests."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from harness.controlplane import ControlPlane
from harness.faultproxy import Asked, FaultProxy
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.wait import until
from harness.world import User

__all__ = ["DECLARED", "WAIT", "Outage", "outage"]

WAIT = 180.0

DECLARED = 4
BEFORE = ("keeps", "drifts", "grows", "goes", "leaves")
TIMES = {
    "kube.transport.ANSWER_SECONDS": 6.0,
    "kube.transport.BACKOFF.base_seconds": 0.25,
    "kube.cluster.REQUEST_SECONDS": 4.0,
    "kube.source.SILENT_SECONDS": 10.0,
}
"""The operator's own waits, shorter than in a cluster: 30 s, 1 s, 10 s and 70 s."""

AFTER = {"keeps": 4, "drifts": 4, "grows": 6, "comes": 3}
"""What is served in the end, and the counts."""


@dataclass
class Outage:
    """An operator that reaches the API server through a proxy, and its machines."""

    user: User
    proxy: FaultProxy
    operator: OperatorProcess
    machines: dict[str, FaultyMonitor]
    pid: int

    def count(self, name: str) -> int:
        """How many CPUs a machine has."""
        return len(self.machines[name].cpus.occupied())

    async def machine_is_kept(self) -> None:
        """Take a CPU away from a machine behind the operator's back, and wait until it is there again."""
        machine = self.machines["keeps"]
        machine.cpus.eject(machine.cpus.occupied()[-1])
        assert self.count("keeps") == DECLARED - 1
        await until(
            lambda: self.count("keeps") == DECLARED, WAIT, lambda: f"the CPU to be back; {self.operator.tail()}"
        )

    async def life_goes_on(self) -> None:
        """Users who reach the API server change, create, delete and move sets; a machine has a CPU too many."""
        self.machines["drifts"].cpus.plug(6)
        await self.user.change("grows", vcpus=5)
        await self.user.change("grows", vcpus=AFTER["grows"])
        await self.user.create("comes", AFTER["comes"])
        await self.user.delete("goes")
        await self.user.change("leaves", nodeName="elsewhere")

    async def all_is_obeyed(self) -> None:
        """Wait until each machine has what was declared meanwhile, and whoever left is forgotten."""
        for name, vcpus in AFTER.items():
            await self.user.wait(
                name,
                # The status need not say yet what became of the machine.
                lambda seen, name=name, vcpus=vcpus: seen.ready and seen.vcpus == vcpus == self.count(name),  # type: ignore[misc]
                f"{vcpus} vCPUs; {self.operator.tail()}",
                WAIT,
            )
        await self.serves(len(AFTER))
        assert self.count("goes") == self.count("leaves") == DECLARED
        assert (await self.user.get("leaves")).current is False, "a set of another node is none of its business"
        self.is_the_same_process()

    async def serves(self, sets: int) -> None:
        """Wait until the operator serves so many sets."""
        await until(
            lambda: self.operator.sets_served() == sets,
            WAIT,
            lambda: f"{sets} sets to be served; {self.operator.tail()}",
        )

    def is_the_same_process(self) -> None:
        """Check that it has neither ended nor failed."""
        self.operator.require_running()
        assert self.operator.pid == self.pid
        assert "Traceback" not in self.operator.text(), self.operator.text()

    # --- the record -------------------------------------------------------------------------------------------------

    def watches(self) -> list[Asked]:
        """The requests that begin a watch."""
        return [each for each in self.proxy.requests if each.watch]

    def lists(self) -> list[Asked]:
        """kopf's lists; the operator's own ones come in pages."""
        return [each for each in self.proxy.requests if each.list and "limit" not in each.query]

    async def failed(self, times: int) -> None:
        """Wait until the watch, its list or its end was told of in the log so many times."""
        await until(
            lambda: max(len(self.pauses()), self._begun_again()) >= times,
            WAIT,
            lambda: f"{times} failed attempts to watch; {self.operator.tail()}",
        )

    def pauses(self) -> list[float]:
        """The pauses that the log tells of after each failed attempt to watch or to list for it."""
        line = r" vcpuset\.kube\.transport: (?:watch|GET) \S+/vcpusets: .*; (?:retrying|resuming) in ([0-9.]+) s"
        return [float(found) for found in re.findall(line, self.operator.text())]

    def _begun_again(self) -> int:
        """How often the log says that all of the watch was restarted.

        The pause before that can be so long that the request after it does not know of an end that came too soon.
        """
        return len(re.findall(r" vcpuset\.kube\.source: .*; restarting the watch in ", self.operator.text()))

    def check_pace(self) -> None:
        """Check that attempts to watch were as far apart as the log says, and further and further.

        A pause is at least half of twice as long as the longest that the one before could be: so each is at least as
        long as the second to last, whatever the jitter. Only lower limits of measured times are checked: a loaded
        machine makes them longer.
        """
        pauses = self.pauses()
        assert all(later >= earlier for earlier, later in zip(pauses, pauses[2:], strict=False)), pauses
        asked = sorted([*self.watches(), *self.lists()], key=lambda each: each.began)
        gaps = [later.began - earlier.began for earlier, later in pairwise(asked)]
        for pause in pauses[:-1]:
            assert any(gap >= pause - 0.1 for gap in gaps), (pauses, gaps)
        # What was not paused for: the list and the watch at the beginning, and one watch after each good list.
        good = [each for each in asked if each.list and each.code == 200]
        assert len(asked) <= max(len(pauses), self._begun_again()) + len(good) + 2, (pauses, asked)

    def check_lists(self) -> None:
        """Check that no two lists, of whomever, were asked for at once."""
        lists = [each for each in self.proxy.requests if each.list]
        if lists and lists[-1].ended is None:
            lists.pop()  # under way
        for earlier, later in pairwise(lists):
            assert earlier.ended is not None
            assert earlier.ended <= later.began, (earlier, later)

    def check_writes(self) -> None:
        """Check that the attempts to write one status grew apart: from a quarter of a second, doubling, half jitter."""
        for name in self.machines:
            failed = [
                each.began
                for each in self.proxy.requests
                if each.verb == "PATCH" and each.path.endswith(f"/{name}/status") and each.code != 200
            ]
            if any(each.code == 401 for each in self.proxy.requests):
                failed = failed[::2]  # each is tried once more, with credentials read again
            # Three for what else wakes a set: its machine, its spec.
            steps = len(failed) - 4
            if steps > 0:
                assert failed[-1] - failed[0] >= 0.125 * (2**steps - 1), (name, failed)


@asynccontextmanager
async def outage(
    control_plane: ControlPlane,
    user: User,
    folder: Path,
    tmp_path: Path,
    *flags: str,
    kubeconfig: Path | None = None,
) -> AsyncIterator[Outage]:
    """Six machines, five sets, all at rest.

    kubeconfig  as whom the operator speaks; None: somebody who may do everything
    """
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(control_plane, tmp_path))
        machines = {
            name: await stack.enter_async_context(FaultyMonitor(folder / f"{name}.sock", cpus=DECLARED))
            for name in (*BEFORE, "comes")
        }
        for name in BEFORE:
            await user.create(name, DECLARED)
        operator = OperatorProcess(
            control_plane,
            f"--namespace={user.namespace}",
            "--resync-seconds=1",
            *flags,
            kubeconfig=proxy.kubeconfig(kubeconfig or control_plane.kubeconfig),
            socket_root=folder.parent,
            times=TIMES,
        )
        await stack.enter_async_context(operator)
        for name in BEFORE:
            await user.wait_ready(name)
        found = Outage(user, proxy, operator, machines, operator.pid)
        await until(found.watches, WAIT, "the watch")
        yield found
