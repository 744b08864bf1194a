"""The cache only moves forward, whoever reports and in whatever order."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from vcpuset.domain.resource import UID, Spec, Status, UnixMonitor, VCPUSet
from vcpuset.kube.cache import Cache

WEB = VCPUSet(
    uid=UID("0000-1"),
    namespace="default",
    name="web",
    generation=1,
    resource_version="100",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    spec=Spec(2, UnixMonitor("web.sock")),
)


def version(number: str) -> VCPUSet:
    """WEB at another resourceVersion."""
    return replace(WEB, resource_version=number)


@pytest.fixture
def cache() -> Cache:
    """A cache that holds WEB at resourceVersion 100."""
    filled = Cache()
    assert filled.put(WEB)
    return filled


@pytest.mark.parametrize(
    ("number", "is_newer"),
    [
        pytest.param("100", False, id="the same"),
        pytest.param("99", False, id="older, though its text is greater"),
        pytest.param("1000", True, id="newer, though its text is smaller"),
        pytest.param("opaque", True, id="not a number: sent in order"),
    ],
)
def test_only_what_is_newer_is_stored(cache: Cache, number: str, is_newer: bool) -> None:
    cache.put(version(number))
    assert cache.get(WEB.uid) == (version(number) if is_newer else WEB)


def test_a_version_with_other_labels_annotations_or_managed_fields_only_is_no_news(cache: Cache) -> None:
    assert not cache.put(version("101"))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"generation": 2, "spec": replace(WEB.spec, vcpus=3)}, id="spec"),
        pytest.param({"generation": 2}, id="a field of the spec that this version does not know"),
        pytest.param({"status": Status(vcpus=99)}, id="the status, by another writer"),
    ],
)
def test_a_change_to_act_on_is_news(cache: Cache, changed: dict[str, Any]) -> None:
    assert cache.put(replace(version("101"), **changed))


def test_a_status_that_is_being_written_is_no_news_until_somebody_else_changes_it(cache: Cache) -> None:
    ours = replace(version("101"), status=Status(vcpus=2))
    theirs = replace(version("102"), status=Status(vcpus=99))
    with cache.expecting(WEB.uid, ours.status):
        assert not cache.put(ours)
        assert cache.get(WEB.uid) == ours
        assert cache.put(theirs)
    assert cache.put(replace(ours, resource_version="103")), "it is expected once"


def test_a_change_of_the_spec_is_news_also_together_with_a_status_that_is_being_written(cache: Cache) -> None:
    """The watch may skip a version, after a break."""
    both = replace(version("102"), generation=2, status=Status(vcpus=2))
    with cache.expecting(WEB.uid, both.status):
        assert cache.put(both)


def test_the_same_version_with_other_contents_is_news(cache: Cache) -> None:
    """A watch that began before the definition was upgraded tells a new set without its new fields."""
    whole = replace(WEB, spec=replace(WEB.spec, suspend=True))
    assert cache.put(whole)
    assert cache.get(WEB.uid) == whole
    assert not cache.put(replace(whole))


def test_a_dropped_set_is_gone(cache: Cache) -> None:
    assert cache.drop(WEB.uid) == WEB
    assert cache.get(WEB.uid) is None
    assert (len(cache), list(cache)) == (0, [])
    assert cache.drop(WEB.uid) is None


@pytest.mark.parametrize("late", ["99", "100"])
def test_a_late_report_does_not_bring_a_dropped_set_back(cache: Cache, late: str) -> None:
    cache.drop(WEB.uid)
    assert not cache.put(version(late))
    assert len(cache) == 0


def test_a_dropped_set_comes_back_with_a_later_version(cache: Cache) -> None:
    cache.drop(WEB.uid)
    assert cache.put(version("101"))
    assert cache.get(WEB.uid) == version("101")


def test_a_deleted_set_is_not_served_although_its_object_is_still_there(cache: Cache) -> None:
    deleted = replace(WEB, resource_version="101", deleting=True)
    assert cache.put(deleted)
    assert cache.get(WEB.uid) is None
    assert (len(cache), list(cache)) == (0, [])
    assert cache.terminating(WEB.uid) == deleted
    assert cache.versions() == {WEB.uid: "101"}

    assert not cache.put(WEB)
    assert cache.drop(WEB.uid) == deleted
    assert cache.terminating(WEB.uid) is None


def test_the_deletion_is_the_end_for_those_who_follow_which_sets_are_served() -> None:
    told: list[tuple[VCPUSet | None, VCPUSet | None]] = []
    cache = Cache(lambda before, after: told.append((before, after)))
    cache.put(WEB)
    cache.put(replace(WEB, resource_version="101", deleting=True))
    cache.put(replace(WEB, resource_version="102", deleting=True))
    cache.drop(WEB.uid)
    assert told == [(None, WEB), (WEB, None)]


def test_another_set_of_the_same_name_is_another_set(cache: Cache) -> None:
    cache.drop(WEB.uid)
    successor = replace(WEB, uid=UID("0000-2"), resource_version="5")
    assert cache.put(successor)
    assert list(cache) == [successor]


def test_sets_may_be_dropped_while_the_cache_is_walked_through(cache: Cache) -> None:
    cache.put(replace(WEB, uid=UID("0000-2")))
    for vcpuset in cache:
        cache.drop(vcpuset.uid)
    assert len(cache) == 0
