"""Which test process runs what, and when: the longest first, so that no process ends long after the others.

Most of the tests wait for something most of the time, so several run beside each other on each core. A unit of work is
a file, whose fixtures may then be its own (an operator for all of its tests), or a single test where a file has none.
"""

from __future__ import annotations

from typing import Final

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

__all__ = ["SlowestFirst"]

SECONDS: Final = {
    "tests/chaos/test_fleet.py": 90,
    "tests/chaos/test_kill.py": 80,
    "tests/chaos/test_clock_steps.py": 70,
    "tests/e2e/test_as_deployed.py": 70,
    "tests/e2e/test_metrics_api.py": 80,
    "tests/e2e/test_absent_agents.py": 75,
    "tests/e2e/test_autoscaler.py": 75,
    "tests/e2e/test_tls.py": 60,
    "tests/e2e/test_leader_election.py": 50,
    "tests/chaos/test_compacted_version.py": 45,
    "tests/api/test_chart.py": 40,
    "tests/e2e/test_install_page.py": 40,
    "tests/e2e/test_disturbed_pods.py": 35,
    "tests/e2e/test_readme.py": 35,
    "tests/chaos/test_one_process.py": 30,
    "tests/e2e/test_pods.py": 30,
    "tests/api/test_deploy.py": 30,
    "tests/api/test_metrics_api.py": 30,
    "tests/api/test_monitoring.py": 30,
    "tests/api/test_chart_releases.py": 30,
    "tests/e2e/test_dashboard.py": 25,
    "tests/e2e/test_hung_monitors.py": 25,
    "tests/api/test_crd.py": 25,
    "tests/api/test_health.py": 25,
    "tests/api/test_manifests.py": 25,
    "tests/api/test_pod_security.py": 25,
    "tests/e2e/test_adoption.py": 20,
    "tests/e2e/test_kubectl_plugin.py": 20,
    "tests/qmp/test_cli_apply.py": 20,
    "tests/unit/reconciler/test_laws.py": 20,
    "tests/qmp/test_fuzz.py": 20,
}
"""What a unit takes where it is more than usual, on 2 cores; only the order matters."""

USUAL_SECONDS: Final = {"tests/chaos/": 20, "tests/e2e/": 10, "tests/api/": 5, "tests/qmp/": 2, "tests/unit/": 1}

SINGLE: Final = (
    "tests/chaos/",
    "tests/e2e/test_install_page.py",
    "tests/e2e/test_leader_election.py",
    "tests/api/test_health.py",
    "tests/api/test_chart_releases.py",
)
"""Where each test is a unit of its own."""


LONG_SECONDS: Final = 30


class SlowestFirst(LoadScopeScheduling):
    """Gives out the longest unit that is left, to a process that has begun the last test of its units.

    What is given then waits for the end of that test, however long it takes; so after a long unit it is the shortest.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith(SINGLE) else nodeid.partition("::")[0]

    def _reschedule(self, node: WorkerController) -> None:
        if self._pending_of(self.assigned_work[node]) < 2 or not self.workqueue:
            super()._reschedule(node)

    def _assign_work_unit(self, node: WorkerController) -> None:
        given = list(self.assigned_work[node])
        choose = min if given and _seconds(given[-1]) >= LONG_SECONDS else max
        self.workqueue.move_to_end(choose(self.workqueue, key=_seconds), last=False)
        super()._assign_work_unit(node)


def _seconds(unit: str) -> float:
    """What a unit takes, as far as that is known: by its own name, by its file's, or by its folder's."""
    known = (SECONDS.get(unit), SECONDS.get(unit.partition("::")[0]))
    usual = (each for folder, each in USUAL_SECONDS.items() if unit.startswith(folder))
    return next((each for each in (*known, *usual) if each is not None), 1)
