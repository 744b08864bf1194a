"""A mount that hangs: a FUSE file system whose server never answers, as one on NFS whose server is away.

The kernel has every call below the mount wait until the server has answered its first message, which is never sent
here. No library and no helper program is needed, but root is.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["HungMount", "why_not"]

_FORCE_AND_DETACH = 1 | 2


def why_not() -> str | None:
    """Why nothing can be mounted here; None: it can."""
    if os.geteuid() != 0:
        return "only root may mount a FUSE file system"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


class HungMount:
    """Hangs at this folder within the `with` block; what waits for it then fails with ENOTCONN at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._device = -1

    def __enter__(self) -> Self:
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if self._libc.mount(b"hung", os.fsencode(self._folder), b"fuse", 0, options) != 0:
            number = ctypes.get_errno()
            os.close(self._device)
            raise OSError(number, os.strerror(number), str(self._folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._libc.umount2(os.fsencode(self._folder), _FORCE_AND_DETACH)
        os.close(self._device)
