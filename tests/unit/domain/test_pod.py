"""What is asked of a VM's pod, and what it allows, whatever the kubelet does and whenever the operator starts again."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unit.domain.builders import NOW
from vcpuset.domain.pod import Attempt, Container, Pod, PodFindings, Resize, cores, decide, refused, the_pod
from vcpuset.domain.reasons import Reason
from vcpuset.domain.resource import PodCPU, VMPod

SPEC = VMPod("vm=web", "qemu", PodCPU(1000, 200), timeout_seconds=60)


def a_pod(size: int, actual: int | None = None, **fields: object) -> Pod:
    """A pod whose container has this limit and request, and so much in force."""
    container = Container("qemu", size, size, size if actual is None else actual)
    return replace(Pod("uid", "web", (container,)), **fields)  # type: ignore[arg-type]


class World:
    """A pod, its kubelet, and a machine; `work` is one pass of the operator."""

    def __init__(self, vcpus: int) -> None:
        assert SPEC.cpu is not None
        self.cpu = SPEC.cpu
        self.now = NOW
        self.present = self.target = vcpus
        self.pod = a_pod(self.cpu.needed(vcpus))
        self.attempt: Attempt | None = None
        self.meaning = PodFindings()
        self.requests = 0

    @property
    def container(self) -> Container:
        """The container of QEMU."""
        return self.pod.containers[0]

    def work(self) -> None:
        """One pass: resize the pod, and plug what it allows."""
        for _ in range(3):
            resize, self.attempt, self.meaning = decide(
                SPEC, self.pod, present=self.present, target=self.target, attempt=self.attempt, now=self.now
            )
            if resize is None:
                break
            self.requests += 1
            container = replace(self.container, request=resize.request, limit=resize.limit)
            # The kubelet's status is about the size before.
            self.pod = replace(self.pod, containers=(container,), seen=False)
        else:
            raise AssertionError("it never comes to rest")
        allowed = self.target if self.meaning.sufficient_for is None else self.meaning.sufficient_for
        self.present = max(self.present, min(self.target, allowed))

    def obey(self) -> None:
        """The kubelet brings the size into force."""
        container = replace(self.container, actual=self.container.limit)
        self.pod = replace(self.pod, containers=(container,), seen=True, pending=None, busy=False, error=None)

    def refuse(self, reason: str) -> None:
        """The kubelet does not, if that would be more."""
        if (self.container.limit or 0) > (self.container.actual or 0):
            self.pod = replace(self.pod, seen=True, pending=(reason, "no room"))
        else:
            self.obey()

    def give_back(self) -> None:
        """The guest unplugs a vCPU, if too many are there."""
        self.present -= self.present > self.target

    def restart(self) -> None:
        """Another process takes over."""
        self.attempt = None


STEPS = st.one_of(
    st.sampled_from(
        [
            World.work,
            World.obey,
            World.give_back,
            World.restart,
            lambda world: world.refuse("Deferred"),
            lambda world: world.refuse("Infeasible"),
        ]
    ),
    st.integers(1, 16).map(lambda target: lambda world: setattr(world, "target", target)),
    st.sampled_from([1, 30, 61]).map(
        lambda seconds: lambda world: setattr(world, "now", world.now + timedelta(seconds=seconds))
    ),
)


@given(st.integers(1, 8), st.lists(STEPS, max_size=40))
def test_the_pod_may_always_use_what_is_plugged_and_ends_at_the_size_of_the_target(vcpus: int, steps: list) -> None:  # type: ignore[type-arg]
    world = World(vcpus)
    for step in steps:
        step(world)
        assert (world.container.actual or 0) >= world.cpu.needed(world.present)
        assert (world.container.limit or 0) >= world.cpu.needed(world.present)
    for _ in range(20):
        world.now += timedelta(seconds=SPEC.timeout_seconds / 2)
        world.work()
        world.obey()
        world.give_back()
    assert world.present == world.target
    assert world.container.actual == world.container.limit == world.cpu.needed(world.target)
    assert world.meaning == PodFindings(world.target)


def test_a_pod_of_the_right_size_is_left_alone() -> None:
    world = World(4)
    world.work()
    assert (world.requests, world.meaning) == (0, PodFindings(4))


def test_nothing_is_plugged_while_the_kubelet_has_not_confirmed() -> None:
    world = World(2)
    world.target = 4
    world.work()
    assert (world.container.limit, world.present) == (4200, 2)
    world.pod = replace(world.pod, seen=True, busy=True, containers=(replace(world.container, actual=4200),))
    world.work()
    assert world.present == 2
    assert world.meaning.trouble == (Reason.PLUGGING, "the CPU of the pod web is being raised to 4200m")
    assert world.meaning.due is not None
    world.obey()
    world.work()
    assert world.present == 4


def test_a_deferred_size_is_taken_back_after_the_timeout_and_requested_again_after_another() -> None:
    world = World(2)
    world.target = 4
    world.work()
    world.refuse("Deferred")
    world.work()
    assert world.meaning.trouble == (
        Reason.POD_RESIZE_DEFERRED,
        "the pod web does not get 4200m CPUs yet: no room",
    )
    world.now += timedelta(seconds=60)
    world.work()
    assert world.container.limit == 2200
    assert world.meaning.trouble is not None
    assert "the request is taken back, and repeated after 60 s" in world.meaning.trouble[1]
    assert world.meaning.due == world.now + timedelta(seconds=60)
    world.obey()
    world.now += timedelta(seconds=60)
    world.work()
    assert world.container.limit == 4200


def test_a_size_that_may_not_be_lowered_does_not_put_off_the_next_request_for_a_larger_one() -> None:
    pod, times = a_pod(3000), [NOW + timedelta(seconds=seconds) for seconds in (0, 20, 40, 60)]
    attempt: Attempt | None = None
    sizes = []
    for now in times:
        resize, attempt, _ = decide(SPEC, pod, present=2, target=4, attempt=attempt, now=now)
        assert resize is not None
        assert attempt is not None
        sizes.append(resize.limit)
        attempt, _ = refused(SPEC, attempt, "no", now)
    assert sizes == [4200, 2200, 2200, 4200]


def test_an_infeasible_size_is_taken_back_at_once_and_another_count_is_tried_at_once() -> None:
    world = World(2)
    world.target = 4
    world.work()
    world.refuse("Infeasible")
    world.work()
    assert world.container.limit == 2200
    assert world.meaning.trouble is not None
    assert world.meaning.trouble[0] is Reason.POD_RESIZE_INFEASIBLE
    world.target = 3
    world.work()
    assert world.container.limit == 3200


@pytest.mark.parametrize(
    ("answer", "reason"), [("Deferred", Reason.POD_RESIZE_DEFERRED), ("Infeasible", Reason.POD_RESIZE_INFEASIBLE)]
)
def test_a_node_that_never_has_room_is_reported_once_however_often_it_is_asked(answer: str, reason: Reason) -> None:
    world = World(2)
    world.target = 4
    troubles = []
    for _ in range(30):
        world.work()
        troubles.append(world.meaning.trouble)
        world.refuse(answer)
        world.work()
        troubles.append(world.meaning.trouble)
        world.refuse(answer)
        world.now += timedelta(seconds=20)
    last = troubles[-1]
    assert last is not None
    assert last[0] is reason
    assert set(troubles[troubles.index(last) :]) == {last}
    assert world.requests >= 10


def test_a_node_that_has_room_after_all_is_not_reported_as_one_that_has_none() -> None:
    world = World(2)
    world.target = 4
    world.work()
    world.refuse("Infeasible")
    world.work()
    world.now += timedelta(seconds=60)
    world.work()
    world.refuse("Deferred")
    world.work()
    assert world.meaning.trouble == (Reason.POD_RESIZE_DEFERRED, "the pod web does not get 4200m CPUs yet: no room")
    world.obey()
    world.work()
    assert world.present == 4


@pytest.mark.parametrize(
    ("answer", "reason"), [("Deferred", Reason.POD_RESIZE_DEFERRED), ("Infeasible", Reason.POD_RESIZE_INFEASIBLE)]
)
def test_a_pod_that_is_too_small_for_the_present_count_is_raised_and_what_delays_that_is_reported(
    answer: str, reason: Reason
) -> None:
    world = World(4)
    world.pod = a_pod(2000)
    world.work()
    assert (world.container.limit, world.meaning) == (4200, PodFindings(4))
    world.refuse(answer)
    world.work()
    assert world.meaning == PodFindings(4, (reason, "the pod web does not get 4200m CPUs yet: no room"))
    # Something else of the pod is pending.
    world.pod = replace(world.pod, containers=(replace(world.container, actual=4200),))
    world.work()
    assert world.meaning == PodFindings(4)


def test_the_timeout_starts_when_something_waits_for_the_pod() -> None:
    world = World(4)
    world.work()
    world.now += timedelta(hours=1)
    # QEMU's container starts again: the kubelet reports no size for a moment.
    world.present = 1
    world.pod = replace(world.pod, containers=(replace(world.container, actual=None),))
    world.work()
    assert world.meaning.trouble == (Reason.PLUGGING, "the CPU of the pod web is being raised to 4200m")
    assert world.requests == 0, "taken back"
    world.obey()
    world.work()
    assert world.present == 4


@pytest.mark.parametrize(
    ("request_", "limit", "vcpus", "expected"),
    [
        (2200, 2200, 4, (4200, 4200)),
        (1100, 2200, 4, (2100, 4200)),
        (None, 2200, 4, (None, 4200)),
        (2200, None, 4, (4200, None)),
        (2199, 2200, 1, (1199, 1200)),
        (1, 2200, 1, (1, 1200)),
    ],
)
def test_request_and_limit_keep_their_relation_and_the_pod_its_qos_class(
    request_: int | None, limit: int | None, vcpus: int, expected: tuple[int | None, int | None]
) -> None:
    pod = Pod("uid", "web", (Container("qemu", request_, limit, 2200),))
    resize, _, _ = decide(SPEC, pod, present=vcpus, target=vcpus, attempt=None, now=NOW)
    assert resize == Resize(pod, "qemu", *expected)


def test_many_matching_pods_are_named_but_not_all() -> None:
    found = the_pod(SPEC, [replace(a_pod(1), name=f"web-{number}") for number in range(7)])
    assert isinstance(found, PodFindings)
    assert found.trouble is not None
    assert "7 running pods" in found.trouble[1]
    assert "web-0, web-1, web-2, web-3, web-4 and 2 more" in found.trouble[1]


@pytest.mark.parametrize(("millicores", "text"), [(1000, "1"), (2500, "2500m"), (1, "1m"), (64000, "64")])
def test_sizes_are_written_as_kubernetes_writes_them(millicores: int, text: str) -> None:
    assert cores(millicores) == text
