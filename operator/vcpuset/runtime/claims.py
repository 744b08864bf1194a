"""Which claimant owns a thing that several name: the most senior one.

Each claimant states the keys of all that it names. It owns them if no more senior claimant shares one of them; when
that one releases them, `release` returns those who share its keys, so that the next can take over at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

__all__ = ["Claims"]

C = TypeVar("C", bound=Hashable)


class Claims(Generic[C]):
    """Claims of claimants `C` on hashable keys. Synchronous; every method is O(claimants that share a key)."""

    def __init__(self) -> None:
        self._claimants: defaultdict[Hashable, dict[C, Any]] = defaultdict(dict)
        """Key → claimant → seniority (anything ordered; the smallest wins). No key is left without a claimant."""
        self._keys: dict[C, frozenset[Hashable]] = {}

    def claim(self, claimant: C, seniority: Any, keys: Iterable[Hashable]) -> set[C]:  # noqa: ANN401 - any ordered value
        """Claim these keys and no others; returns the other claimants whose ownership may have changed."""
        wanted = frozenset(keys)
        held = self._keys.get(claimant, frozenset())
        if wanted == held:
            return set()
        touched = self._sharers(claimant, wanted ^ held)
        for key in held - wanted:
            self._drop(claimant, key)
        for key in wanted:
            self._claimants[key][claimant] = seniority
        self._keys[claimant] = wanted
        return touched

    def has(self, claimant: C, key: Hashable) -> bool:
        """Whether the claimant claims this key (among others)."""
        return key in self._keys.get(claimant, frozenset())

    def first(self, key: Hashable) -> Any:  # noqa: ANN401 - any ordered value
        """The seniority of the most senior claimant of a key; None: there is none."""
        return min(self._claimants.get(key, {}).values(), default=None)

    def release(self, claimant: C) -> set[C]:
        """Release all keys; returns those whose ownership may have changed."""
        touched = self._sharers(claimant, self._keys.get(claimant, frozenset()))
        for key in self._keys.pop(claimant, frozenset()):
            self._drop(claimant, key)
        return touched

    def conflicting_owner(
        self, claimant: C, key: Hashable | None = None, *, rival: Callable[[C], bool] = lambda _: True
    ) -> C | None:
        """The most senior other claimant that comes before this one; None: this one owns what it claims.

        key    only this key; None: all keys that it claims
        rival  whether another claimant of a shared key means the same thing by it
        """
        keys = self._keys.get(claimant, frozenset())
        rivals = {
            other: seniority
            for each in (keys if key is None else keys & {key})
            if len(self._claimants[each]) > 1
            for other, seniority in self._claimants[each].items()
            if seniority < self._claimants[each][claimant] and rival(other)
        }
        return min(rivals, key=lambda other: rivals[other], default=None)

    def _sharers(self, claimant: C, keys: Iterable[Hashable]) -> set[C]:
        # .get: asking about a key must not create it
        return {other for key in keys for other in self._claimants.get(key, {})} - {claimant}

    def _drop(self, claimant: C, key: Hashable) -> None:
        del self._claimants[key][claimant]
        if not self._claimants[key]:
            del self._claimants[key]
