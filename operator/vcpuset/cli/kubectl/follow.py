"""VCPUSets as they change, for a user who waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from vcpuset.domain.errors import NoAnswer, Unavailable
from vcpuset.domain.resource import VCPUSet

if TYPE_CHECKING:
    from vcpuset.kube.user import UserAPI

__all__ = ["Key", "follow"]

RETRY_SECONDS: Final = 1.0

Key = tuple[str, str]
"""Namespace and name."""


async def follow(
    api: UserAPI, namespace: str | None, name: str | None, tell: Callable[[str], None]
) -> AsyncGenerator[Mapping[Key, VCPUSet]]:
    """As `UserAPI.watch`, and again when an API server that was away is back; `tell` is called with its failures."""
    while True:
        try:
            async with aclosing(api.watch(namespace, name)) as states:
                async for state in states:
                    yield state
        except (Unavailable, NoAnswer) as error:
            tell(f"{error}; retrying")
            await asyncio.sleep(RETRY_SECONDS)
