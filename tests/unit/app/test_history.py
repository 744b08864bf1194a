"""What has become of changes, told by one status after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from unit.domain.builders import NOW, a_request, a_set, a_spec
from vcpuset.app.history import History
from vcpuset.domain.machine import Answer
from vcpuset.domain.resource import Condition, Request, Status, VCPUSet
from vcpuset.kube.cache import Cache

__all__: list[str] = []

pytestmark = pytest.mark.looptime


def reported(reason: str, *requests: Request, generation: int = 1, vcpus: int = 4) -> Status:
    """A status with this reason."""
    ready = Condition("Ready", "True" if reason == "Converged" else "False", reason, "…", NOW, generation)
    return Status(generation, vcpus, pending_unplugs=requests, conditions=(ready,))


class Told:
    """A History behind a cache, as in the operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.history = History(self.registry, asyncio.get_running_loop().time)
        self.cache = Cache(self.history.moved)
        self._version = 0

    def tell(self, generation: int, status: Status) -> VCPUSet:
        """The cache takes news of the set."""
        self._version += 1
        vcpuset = replace(a_set(a_spec(4), generation=generation, status=status), resource_version=str(self._version))
        assert self.cache.put(vcpuset)
        return vcpuset

    def value(self, name: str, **labels: str) -> float:
        """One sample."""
        found = self.registry.get_sample_value(name, labels)
        assert found is not None
        return found

    def converged(self) -> tuple[float, float]:
        """How many changes have converged, and how long they took together."""
        return self.value("vcpuset_convergence_seconds_count"), self.value("vcpuset_convergence_seconds_sum")


@pytest.fixture
def told() -> Callable[[], Told]:
    """Made inside of the test, where its loop runs."""
    return Told


async def test_a_new_set_is_timed_from_its_creation_to_ready(told: Callable[[], Told]) -> None:
    story = told()
    story.history.go_live()
    story.tell(1, Status())
    await asyncio.sleep(2)
    story.tell(1, reported("Plugging"))
    await asyncio.sleep(3)
    story.tell(1, reported("Converged"))
    assert story.converged() == (1, 5)


async def test_a_changed_set_is_timed_from_its_last_change(told: Callable[[], Told]) -> None:
    story = told()
    story.tell(1, reported("Converged"))
    story.history.go_live()
    await asyncio.sleep(100)
    story.tell(2, reported("Converged"))
    await asyncio.sleep(2)
    story.tell(3, reported("Plugging", generation=2))
    await asyncio.sleep(3)
    story.tell(3, reported("Converged", generation=2))
    assert story.converged() == (0, 0), "that was about the change before"
    await asyncio.sleep(4)
    story.tell(3, reported("Converged", generation=3))
    assert story.converged() == (1, 7)


async def test_a_change_that_is_older_than_this_process_is_not_timed(told: Callable[[], Told]) -> None:
    story = told()
    story.tell(2, reported("Converged", generation=1))
    story.history.go_live()
    await asyncio.sleep(5)
    assert story.history.waits() == {"uid-web": 5}
    story.tell(2, reported("Converged", generation=2))
    assert story.converged() == (0, 0)
    assert story.history.waits() == {}


async def test_a_set_that_is_ready_when_it_comes_has_not_converged_here(told: Callable[[], Told]) -> None:
    story = told()
    story.history.go_live()
    story.tell(1, reported("Converged"))
    assert story.converged() == (0, 0)
    assert story.history.waits() == {}


async def test_a_machine_that_drifts_and_returns_is_no_change_of_the_spec(told: Callable[[], Told]) -> None:
    story = told()
    story.history.go_live()
    story.tell(1, reported("Converged"))
    story.tell(1, reported("Plugging"))
    story.tell(1, reported("Converged"))
    assert story.converged() == (0, 0)


async def test_a_set_that_is_gone_is_forgotten(told: Callable[[], Told]) -> None:
    story = told()
    story.history.go_live()
    vcpuset = story.tell(1, Status())
    story.cache.drop(vcpuset.uid)
    assert story.history.waits() == {}


async def test_an_unplug_is_done_when_its_cpu_has_left(told: Callable[[], Told]) -> None:
    story = told()
    story.tell(1, reported("Unplugging", a_request(2), a_request(3), vcpus=4))
    story.tell(1, reported("Unplugging", a_request(2), vcpus=3))
    story.tell(1, reported("Converged", vcpus=2))
    assert story.value("vcpuset_unplugs_total", result="done") == 2


async def test_a_request_that_is_dropped_while_its_cpu_stays_is_not_done(told: Callable[[], Told]) -> None:
    story = told()
    story.tell(1, reported("Unplugging", a_request(3), vcpus=4))
    story.tell(2, reported("Converged", vcpus=4, generation=2))
    assert story.value("vcpuset_unplugs_total", result="done") == 0


async def test_requests_to_another_machine_are_not_done(told: Callable[[], Told]) -> None:
    story = told()
    story.tell(1, replace(reported("Unplugging", a_request(3), vcpus=4), machine_uuid="a"))
    story.tell(1, replace(reported("Converged", vcpus=2), machine_uuid="b"))
    assert story.value("vcpuset_unplugs_total", result="done") == 0


async def test_each_refusal_is_counted_once(told: Callable[[], Told]) -> None:
    story = told()
    story.tell(1, reported("Unplugging", a_request(3)))
    story.tell(1, reported("UnplugRefused", a_request(3, answer=Answer.BUSY)))
    story.tell(1, reported("UnplugRefused", a_request(3, answer=Answer.BUSY), vcpus=5))
    story.tell(1, reported("Unplugging", a_request(3, attempts=2)))
    story.tell(1, reported("UnplugRefused", a_request(3, attempts=2, answer=Answer.BUSY)))
    assert story.value("vcpuset_unplugs_total", result="refused") == 2


async def test_requests_time_out_once_and_can_be_done_later(told: Callable[[], Told]) -> None:
    story = told()
    story.tell(1, reported("UnplugPending", a_request(2), a_request(3)))
    story.tell(1, reported("UnplugTimedOut", a_request(2), a_request(3)))
    story.tell(1, reported("UnplugTimedOut", a_request(2, attempts=2), a_request(3)))
    story.tell(1, reported("Converged", vcpus=2))
    assert story.value("vcpuset_unplugs_total", result="timed_out") == 2
    assert story.value("vcpuset_unplugs_total", result="done") == 2
