"""What the templates show, as values: one row for each set, and which of them a query selects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Final, Self
from urllib.parse import quote, urlencode

from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import state_of
from vcpuset.domain.resource import VCPUSet
from vcpuset.kube.cluster import Scope

__all__ = ["STATES", "Query", "Row", "clock_time", "count", "duration", "scope_words"]

STATES: Final = (State.STALLED, State.UNKNOWN, State.RECONCILING, State.HELD, State.READY)
"""In the order of the page: what needs attention comes first."""

_REASONS: Final = {reason.value: reason for reason in Reason}

_QUERY_LIMIT: Final = 200
"""Characters of a filter."""


@dataclass(frozen=True, slots=True)
class Row:
    """One set as the page shows it. None: not known.

    busy   vCPUs, on average over the last samples
    since  of the Ready condition; of a set without one, its creation
    """

    vcpuset: VCPUSet
    state: State
    reason: str
    busy: float | None
    since: datetime

    @classmethod
    def of(cls, vcpuset: VCPUSet, busy: float | None) -> Self:
        """The row of a set."""
        ready = vcpuset.status.ready
        since = vcpuset.created_at if ready is None else ready.last_transition_time
        return cls(vcpuset, *state_of(vcpuset), busy, since)

    @property
    def id(self) -> str:
        """Of its element."""
        return f"set-{self.vcpuset.uid}"

    @property
    def url(self) -> str:
        """Of the set's own page, relative to the list's."""
        return f"sets/{quote(self.vcpuset.namespace)}/{quote(self.vcpuset.name)}"

    @property
    def differs(self) -> bool:
        """Whether the machine has another count than desired."""
        return self.vcpuset.spec.vcpus != self.vcpuset.status.vcpus

    @property
    def message(self) -> str:
        """Of the Ready condition, if it is about the spec as it stands."""
        ready = self.vcpuset.status.ready
        return ready.message if ready is not None and ready.observed_generation == self.vcpuset.generation else ""

    @property
    def remedy(self) -> str | None:
        """What helps; None: nothing is wrong, or the reason is of a later version."""
        known = _REASONS.get(self.reason)
        return None if known is None or known is Reason.CONVERGED else known.remedy


_KEYS: Final[Mapping[str, Callable[[Row], Any]]] = {
    "state": lambda row: STATES.index(row.state),
    "name": lambda row: (row.vcpuset.namespace, row.vcpuset.name),
    "desired": lambda row: row.vcpuset.spec.vcpus,
    "current": lambda row: row.vcpuset.status.vcpus,
    "online": lambda row: row.vcpuset.status.online_vcpus,
    "busy": lambda row: row.busy,
    "reason": lambda row: row.reason,
    "since": lambda row: -row.since.timestamp(),
}


@dataclass(frozen=True, slots=True)
class Query:
    """Which rows, in which order. What is not valid is ignored.

    q      words that namespace, name, state or reason have to contain
    state  of the rows; empty: any
    sort   a key of `_KEYS`; with "-": the other way round
    """

    q: str = ""
    state: str = ""
    sort: str = "state"

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Self:
        """The query of a URL."""
        query = cls(given.get("q", "")[:_QUERY_LIMIT], given.get("state", ""), given.get("sort", "state"))
        return replace(
            query,
            state=query.state if query.state in {state.value for state in State} else "",
            sort=query.sort if query.sort.removeprefix("-") in _KEYS else "state",
        )

    def url(self, **changes: str) -> str:
        """The relative URL of this query with some changes."""
        changed = replace(self, **changes)
        found = {each.name: getattr(changed, each.name) for each in fields(self)}
        return "?" + urlencode({name: value for name, value in found.items() if value and (name, value) != _DEFAULT})

    def turned(self, key: str) -> str:
        """The URL that sorts by a column; the other way round if that is how it is sorted now."""
        return self.url(sort=f"-{key}" if self.sort == key else key)

    def direction(self, key: str) -> str | None:
        """`aria-sort` of a column."""
        return {key: "ascending", f"-{key}": "descending"}.get(self.sort)

    def select(self, rows: Iterable[Row]) -> list[Row]:
        """The selected rows, in order. What is not known comes last."""
        words = self.q.lower().split()
        found = [row for row in rows if (not self.state or row.state.value == self.state) and _has(row, words)]
        found.sort(key=_KEYS["name"])
        key = _KEYS[self.sort.removeprefix("-")]
        known = sorted((row for row in found if key(row) is not None), key=key, reverse=self.sort.startswith("-"))
        return known + [row for row in found if key(row) is None]


_DEFAULT: Final = ("sort", "state")


def _has(row: Row, words: list[str]) -> bool:
    if not words:
        return True
    text = f"{row.vcpuset} {row.state.value} {row.reason}".lower()
    return all(word in text for word in words)


def count(number: float | None) -> str:
    """A count, or with one decimal what is not one."""
    if number is None:
        return "\N{EN DASH}"
    return str(number) if isinstance(number, int) else f"{number:.1f}"


def duration(seconds: float) -> str:
    """A time span in at most two units."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min"
    days, hours = divmod(hours, 24)
    return f"{hours} h {minutes:02} min" if days == 0 else f"{days} d {hours} h"


def scope_words(scope: Scope) -> str:
    """Which sets a process manages."""
    words = ["Without a node" if scope.node_name is None else f"Node {scope.node_name}"]
    if scope.namespaces:
        words.append(f"namespace {', '.join(scope.namespaces)}")
    if scope.label_selector:
        words.append(scope.label_selector)
    return " \N{MIDDLE DOT} ".join(words)


def clock_time(moment: datetime | float) -> datetime:
    """Unix time or a time with zone, in UTC."""
    return datetime.fromtimestamp(moment, UTC) if isinstance(moment, float) else moment.astimezone(UTC)
