"""The documentation site: what mkdocs makes of the pages, and that it refuses what leads nowhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from harness import sitehooks
from harness.cache import REPOSITORY

CONFIGURATION: Final = REPOSITORY / "mkdocs.yml"
REPOSITORY_URL: Final = "https://git.example.com/acme/vcpuset/"


def shown(text: str, page: str, repository: str | None = None) -> str:
    """The Markdown of a page as mkdocs gets it."""
    config = MkDocsConfig()
    config.load_dict({"site_name": "x", "extra": {"repository": repository}})
    file = File(page, None, "/nowhere", use_directory_urls=True)
    return sitehooks.on_page_markdown(text, Page(None, file, config), config, Files([file]))


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        pytest.param("install.md", "[a](monitors.md#tls)", "[a](monitors.md#tls)", id="a page"),
        pytest.param("runbooks/A.md", "[a](../scale.md)", "[a](../scale.md)", id="a page above"),
        pytest.param("install.md", "[a](../CHANGELOG.md#010)", "[a](changelog.md#010)", id="a file that is a page"),
        pytest.param("runbooks/A.md", "[a](../../SECURITY.md)", "[a](../security.md)", id="the same from a folder"),
        pytest.param("changelog.md", "[a](docs/cli.md#x)", "[a](cli.md#x)", id="from a file at the root"),
        pytest.param("chart.md", "[a](../../../docs/cli.md)", "[a](cli.md)", id="from the chart"),
        pytest.param("install.md", "[a `b`](../Dockerfile)", "a `b`", id="a file that is no page"),
        pytest.param("install.md", "[a](https://example.com)", "[a](https://example.com)", id="elsewhere"),
        pytest.param("install.md", "[a](#here)", "[a](#here)", id="the same page"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page: str, link: str, expected: str) -> None:
    assert shown(f"See {link}.", page) == f"See {expected}."


def test_a_bracket_that_is_no_link_takes_no_time_whatever_code_follows() -> None:
    # Each span of code once doubled the time.
    text = "[" + "`code` " * 60
    assert shown(text, "install.md") == text


def test_a_file_that_is_no_page_is_linked_to_where_the_repository_is() -> None:
    link = shown("[a](../deploy/examples)", "install.md", REPOSITORY_URL)
    assert link == "[a](https://git.example.com/acme/vcpuset/blob/HEAD/deploy/examples)"


def test_code_is_shown_without_the_marks_for_tests_and_otherwise_as_it_is() -> None:
    text = "* A:\n\n  ```sh tls-identity machine\n  x [a](../Dockerfile)\n  ```\n"
    assert shown(text, "install.md") == text.replace("sh tls-identity machine", "sh")


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example.com/x.js">',
        "<link rel=stylesheet href=//fonts.example.com/x.css>",
        '<link href="https://fonts.example.com" rel="preconnect">',
        '<img alt="x" src="https://example.com/x.png">',
    ],
)
def test_a_page_that_loads_something_from_another_host_is_a_warning(tag: str, caplog: pytest.LogCaptureFixture) -> None:
    config = MkDocsConfig()
    page = Page(None, File("install.md", None, "/nowhere", use_directory_urls=True), config)
    assert sitehooks.on_post_page('<a href="https://example.com">x</a><script src="x.js">', page, config)
    assert not caplog.records
    sitehooks.on_post_page(tag, page, config)
    assert "another host" in caplog.text


def test_a_link_that_leads_nowhere_and_a_page_that_is_in_no_menu_fail_the_build(tmp_path: Path) -> None:
    """With the repository's own settings and the command of the Makefile."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "site.css").touch()
    (tmp_path / "docs" / "index.md").write_text(
        "# A\n\n[a](gone.md) [b](other.md#gone) [c](#gone) [d](../gone) ![e](gone.svg) [f](other.md#it-is)\n"
    )
    (tmp_path / "docs" / "other.md").write_text("# It is\n")
    settings: dict[str, Any] = {
        "INHERIT": str(CONFIGURATION),
        "docs_dir": str(tmp_path / "docs"),
        "site_dir": str(tmp_path / "site"),
        "hooks": [str(REPOSITORY / "tests" / "harness" / "sitehooks.py")],
        "nav": ["index.md"],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    words = shlex.split(re.search(r"-m (mkdocs build .*)", (REPOSITORY / "Makefile").read_text())[1])  # type: ignore[index]

    done = subprocess.run(
        [sys.executable, "-m", *words, "--config-file", tmp_path / "mkdocs.yml"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "index.md" in line or "other.md" in line]
    for each in ("'gone.md'", "'other.md#gone'", "'#gone'", "../gone", "'gone.svg'", "- other.md"):
        assert any(each in line for line in said), (each, done.stderr)
    assert "it-is" not in done.stderr
