"""What observations and answers make of unplug requests."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from unit.domain.builders import NOW, a_machine, a_request, a_slot, ago
from vcpuset.domain.errors import CommandRefused
from vcpuset.domain.machine import Answer, Machine, Ost
from vcpuset.domain.requests import Ledger, cpu_of, due_at, requested, still_open
from vcpuset.domain.resource import Request, Status, Unplug

__all__: list[str] = []

MACHINE = a_machine(plugged=[4, 5])


def test_a_request_is_open_while_its_cpu_is_there() -> None:
    requests = (a_request(4, at=ago(9)), a_request(1, boot=True, at=ago(8), answer=Answer.BUSY))

    assert still_open(requests, MACHINE, NOW) == requests


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(a_request(6), id="the slot is free"),
        pytest.param(a_request(4, thread_id=77), id="another CPU is in the slot, or another QEMU runs"),
        pytest.param(a_request(4, boot=True), id="the CPU in the slot has another path"),
    ],
)
def test_a_request_is_void_once_its_cpu_is_gone(request_: Request) -> None:
    assert still_open([request_], MACHINE, NOW) == ()


def test_a_request_goes_by_its_cpu_even_if_its_slot_is_counted_otherwise() -> None:
    odd = Request(9, *cpu_of(a_slot(4, "plugged")), ago(9))

    (kept,) = still_open([odd], MACHINE, NOW)

    assert kept.slot == 4


def test_after_the_clock_was_set_back_a_request_was_made_now() -> None:
    (kept,) = still_open([a_request(4, at=NOW + timedelta(hours=1))], MACHINE, NOW)

    assert kept.requested_at == NOW


OURS = "a9e0cd9c-8b8a-4a92-9a4b-0e6c3c3a8b5c"
RECORDED = Status(machine_uuid=OURS, pending_unplugs=(a_request(4, at=ago(9)), a_request(5, at=ago(2))))
BUSY = Ost(0x103, 0x82)
IN_PROGRESS = Ost(0x103, 0x84)


def a_ledger(*recorded: Request) -> Ledger:
    """The ledger of a process that began with these in the status of `MACHINE`."""
    return Ledger.of(Status(pending_unplugs=recorded), MACHINE, NOW)


def reports(**ost: Ost) -> Machine:
    """`MACHINE` with these `_OST` reports, by "slot<index>"."""
    return replace(MACHINE, ost={int(name.removeprefix("slot")): report for name, report in ost.items()})


def nothing(_: int) -> None:
    """No answer by event."""


# --- which requests a process takes up ------------------------------------------------------------------------------


def test_what_another_machine_received_is_void_even_with_the_same_paths_and_threads() -> None:
    assert Ledger.of(RECORDED, replace(MACHINE, uuid=OURS), NOW).requests == RECORDED.pending_unplugs
    assert Ledger.of(RECORDED, replace(MACHINE, uuid="0f0b7a64-9d61-44a3-a0e9-6d6f7b3f0f0b"), NOW).requests == ()
    assert Ledger.of(RECORDED, replace(MACHINE, uuid=None), NOW).requests == ()


def test_what_was_sent_before_the_monitors_socket_was_made_is_void() -> None:
    restarted = replace(MACHINE, uuid=OURS, since=ago(5))
    assert Ledger.of(RECORDED, restarted, NOW).requests == (a_request(5, at=ago(2)),)


def test_a_socket_from_the_future_voids_nothing_for_then_the_clock_was_set_back() -> None:
    odd = replace(MACHINE, uuid=OURS, since=NOW + timedelta(hours=1))
    assert Ledger.of(RECORDED, odd, NOW).requests == RECORDED.pending_unplugs


def test_only_the_first_observation_of_a_process_takes_up_what_is_recorded() -> None:
    """What this process has recorded and not sent is due at once."""
    ledger = a_ledger()
    ledger.observe(Status(pending_unplugs=(a_request(4),)), None, MACHINE, NOW)
    assert ledger.requests == ()


@pytest.mark.parametrize(
    ("address", "machine", "kept"),
    [
        pytest.param("a.sock", MACHINE, 2, id="the same QEMU"),
        pytest.param("a.sock", replace(MACHINE, since=ago(5)), 0, id="another QEMU on the same socket"),
        pytest.param("a.sock", replace(MACHINE, uuid=OURS), 0, id="another UUID"),
        pytest.param("b.sock", replace(MACHINE, since=ago(5)), 1, id="another socket: what is older than it is void"),
        pytest.param("b.sock", MACHINE, 2, id="another address of which nothing is known"),
    ],
)
def test_another_qemu_has_none_of_the_requests(address: str, machine: Machine, kept: int) -> None:
    ledger = Ledger()
    ledger.observe(Status(pending_unplugs=(a_request(4, at=ago(9)), a_request(5, at=ago(2)))), "a.sock", MACHINE, NOW)
    ledger.observe(Status(), address, machine, NOW)
    assert len(ledger.requests) == kept


def test_a_cpu_that_has_left_is_counted_once() -> None:
    ledger = a_ledger(a_request(4), a_request(5))
    without = a_machine(plugged=[5])
    assert ledger.observe(Status(), None, without, NOW) == 1
    assert ledger.observe(Status(), None, without, NOW) == 0
    assert ledger.requests == (a_request(5),)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_kept_until_there_is_another() -> None:
    ledger = a_ledger(a_request(4, answer=Answer.IN_PROGRESS), a_request(5))

    ledger.hear({5: Answer.IN_USE}.get)
    assert [request.answer for request in ledger.requests] == [Answer.IN_PROGRESS, Answer.IN_USE]

    ledger.hear({4: Answer.BUSY}.get)
    assert [request.answer for request in ledger.requests] == [Answer.BUSY, Answer.IN_USE]


def test_a_report_that_stood_before_a_request_was_sent_is_no_answer_to_it() -> None:
    ledger = a_ledger()
    ledger.send(a_request(4), BUSY)

    ledger.hear(nothing, reports(slot4=BUSY))
    assert ledger.requests == (a_request(4),)

    ledger.hear(nothing, reports(slot4=Ost(0x103, 0x81)))
    assert ledger.requests == (a_request(4, answer=Answer.IN_USE),)


@pytest.mark.parametrize(("report", "answer"), [(BUSY, None), (IN_PROGRESS, Answer.IN_PROGRESS)])
def test_to_a_predecessors_request_no_report_is_an_answer_but_that_the_guest_is_at_work(
    report: Ost, answer: Answer | None
) -> None:
    ledger = a_ledger(a_request(4))
    ledger.hear(nothing, reports(slot4=report))
    assert ledger.requests == (a_request(4, answer=answer),)


def test_what_qemu_has_rejected_stays_so_whatever_is_reported_of_its_slot() -> None:
    ledger, error = a_ledger(), CommandRefused("device_del", "GenericError", "no")
    ledger.send(a_request(4), None)
    ledger.reject(a_request(4), error)

    ledger.hear({4: Answer.BUSY}.get, reports(slot4=BUSY))

    assert ledger.requests == (a_request(4, answer=Answer.REJECTED),)
    assert ledger.rejection is error


def test_once_no_cpu_is_too_many_refusals_are_forgotten_and_what_may_still_leave_is_not() -> None:
    ledger = a_ledger(a_request(4, answer=Answer.BUSY), a_request(5))
    ledger.forget_refusals()
    assert ledger.requests == (a_request(5),)


# --- new requests -----------------------------------------------------------------------------------------------------


def test_a_request_starts_an_entry_or_counts_one_up_and_forgets_its_answer() -> None:
    before = (a_request(5, at=ago(400), attempts=2, answer=Answer.IN_USE),)

    after = requested(before, [a_slot(5, "plugged"), a_slot(4, "plugged"), a_slot(1, "boot")], NOW)

    assert after == (a_request(1, boot=True), a_request(4), a_request(5, attempts=3))


def test_a_request_that_is_withdrawn_leaves_what_was_there_before() -> None:
    before = (a_request(5, at=ago(400), attempts=2, answer=Answer.IN_USE),)
    ledger = a_ledger(*before)

    for request in requested(before, [a_slot(5, "plugged"), a_slot(4, "plugged")], NOW):
        ledger.send(request, None)()

    assert ledger.requests == before


@pytest.mark.parametrize(
    ("attempts", "answer", "retry", "seconds"),
    [
        pytest.param(1, None, 300, 5, id="unanswered"),
        pytest.param(1, Answer.IN_USE, 300, 5, id="refused"),
        pytest.param(2, None, 300, 10, id="unanswered twice"),
        pytest.param(6, Answer.BUSY, 300, 160, id="refused six times"),
        pytest.param(7, None, 300, 300, id="never after more than retrySeconds"),
        pytest.param(2**31 - 1, None, 86400, 86400, id="nor after any number of attempts"),
        pytest.param(1, None, 3, 3, id="a retrySeconds that is shorter than the first pause"),
        pytest.param(3, None, 3, 3, id="a retrySeconds that is shorter than the first pause does not grow"),
        pytest.param(1, Answer.IN_PROGRESS, 300, 300, id="the guest is at work on it"),
        pytest.param(1, Answer.REJECTED, 300, 300, id="QEMU rejected it"),
    ],
)
def test_a_request_falls_due_after_a_pause(attempts: int, answer: Answer | None, retry: int, seconds: int) -> None:
    request = a_request(4, attempts=attempts, answer=answer)

    assert due_at(request, Unplug(retry_seconds=retry)) == NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [(None, 5), (Answer.IN_USE, 5), (Answer.IN_PROGRESS, 5), (Answer.REJECTED, 300)],
)
def test_once_the_guest_has_given_a_sign_only_the_first_pause_counts(answer: Answer | None, seconds: int) -> None:
    request = a_request(4, attempts=9, answer=answer)

    assert due_at(request, Unplug(retry_seconds=300), early=True) == NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("attempts", "answer", "moved", "seconds"),
    [
        pytest.param(1, None, 8, 13, id="it comes to this one later"),
        pytest.param(2, None, 8, 18, id="it comes to this one later, as after each repetition"),
        pytest.param(1, None, 299, 300, id="up to retrySeconds"),
        pytest.param(1, None, -8, 5, id="that was before"),
        pytest.param(1, Answer.IN_USE, 8, 5, id="this one it has refused"),
    ],
)
def test_a_guest_that_carries_out_one_request_after_the_other_ignores_none(
    attempts: int, answer: Answer | None, moved: int, seconds: int
) -> None:
    request = a_request(4, attempts=attempts, answer=answer)

    due = due_at(request, Unplug(retry_seconds=300), moved=NOW + timedelta(seconds=moved))

    assert due == NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("answers", "gone", "early"),
    [
        pytest.param({5: Answer.IN_USE}, False, True, id="refused"),
        pytest.param({5: Answer.IN_PROGRESS}, False, True, id="in progress"),
        pytest.param({}, True, True, id="carried out"),
        pytest.param({}, False, False, id="unanswered too"),
        pytest.param({5: Answer.REJECTED}, False, False, id="rejected by QEMU"),
    ],
)
def test_an_answer_to_a_later_request_makes_an_unanswered_one_due_early(
    answers: dict[int, Answer], gone: bool, early: bool
) -> None:
    unanswered = a_request(4, at=ago(9))
    ledger = a_ledger(unanswered, a_request(1, boot=True, at=ago(9), answer=Answer.BUSY), a_request(5, at=ago(2)))

    ledger.hear(answers.get)
    ledger.observe(Status(), None, a_machine(plugged=[4] if gone else [4, 5]), NOW)

    assert ledger.early == ({cpu_of(unanswered)} if early else set())


def test_requests_of_one_moment_do_not_make_each_other_due_early() -> None:
    ledger = a_ledger(a_request(4), a_request(5))
    ledger.observe(Status(), None, a_machine(plugged=[4]), NOW)
    assert ledger.early == set()


def test_a_reset_makes_all_due_early_until_they_are_sent_again() -> None:
    ledger = a_ledger(a_request(4), a_request(5))
    ledger.hurry_up()
    ledger.send(a_request(5, attempts=2), None)
    assert ledger.early == {cpu_of(a_request(4))}


def test_a_request_that_was_due_early_counts_from_one_again() -> None:
    request = a_request(4, at=ago(400), attempts=7)

    assert requested([request], [a_slot(4, "plugged")], NOW, {cpu_of(request)}) == (a_request(4),)


# --- the time-out -----------------------------------------------------------------------------------------------------

OPEN = Status(observed_generation=4, unplug_started_at=ago(50))


@pytest.mark.parametrize(
    ("status", "generation", "surplus", "open_", "started"),
    [
        pytest.param(OPEN, 4, 1, True, ago(50), id="of this generation: it stands"),
        pytest.param(OPEN, 5, 1, True, NOW, id="of an earlier generation: counts again"),
        pytest.param(OPEN, 4, 0, True, None, id="at the target: none"),
        pytest.param(OPEN, 4, -1, True, None, id="below the target: none"),
        pytest.param(OPEN, 4, 1, False, None, id="nothing requested: none"),
        pytest.param(replace(OPEN, unplug_started_at=None), 4, 1, True, NOW, id="the first request"),
        pytest.param(
            replace(OPEN, unplug_started_at=NOW + timedelta(hours=1)), 4, 1, True, NOW, id="the clock was set back"
        ),
    ],
)
def test_the_time_out_counts_from_the_first_request_of_the_generation(
    status: Status, generation: int, surplus: int, open_: bool, started: datetime | None
) -> None:
    ledger = Ledger.of(status, MACHINE, NOW)
    assert ledger.started([a_request(4)] if open_ else [], generation, surplus, NOW) == started


def test_after_the_clock_was_set_back_the_time_out_counts_from_then() -> None:
    ledger = Ledger.of(replace(OPEN, unplug_started_at=NOW + timedelta(hours=1)), MACHINE, NOW)
    assert ledger.started([a_request(4)], 4, 1, NOW) == NOW
    assert ledger.started([a_request(4)], 4, 1, NOW + timedelta(seconds=60)) == NOW


def test_a_cpu_is_its_path_and_its_thread() -> None:
    assert cpu_of(a_request(4)) == cpu_of(a_slot(4, "plugged")) != cpu_of(a_slot(4, "boot"))
