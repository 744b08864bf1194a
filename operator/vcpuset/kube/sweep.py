"""The list that finds what a watch can miss.

A watch that breaks and restarts reports what exists, but not what was deleted meanwhile. A periodic list finds those
sets; the first one fills the cache before the watch starts.
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
    """Update `cache` to the state of the API server, and call `changed` for each set that is news or gone.

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
    # The watch has to deliver each version that was not known, also one that needs no pass.
    owed = {uid: version for uid, version in now.items() if uid in present and version != known.get(uid)}
    freshness.listed(present, owed)
    for uid in news:
        changed(uid)
    for uid in before.keys() - present.keys():
        # A set that was created or came back while the list was in progress may be missing in it.
        if now.get(uid) == before[uid]:
            cache.drop(uid)
            changed(uid)
