"""Namespaces and cgroups in which a whole cluster runs, and which end with it.

    python -m harness.sandbox COMMAND ARGUMENT…

runs a command, such as pytest, with a network that has nothing but its loopback, with mounts, process ids and System V
IPC of its own, and in cgroups below those of the caller. When the command ends, the kernel kills all that it started.
It needs root, and cgroup v1 (Debian 12: `systemd.unified_cgroup_hierarchy=0` as a kernel parameter): the tests' node
has not been tried with v2.

`enter` is the part of it that a node needs, too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

__all__ = ["cgroup_folders", "enter", "hierarchies", "is_entered", "joining", "own_cgroups", "remove_cgroups"]

MARK: Final = "VCPUSET_SANDBOX"
"""Set in the environment of what runs inside."""

MOUNTS: Final = Path("/proc/self/mountinfo")
NAMESPACES: Final = ("--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup")
END_SECONDS: Final = 30.0


def is_entered() -> bool:
    """Whether this process runs inside."""
    return MARK in os.environ


def own_cgroups() -> list[Path]:
    """The folder of the cgroup that this process is in, in each hierarchy that is mounted."""
    return cgroup_folders(Path("/proc/self/cgroup").read_text(), MOUNTS.read_text())


def cgroup_folders(cgroups: str, mounts: str) -> list[Path]:
    """The folders of the cgroups in the text of /proc/PID/cgroup, according to that of /proc/PID/mountinfo."""
    paths: dict[str, str] = {}
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    folders = []
    for place, root, options in hierarchies(mounts):
        # v2 has no controllers, neither there nor among the options.
        path = next((paths[each] for each in options or [""] if each in paths), "")
        if path:
            folders.append(place / os.path.relpath(path, root))
    return folders


def hierarchies(mounts: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Where each hierarchy is mounted, the cgroup that is its root there, and its mount options (v2: none)."""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        root, place = fields.split(" ")[3:5]
        kind, *_, options = rest.split(" ")
        if kind in {"cgroup", "cgroup2"}:
            chosen = [each for each in options.split(",") if each not in {"rw", "ro"}] if kind == "cgroup" else []
            yield Path(place), root, chosen


def why_not() -> str | None:
    """Why there can be no sandbox here; None: there can."""
    if os.geteuid() != 0:
        return "root is needed, to make namespaces and cgroups: run it as root, or with sudo"
    if not any((folder / "cgroup.clone_children").exists() for folder in own_cgroups()):
        return "cgroup v1 is needed (the node has not been tried with v2): boot with systemd.unified_cgroup_hierarchy=0"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, timeout=60, check=False
    )
    return None if tried.returncode == 0 else f"namespaces cannot be made here: {tried.stderr.strip()}"


def joining(name: str) -> list[str]:
    """The shell commands by which a process joins the cgroup `name` below the caller's own, made if need be."""
    lines = []
    for folder in own_cgroups():
        own = shlex.quote(str(folder / name))
        lines.append(f"mkdir -p {own}")
        # A cgroup without CPUs and memory nodes takes no process.
        inherited = [folder / each for each in ("cpuset.cpus", "cpuset.mems") if (folder / each).exists()]
        lines += [f"cat {shlex.quote(str(each))} >{own}/{each.name}" for each in inherited]
        lines.append(f"echo $$ >{own}/cgroup.procs")
    return lines


def enter(name: str, script: str, namespaces: Sequence[str] = NAMESPACES) -> list[str]:
    """The command line that runs a shell script in new namespaces, and in the cgroup `name` below the caller's own.

    The script sees the cgroup as the root of each hierarchy, and an empty /run. The cgroup is the caller's to remove.
    """
    remounting = []
    for folder, _, options in hierarchies(MOUNTS.read_text()):
        place, kind = shlex.quote(str(folder)), f"cgroup -o {','.join(options)}" if options else "cgroup2"
        remounting += [f"umount {place}", f"mount -t {kind} cgroup {place}"]
    is_init = "--pid" in namespaces
    inside = [
        "set -eu",
        "mount --make-rprivate /",
        *(["mount -t proc proc /proc"] if is_init else []),
        *remounting,
        "mount -t tmpfs -o mode=755 tmpfs /run",
        "mkdir -p /run/lock /run/netns",
        "mount --make-rshared /",
        "ip link set lo up",
        script,
    ]
    forking = ["--fork", "--kill-child"] if is_init else []
    command = ["unshare", *namespaces, *forking, "--", "sh", "-c", "\n".join(inside)]
    return ["sh", "-c", "\n".join(["set -eu", *joining(name), f"exec {shlex.join(command)}"])]


def remove_cgroups(name: str) -> None:
    """Remove the cgroup and those below it, once its processes have gone."""
    end = time.monotonic() + END_SECONDS
    for folder in own_cgroups():
        for each in sorted([folder / name, *(folder / name).rglob("*/")], key=lambda path: -len(path.parts)):
            while each.is_dir():
                with contextlib.suppress(OSError):
                    each.rmdir()
                    break
                if time.monotonic() > end:
                    raise TimeoutError(f"{each} cannot be removed: a process is left in it")
                time.sleep(0.05)  # cgroup v1 has no event for a cgroup that becomes empty


def main(command: Sequence[str]) -> int:
    """Run a command inside, and return its exit status."""
    if (reason := why_not()) is not None:
        sys.stderr.write(f"{reason}\n")
        return 2
    name = f"vcpuset-tests-{os.getpid()}"
    try:
        words = enter(name, f"exec env {MARK}=1 {shlex.join(command)}")
        return subprocess.run(["setpriv", "--pdeathsig", "KILL", "--", *words], check=False).returncode
    except KeyboardInterrupt:
        return 130
    finally:
        remove_cgroups(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
