"""The sets that this operator serves, as last heard from the API server.

Three writers meet here: the watch, the periodic list, and the answers to our own status writes. They may report one
change in any order and more than once, so an object only ever moves forward, by its resourceVersion, and a set that was
dropped does not come back because an older report of it arrives late.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from vcpuset.domain.resource import UID, VCPUSet

__all__ = ["Cache", "is_newer"]

_DROPPED_LIMIT: Final = 4096
"""How many dropped sets are remembered. It matters only while a list is under way, which is seconds."""


class Cache:
    """VCPUSets by UID.

    moved  told what was known of a set and what is now, whenever that changes (None: nothing); it must not raise
    """

    def __init__(self, moved: Callable[[VCPUSet | None, VCPUSet | None], None] | None = None) -> None:
        self._moved = moved
        self._sets: dict[UID, VCPUSet] = {}
        # The last resourceVersion of each dropped set: a list that began before the set went away still has it, and
        # would bring it back until the next list.
        self._dropped: OrderedDict[UID, str] = OrderedDict()

    def get(self, uid: UID) -> VCPUSet | None:
        """The set, or None: not served by this operator (any more)."""
        return self._sets.get(uid)

    def put(self, vcpuset: VCPUSet) -> bool:
        """Store it. False: nothing new, it is what is known already or older."""
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
        if self._moved is not None:
            self._moved(known, vcpuset)
        return True

    def drop(self, uid: UID) -> VCPUSet | None:
        """Forget the set and return what was known of it; None: nothing was."""
        known = self._sets.pop(uid, None)
        if known is not None:
            self._dropped[uid] = known.resource_version
            if len(self._dropped) > _DROPPED_LIMIT:
                self._dropped.popitem(last=False)
            if self._moved is not None:
                self._moved(known, None)
        return known

    def __iter__(self) -> Iterator[VCPUSet]:
        return iter(tuple(self._sets.values()))

    def __len__(self) -> int:
        return len(self._sets)


def is_newer(version: str, than: str) -> bool:
    """Whether a resourceVersion is later than another one of the same object.

    Kubernetes promises since 1.35 that they are decimal numbers which can be compared, and etcd-backed servers have
    always done so. An API server with others is believed to send news in order.
    """
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than
