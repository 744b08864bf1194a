"""Examples of pages are found, and run as somebody would who follows the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.docpage import Page, Reader
from harness.processes import ChildDied, CommandFailed

__all__: list[str] = []

TEXT = """
# A page

```sh first
A=1
mkdir sub && cd sub
```

`some.yaml`:

```yaml
a: 1
---
b: 2
```

1. In a list:

   ```sh first second
   echo "$A in ${PWD##*/}"
   ```

```console
$ one
1
$ two
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Page:
    path = tmp_path / "page.md"
    path.write_text(TEXT)
    return Page(path)


def test_blocks_are_found_by_language_and_marks(page: Page) -> None:
    assert [each.language for each in page.blocks()] == ["sh", "yaml", "sh", "console"]
    assert [each.where for each in page.blocks("sh", "first")] == ["page.md:5", "page.md:20"]
    assert page.block("sh", "second").text == 'echo "$A in ${PWD##*/}"\n', "without the list's indentation"
    assert [each.file for each in page.blocks()] == [None, "some.yaml", None, None]
    assert page.block("yaml").documents() == [{"a": 1}, {"b": 2}]
    assert list(page.block("console").commands()) == [("one", "1\n"), ("two", "")]
    with pytest.raises(LookupError, match=r"page\.md:5, page\.md:20"):
        page.block("sh", "first")
    with pytest.raises(LookupError, match="none"):
        page.block("sh", "third")


async def test_variables_and_the_folder_go_on_from_block_to_block(page: Page, tmp_path: Path) -> None:
    with Reader(tmp_path / "place") as reader:
        said = [(await reader.run(block)).stdout for block in page.blocks("sh", "first")]
        assert said == ["", "1 in sub\n"]
        assert reader.write(page.block("yaml")) == tmp_path / "place" / "sub" / "some.yaml"


@pytest.mark.parametrize("text", ["false\necho on", "false | cat\necho on", 'echo "$MISSING"\necho on'])
async def test_a_block_ends_at_the_first_command_that_fails(tmp_path: Path, text: str) -> None:
    with Reader(tmp_path / "place") as reader:
        with pytest.raises(CommandFailed) as failed:
            await reader.run(text)
        assert "on" not in failed.value.completed.stdout.split()
        assert (await reader.run("echo goes on")).stdout == "goes on\n"


async def test_a_block_without_an_end_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    with Reader(tmp_path / "place") as reader, pytest.raises(TimeoutError, match="begun"):
        await reader.run("echo begun; sleep 600 | cat", timeout=5)


async def test_what_was_started_runs_beside_what_follows_and_ends_with_the_reader(tmp_path: Path) -> None:
    with Reader(tmp_path / "place", SECONDS_LONG="600") as reader:
        child = reader.start("sleep \\\n  $SECONDS_LONG")
        await reader.run(f"kill -0 {child.pid}")
        child.require_running()
    with pytest.raises(ChildDied):
        child.require_running()
