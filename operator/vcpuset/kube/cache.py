"""The sets that this operator serves, as last heard from the API server.

Three writers meet here: the watch, the periodic list, and the answers to our own status writes. They may report one
change in any order and more than once, so an object only ever moves forward, by its resourceVersion, and a set that was
dropped does not come back because an older report of it arrives late.

A set that has been deleted is not served any more, however long somebody's finalizer keeps its object.

What is newer is stored; what there is to act on is less. A set is news when it is new, when its spec has changed, and
when somebody else has changed what this operator reports in its status, which is then put right. Labels, annotations,
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
"""How many dropped sets are remembered. It matters only while a list is under way, which is seconds."""


class Cache:
    """VCPUSets by UID. Its iterator and length are about those that are served.

    moved  told which set was served and which is now, whenever that changes (None: none); it must not raise
    """

    def __init__(self, moved: Callable[[VCPUSet | None, VCPUSet | None], None] | None = None) -> None:
        self._moved = moved
        self._sets: dict[UID, VCPUSet] = {}
        # The last resourceVersion of each dropped set: a list that began before the set went away still has it, and
        # would bring it back until the next list.
        self._dropped: OrderedDict[UID, str] = OrderedDict()
        self._expected: dict[UID, Status] = {}

    def get(self, uid: UID) -> VCPUSet | None:
        """The set, or None: not served by this operator (any more)."""
        return _served(self._sets.get(uid))

    def terminating(self, uid: UID) -> VCPUSet | None:
        """The set, if it has been deleted and its object is still there."""
        known = self._sets.get(uid)
        return known if known is not None and known.deleting else None

    def versions(self) -> dict[UID, str]:
        """The resourceVersion of every object that is known, served or not."""
        return {uid: vcpuset.resource_version for uid, vcpuset in self._sets.items()}

    def put(self, vcpuset: VCPUSet) -> bool:
        """Store it if it is newer than what is known. Whether there is something to act on."""
        known = self._sets.get(vcpuset.uid)
        last = self._dropped.get(vcpuset.uid) if known is None else known.resource_version
        if last is not None and not is_newer(vcpuset.resource_version, last):
            # While the definition is being upgraded, one version of a set is told without the fields that are new, by a
            # watch of the old definition, and with them by the next list.
            told_otherwise = known is not None and vcpuset.resource_version == last and vcpuset != known
            if not told_otherwise:
                return False
        self._dropped.pop(vcpuset.uid, None)
        self._sets[vcpuset.uid] = vcpuset
        self._tell(known, vcpuset)
        return known is None or self._is_news(known, vcpuset)

    @contextlib.contextmanager
    def expecting(self, uid: UID, status: Status) -> Iterator[None]:
        """While this process writes `status`: it is no news, though the watch brings it before the answer comes."""
        self._expected[uid] = status
        try:
            yield
        finally:
            del self._expected[uid]

    def _is_news(self, known: VCPUSet, vcpuset: VCPUSet) -> bool:
        status = known.status if vcpuset.status == self._expected.get(vcpuset.uid) else vcpuset.status
        return replace(vcpuset, resource_version=known.resource_version, status=status) != known

    def drop(self, uid: UID) -> VCPUSet | None:
        """Forget the set and return what was known of it; None: nothing was."""
        known = self._sets.pop(uid, None)
        if known is not None:
            self._dropped[uid] = known.resource_version
            if len(self._dropped) > _DROPPED_LIMIT:
                self._dropped.popitem(last=False)
            self._tell(known, None)
        return known

    def _tell(self, before: VCPUSet | None, after: VCPUSet | None) -> None:
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

    Kubernetes promises since 1.35 that they are decimal numbers which can be compared, and etcd-backed servers have
    always done so. An API server with others is believed to send news in order.
    """
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than
