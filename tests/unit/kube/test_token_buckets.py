"""Token buckets: so many at once, then one in a while, and no bucket for ever."""

from __future__ import annotations

from vcpuset.kube.tokenbucket import TokenBuckets

__all__: list[str] = []


def buckets(limit: int = 100) -> TokenBuckets[str]:
    """Three at once, then one each 10 s."""
    return TokenBuckets(burst=3, refill_seconds=10, limit=limit)


def taken(found: TokenBuckets[str], key: str, now: float, tries: int) -> int:
    return sum(found.take(key, now) for _ in range(tries))


def test_a_burst_passes_and_then_one_in_a_while() -> None:
    found = buckets()

    assert taken(found, "a", 0, 10) == 3
    assert taken(found, "a", 9, 10) == 0
    assert taken(found, "a", 10, 10) == 1
    assert taken(found, "a", 35, 10) == 2


def test_a_bucket_never_holds_more_than_the_burst() -> None:
    found = buckets()

    assert taken(found, "a", 0, 1) == 1
    assert taken(found, "a", 1e6, 10) == 3


def test_one_key_takes_nothing_from_another() -> None:
    found = buckets()

    assert taken(found, "a", 0, 100) == 3
    assert taken(found, "b", 0, 100) == 3


def test_refusals_are_counted_until_the_bucket_is_full_again() -> None:
    found = buckets()
    taken(found, "a", 0, 3)
    assert not found.take("a", 0)
    assert [found.refuse("a"), found.refuse("a")] == [1, 2]

    assert taken(found, "a", 10, 1) == 1, "one token more is no full bucket"
    assert found.refuse("a") == 3

    assert taken(found, "a", 100, 4) == 3
    assert found.refuse("a") == 1


def test_only_so_many_buckets_are_remembered_and_the_idlest_goes_first() -> None:
    found = buckets(limit=2)
    for key in ("a", "b"):
        taken(found, key, 0, 3)
    taken(found, "a", 1, 1)
    taken(found, "c", 2, 1)

    assert len(found) == 2
    assert taken(found, "a", 2, 3) == 0
    assert taken(found, "b", 2, 3) == 3
