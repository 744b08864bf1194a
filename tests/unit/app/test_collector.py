"""What Python's cyclic garbage collector is spared."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from vcpuset.app.operator import keep_from_collector


class Node:
    """Refers to itself, so that reference counts alone never free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_the_collector_passes_over_what_is_there_and_finds_what_comes_later() -> None:
    kept = Node()
    keep_from_collector()
    assert not any(each is kept for each in gc.get_objects())
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None


def test_what_an_earlier_lead_has_left_goes_with_the_next_one() -> None:
    node = Node()
    left = weakref.ref(node)
    keep_from_collector()
    del node
    gc.collect()
    assert left() is not None
    keep_from_collector()
    assert left() is None
