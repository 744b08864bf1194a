"""Where the cgroups of a process are, as the kernel describes them in /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.sandbox import cgroup_folders, hierarchies

V1_CGROUPS = """\
9:name=systemd:/init.scope
8:pids:/
2:cpu,cpuacct:/docker/7f
0::/init.scope
"""

V1_MOUNTS = """\
27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
28 27 0:25 / /srv/a\\040b rw - tmpfs  rw,size=4k
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 /docker /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
39 31 0:36 / /sys/fs/cgroup/pids ro,relatime - cgroup cgroup ro,pids
38 31 0:35 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""

V2_MOUNTS = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"


@pytest.mark.parametrize(
    ("cgroups", "mounts", "folders"),
    [
        pytest.param(
            V1_CGROUPS,
            V1_MOUNTS,
            ["cpu,cpuacct/7f", "pids", "systemd/init.scope", "unified/init.scope"],
            id="v1-with-an-empty-v2-beside-it",
        ),
        pytest.param("0::/user.slice/a.scope\n", V2_MOUNTS, ["user.slice/a.scope"], id="v2"),
        pytest.param("2:cpu:/\n", V2_MOUNTS, [], id="not-mounted"),
    ],
)
def test_a_process_has_a_cgroup_in_each_hierarchy_that_is_mounted(
    cgroups: str, mounts: str, folders: list[str]
) -> None:
    assert cgroup_folders(cgroups, mounts) == [Path("/sys/fs/cgroup") / each for each in folders]


def test_a_hierarchy_of_v1_is_mounted_again_by_its_controllers_or_its_name() -> None:
    assert [options for _, _, options in hierarchies(V1_MOUNTS)] == [
        ["cpu", "cpuacct"],
        ["pids"],
        ["blkio"],
        ["xattr", "name=systemd"],
        [],
    ]
