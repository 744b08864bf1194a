"""Guests that are restored from a saved state: 0.4 s in place of a boot of 4 s.

    async with saved_guest(smp="2,maxcpus=64", monitors=2) as guest:
        assert guest.online() == {0, 1}

The first user of a combination of image, QEMU and machine arguments boots the guest once and keeps its state in the
cache folder (about 100 MB); all later ones, of any test process, start from that file. A state that is not used for two
weeks is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Unpack

from harness.cache import cache_dir, digest
from harness.effort import QUICK
from harness.guest import Guest, GuestError, GuestOptions
from harness.guestimage import digest as image_digest
from harness.processes import run
from harness.wait import until

__all__ = ["saved_guest"]

LOCK_SECONDS = 400.0
AGENT_SECONDS = 60.0
UNUSED_SECONDS = 14 * 24 * 3600


@contextlib.asynccontextmanager
async def saved_guest(**options: Unpack[GuestOptions]) -> AsyncIterator[Guest]:
    """A running guest that has booted; the options are those of `Guest`. A `QUICK` run skips the test."""
    if QUICK:
        import pytest

        pytest.skip("boots a guest")
    state = await _state(options)
    guest = Guest(**options, restore=state)
    try:
        try:
            await guest.start()
        except GuestError:
            # Cut short, or of a QEMU that changed without changing its version: make it again, once.
            state.unlink(missing_ok=True)
            await _state(options)
            await guest.start()
        yield guest
    finally:
        await guest.stop()


async def _state(options: GuestOptions) -> Path:
    """The file with the state for these options, made if need be."""
    private: GuestOptions = {
        **options, "monitors": 1, "tcp": False, "tls": None, "socket_dir": None, "monitor_paths": None,
        "agent_path": None,
    }  # fmt: skip
    guest = Guest(**private)
    try:
        assert guest.images is not None
        qemu = await run([guest.qemu, "--version"])
        name = digest([image_digest(guest.images), qemu.stdout, *guest.hardware])
        state = cache_dir() / "saved" / name
        await asyncio.to_thread(state.parent.mkdir, exist_ok=True)
        async with _locked(state.with_suffix(".lock")):
            if not _use(state):
                _delete_unused(state.parent)
                await _make(guest, state, agent=options.get("agent", False))
    finally:
        await guest.stop()
    return state


async def _make(guest: Guest, state: Path, *, agent: bool) -> None:
    await guest.start()
    await guest.ready()
    if agent:  # it starts while the guest reports that it is up
        await guest.shell(
            f"i=0; until pidof qemu-ga; do i=$((i+1)); [ $i -lt {AGENT_SECONDS * 10:.0f} ]; sleep 0.1; done"
        )
    with _written_at_once(state) as temporary:
        await guest.save(temporary)


@contextlib.contextmanager
def _written_at_once(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` when that went well and is removed otherwise."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _use(state: Path) -> bool:
    """Whether the state exists; its time then says that it was used now."""
    try:
        os.utime(state)
    except FileNotFoundError:
        return False
    return True


def _delete_unused(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix == ".lock":
            continue  # empty, and somebody may hold it
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold the lock of a state; it ends with the process, however that ends."""
    with path.open("w") as file:

        def taken() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        await until(taken, LOCK_SECONDS, f"the lock {path}, held by a process that boots the same guest")
        yield
