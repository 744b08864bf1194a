"""What the documentation site needs beyond mkdocs: hooks, named in mkdocs.yml.

The pages are plain Markdown that reads well in the repository, too. There, they link to files outside of docs/. On the
site, some of these files are pages (`PAGES`), links to others lead to the repository if its address is known, and are
plain text otherwise. A link to a file that does not exist is a warning, and so an error with --strict.
"""

from __future__ import annotations

import logging
import posixpath
import re
from typing import Final

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from harness.cache import REPOSITORY

__all__ = ["PAGES", "ListsOfGitHub", "on_config", "on_files", "on_page_markdown", "on_post_page"]

_log = logging.getLogger("mkdocs.hooks.vcpuset")

PAGES: Final = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
    "deploy/helm/vcpuset/README.md": "chart.md",
}
"""Files outside of docs/, and the pages that they are. README.md is one for the check of its links only."""

_PLACES: Final = {page: path for path, page in PAGES.items()}

_LINK: Final = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
_CODE: Final = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_MARKS: Final = re.compile(r"(^ *```\w+) .+$", re.MULTILINE)
_FOREIGN: Final = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=[\"']?(?:https?:)?//"
)


class ListsOfGitHub(Extension):
    """What is two spaces in belongs to a list item. Python-Markdown would want four, and break the list otherwise."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Python-Markdown's name
        """Called once for each page, before the other extensions: the parser is made for a width."""
        md.tab_length = 2
        md.build_parser()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read lists as GitHub does."""
    config.markdown_extensions.insert(0, "harness.sitehooks:ListsOfGitHub")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files are elsewhere in the repository."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them; code blocks without the marks that are for the tests (harness.docpage)."""
    source = page.file.src_uri
    if source == "readme.md":
        page.meta["search"] = {"exclude": True}

    def target(found: re.Match[str]) -> str:
        return _link(found, source, config.extra.get("repository"))

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(target, markdown[end : code.start()]), _MARKS.sub(r"\1", code[0])]
        end = code.end()
    return "".join(parts) + _LINK.sub(target, markdown[end:])


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of a page that needs another host to be shown."""
    if found := _FOREIGN.search(output):
        _log.warning("%s loads something from another host: %s…", page.file.src_uri, output[found.start() :][:120])
    return output


def _link(found: re.Match[str], source: str, repository: str | None) -> str:
    """A link of the page `source`, which is relative to the file of that page, as a link within the site."""
    text, anchor = found["text"], found["anchor"] or ""
    place = _PLACES.get(source, f"docs/{source}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), found["path"]))
    page = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if page is not None:
        # mkdocs checks this one itself.
        return f"[{text}]({posixpath.relpath(page, posixpath.dirname(source) or '.')}{anchor})"
    if path.startswith("../") or not (REPOSITORY / path).exists():
        _log.warning("%s links to %s, which does not exist", place, found["path"])
    return f"[{text}]({repository.rstrip('/')}/blob/HEAD/{path}{anchor})" if repository else text
