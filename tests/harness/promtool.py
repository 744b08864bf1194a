"""`promtool`, Prometheus' own checker and tester of rules: from PATH, or out of Debian's package into the cache folder.

The package is downloaded and unpacked, not installed: it would start a Prometheus on whoever's machine this is. Built
from source, as the control plane is, it would take as long as that does.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness.build.guest.packages import Apt, PackageError, files
from harness.cache import cache_dir

__all__ = ["PromtoolMissing", "fetch", "promtool"]

_PACKAGES: Final = ("promtool", "prometheus")
"""Those that have it: Debian 13's own for it, and the server's of Debian 12 and Ubuntu 24.04."""


class PromtoolMissing(Exception):
    """There is no promtool; the message says what to do."""


def promtool() -> Path:
    """The promtool in PATH, else the one in the cache folder.

    Raises:
        PromtoolMissing: there is none.
    """
    installed = shutil.which("promtool")
    if installed is not None:
        return Path(installed)
    if os.access(_kept(), os.X_OK):
        return _kept()
    raise PromtoolMissing(f"promtool is neither in PATH nor at {_kept()}: run `make setup`")


def fetch(report: Callable[[str], None]) -> None:
    """Put promtool into the cache folder.

    Raises:
        PackageError: it cannot be had, or not here; says why.
    """
    with tempfile.TemporaryDirectory(prefix="vcpuset-promtool-") as work:
        apt = Apt(Path(work), report)
        try:
            package = _download(apt)
        except PackageError:  # if it is no matter of the lists, the second try says so
            apt.use_fresh_lists()
            package = _download(apt)
        found = [
            text for _, text in files(package, lambda path: path == "/usr/bin/promtool") if isinstance(text, bytes)
        ]
    if not found:
        raise PackageError(
            f"{package.name} holds no /usr/bin/promtool: put a promtool of Prometheus 2.40 or later in PATH"
        )
    target = _kept()
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_bytes(found[0])
    partial.chmod(0o755)
    partial.rename(target)


def _download(apt: Apt) -> Path:
    own, servers = _PACKAGES
    try:
        return apt.download([own])[own]
    except PackageError:  # if the reason is another than the name, it holds for the server's as well
        return apt.download([servers])[servers]


def _kept() -> Path:
    return cache_dir() / "promtool" / "promtool"
