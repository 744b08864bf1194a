"""What an observation makes of the requests on the book."""

from dataclasses import replace
from datetime import timedelta

import pytest

from unit.domain.builders import NOW, a_machine, a_request, a_slot, ago
from vcpuset.domain.machine import Answer
from vcpuset.domain.requests import answered, asked, carried_over, cpu_of, due_at, revived, still_open, withdrawn
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
BOOK = Status(machine_uuid=OURS, pending_unplugs=(a_request(4, at=ago(9)), a_request(5, at=ago(2))))


def test_what_another_machine_was_asked_is_void_even_with_the_same_paths_and_threads() -> None:
    assert carried_over(BOOK, replace(MACHINE, uuid=OURS), NOW) == BOOK.pending_unplugs
    assert carried_over(BOOK, replace(MACHINE, uuid="0f0b7a64-9d61-44a3-a0e9-6d6f7b3f0f0b"), NOW) == ()
    assert carried_over(BOOK, replace(MACHINE, uuid=None), NOW) == ()


def test_what_was_asked_before_the_monitors_socket_was_made_is_void() -> None:
    restarted = replace(MACHINE, uuid=OURS, since=ago(5))
    assert carried_over(BOOK, restarted, NOW) == (a_request(5, at=ago(2)),)


def test_a_socket_from_the_future_voids_nothing_for_then_the_clock_was_set_back() -> None:
    odd = replace(MACHINE, uuid=OURS, since=NOW + timedelta(hours=1))
    assert carried_over(BOOK, odd, NOW) == BOOK.pending_unplugs


def test_an_answer_is_kept_until_there_is_another() -> None:
    requests = (a_request(4, answer=Answer.IN_PROGRESS), a_request(5))
    news = {5: Answer.IN_USE}

    found = answered(requests, lambda request: news.get(request.slot))
    later = answered(found, lambda request: {4: Answer.BUSY}.get(request.slot))

    assert [request.answer for request in found] == [Answer.IN_PROGRESS, Answer.IN_USE]
    assert [request.answer for request in later] == [Answer.BUSY, Answer.IN_USE]


def test_asking_starts_an_entry_or_counts_one_up_and_forgets_its_answer() -> None:
    before = (a_request(5, at=ago(400), attempts=2, answer=Answer.IN_USE),)

    book = asked(before, [a_slot(5, "plugged"), a_slot(4, "plugged"), a_slot(1, "boot")], NOW)

    assert book == (a_request(1, boot=True), a_request(4), a_request(5, attempts=3))


def test_a_request_that_was_not_sent_leaves_the_book_as_it_was() -> None:
    before = (a_request(3, at=ago(5)), a_request(5, at=ago(400), attempts=2, answer=Answer.IN_USE))
    book = asked(before, [a_slot(5, "plugged"), a_slot(4, "plugged")], NOW)
    unsent = {cpu_of(a_slot(5, "plugged")): before[1], cpu_of(a_slot(4, "plugged")): None}

    assert withdrawn(book, unsent) == withdrawn(before, unsent) == before
    assert withdrawn(book, {}) == book


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

    assert due_at(request, Unplug(retry_seconds=300), woken={cpu_of(request)}) == NOW + timedelta(seconds=seconds)


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
    ("later", "revives"),
    [
        pytest.param(a_request(5, at=ago(2), answer=Answer.IN_USE), True, id="refused"),
        pytest.param(a_request(5, at=ago(2), answer=Answer.IN_PROGRESS), True, id="in progress"),
        pytest.param(None, True, id="carried out"),
        pytest.param(a_request(5, at=ago(2)), False, id="unanswered too"),
        pytest.param(a_request(5, at=ago(2), answer=Answer.REJECTED), False, id="rejected by QEMU"),
    ],
)
def test_a_request_is_revived_by_the_answer_to_a_later_one(later: Request | None, revives: bool) -> None:
    recorded = [a_request(4, at=ago(9)), a_request(3, at=ago(9), answer=Answer.BUSY), a_request(5, at=ago(2))]
    still_there = [*recorded[:2], *([] if later is None else [later])]

    assert revived(recorded, still_there) == ({cpu_of(recorded[0])} if revives else set())


def test_requests_of_one_moment_do_not_revive_each_other() -> None:
    recorded = [a_request(4), a_request(5)]

    assert revived(recorded, recorded[:1]) == set()


def test_a_request_that_a_sign_has_made_due_counts_from_one_again() -> None:
    request = a_request(4, at=ago(400), attempts=7)

    assert asked([request], [a_slot(4, "plugged")], NOW, {cpu_of(request)}) == (a_request(4),)


def test_a_cpu_is_its_path_and_its_thread() -> None:
    assert cpu_of(a_request(4)) == cpu_of(a_slot(4, "plugged")) != cpu_of(a_slot(4, "boot"))
