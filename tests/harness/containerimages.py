"""Container images for the tests' node, as archives in the cache folder; made by `make test-cluster`.

    pause      the container with which containerd keeps a pod's namespaces
    vm         QEMU of Debian 13, and the test guest below /guest
    vcpuset    the operator, built from the repository's Dockerfile by buildah; and that of `BEFORE`

Only the Dockerfile's base image is replaced, because a registry may not be reachable: its stand-in has the Python 3.13
and pip of Debian 13, in /usr in place of /usr/local.

    python -m harness.containerimages      builds those that are missing
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness import guestimage
from harness.cache import REPOSITORY, cache_dir, digest
from harness.setup.aptsources import own_source, source_text, targets
from harness.setup.console import NotPossible, SetupFailed, probe, run_visibly, say

__all__ = ["VM", "Image", "before", "checkout_before", "images", "make_images", "operator_image", "remove_old"]

SUITE: Final = "trixie"
MAKE_SECONDS: Final = 1800.0
KEPT: Final = 2
"""How many images of other sources are kept: each has 350 MB, and each change of the sources makes one."""

BEFORE: Final = "7a1c7f688bb76ad21c6462ca331fe830f5de575b"
"""The commit from which tests upgrade: the last release, once there is one."""

PYTHON: Final = ("python3", "python3-venv", "python3-pip-whl", "ca-certificates")
TO_BASE: Final = (
    # As in the official image: `python`, and a pip that may install and be removed.
    'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 "$1"/usr/bin/python && '
    'wheel=$(cd "$1" && ls usr/share/python-wheels/pip-*.whl) && '
    'chroot "$1" python "/$wheel/pip" install --no-index --root-user-action=ignore "/$wheel"'
)
BASE_PARTS: Final = (SUITE, *PYTHON, TO_BASE)
QEMU: Final = ("qemu-system-x86", "busybox-static")
OF_PIP: Final = ("/etc/pip.conf", "/etc/ssl/certs")
"""Where the machine's owner configures pip's package index and the trusted authorities."""
PAUSE: Final = "localhost/pause:1"
VM: Final = "localhost/vm:1"


@dataclass(frozen=True)
class Image:
    """An image in a file.

    reference  its name in a pod's manifest
    path       an archive as `docker save` writes it
    """

    reference: str
    path: Path


def operator_image() -> Image:
    """The image of this work tree, whether it is built or not; the file's name changes with the sources."""
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    names = ("Dockerfile", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
    made = {"__pycache__", "vcpuset.egg-info"}
    sources = (path for path in (REPOSITORY / "operator").rglob("*") if path.is_file() and not made & set(path.parts))
    files = [*(REPOSITORY / name for name in names), *sorted(sources)]
    contents = [part for file in files for part in (str(file.relative_to(REPOSITORY)), file.read_bytes())]
    return Image(f"vcpuset:{version}", _path("vcpuset", digest([*contents, *BASE_PARTS])))


def before() -> Image:
    """The image of the version before, whether it is built or not."""
    return Image("vcpuset:before", _path("vcpuset", digest([BEFORE, *BASE_PARTS])))


def checkout_before(folder: Path) -> None:
    """Write the version before into a folder.

    Raises:
        SetupFailed: this is no clone with its history; git's message has been shown.
    """
    archive = folder / "before.tar"
    run_visibly(["git", "-C", REPOSITORY, "archive", f"--output={archive}", BEFORE], seconds=60)
    run_visibly(["tar", "-x", "-f", archive, "-C", folder], seconds=60)
    archive.unlink()


def images() -> list[Image]:
    """The images that each node needs, whether they are built or not."""
    vm = digest([SUITE, *QEMU, guestimage.digest(guestimage.images())])
    return [Image(PAUSE, _path("pause", digest([SUITE, *QEMU]))), Image(VM, _path("vm", vm)), operator_image()]


def make_images() -> None:
    """Make those that are missing.

    Raises:
        NotPossible: Debian's packages are not available here.
        SetupFailed: a step failed; its output has been shown.
    """
    pause, vm, operator = images()
    earlier = before()
    missing = [each for each in (pause, vm, operator, earlier) if not each.path.exists()]
    if not missing:
        return
    say(f"==> Images {', '.join(each.reference for each in missing)}, into {pause.path.parent}")
    with tempfile.TemporaryDirectory(prefix="vcpuset-images-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        builder = _Builder(Path(folder))
        if pause in missing or vm in missing:
            builder.make_vm(pause, vm)
        if operator in missing:
            builder.make_operator(operator, REPOSITORY)
        if earlier in missing:
            tree = Path(folder) / "before"
            tree.mkdir()
            checkout_before(tree)
            builder.make_operator(earlier, tree)
    remove_old()


def remove_old() -> None:
    """Remove operator images of other work trees and earlier sources, but for the newest `KEPT`."""
    operator = operator_image().path
    others = set(operator.parent.glob("vcpuset-*.tar")) - {operator, before().path}
    for old in sorted(others, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        old.unlink()


def _path(name: str, key: str) -> Path:
    folder = cache_dir() / "images"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}-{key}.tar"


class _Builder:
    """buildah with a storage of its own, in a folder that is removed afterwards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._policy = folder / "policy.json"
        self._policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        self._registries = folder / "registries.conf"
        self._registries.write_text('unqualified-search-registries = ["localhost"]\n')

    def make_vm(self, pause: Image, vm: Image) -> None:
        """QEMU with the guest; and busybox alone, as the pause container."""
        root = self._debian("vm", QEMU)
        empty = self._folder / "pause"
        empty.mkdir()
        shutil.copy2(root / "usr/bin/busybox", empty / "busybox")
        self._commit(empty, pause, ["--entrypoint", '["/busybox", "sleep", "2147483647"]'])
        guest = root / "guest"
        guest.mkdir()
        for name in (guestimage.KERNEL, guestimage.INITRAMFS):
            shutil.copy2(guestimage.images() / name, guest / name)
        self._commit(root, vm, [])

    def make_operator(self, image: Image, tree: Path) -> None:
        """The image of the Dockerfile in a folder, as it stands."""
        base = _path("base", digest(BASE_PARTS))
        if not base.exists():
            root = self._debian("base", PYTHON, hooks=(TO_BASE,))
            self._commit(root, Image("localhost/base:1", base), [])
        self._buildah(["pull", "--quiet", f"docker-archive:{base}"])
        command = ["bud", "--isolation=chroot", "--pull-never", "--build-arg=BASE=localhost/base:1"]
        command += [f"--volume={each}:{each}:ro" for each in OF_PIP if Path(each).exists()]
        self._buildah([*command, f"--tag={image.reference}", str(tree)])
        self._push(image)

    def _debian(self, name: str, packages: Sequence[str], hooks: Sequence[str] = ()) -> Path:
        """A root file system with these packages."""
        source = own_source(targets(), SUITE, platform.freedesktop_os_release().get("VERSION_CODENAME", ""))
        if source is None:
            raise NotPossible(f"no apt source of Debian found (apt-get indextargets), for packages of {SUITE}")
        file = self._folder / "debian.sources"
        file.write_text(source_text(source, SUITE))
        said = probe(["apt-config", "dump"]) or ""
        options = [line for line in said.splitlines() if re.match(r'Acquire::(https?::|Check-)\S* "[^"]', line)]
        root = self._folder / name
        run_visibly(
            [
                "mmdebstrap",
                "--mode=root",
                "--variant=minbase",
                "--format=directory",
                f"--include={','.join(packages)}",
                *(f"--aptopt={each}" for each in options),
                *(f"--customize-hook={each}" for each in hooks),
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                SUITE,
                root,
                file,
            ],
            seconds=MAKE_SECONDS,
            shown=f"mmdebstrap --variant=minbase --include={','.join(packages)} {SUITE}",
        )
        return root

    def _commit(self, root: Path, image: Image, settings: Sequence[str]) -> None:
        """An image with one layer."""
        container = self._buildah(["from", "--pull-never", "scratch"]).strip()
        self._buildah(["add", "--quiet", container, str(root), "/"])
        if settings:
            self._buildah(["config", *settings, container])
        self._buildah(["commit", "--quiet", "--rm", container, image.reference])
        self._push(image)

    def _push(self, image: Image) -> None:
        """Write the image to its file, which appears when it is complete."""
        temporary = image.path.with_suffix(f".{os.getpid()}")
        # A kubelet expands a name without a registry like this.
        full = image.reference if "/" in image.reference else f"docker.io/library/{image.reference}"
        try:
            self._buildah(["push", "--quiet", image.reference, f"docker-archive:{temporary}:{full}"])
            temporary.rename(image.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _buildah(self, arguments: Sequence[str]) -> str:
        say(f"+ buildah {' '.join(arguments)}")
        command, *rest = arguments
        policy = [] if command in {"add", "config"} else [f"--signature-policy={self._policy}"]
        storage = [f"--root={self._folder / 'storage'}", f"--runroot={self._folder / 'run'}", "--storage-driver=vfs"]
        try:
            done = subprocess.run(
                ["buildah", *storage, f"--registries-conf={self._registries}", command, *policy, *rest],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                timeout=MAKE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SetupFailed(f"timed out after {MAKE_SECONDS:.0f} s: buildah {' '.join(arguments)}") from error
        if done.returncode:
            sys.stdout.write(done.stdout)
            raise SetupFailed(f"exit status {done.returncode} (see above): buildah {' '.join(arguments)}")
        return done.stdout


if __name__ == "__main__":
    try:
        make_images()
    except SetupFailed as failure:
        sys.exit(str(failure))
