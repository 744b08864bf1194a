"""How far the tests that search for the unforeseen go: `make test` stops sooner than a release does.

VCPUSET_TEST_EFFORT=long    as far as `make test-long`
VCPUSET_TEST_EFFORT=quick   as far as `make test-quick`; no guest is booted
VCPUSET_TEST_SEED=…         what an earlier run has drawn, again; each run shows its seed
"""

from __future__ import annotations

import os
import secrets
from typing import Final

__all__ = ["LONG", "QUICK", "SEED", "scaled"]

LONG: Final = os.environ.get("VCPUSET_TEST_EFFORT") == "long"
QUICK: Final = os.environ.get("VCPUSET_TEST_EFFORT") == "quick"

SEED: Final = int(os.environ.setdefault("VCPUSET_TEST_SEED", str(secrets.randbelow(10**8))))
"""Another one for each run, the same for all of its processes, which inherit it. Tests use it beside a fixed one."""


def scaled(whole: int) -> int:
    """How many cases a run has, of so many in a long one."""
    return whole if LONG else whole // (20 if QUICK else 3)
