"""The sets that this operator manages, as last received from the API server.

There are three writers: the watch, the periodic list, and the responses to our own status writes. They may report a
change in any order and repeatedly, so an object only moves forward, by its resourceVersion, and a dropped set does not
come back because an older report of it arrives late.

A deleted set is no longer managed, even while a finalizer keeps its object.

Every newer version is stored; fewer need a pass. A set is news when it is new, when its spec has changed, and when
another client has changed what this operator reports in its status, which it then corrects. Labels, annotations,
managed fields, conditions of other owners and the operator's own status writes are no news.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from vcpuset.domain.resource import UID, Status, VCPUSet

__all__ = ["Cache", "is_newer"]

_DROPPED_LIMIT: Final = 4096
"""How many dropped sets are remembered. This only matters while a list is in progress, which takes seconds."""


class Cache:
    """VCPUSets by UID. The iterator and the length only include managed ones.

    moved  called with the managed set before and after each change (None: none); it must not raise
    """

    def __init__(self, moved: Callable[[VCPUSet | None, VCPUSet | None], None] | None = None) -> None:
        self._moved = moved
        self._sets: dict[UID, VCPUSet] = {}
        # The last resourceVersion of each dropped set: a list that began before the drop still has the set, and would
        # bring it back until the next list.
        self._dropped: OrderedDict[UID, str] = OrderedDict()
        self._expected: dict[UID, Status] = {}

    def get(self, uid: UID) -> VCPUSet | None:
        """The set, or None: not managed by this operator (any more)."""
        return _served(self._sets.get(uid))

    def terminating(self, uid: UID) -> VCPUSet | None:
        """The set, if it was deleted and its object still exists."""
        known = self._sets.get(uid)
        return known if known is not None and known.deleting else None

    def has(self, uid: UID, version: str) -> bool:
        """Whether this version of an object was stored last, managed or not."""
        known = self._sets.get(uid)
        return known is not None and known.resource_version == version

    def versions(self) -> dict[UID, str]:
        """The resourceVersion of every known object, managed or not."""
        return {uid: vcpuset.resource_version for uid, vcpuset in self._sets.items()}

    def put(self, vcpuset: VCPUSet) -> bool:
        """Store it if it is newer than the known one. Returns whether it needs a pass."""
        known = self._sets.get(vcpuset.uid)
        last = self._dropped.get(vcpuset.uid) if known is None else known.resource_version
        if last is not None and not is_newer(vcpuset.resource_version, last):
            # While the definition is being upgraded, a watch of the old definition delivers a version without the new
            # fields, and the next list delivers the same version with them.
            differs = known is not None and vcpuset.resource_version == last and vcpuset != known
            if not differs:
                return False
        self._dropped.pop(vcpuset.uid, None)
        self._sets[vcpuset.uid] = vcpuset
        self._notify(known, vcpuset)
        return known is None or self._is_news(known, vcpuset)

    @contextlib.contextmanager
    def expecting(self, uid: UID, status: Status) -> Iterator[None]:
        """While this process writes `status`: it is no news, although the watch may deliver it before the response."""
        self._expected[uid] = status
        try:
            yield
        finally:
            del self._expected[uid]

    def _is_news(self, known: VCPUSet, vcpuset: VCPUSet) -> bool:
        status = known.status if vcpuset.status == self._expected.get(vcpuset.uid) else vcpuset.status
        return replace(vcpuset, resource_version=known.resource_version, status=status) != known

    def drop(self, uid: UID) -> VCPUSet | None:
        """Forget the set and return it; None: it was not known."""
        known = self._sets.pop(uid, None)
        if known is not None:
            self._dropped[uid] = known.resource_version
            if len(self._dropped) > _DROPPED_LIMIT:
                self._dropped.popitem(last=False)
            self._notify(known, None)
        return known

    def _notify(self, before: VCPUSet | None, after: VCPUSet | None) -> None:
        before, after = _served(before), _served(after)
        if self._moved is not None and (before is not None or after is not None):
            self._moved(before, after)

    def __iter__(self) -> Iterator[VCPUSet]:
        return iter([vcpuset for vcpuset in self._sets.values() if not vcpuset.deleting])

    def __len__(self) -> int:
        return sum(not vcpuset.deleting for vcpuset in self._sets.values())


def _served(vcpuset: VCPUSet | None) -> VCPUSet | None:
    return None if vcpuset is None or vcpuset.deleting else vcpuset


def is_newer(version: str, than: str) -> bool:
    """Whether a resourceVersion is later than another one of the same object.

    Since 1.35 Kubernetes guarantees that they are comparable decimal numbers, and servers with etcd have always had
    these. Others are assumed to arrive in order.
    """
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than
