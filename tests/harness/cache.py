"""Where things that are costly to make are kept between runs: built programs, guest images, saved guests.

Everything in here can be made again by `make setup`, so the folder may be deleted at any time (not while tests run).
Names inside carry a hash of what they were made from; nothing is ever changed in place.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["REPOSITORY", "cache_dir", "digest"]

REPOSITORY = Path(__file__).resolve().parents[2]
"""The root of the work tree that this file belongs to."""


def cache_dir() -> Path:
    """The cache folder, created if need be: `$VCPUSET_CACHE`, else `vcpuset` beneath the user's cache folder.

    Read from the environment at each call, so that a test can point it elsewhere.
    """
    chosen = os.environ.get("VCPUSET_CACHE")
    if chosen:
        folder = Path(chosen).expanduser().absolute()
    else:
        user_cache = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(user_cache) if user_cache else Path.home() / ".cache") / "vcpuset"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(parts: Iterable[bytes | str]) -> str:
    """A short name (16 hexadecimal digits) for exactly these parts in this order."""
    whole = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        whole.update(len(encoded).to_bytes(8, "big"))  # so that ("ab", "c") and ("a", "bc") differ
        whole.update(encoded)
    return whole.hexdigest()[:16]
