"""Which file of the cache folder is the image of which sources, and which of them are removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness import containerimages
from harness.containerimages import before, operator_image, remove_old

SOURCES = ("Dockerfile", "requirements.txt", "README.md", "LICENSE", "operator/vcpuset/cli/main.py")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work tree, and a cache folder without images."""
    monkeypatch.setenv("VCPUSET_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tree"
    monkeypatch.setattr(containerimages, "REPOSITORY", folder)
    for name in SOURCES:
        written(folder / name)
    written(folder / "pyproject.toml", '[project]\nversion = "1.2.3"\n')
    return folder


def written(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", [*SOURCES, "operator/vcpuset/app/page/page.css"])
def test_an_image_is_another_one_after_a_change_of_a_source(tree: Path, name: str) -> None:
    first = operator_image()
    assert first.reference == "vcpuset:1.2.3"
    written(tree / name, "changed")
    assert operator_image().path != first.path
    assert operator_image().path == operator_image().path


def test_an_image_is_another_one_after_a_source_was_renamed(tree: Path) -> None:
    first = operator_image()
    main = tree / "operator" / "vcpuset" / "cli" / "main.py"
    main.rename(main.with_name("other.py"))
    assert operator_image().path != first.path


@pytest.mark.parametrize(
    "name",
    ["docs/index.md", "operator/vcpuset/cli/__pycache__/main.cpython-311.pyc", "operator/vcpuset.egg-info/PKG-INFO"],
)
def test_an_image_stays_the_same_after_a_change_of_what_it_does_not_contain(tree: Path, name: str) -> None:
    first = operator_image()
    written(tree / name)
    assert operator_image() == first


def test_the_two_newest_operator_images_of_other_sources_are_kept_beside_the_own_ones(tree: Path) -> None:
    folder = operator_image().path.parent
    kept = {operator_image().path, before().path, folder / "vm-0.tar", folder / "base-0.tar"}
    others = [folder / f"vcpuset-{number}.tar" for number in range(4)]
    for age, path in enumerate([*others, *kept]):
        os.utime(written(path), (1000 - age, 1000 - age))
    remove_old()
    assert set(folder.iterdir()) == kept | set(others[:2])
