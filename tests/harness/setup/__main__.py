"""`python -m harness.setup PART…` (see the package)."""

import contextlib
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from harness import guestimage, prometheus
from harness.binaries import BUILDS
from harness.build.guest.packages import PackageError
from harness.cache import cache_dir
from harness.setup.console import NotPossible, SetupFailed, run_visibly, say
from harness.setup.gobuilds import ensure_built, remove_build_cache
from harness.setup.system import CLUSTER_REQUIREMENTS, install_missing
from harness.setup.venv import VENV_PYTHON, ensure_venv

__all__ = ["main"]


def ensure_guest() -> None:
    """Build the test guest, unless the cache folder has it."""
    try:
        guestimage.images()
    except FileNotFoundError:
        say("==> Test guest")
        run_visibly([VENV_PYTHON, "-m", "harness.guestimage"], seconds=3600)


def ensure_images() -> None:
    """Make the container images, unless the cache folder has them."""
    run_visibly([VENV_PYTHON, "-m", "harness.containerimages"], seconds=3600)


def ensure_prometheus() -> None:
    """Fetch Prometheus and promtool, unless they are there.

    Raises:
        NotPossible: they are not available here.
    """
    try:
        for name in prometheus.PROGRAMS:
            prometheus.program(name)
    except prometheus.PrometheusMissing:
        say("==> Prometheus, from Debian's packages")
        try:
            prometheus.fetch(say)
        except PackageError as error:
            raise NotPossible(
                f"Prometheus: {error}. Alternatively, put prometheus and promtool from a Prometheus release into PATH"
            ) from error


PARTS: Final[dict[str, Callable[[], None]]] = {
    "system": install_missing,
    "system-cluster": partial(install_missing, CLUSTER_REQUIREMENTS),
    "venv": ensure_venv,
    "guest": ensure_guest,
    "prometheus": ensure_prometheus,
    "images": ensure_images,
    **{name: partial(ensure_built, build) for name, build in BUILDS.items()},
}
"""In the order in which they need each other; what a system may lack comes before what takes long to build."""


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock of the cache folder; the kernel releases it however this process ends."""
    with (cache_dir() / "set-up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str]) -> int:
    """Run the parts named. Returns the exit status: 2 if something is missing that cannot be got here."""
    unknown = set(arguments) - PARTS.keys()
    if unknown:
        sys.stderr.write(f"set-up: unknown part {', '.join(sorted(unknown))}; known parts: {', '.join(PARTS)}\n")
        return 2
    began = time.monotonic()
    try:
        with one_at_a_time():
            for name, ensure in PARTS.items():
                if name in arguments:
                    ensure()
            if BUILDS.keys() & set(arguments):
                remove_build_cache()
    except SetupFailed as error:
        sys.stdout.flush()
        sys.stderr.write(f"set-up: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("\nset-up: interrupted; the next run continues from here\n")
        return 130
    say(f"set-up: complete ({time.monotonic() - began:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
