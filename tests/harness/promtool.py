"""`promtool`, Prometheus' checker and tester of rules, and Prometheus: from PATH, or out of Debian's packages.

A package is downloaded and unpacked into the cache folder, not installed: it would start a Prometheus on whoever's
machine this is. Built from source, as the control plane is, they would take as long as that does.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from harness.build.guest.packages import Apt, PackageError, files
from harness.cache import cache_dir

__all__ = ["PROGRAMS", "PromtoolMissing", "fetch", "program", "promtool"]

PROGRAMS: Final = {"promtool": ("promtool", "prometheus"), "prometheus": ("prometheus",)}
"""The packages that have each: promtool is in one of its own in Debian 13, and in the server's in Debian 12."""


class PromtoolMissing(Exception):
    """The program is not there; the message says what to do."""


def promtool() -> Path:
    """`program("promtool")`."""
    return program("promtool")


def program(name: str) -> Path:
    """The program in PATH, else the one in the cache folder.

    Raises:
        PromtoolMissing: there is none.
    """
    installed = shutil.which(name)
    if installed is not None:
        return Path(installed)
    kept = _kept(name)
    if os.access(kept, os.X_OK):
        return kept
    raise PromtoolMissing(f"{name} is neither in PATH nor at {kept}: run `make setup`")


def fetch(name: str, report: Callable[[str], None]) -> None:
    """Put the program into the cache folder.

    Raises:
        PackageError: it cannot be had, or not here; says why.
    """
    with tempfile.TemporaryDirectory(prefix="vcpuset-promtool-") as work:
        apt = Apt(Path(work), report)
        try:
            package = _download(apt, PROGRAMS[name])
        except PackageError:  # if it is no matter of the lists, the second try says so
            apt.use_fresh_lists()
            package = _download(apt, PROGRAMS[name])
        path = f"/usr/bin/{name}"
        found = [text for _, text in files(package, path.__eq__) if isinstance(text, bytes)]
    if not found:
        raise PackageError(f"{package.name} holds no {path}: put a {name} of Prometheus 2.40 or later in PATH")
    target = _kept(name)
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_bytes(found[0])
    partial.chmod(0o755)
    partial.rename(target)


def _download(apt: Apt, packages: Sequence[str]) -> Path:
    *others, last = packages
    for each in others:
        try:
            return apt.download([each])[each]
        except PackageError:  # if the reason is another than the name, it holds for the next as well
            continue
    return apt.download([last])[last]


def _kept(name: str) -> Path:
    return cache_dir() / name / name
