"""A pod's container as a child process: what of its isolation the kernel gives without a container runtime.

The process has a mount namespace of its own, which shows what the pod's manifest says: its volumes where they are to be
mounted, an empty /run besides, and the rest of the file system read-only if `readOnlyRootFilesystem` says so. It runs
as the user and groups of the manifest, with the capabilities that are left, and can gain none. Nothing of that is seen
outside, and all of it ends with the process.

Not as in a container: the program is the test's own interpreter and this source tree, the network and the processes of
the host are seen, there is no seccomp filter, and no limit of memory or CPU.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from harness.cache import REPOSITORY

__all__ = ["PROGRAM", "SOURCE", "WHY_NOT", "Identity", "Mount", "contained"]

PROGRAM: Final = (sys.executable, "-m", "vcpuset.cli.main")
"""What the image has as `vcpuset`."""

SOURCE: Final = REPOSITORY / "operator"
"""Where the program's package is."""


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "needs root, to give each pod a mount namespace and a user of its own"
    # Root of a container may lack the right to, and a chroot the mount point.
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, timeout=60, check=False)
    return None if tried.returncode == 0 else f"needs mount namespaces: {tried.stderr.strip()}"


WHY_NOT: Final = _why_not()
"""Why containers cannot be played here; None: they can."""

_RUN: Final = Path("/run")
_STAGE: Final = _RUN / "stage"


@dataclass(frozen=True)
class Mount:
    """A file or folder of the test that the process sees at another place."""

    source: Path
    target: Path
    read_only: bool = False


@dataclass(frozen=True)
class Identity:
    """What a pod's and its container's securityContext say together."""

    user: int = 0
    groups: tuple[int, ...] = (0,)
    """The first is the primary one."""
    dropped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    new_privileges: bool = True
    read_only_root: bool = False

    @classmethod
    def of(cls, pod: Mapping[str, Any], container: Mapping[str, Any]) -> Self:
        """From the specs of both; ValueError if they ask for what the kubelet would refuse."""
        shared: Mapping[str, Any] = pod.get("securityContext") or {}
        own: Mapping[str, Any] = {**shared, **(container.get("securityContext") or {})}
        user = int(own.get("runAsUser", 0))
        if own.get("runAsNonRoot") and user == 0:
            raise ValueError("container has runAsNonRoot and image will run as root")
        more = [shared[each] for each in ("fsGroup",) if each in shared]
        capabilities = own.get("capabilities") or {}
        return cls(
            user=user,
            groups=(int(own.get("runAsGroup", 0)), *shared.get("supplementalGroups", ()), *more),
            dropped=tuple(capabilities.get("drop", ())),
            added=tuple(capabilities.get("add", ())),
            new_privileges=own.get("allowPrivilegeEscalation", True),
            read_only_root=own.get("readOnlyRootFilesystem", False),
        )

    def command(self) -> list[str]:
        """The command that runs what follows it as this user."""
        words = ["setpriv", "--pdeathsig", "KILL", f"--reuid={self.user}", f"--regid={self.groups[0]}"]
        words.append(f"--groups={','.join(map(str, self.groups[1:]))}" if self.groups[1:] else "--clear-groups")
        left = [f"-{each.lower()}" for each in self.dropped] + [f"+{each.lower()}" for each in self.added]
        if left:
            words += [f"--bounding-set={','.join(left)}", "--inh-caps=-all"]
        if not self.new_privileges:
            words.append("--no-new-privs")
        return [*words, "--"]


def contained(
    mounts: Iterable[Mount], command: Sequence[str], identity: Identity | None = None, hostname: str | None = None
) -> list[str]:
    """The command line that runs `command` in a mount namespace of its own; without an identity as root.

    It replaces itself by the command, which so has the process id of whoever starts this.
    """
    identity = identity or Identity()
    naming = [f"echo {shlex.quote(hostname)} >/proc/sys/kernel/hostname"] if hostname else []
    lines = ["set -eu", *naming, "mount -t tmpfs -o mode=755 tmpfs /run"]
    for mount in mounts:
        place = Path(os.path.realpath(mount.target))  # /var/run is /run
        if place != _RUN and _RUN not in place.parents and not place.exists():
            raise NotImplementedError(f"no {place} here to mount something at, and none is made on the host")
        source, target = shlex.quote(str(mount.source)), shlex.quote(str(place))
        lines += [f"mkdir -p {target}", f"mount --bind {source} {target}"]
        if mount.read_only:
            lines.append(f"mount -o remount,bind,ro {target}")
    lines += _opened(identity.user)
    if identity.read_only_root:
        lines += [f"mount -o remount,bind,ro {each}" for each in ("/run", "/")]
    lines.append(f"exec {shlex.join([*identity.command(), *command])}")
    spaces = ["--mount", "--propagation=private", *(["--uts"] if hostname else [])]
    return ["unshare", *spaces, "sh", "-c", "\n".join(lines)]


def _opened(user: int) -> list[str]:
    """Commands that make the program readable for a user who may not enter the folder that it lies in, such as /root.

    An empty folder takes that one's place, with nothing in it but what the program needs.
    """
    needed = [Path(each) for each in {sys.prefix, sys.base_prefix, str(SOURCE), os.path.realpath(sys.prefix)}]
    closed = {path: lock for path in needed if user != 0 and (lock := _lock(path))}
    staged = {path: _STAGE / str(number) for number, path in enumerate(sorted(closed))}
    lines = []
    for path, stage in staged.items():
        lines += [f"mkdir -p {stage}", f"mount --bind {shlex.quote(str(path))} {stage}"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(lock))}" for lock in sorted(set(closed.values()))]
    for path, stage in staged.items():
        place = shlex.quote(str(path))
        lines += [f"mkdir -p {place}", f"mount --bind {stage} {place}"]
    return lines


def _lock(path: Path) -> Path | None:
    """The outermost folder on the way to `path` that others may not enter."""
    ways = [*reversed(path.parents), path]
    return next((each for each in ways if not each.stat().st_mode & stat.S_IXOTH), None)
