"""What must be installed on the machine itself, and installing it where that can be done unasked.

On Debian 12, as root or with sudo, the missing packages are installed. Anywhere else, and for users without sudo, the
command lines are printed, to be run as root, and set-up ends with status 2.
"""

import os
import platform
import re
import shlex
import shutil
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness import steppedclock
from harness.setup import aptsources
from harness.setup.console import NotPossible, SetupFailed, probe, run_visibly, say

__all__ = [
    "CLUSTER_REQUIREMENTS",
    "QEMU",
    "Requirement",
    "Step",
    "install_missing",
    "missing",
    "qemu_version",
    "run_steps",
    "steps",
]

QEMU: Final = "qemu-system-x86_64"

QEMU_MINIMUM: Final = (8, 2)
"""Older ones corrupt their memory after a CPU was removed under TCG (seen with 7.2), which is all that the tests do."""

KNOWN: Final = {"trixie", "noble"}
"""Releases, by their code names, on which the packages that are advised were seen to bring what is missing."""

TOO_OLD: Final = {"bullseye", "focal", "jammy"}
"""Releases whose own QEMU is older than `QEMU_MINIMUM`."""

OTHER_NAMES: Final = {"noble": {"qemu-system-riscv": "qemu-system-misc"}}
"""Packages that have another name in a release, by its code name."""

BACKPORTS_FILE: Final = Path("/etc/apt/sources.list.d/vcpuset-backports.sources")

UNATTENDED: Final = (
    "apt-get() { DEBIAN_FRONTEND=noninteractive command apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "
    '-o Acquire::http::Timeout=60 -o Acquire::https::Timeout=60 "$@"; }; '
)
"""Goes before a line that is run here: apt must not ask questions, and a lock or a mirror may be busy for a while."""

INSTALL_SECONDS: Final = 1800
UPDATE_TRIES: Final = 5
"""`apt-get update` does not wait for the lock of the package lists, which a machine just booted often holds."""


@dataclass(frozen=True)
class Requirement:
    """Something that must be on the machine."""

    what: str
    """For people: what it is, and why."""
    debian: str
    """The Debian package that brings it."""
    fedora: str
    is_met: Callable[[], bool]
    newer: bool = False
    """Whether Debian 12 has it only in its backports."""


@dataclass(frozen=True)
class Step:
    """A shell command line that needs root."""

    line: str
    seconds: float = 60
    tries: int = 1
    undo: str = ""
    """The command line that takes the step back, run if a later step fails."""


def qemu_version() -> tuple[int, int] | None:
    """The version of the installed QEMU, or None if there is none."""
    found = re.search(r"version (\d+)\.(\d+)", probe([QEMU, "--version"]) or "")
    return (int(found[1]), int(found[2])) if found else None


def _has_program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _has_venv() -> bool:
    # Debian's own python3 has the module venv always, but not what it needs to put pip into an environment.
    return probe([sys.executable, "-c", "import ensurepip, venv"]) is not None


def _has_certificates() -> bool:
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return True
    return bool(paths.capath) and any(Path(paths.capath).iterdir())


def _qemu_is_good() -> bool:
    version = qemu_version()
    return version is not None and version >= QEMU_MINIMUM


REQUIREMENTS: Final = (
    Requirement("venv and ensurepip of Python", "python3-venv", "python3", _has_venv),
    Requirement("openssl, for the keys of the test API server", "openssl", "openssl", _has_program("openssl")),
    Requirement(
        "setpriv, to terminate child processes with their parent", "util-linux", "util-linux", _has_program("setpriv")
    ),
    Requirement("ip, for tests of a TCP monitor whose host is gone", "iproute2", "iproute", _has_program("ip")),
    Requirement("certificate authorities, for downloads", "ca-certificates", "ca-certificates", _has_certificates),
    Requirement(
        "libfaketime, to set the clock of an operator in tests",
        "libfaketime",
        "libfaketime",
        lambda: steppedclock.shared_object() is not None,
    ),
    Requirement("dpkg-deb, to unpack the guest's packages", "dpkg", "dpkg", _has_program("dpkg-deb")),
    Requirement(
        f"{QEMU} {'.'.join(map(str, QEMU_MINIMUM))} or later (older versions crash after a CPU is unplugged under TCG)",
        "qemu-system-x86",
        "qemu-system-x86-core",
        _qemu_is_good,
        newer=True,
    ),
    Requirement(
        "qemu-system-s390x, for tests of a machine that cannot unplug CPUs",
        "qemu-system-s390x",
        "qemu-system-s390x-core",
        _has_program("qemu-system-s390x"),
        newer=True,
    ),
    Requirement(
        "qemu-system-ppc64, for tests of a machine that plugs whole cores",
        "qemu-system-ppc",
        "qemu-system-ppc-core",
        _has_program("qemu-system-ppc64"),
        newer=True,
    ),
    Requirement(
        "qemu-system-aarch64, for tests of a machine without CPU hotplug",
        "qemu-system-arm",
        "qemu-system-aarch64-core",
        _has_program("qemu-system-aarch64"),
        newer=True,
    ),
    Requirement(
        "qemu-system-riscv64, for tests of another machine without CPU hotplug",
        "qemu-system-riscv",
        "qemu-system-riscv-core",
        _has_program("qemu-system-riscv64"),
        newer=True,
    ),
)

CLUSTER_REQUIREMENTS: Final = (
    Requirement("containerd, to run pods", "containerd", "containerd", _has_program("containerd")),
    Requirement("runc, to run containers", "runc", "runc", _has_program("runc")),
    Requirement(
        "the bridge and host-local plugins of CNI, for the pods' network",
        "containernetworking-plugins",
        "containernetworking-plugins",
        lambda: Path("/usr/lib/cni/bridge").exists() or Path("/usr/libexec/cni/bridge").exists(),
    ),
    Requirement("iptables, ip6tables and their save and restore", "iptables", "iptables-nft", _has_program("iptables")),
    Requirement("nft, for kube-proxy", "nftables", "nftables", _has_program("nft")),
    Requirement("ipset, for network policies", "ipset", "ipset", _has_program("ipset")),
    Requirement("conntrack, for kube-proxy", "conntrack", "conntrack-tools", _has_program("conntrack")),
    Requirement("git, for the version from which tests upgrade", "git", "git", _has_program("git")),
    Requirement("buildah, to build the image", "buildah", "buildah", _has_program("buildah")),
    Requirement("sysctl, to let a node forward packets", "procps", "procps-ng", _has_program("sysctl")),
    Requirement("libvirtd, to run machines", "libvirt-daemon", "libvirt-daemon", _has_program("libvirtd")),
    Requirement(
        "libvirt's driver for QEMU",
        "libvirt-daemon-driver-qemu",
        "libvirt-daemon-driver-qemu",
        lambda: any(Path("/usr").glob("lib*/**/libvirt/connection-driver/libvirt_driver_qemu.so")),
    ),
    Requirement("virsh, to control them", "libvirt-clients", "libvirt-client", _has_program("virsh")),
    Requirement(
        "virt-qemu-qmp-proxy, to reach their monitors",
        "libvirt-clients-qemu",
        "libvirt-client-qemu",
        _has_program("virt-qemu-qmp-proxy"),
    ),
    Requirement("Chromium, to test the status page", "chromium", "chromium", _has_program("chromium")),
    Requirement("mmdebstrap, to make base images", "mmdebstrap", "mmdebstrap", _has_program("mmdebstrap")),
)
"""What `make test-cluster` needs in addition."""


def missing(requirements: Sequence[Requirement] = REQUIREMENTS) -> list[Requirement]:
    """What is not there yet."""
    return [requirement for requirement in requirements if not requirement.is_met()]


def install_missing(requirements: Sequence[Requirement] = REQUIREMENTS) -> None:
    """Install what is missing.

    Raises:
        NotPossible: this is not Debian 12, or there is no sudo; the message has the lines to run.
        SetupFailed: an installation failed, or did not bring what was missing.
    """
    if not sys.platform.startswith("linux"):
        raise NotPossible(f"Linux is needed, this is {platform.system()}: use a Debian 12 machine")
    needed = missing(requirements)
    if not needed:
        return
    say("Missing on this machine:")
    for requirement in needed:
        say(f"  - {requirement.what}")
    version = qemu_version()
    if version and any(requirement.newer for requirement in needed):
        say(f"    (installed: {version[0]}.{version[1]}, which will be replaced)")
    release = _os_release()
    if (release.get("ID"), release.get("VERSION_ID")) != ("debian", "12"):
        raise NotPossible(_advice(needed, release))
    if sys.base_prefix != "/usr" and any(requirement.debian == "python3-venv" for requirement in needed):
        raise NotPossible(
            f"{sys.executable} is not Debian's Python and lacks ensurepip: run make with PYTHON=/usr/bin/python3"
        )
    todo = steps(needed, aptsources.targets())
    become_root = _become_root()
    if become_root is None:
        lines = "\n".join(f"    {step.line}" for step in todo)
        raise NotPossible(
            f"Installation needs root, and this user has no sudo. As root, run:\n\n{lines}\n\nThen try again."
        )
    run_steps(todo, become_root)
    still = missing(requirements)
    if still:
        raise SetupFailed(f"installed, but still missing: {'; '.join(requirement.what for requirement in still)}")


def steps(needed: Sequence[Requirement], sources: Sequence[aptsources.Target]) -> list[Step]:
    """The command lines that install `needed` on Debian 12."""
    plain = sorted({requirement.debian for requirement in needed if not requirement.newer})
    newer = sorted({requirement.debian for requirement in needed if requirement.newer})
    todo: list[Step] = []
    update = Step("apt-get update", seconds=900, tries=UPDATE_TRIES)
    if newer and not aptsources.has_suite(sources, "bookworm-backports"):
        text = aptsources.backports_source(sources, "bookworm")
        quoted = " ".join(shlex.quote(line) for line in text.splitlines())
        todo.append(Step(f"printf '%s\\n' {quoted} > {BACKPORTS_FILE}", undo=f"rm {BACKPORTS_FILE}"))
    todo.append(update)
    if plain:
        todo.append(Step(f"apt-get install --yes --no-install-recommends {' '.join(plain)}", seconds=INSTALL_SECONDS))
    if newer:
        install = f"apt-get install --yes --no-install-recommends -t bookworm-backports {' '.join(newer)}"
        todo.append(Step(install, seconds=INSTALL_SECONDS))
    return todo


def run_steps(todo: Sequence[Step], become_root: Sequence[str]) -> None:
    """Run the steps, with `become_root` put before each command; if one fails, take back those done.

    Raises:
        SetupFailed: a step failed, each time it was tried.
    """
    done: list[Step] = []
    try:
        for step in todo:
            _run_step(step, become_root)
            done.append(step)
    except SetupFailed:
        # A mirror without backports, for example: with that source, every later `apt-get update` would fail.
        for step in reversed(done):
            if step.undo:
                run_visibly([*become_root, "sh", "-ec", step.undo], seconds=step.seconds, shown=step.undo)
        raise


def _run_step(step: Step, become_root: Sequence[str]) -> None:
    for attempt in range(1, step.tries + 1):
        try:
            # Not sh: it has no functions of such names.
            run_visibly([*become_root, "bash", "-ec", UNATTENDED + step.line], seconds=step.seconds, shown=step.line)
        except SetupFailed:
            if attempt == step.tries:
                raise
            say(f"trying again in 10 s (attempt {attempt} of {step.tries} failed)")
            time.sleep(10)  # nothing tells when another apt-get gives the lock of the lists back
        else:
            return


def _become_root() -> list[str] | None:
    """What to put before a command so that it runs as root, or None."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    if probe(["sudo", "-n", "true"]) is not None:
        return ["sudo", "-n"]
    return ["sudo"] if sys.stdin.isatty() else None


def _os_release() -> Mapping[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _advice(needed: Sequence[Requirement], release: Mapping[str, str]) -> str:
    """How to get what is missing on a system where nothing is installed unasked."""
    head = "Automatic installation is only supported on Debian 12."
    # Those that are made of an Ubuntu have a code name of their own, but its packages.
    codename = release.get("UBUNTU_CODENAME") or release.get("VERSION_CODENAME", "")
    if codename in TOO_OLD and any(requirement.newer for requirement in needed):
        return (
            f"{head} The QEMU of this release ({codename}) is too old. Use Debian 12 or 13, or Ubuntu 24.04, or put a "
            "later QEMU with the emulators listed above into PATH."
        )
    notes = ""
    if release.get("ID") != "debian":
        notes += "The test guest can only be built on Debian 12 and 13. Build it there and copy it.\n"
    if shutil.which("apt-get"):
        others = OTHER_NAMES.get(codename, {})
        names = sorted({others.get(requirement.debian, requirement.debian) for requirement in needed})
        lines = ["apt-get update", f"apt-get install --yes --no-install-recommends {' '.join(names)}"]
        if codename not in KNOWN:
            notes += (
                "These are the package names of Debian 13. Other systems may use other names or have an older QEMU.\n"
            )
    elif shutil.which("dnf"):
        lines = [f"dnf install --assumeyes {' '.join(sorted({requirement.fedora for requirement in needed}))}"]
    else:
        return f"{head} Install the packages above with the package manager of your system, then try again."
    shown = "\n".join(f"    {line}" for line in lines)
    return f"{head} As root, run:\n\n{shown}\n\n{notes}Then try again."
