"""An apt source for another suite of Debian (backports, a release), derived from those that the machine already uses.

So mirrors, proxies by path and signing keys chosen by the machine's owner stay in use, and no host is named here. apt
itself is asked which sources there are (`apt-get indextargets`); only the options of the one entry that is followed are
read from its file, in either of the two formats (sources.list(5)).
"""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.setup.console import NotPossible, probe, run_visibly

__all__ = ["Target", "backports_source", "entry_options", "has_suite", "own_source", "source_text", "targets"]

FETCH_SECONDS: Final = 300

FIELDS: Final = ("RELEASE", "COMPONENT", "REPO_URI", "ORIGIN", "SOURCESENTRY")

OPTION_FIELDS: Final = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}
"""Options of the one-line format whose deb822 field has another name; else `signed-by` is `Signed-By`."""

OWN_FIELDS: Final = frozenset({"types", "uris", "suites", "components", "enabled", "x-repolib-name"})
"""Fields of an entry that the new one does not take over."""


@dataclass(frozen=True)
class Target:
    """A package list that apt fetches."""

    release: str
    component: str
    uri: str
    origin: str  # "Debian", but empty as long as `apt-get update` has not run
    file: Path  # the file with the entry


def targets() -> list[Target]:
    """The package lists of the machine's apt sources.

    Raises:
        SetupFailed: they were never fetched, as in the image of a container, and cannot be.
    """
    found = _listed()
    if not found and shutil.which("apt-get"):
        # What has not been fetched is not listed. This needs no root, and leaves the machine as it is.
        with tempfile.TemporaryDirectory(prefix="vcpuset-apt-") as folder:
            lists = [f"-oDir::State::Lists={folder}", f"-oDir::Cache={folder}", "-oAPT::Sandbox::User=root"]
            run_visibly(
                ["apt-get", "-qq", *lists, "update"], seconds=FETCH_SECONDS, shown="apt-get update, temporarily"
            )
            found = _listed(lists)
    return found


def _listed(options: Sequence[str] = ()) -> list[Target]:
    form = "\t".join(f"$({field})" for field in FIELDS)
    listed = probe(["apt-get", *options, "indextargets", "--format", form, "Created-By: Packages"]) or ""
    found = []
    for line in listed.splitlines():
        values = ["" if value.startswith("$(") else value for value in line.split("\t")]
        if len(values) == len(FIELDS):
            release, component, uri, origin, entry = values
            found.append(Target(release, component, uri, origin, Path(entry.rpartition(":")[0])))
    return found


def has_suite(sources: Sequence[Target], suite: str) -> bool:
    """Whether the machine already uses this suite."""
    return any(target.release == suite and target.component == "main" for target in sources)


def own_source(sources: Sequence[Target], *codenames: str) -> Target | None:
    """The machine's source of the first of these releases of Debian that it has; None: it has none of them."""
    for codename in codenames:
        own = [target for target in sources if target.release == codename and target.component == "main"]
        own = [target for target in own if not target.uri.startswith("cdrom:")]
        # Other publishers call their suites by Debian's names, too. Before the first update the path has to tell.
        debian = [target for target in own if target.origin == "Debian"]
        if found := debian or [each for each in own if not each.origin and each.uri.rstrip("/").endswith("/debian")]:
            return found[0]
    return None


def source_text(base: Target, suite: str) -> str:
    """The text of a deb822 file that adds a suite from the same mirror, and with the same options, as `base`."""
    fields: dict[str, str] = {
        "Types": "deb",
        "URIs": base.uri,
        "Suites": suite,
        "Components": "main",
        **entry_options(base.file.read_text(), base.file.suffix == ".sources", base.uri, base.release),
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def backports_source(sources: Sequence[Target], codename: str) -> str:
    """The text of a deb822 file that adds the backports from where the machine has Debian itself.

    Raises:
        NotPossible: no source of Debian's own packages is configured.
    """
    base = own_source(sources, codename)
    if base is None:
        raise NotPossible(
            f"no apt source for the Debian suite {codename} found (apt-get indextargets), so its backports, which "
            "contain the required QEMU, cannot be added. Configure apt (see sources.list(5)) and try again"
        )
    return source_text(base, f"{codename}-backports")


def entry_options(text: str, is_deb822: bool, uri: str, release: str) -> Mapping[str, str]:
    """The options (as deb822 fields such as `Signed-By`) of the entry for `uri` and `release` in a sources file."""
    return _deb822_options(text, uri, release) if is_deb822 else _one_line_options(text, uri, release)


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


def _deb822_options(text: str, uri: str, release: str) -> dict[str, str]:
    uncommented = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for stanza in re.split(r"\n[ \t]*\n", uncommented):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):  # goes on: an embedded key, for example
                fields[name] += f"\n{line}"
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        lower = {key.lower(): value.split() for key, value in fields.items()}
        if any(_same(each, uri) for each in lower.get("uris", ())) and release in lower.get("suites", ()):
            return {key: value for key, value in fields.items() if key.lower() not in OWN_FIELDS}
    return {}


def _one_line_options(text: str, uri: str, release: str) -> dict[str, str]:
    for line in text.splitlines():
        found = re.match(r"\s*deb\s+(?:\[([^]]*)]\s+)?(\S+)\s+(\S+)\s", line)
        if found and _same(found[2], uri) and found[3] == release:
            pairs = [option.partition("=") for option in (found[1] or "").split()]
            return {
                OPTION_FIELDS.get(name, "-".join(word.capitalize() for word in name.split("-"))): value.replace(
                    ",", " "
                )
                for name, _, value in pairs
            }
    return {}
