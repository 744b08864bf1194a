"""The list that makes up for what a watch can miss.

A watch that breaks and begins anew reports what exists, but not what was deleted meanwhile. One list, from time to
time, finds those sets; the first one fills the cache before the watch is there.
"""

from __future__ import annotations

from collections.abc import Callable

from vcpuset.domain.errors import APIError
from vcpuset.domain.resource import UID
from vcpuset.kube.cache import Cache
from vcpuset.kube.cluster import Cluster, Scope
from vcpuset.kube.freshness import Freshness

__all__ = ["sweep"]


async def sweep(
    cluster: Cluster, scope: Scope, cache: Cache, changed: Callable[[UID], None], freshness: Freshness
) -> None:
    """Make `cache` hold what the API server has, and call `changed` for each set that is news or gone.

    Raises:
        APIError: the list failed; the cache is as it was.
    """
    before = cache.versions()
    try:
        listed = await cluster.list(scope)
    except APIError:
        freshness.failed()
        raise
    known = cache.versions()
    news = [vcpuset.uid for vcpuset in listed if cache.put(vcpuset)]
    now = cache.versions()
    present = {vcpuset.uid: vcpuset.namespace for vcpuset in listed}
    # The watch owes each version that was not known, also one in which there is nothing to act on.
    owed = {uid: version for uid, version in now.items() if uid in present and version != known.get(uid)}
    freshness.listed(present, owed)
    for uid in news:
        changed(uid)
    for uid in before.keys() - present.keys():
        # A set that came, or came back, while the list was under way need not be in it.
        if now.get(uid) == before[uid]:
            cache.drop(uid)
            changed(uid)
