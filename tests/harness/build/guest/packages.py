"""Debian packages, downloaded and read without installing anything and without root.

``apt-get download`` is used with the machine's own package sources. Where the machine has no package lists, or old
ones whose files have left the mirror, fresh lists are fetched into a private folder: the machine's stay as they are.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from harness.setup.aptsources import own_source, source_text, targets

__all__ = ["Apt", "PackageError", "files", "version"]

UPDATE_SECONDS = 300
DOWNLOAD_SECONDS = 900
UNPACK_SECONDS = 120


class PackageError(Exception):
    """A package, or apt itself, is missing; the message says which and what to do."""


class Apt:
    """The machine's package sources.

    folder    private and empty: holds the downloads and, if need be, fresh package lists
    report    is told each long step
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        for program in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(program) is None:
                raise PackageError(
                    f"{program} is missing: the test guest is made of Debian 12 packages, so build it on Debian 12 "
                    "(a container will do) and copy the cache folder"
                )
        self._folder = folder
        self._report = report
        self._options = ["-o", "APT::Sandbox::User=root"]  # no helper user needs access to `folder`

    def use_fresh_lists(self, release: str | None = None) -> None:
        """Fetch the package lists of the machine's sources into the private folder and use those from now on.

        A source that does not answer is reported only: it may be one that the guest does not need.

        release   the code name of a Debian release. Another Debian uses that one instead of its own, from the same
                  mirror; a machine that has no source of Debian keeps to what it has
        """
        shutil.rmtree(self._folder / "deb", ignore_errors=True)  # what the old lists still gave
        lists = self._folder / "lists"
        (lists / "partial").mkdir(parents=True)
        (self._folder / "cache" / "archives" / "partial").mkdir(parents=True)
        self._options += ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={self._folder / 'cache'}"]
        if release is not None:
            self._follow(release)
        self._report("fetching the package lists")
        self._run(["apt-get", "update", "-qq"], UPDATE_SECONDS)

    def _follow(self, release: str) -> None:
        sources, installed = targets(), platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        base = own_source(sources, release, installed)
        if base is None or installed == release:
            return
        parts, nothing = self._folder / "sources", self._folder / "nothing"
        parts.mkdir()
        (parts / "debian.sources").write_text(source_text(base, release))
        nothing.touch()
        # What is installed is newer, and would be preferred, but cannot be downloaded from there.
        files = {"Etc::SourceList": nothing, "Etc::SourceParts": parts, "State::Status": nothing}
        self._options += [word for name, path in files.items() for word in ("-o", f"Dir::{name}={path}")]

    def newest(self, pattern: str) -> str | None:
        """The package whose whole name matches `pattern`; of several the one with the greatest number in group 1."""
        regex = re.compile(pattern)
        names = self._run(["apt-cache", "pkgnames"], UNPACK_SECONDS).split()
        found = [match for match in map(regex.fullmatch, names) if match]
        # apt-cache also knows names that only others refer to: a real one has a version.
        for match in sorted(found, key=lambda match: int(match[1]), reverse=True):
            if re.search(r"Candidate: (?!\(none\))", self._run(["apt-cache", "policy", match[0]], UNPACK_SECONDS)):
                return match[0]
        return None

    def libraries_of(self, package: str) -> list[str]:
        """The names of all library packages that `package` needs, directly or not."""
        text = self._run(["apt-cache", "depends", "--recurse", "--important", package], UNPACK_SECONDS)
        return sorted({line for line in text.splitlines() if re.match(r"(lib|zlib)(?!.*(perl|gdbm))", line)})

    def download(self, packages: Iterable[str]) -> dict[str, Path]:
        """The .deb files of the candidate versions, by package name."""
        target = self._folder / "deb"
        target.mkdir(exist_ok=True)
        names = sorted(packages)
        self._report(f"downloading {len(names)} packages")
        self._run(["apt-get", "download", "-qq", *names], DOWNLOAD_SECONDS, cwd=target)
        return {name: next(target.glob(f"{name}_*.deb")) for name in names}

    def _run(self, command: list[str], seconds: float, cwd: Path | None = None) -> str:
        program, *arguments = command
        try:
            done = subprocess.run(
                [program, *self._options, *arguments],
                cwd=cwd or self._folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", **_proxies()},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PackageError(f"{' '.join(command[:2])} took more than {seconds:.0f} s: check the network") from None
        if done.returncode:
            raise PackageError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        if done.stderr.strip():
            self._report(f"{' '.join(command[:2])}: {done.stderr.strip()}")
        return done.stdout


def _proxies() -> dict[str, str]:
    """The proxy settings of this process: all that the network needs of its environment."""
    return {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}


def version(package: Path) -> str:
    """``NAME VERSION`` of a .deb file."""
    return _dpkg_deb(["--show", "--showformat=${Package} ${Version}", str(package)]).decode()


def files(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | str]]:
    """The files of a .deb file whose absolute path is `wanted`: (path, contents), for a symlink (path, its target)."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as dpkg:
        with tarfile.open(fileobj=dpkg.stdout, mode="r|") as archive:
            for member in archive:
                path = member.name.removeprefix(".")
                if not wanted(path):
                    continue
                if member.issym():
                    yield path, member.linkname
                elif (file := archive.extractfile(member)) is not None:
                    yield path, file.read()
        dpkg.wait(UNPACK_SECONDS)
    if dpkg.returncode:
        raise PackageError(f"{package.name} cannot be unpacked: dpkg-deb ended with {dpkg.returncode}")


def _dpkg_deb(arguments: list[str]) -> bytes:
    return subprocess.run(["dpkg-deb", *arguments], stdout=subprocess.PIPE, timeout=UNPACK_SECONDS, check=True).stdout
