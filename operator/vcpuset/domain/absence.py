"""Which nodes have been without an agent for so long that their sets are reported.

A report can be wrong: the agent runs, and only its pod is not ready. The agent then replaces the report at once. Each
time that a report is replaced, because the agent answers or is back, the next one for this node waits twice as long, so
that an agent that comes and goes, or that never becomes ready, does not cause a stream of writes.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass
from typing import Final

__all__ = ["LONGEST", "Absences"]

LONGEST: Final = 16
"""The longest wait before a report, as a multiple of the grace period."""


@dataclass
class _Absence:
    """A node that is, or recently was, without a ready agent.

    wait      how long it must be without one before it is reported, in seconds
    since     when it was first seen without one, or when its agent has last answered
    until     when it was first seen with one again; None: it is without one
    reported  whether its sets were reported since `since`
    """

    wait: float
    since: float
    until: float | None = None
    reported: bool = False


class Absences:
    """The nodes without a ready agent. All times are of one monotonic clock, in seconds."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._nodes: dict[str, _Absence] = {}

    def observe(self, nodes: Collection[str], ready: Container[str], now: float) -> None:
        """Note which of the nodes that have sets have a ready agent."""
        for node in self._nodes.keys() - set(nodes):
            del self._nodes[node]
        for node in nodes:
            absence = self._nodes.get(node)
            if node not in ready:
                if absence is None:
                    self._nodes[node] = _Absence(self._grace, now)
                elif absence.until is not None:
                    absence.since, absence.until = now, None
            elif absence is not None:
                if absence.until is None:
                    self._be_patient(absence)
                    absence.until = now
                elif now - absence.until >= absence.wait:
                    del self._nodes[node]

    def overdue(self, now: float) -> frozenset[str]:
        """The nodes whose sets are to be reported."""
        return frozenset(
            node
            for node, absence in self._nodes.items()
            if absence.until is None and now - absence.since >= absence.wait
        )

    def reported(self, node: str) -> None:
        """The sets of an overdue node were reported."""
        self._nodes[node].reported = True

    def answered(self, node: str, now: float) -> None:
        """The agent of an overdue node has replaced a report, although it is not ready: count from now on."""
        absence = self._nodes[node]
        self._be_patient(absence)
        absence.since = now

    def _be_patient(self, absence: _Absence) -> None:
        if absence.reported:
            absence.wait = min(2 * absence.wait, LONGEST * self._grace)
            absence.reported = False
