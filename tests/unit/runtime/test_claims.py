"""Who of several claimants holds a thing, and who is told when that may have changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcpuset.runtime.claims import Claims

__all__: list[str] = []


@pytest.fixture
def claims() -> Claims[str]:
    """Claims of sets with names for what they name; a smaller number is older."""
    return Claims()


def test_who_claims_alone_holds(claims: Claims[str]) -> None:
    assert claims.claim("a", 1, ["socket"]) == set()

    assert claims.conflicting_owner("a") is None


@pytest.mark.parametrize("order", [("elder", "younger"), ("younger", "elder")])
def test_the_more_senior_holds_whoever_comes_first(claims: Claims[str], order: tuple[str, str]) -> None:
    age = {"elder": 1, "younger": 2}
    told = [claims.claim(name, age[name], ["socket"]) for name in order]

    assert claims.conflicting_owner("elder") is None
    assert claims.conflicting_owner("younger") == "elder"
    assert told == [set(), {order[0]}]


def test_repeating_a_claim_tells_nobody(claims: Claims[str]) -> None:
    claims.claim("elder", 1, ["socket"])
    claims.claim("younger", 2, ["socket"])

    assert claims.claim("elder", 1, ["socket"]) == set()
    assert claims.claim("younger", 2, ["socket"]) == set()


def test_letting_go_tells_all_who_share_and_the_next_holds(claims: Claims[str]) -> None:
    for age, name in enumerate(("a", "b", "c")):
        claims.claim(name, age, ["socket"])
    claims.claim("elsewhere", 9, ["other"])

    assert claims.release("a") == {"b", "c"}
    assert claims.conflicting_owner("b") is None
    assert claims.conflicting_owner("c") == "b"


def test_moving_to_another_key_tells_the_old_and_the_new_neighbours(claims: Claims[str]) -> None:
    claims.claim("mover", 1, ["here", "common"])
    claims.claim("old", 2, ["here"])
    claims.claim("new", 3, ["there"])
    claims.claim("same", 4, ["common"])

    assert claims.claim("mover", 1, ["there", "common"]) == {"old", "new"}
    assert claims.conflicting_owner("old") is None
    assert claims.conflicting_owner("new") == "mover"
    assert claims.conflicting_owner("same") == "mover"


def test_of_several_rivals_the_most_senior_is_named(claims: Claims[str]) -> None:
    claims.claim("oldest", 1, ["inode"])
    claims.claim("older", 2, ["path"])
    claims.claim("young", 3, ["path", "inode"])

    assert claims.conflicting_owner("young") == "oldest"
    claims.release("oldest")
    assert claims.conflicting_owner("young") == "older"


def test_one_shared_key_of_several_is_enough(claims: Claims[str]) -> None:
    claims.claim("elder", 1, ["path-1", "inode"])
    claims.claim("younger", 2, ["path-2", "inode"])

    assert claims.conflicting_owner("younger") == "elder"


def test_who_claims_nothing_has_no_rival_and_may_let_go(claims: Claims[str]) -> None:
    assert claims.conflicting_owner("nobody") is None
    assert claims.release("nobody") == set()
    claims.claim("a", 1, [])
    assert claims.conflicting_owner("a") is None


def test_after_letting_go_a_claim_can_be_made_again(claims: Claims[str]) -> None:
    claims.claim("elder", 1, ["socket"])
    claims.claim("younger", 2, ["socket"])
    claims.release("elder")

    assert claims.claim("elder", 1, ["socket"]) == {"younger"}
    assert claims.conflicting_owner("younger") == "elder"


KEYS = st.sets(st.sampled_from("xyz"))


@given(st.lists(st.tuples(st.integers(0, 4), st.none() | KEYS)))
def test_everybody_whose_standing_changed_was_told(steps: list[tuple[int, set[str] | None]]) -> None:
    claims: Claims[int] = Claims()
    held: dict[int, set[str]] = {}

    def standing(name: int) -> int | None:
        elders = [other for other, keys in held.items() if other < name and keys & held.get(name, set())]
        return min(elders, default=None)

    before: dict[int, int | None] = {}
    for name, keys in steps:
        if keys is None:
            told = claims.release(name)
            held.pop(name, None)
        else:
            told = claims.claim(name, name, keys)
            held[name] = keys
        after = {each: standing(each) for each in held}
        assert {each: claims.conflicting_owner(each) for each in held} == after
        changed = {each for each in held if each in before and before[each] != after[each]} - {name}
        assert changed <= told
        before = after


def test_one_key_can_be_asked_for_alone(claims: Claims[str]) -> None:
    claims.claim("elder", 1, ["inode"])
    claims.claim("younger", 2, ["path", "inode"])

    assert claims.conflicting_owner("younger", "path") is None
    assert claims.conflicting_owner("younger", "inode") == "elder"
    assert claims.conflicting_owner("younger", "unknown") is None
    assert claims.has("younger", "path")
    assert not claims.has("elder", "path")
    assert not claims.has("nobody", "path")


def test_a_claimant_that_means_something_else_by_a_key_is_no_rival(claims: Claims[str]) -> None:
    for seniority, name in enumerate(("stranger", "elder", "younger")):
        claims.claim(name, seniority, ["name"])

    assert claims.conflicting_owner("younger") == "stranger"
    assert claims.conflicting_owner("younger", rival=lambda other: other != "stranger") == "elder"
    assert claims.conflicting_owner("elder", rival=lambda other: other != "stranger") is None
