"""The base class of what tests start and stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

__all__ = ["Runnable"]


class Runnable(ABC):
    """It runs while the context lasts. If the start fails or is cancelled, it is stopped: nothing is left behind."""

    @abstractmethod
    async def start(self) -> None:
        """Start it, and wait until it works."""

    @abstractmethod
    async def stop(self) -> None:
        """End it and remove what it left, also if it was started in part. Safe to call again."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
