"""Messages made wrong: pure functions that take a source of randomness and give back what to send instead.

`restructure` changes one thing in a JSON value, `scar` changes bytes of an encoded one. What they make is for the peer
of a fuzz test; whether it is still right is for that test's own reading to say.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

__all__ = ["JUNK", "Nested", "encoded", "restructure", "scar"]

Json = Any
"""What `json` makes and takes; also `Nested`."""


@dataclass(frozen=True)
class Nested:
    """So many lists in one another; `json.dumps` would not write them."""

    depth: int

    @property
    def text(self) -> str:
        """As JSON."""
        return "[" * self.depth + "]" * self.depth


JUNK: tuple[Json, ...] = (
    None, True, False, 0, 1, 2, -1, 4096, 1 << 31, (1 << 63) - 1, 1 << 63, 10**30, -(10**30), 10**4000,
    0.0, 1.5, -2.5, 1e300, float("nan"), float("inf"),
    "", "0", "1", "x", " ", "\0", "\n", "\x1b[31m", "\ud800", "/", "é" * 600, "x" * 2000, "x" * 5000,
    [], [[]], [None], [{}], {}, {"": None}, {"x": {"y": [1]}}, Nested(30), Nested(600), Nested(960), Nested(20_000),
)  # fmt: skip
"""Values that a program may not be prepared for."""

_MARK = "\N{SNOWMAN}{}\N{SNOWMAN}"
"""Stands for a `Nested` until the rest is written."""


def encoded(message: Json) -> bytes:
    """A message as QEMU sends it, in one line."""
    deep: list[Nested] = []

    def stand_in(value: object) -> str:
        assert isinstance(value, Nested)
        deep.append(value)
        return _MARK.format(len(deep) - 1)

    text = json.dumps(message, default=stand_in)
    for number, value in enumerate(deep):
        text = text.replace(json.dumps(_MARK.format(number)), value.text)
    return text.encode() + b"\r\n"


# --- JSON -------------------------------------------------------------------------------------------------------------

_Place = tuple[dict[str, Json] | list[Json], Any]
"""A container and the key or position in it."""


def restructure(rng: Random, message: Json, words: Sequence[str] = (), within: Sequence[str] = ()) -> Json:
    """A copy of the message with one thing changed; it may, by chance, mean the same.

    words   strings that stand for something where the message is read, to be put in place of others
    within  only what is below these keys of the message is changed, while there is anything
    """
    root = [copy.deepcopy(message)]
    places = list(_places(root))
    below = [place for key in within if isinstance(message, dict) and key in root[0] for place in _below(root[0], key)]
    container, key = rng.choice(below or places)
    value = container[key]
    changes: list[Callable[[], Json]] = [lambda: copy.deepcopy(rng.choice(JUNK))]
    if isinstance(value, dict):
        changes += [lambda: _changed_object(rng, value)] * 3
    elif isinstance(value, list):
        changes += [lambda: _changed_list(rng, value)] * 3
    elif isinstance(value, str):
        changes += [lambda: _changed_text(rng, value, words)] * 3
    elif isinstance(value, int) and not isinstance(value, bool):
        changes += [lambda: value + rng.choice([-2, -1, 1, 2, 1000, -value - 1]), lambda: str(value), lambda: value / 2]
    # Two places of one kind change their values: paths, ids, counts that belong to something else.
    alike = [(c, k) for c, k in below or places if type(c[k]) is type(value) and c[k] != value and c is not container]
    if alike and rng.random() < 0.15 and not isinstance(value, dict | list):
        other, its_key = rng.choice(alike)
        container[key], other[its_key] = other[its_key], value
    elif isinstance(container, dict) and rng.random() < 0.25:
        container.pop(key)
        if rng.random() < 0.4:
            container[_renamed(rng, key, container)] = value
    else:
        container[key] = rng.choice(changes)()
    return root[0]


def _places(container: dict[str, Json] | list[Json]) -> Iterator[_Place]:
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(pairs):
        yield container, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _below(message: dict[str, Json], key: str) -> Iterator[_Place]:
    yield message, key
    if isinstance(message[key], dict | list):
        yield from _places(message[key])


def _renamed(rng: Random, key: str, others: dict[str, Json]) -> str:
    return rng.choice([key.upper(), key + "s", key.replace("-", "_") + "_", key[:-1], "", "\0", *others])


def _changed_object(rng: Random, value: dict[str, Json]) -> Json:
    items = list(value.items())
    match rng.randrange(5):
        case 0:
            rng.shuffle(items)
            return dict(items)
        case 1 | 2:
            return {**value, rng.choice(["x", "new-in-qemu-99", "error", "return", "event", ""]): rng.choice(JUNK)}
        case 3:
            return items
        case _:
            return dict(items[: len(items) // 2])


def _changed_list(rng: Random, value: list[Json]) -> Json:
    if not value:
        return [copy.deepcopy(rng.choice(JUNK))]
    one = rng.randrange(len(value))
    match rng.randrange(9):
        case 0:
            return [*value[:one], *value[one + 1 :]]
        case 1:
            return [*value, copy.deepcopy(value[one])]
        case 2:
            return rng.sample(value, len(value))
        case 3:
            return value[::-1]
        case 4:
            return [*value, copy.deepcopy(rng.choice(JUNK))]
        case 5:
            return [value]
        case 6:
            return value[:one]
        case 7:
            return value * rng.choice([2, 3, 50])
        case _:
            return {str(number): each for number, each in enumerate(value)}


def _changed_text(rng: Random, value: str, words: Sequence[str]) -> Json:
    number = rng.choice([-1, 0, 1, 2, 4, 7, 99_999, 10**9, 10**40])
    digits = "".join(letter if not letter.isdigit() else str(number) for letter in value)
    return rng.choice([
        value.upper(), value[:-1], value + " ", value + "\0", value * 3, digits, value[::-1], [value],
        *(rng.choice(words) for _ in range(6) if words),
    ])  # fmt: skip


# --- bytes ------------------------------------------------------------------------------------------------------------

_BYTES = (
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\r",
    b"\n",
    b"\r\n\r\n",
    b" ",
    b'"',
    b"{",
    b"]",
    b",",
    b"\\",
    b"9",
)
"""Bytes that end, open or spoil something; the third and fourth are no UTF-8."""


def scar(rng: Random, line: bytes) -> bytes:
    """The line with some bytes changed; it may, by chance, mean the same."""
    at = rng.randrange(len(line))
    to = min(len(line), at + rng.choice([1, 1, 2, 8, 100]))
    match rng.randrange(14):
        case 0 | 1:
            return line[:at] + bytes([line[at] ^ 1 << rng.randrange(8)]) + line[at + 1 :]
        case 2 | 3:
            return line[:at] + rng.choice(_BYTES) + line[at:]
        case 4:
            return line[:at] + rng.choice(_BYTES) + line[at + 1 :]
        case 5:
            return line[:at] + line[to:]
        case 6:
            return line[:to] + line[at:]
        case 7:
            return line[:at] + rng.randbytes(to - at) + line[to:]
        case 8:
            return line[:at]
        case 9:
            return line[:at] + b"\r\n"
        case 10:
            return rng.choice([b"\xef\xbb\xbf", b"\0", b"\n", b" ", b"\t", b"\r", b"1", b"\xff\xfa\x18"]) + line
        case 11:
            return rng.choice([line.rstrip(), line.rstrip() + b"\n", line.rstrip() + b"\r", line + b"\n", line + b"\0"])
        case 12:
            return line.decode("latin-1").encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
        case _:
            return _with_a_key_twice(rng, line)


def _with_a_key_twice(rng: Random, line: bytes) -> bytes:
    """The first key of one object stands there a second time, and the value that was there before counts."""
    keys = list(re.finditer(rb'(?<=\{)"[^"]*"', line))
    if not keys:
        return line
    key = rng.choice(keys)
    return line[: key.start()] + key[0] + b": " + encoded(rng.choice(JUNK)).strip() + b", " + line[key.start() :]
