"""The test guest: a kernel and an initramfs of a tiny Linux, built once from Debian packages.

Linux is Debian 12's 6.1. Not a later one: without KVM, the versions of 6.12 that were tried take no hot-plugged CPU,
although QEMU sees the plug succeed (and says so with ACPI_DEVICE_OST). In the guest run busybox, the QEMU guest agent
and two scripts that make Linux refuse to give up chosen CPUs (harness/build/guest). Nothing is compiled, nothing is
installed and no step needs root; the same package versions give the same bytes.

    python -m harness.guestimage      builds, or says that nothing is to be done
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import lzma
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from harness.build.guest.initramfs import Archive, needed_libraries
from harness.build.guest.packages import Apt, PackageError, files, version
from harness.cache import cache_dir

__all__ = ["INITRAMFS", "KERNEL", "build", "digest", "images"]

KERNEL = "vmlinuz"
INITRAMFS = "initramfs"
MANIFEST = "MANIFEST"

RECIPE = Path(__file__).parent / "build" / "guest"
SCRIPTS = ("set-online", "hold-cpus", "release-cpus")
DEBIAN = "bookworm"
KERNEL_PACKAGE = r"linux-image-6\.1\.0-(\d+)-cloud-amd64"
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_console")
LOADER = "ld-linux-x86-64.so.2"


def images() -> Path:
    """The folder with the kernel and the initramfs of the current recipe. FileNotFoundError: not built yet."""
    folder = _folder()
    if not folder.is_dir():
        raise FileNotFoundError(f"the test guest is not built ({folder} is missing): run `make setup`")
    return folder


def digest(folder: Path) -> str:
    """A short name for the exact contents of a built image: other package versions have another one."""
    return (folder / MANIFEST).read_text(encoding="utf-8").split()[0]


def build(report: Callable[[str], None]) -> Path:
    """Build the guest unless it is there, and return its folder. PackageError: something is missing, with the remedy.

    Safe to run several times at once: one builds, the others wait for it. The folder appears complete or not at all.
    """
    folder = _folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), report):
        if folder.is_dir():
            report(f"the test guest is up to date: {folder}")
            return folder
        began = time.monotonic()
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _build(temporary, report)
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        report(f"the test guest is built: {folder} ({time.monotonic() - began:.0f} s)")
    return folder


def _folder() -> Path:
    recipe = hashlib.sha256()
    for path in (Path(__file__), *sorted(RECIPE.glob("*.py")), *(RECIPE / name for name in ("init", *SCRIPTS))):
        recipe.update(path.read_bytes())
    return cache_dir() / "guest" / recipe.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is building the test guest: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when that process ends, however it ends
        yield


def _build(target: Path, report: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="vcpuset-guest-") as work:
        packages = _download(Path(work), report)
        report("assembling the guest")
        kernel, *others = sorted(packages, key=lambda name: not name.startswith("linux-image-"))
        root = Archive()
        for folder in ("dev", "proc", "sys", "tmp", "run", "var"):
            root.folder(folder)
        root.character_device("dev/console", 5, 1)  # the kernel opens it before /init can mount anything
        root.link("var/run", "/run")
        for path, contents in files(packages[kernel], _is_kernel_or_module):
            if isinstance(contents, str):
                continue
            if path.startswith("/boot/"):
                (target / KERNEL).write_bytes(contents)
            else:
                name = PurePosixPath(path).name
                plain = lzma.decompress(contents) if name.endswith(".xz") else contents
                root.file(f"lib/modules/{name.removesuffix('.xz')}", plain)
        _add_programs(root, {name: packages[name] for name in others})
        root.file("init", (RECIPE / "init").read_bytes(), 0o755)
        for name in SCRIPTS:
            root.file(f"bin/{name}", (RECIPE / name).read_bytes(), 0o755)
        (target / INITRAMFS).write_bytes(gzip.compress(root.cpio(), compresslevel=9, mtime=0))
        contents_hash = hashlib.sha256((target / KERNEL).read_bytes() + (target / INITRAMFS).read_bytes()).hexdigest()
        versions = [version(packages[name]) for name in sorted(packages)]
        (target / MANIFEST).write_text("\n".join([contents_hash[:16], *versions, ""]), encoding="utf-8")


def _download(work: Path, report: Callable[[str], None]) -> dict[str, Path]:
    """All packages of the guest, with fresh package lists if the machine's own do not do."""
    apt = Apt(work, report)
    try:
        return _download_from(apt)
    except PackageError:  # if it is no matter of the lists, the second try says so
        report("the machine's package lists are missing, out of date or not of Debian 12")
    apt.use_fresh_lists(DEBIAN)
    return _download_from(apt)


def _download_from(apt: Apt) -> dict[str, Path]:
    kernel = apt.newest(KERNEL_PACKAGE)
    if kernel is None:
        raise PackageError(
            "no package linux-image-6.1.0-*-cloud-amd64: the guest is made of Debian 12's packages for amd64. Have it "
            f"built by `make setup` on such a Debian 12 or 13, and copy it to the same place here: {_folder()}"
        )
    return apt.download(
        [kernel, "busybox-static", "util-linux", "qemu-guest-agent", *apt.libraries_of("qemu-guest-agent")]
    )


def _is_kernel_or_module(path: str) -> bool:
    name = PurePosixPath(path).name
    return path.startswith("/boot/vmlinuz-") or (
        "/kernel/drivers/" in path and name.removesuffix(".xz").removesuffix(".ko") in MODULES and ".ko" in name
    )


def _add_programs(root: Archive, packages: dict[str, Path]) -> None:
    """busybox (which links its commands at boot), the agent and chrt, and the libraries that these two need."""
    programs: dict[str, bytes] = {}
    libraries: dict[str, bytes | str] = {}
    for package in packages.values():
        for path, contents in files(package, lambda path: "/bin/" in path or "/sbin/" in path or "/lib" in path):
            name = PurePosixPath(path).name
            if name in {"busybox", "qemu-ga", "chrt"} and isinstance(contents, bytes):
                programs[name] = contents
            elif ".so" in name:
                libraries.setdefault(name, contents)
    for name, contents in sorted(programs.items()):
        root.file(f"bin/{name}", contents, 0o755)
    root.link("bin/sh", "busybox")
    wanted = [*needed_libraries(programs["qemu-ga"]), *needed_libraries(programs["chrt"]), LOADER]
    while wanted:
        soname = wanted.pop()
        if (path := f"{'lib64' if soname == LOADER else 'lib'}/{soname}") in root:
            continue
        found = libraries.get(soname)
        while isinstance(found, str):
            found = libraries.get(PurePosixPath(found).name)
        if found is None:
            raise PackageError(f"no package brought {soname}, which the guest agent needs")
        root.file(path, found, 0o755)
        wanted += needed_libraries(found)


def main() -> int:
    """Build the guest for the command line; 2: something is missing on this machine."""

    def report(step: str) -> None:
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()

    try:
        build(report)
    except (PackageError, OSError) as error:
        sys.stderr.write(f"guest image: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
