"""What an observation means: run states, slots, `_OST` reports."""

from dataclasses import replace

import pytest

from unit.domain.builders import a_machine, a_slot
from vcpuset.domain.machine import Activity, Answer, Ost

__all__: list[str] = []


@pytest.mark.parametrize(
    ("run_state", "migrating", "activity"),
    [
        ("running", False, Activity.CHANGEABLE),
        ("paused", False, Activity.CHANGEABLE),
        ("prelaunch", False, Activity.BUSY),
        ("running", True, Activity.BUSY),
        ("inmigrate", False, Activity.BUSY),
        ("finish-migrate", False, Activity.BUSY),
        ("save-vm", False, Activity.BUSY),
        ("suspended", False, Activity.BUSY),
        ("colo", False, Activity.BUSY),
        ("a-state-of-a-later-qemu", False, Activity.BUSY),
        ("shutdown", False, Activity.OVER),
        ("guest-panicked", False, Activity.OVER),
        ("internal-error", False, Activity.OVER),
        ("postmigrate", False, Activity.OVER),
        ("postmigrate", True, Activity.OVER),
        ("watchdog", False, Activity.OVER),
    ],
)
def test_a_run_state_says_whether_cpus_can_be_changed(run_state: str, migrating: bool, activity: Activity) -> None:
    assert a_machine(run_state=run_state, migrating=migrating).activity is activity


@pytest.mark.parametrize(
    ("ost", "answer"),
    [
        pytest.param(Ost(3, 0x81), Answer.IN_USE, id="in use"),
        pytest.param(Ost(3, 0x82), Answer.BUSY, id="busy"),
        pytest.param(Ost(3, 0x80), Answer.NOT_SUPPORTED, id="not supported"),
        pytest.param(Ost(0x103, 0x84), Answer.IN_PROGRESS, id="in progress"),
        pytest.param(Ost(3, 1), Answer.FAILURE, id="failure"),
        pytest.param(Ost(3, 0x77), Answer.OTHER, id="a code that ACPI does not define is a no"),
        pytest.param(Ost(3, 0), None, id="success is shown by the CPU's absence"),
        pytest.param(Ost(1, 0x81), None, id="about a plug"),
    ],
)
def test_an_ost_report_is_an_answer_to_an_eject_only(ost: Ost, answer: Answer | None) -> None:
    assert ost.answer is answer


@pytest.mark.parametrize("answer", list(Answer))
def test_every_answer_has_words_and_only_progress_leaves_the_request_open(answer: Answer) -> None:
    assert answer.words
    assert answer.refused == (answer is not Answer.IN_PROGRESS)


def test_floor_and_ceiling_are_what_the_slots_allow() -> None:
    machine = a_machine(boot=[0, 1], plugged=[4], slots=6)

    assert (machine.floor, machine.vcpus, machine.ceiling) == (1, 3, 6)


def test_with_whole_cores_floor_and_ceiling_count_their_threads() -> None:
    machine = a_machine(boot=[0], plugged=[1], slots=4, threads=4)

    assert (machine.floor, machine.vcpus, machine.ceiling) == (4, 8, 16)


def test_s390x_gives_nothing_back() -> None:
    machine = a_machine(arch="s390x", boot=[0], plugged=[1, 2], ost=None)

    assert machine.unpluggable == ()
    assert machine.floor == 3


def test_a_machine_whose_cpus_share_one_thread_gives_nothing_back() -> None:
    machine = a_machine(boot=[0, 1], plugged=[4])
    assert machine.slots is not None
    shared = replace(machine, slots=tuple(replace(each, thread_id=each.thread_id and 7) for each in machine.slots))

    assert not machine.one_thread
    assert shared.one_thread
    assert (shared.unpluggable, shared.floor, shared.ceiling) == ((), 3, 8)
    assert not a_machine(boot=[0]).one_thread


def test_without_slots_floor_and_ceiling_are_what_is_there() -> None:
    machine = a_machine(slots=None, vcpus=4)

    assert (machine.floor, machine.ceiling, machine.occupied, machine.free) == (4, 4, (), ())


@pytest.mark.parametrize(
    ("arch", "ost", "takes"),
    [
        pytest.param("x86_64", {}, False, id="x86 in legacy mode"),
        pytest.param("i386", {}, False, id="i386 in legacy mode"),
        pytest.param("x86_64", {0: Ost(0, 0)}, True, id="x86 whose firmware has come up"),
        pytest.param("x86_64", None, True, id="x86 without the query: device_del will tell"),
        pytest.param("ppc64", None, True, id="no ACPI at all"),
    ],
)
def test_an_x86_guest_takes_requests_once_its_firmware_has_come_up(
    arch: str, ost: dict[int, Ost] | None, takes: bool
) -> None:
    assert a_machine(arch=arch, ost=ost).guest_accepts_unplugs is takes


def test_only_a_cpu_that_came_without_an_id_is_a_boot_cpu() -> None:
    assert a_slot(1, "boot").boot
    assert not a_slot(1, "plugged").boot
    assert not a_slot(1, None).boot
