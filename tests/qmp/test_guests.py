"""What guests say of their CPUs, asked for beside the passes: which answer counts, who is woken, how often is asked.

The agents are scripted and time is virtual; `vcpuset.qmp.agent` between them is the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typing_extensions import override

from harness.faults import Answer, Deaf, Delay, Error, Fault, Link
from harness.faultyagent import SYNC, FaultyAgent
from harness.wait import until
from vcpuset.domain.errors import AgentRefused, AgentTimeout, AgentUnreachable
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Machine, Slot
from vcpuset.domain.resource import UID, GuestAgent, Spec, UnixMonitor, VCPUSet
from vcpuset.qmp import files, ratelimiter
from vcpuset.qmp import guests as guests_module
from vcpuset.qmp.agent import AGENT_SECONDS
from vcpuset.qmp.guests import RETRY_SECONDS, Guests
from vcpuset.qmp.ratelimiter import WAKES_AT_ONCE, WAKES_PER_SECOND

pytestmark = pytest.mark.looptime

GET = "guest-get-vcpus"
SET = "guest-set-vcpus"

LONG = 600.0
"""Virtual seconds: longer than anything here takes."""


def a_set(path: str = "agent.sock", *, name: str = "vm", bring_online: bool = False, suspend: bool = False) -> VCPUSet:
    """A set of the namespace `team-a` whose guest's agent is at `path`."""
    return VCPUSet(
        uid=UID(f"uid-of-{name}"),
        namespace="team-a",
        name=name,
        generation=1,
        resource_version="1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        spec=Spec(vcpus=2, monitor=UnixMonitor("vm.sock"), guest_agent=GuestAgent(path, bring_online), suspend=suspend),
    )


def a_machine(*threads: int, uuid: str | None = None) -> Machine:
    """A machine with one CPU for each of these threads of QEMU."""
    slots = tuple(
        Slot(index, "cpu", {}, path=f"/machine/peripheral/vcpu{index}", thread_id=thread)
        for index, thread in enumerate(threads)
    )
    return Machine(run_state="running", arch="x86_64", vcpus=len(threads), slots=slots, uuid=uuid)


TWO = a_machine(11, 12)
THREE = a_machine(11, 12, 13)


class _NoThreads:
    """In place of `files.THREADS`: virtual time does not wait for threads."""

    def start(self, function: Callable[[], object]) -> asyncio.Future[object]:
        answer = asyncio.get_running_loop().create_future()
        try:
            answer.set_result(function())
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            answer.set_exception(error)
        return answer


@pytest.fixture(autouse=True)
def file_calls_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "THREADS", _NoThreads())


class Woken:
    """The sets that were woken, in that order, each at its loop time; `then` is what a woken pass does."""

    def __init__(self) -> None:
        self.uids: list[UID] = []
        self.times: list[float] = []
        self.then: Callable[[], object] = lambda: None

    def __call__(self, uid: UID) -> None:
        self.uids.append(uid)
        self.times.append(asyncio.get_running_loop().time())
        self.then()

    async def wait(self, count: int) -> None:
        """Wait until somebody was woken for the count-th time."""
        await until(lambda: len(self.uids) >= count, LONG, f"wake number {count}")
        assert len(self.uids) == count


class Holds(Fault):
    """No answer before the client gives up; notes when each client came, and how many waited at once."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_at: list[float] = []
        self.waiting = 0
        self.most = 0

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        self.asked_at.append(asyncio.get_running_loop().time())
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await link.left()
        self.waiting -= 1


class SecondFails(Fault):
    """The second answer is an error."""

    @override
    async def deliver(self, link: Link, answer: Answer) -> None:
        if self.struck == 2:
            answer = {"error": {"class": "GenericError", "desc": "no"}, "id": answer["id"]}
        await link.send(answer)


@pytest.fixture
def woken() -> Woken:
    return Woken()


@pytest.fixture
async def guests(namespace_folder: Path, woken: Woken) -> AsyncIterator[Guests]:
    made = Guests(namespace_folder.parent, woken)
    yield made
    await made.close()
    assert questions() == set()


@pytest.fixture
def path(namespace_folder: Path) -> Path:
    return namespace_folder / "agent.sock"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Agents that fail are told of in a report, and in no log."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


async def answer(guests: Guests, woken: Woken, vcpuset: VCPUSet, machine: Machine) -> GuestReport:
    """The guest's first answer about these CPUs."""
    assert guests.query(vcpuset, machine) is None
    await woken.wait(len(woken.uids) + 1)
    report = guests.query(vcpuset, machine)
    assert report is not None
    return report


def questions() -> set[asyncio.Task[object]]:
    """Those that are under way."""
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("guest of ")}


async def idle() -> None:
    """Wait until no question is under way."""
    await until(lambda: not questions(), LONG, "the answers")


def online(report: GuestReport | None) -> int:
    assert report is not None
    assert report.cpus is not None, report.error
    return report.cpus.online


# What an answer is about.


async def test_nothing_is_known_before_the_guest_has_answered_and_the_answer_wakes(
    guests: Guests, woken: Woken, path: Path
) -> None:
    async with FaultyAgent(path, offline={1}):
        report = await answer(guests, woken, a_set(), TWO)
        assert online(report) == 1
        assert report.cpus is not None
        assert (report.cpus.offline, report.error, report.resisted) == ((1,), None, {})
        assert woken.uids == [a_set().uid]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(THREE, id="one more CPU"),
        pytest.param(a_machine(11), id="one less"),
        pytest.param(a_machine(11, 99), id="the slot was emptied and filled again"),
        pytest.param(a_machine(11, 12, uuid="another"), id="another machine"),
    ],
)
async def test_an_answer_counts_for_no_other_cpus_than_those_that_were_asked_of(
    guests: Guests, woken: Woken, path: Path, other: Machine
) -> None:
    async with FaultyAgent(path, offline={1}) as agent:
        await answer(guests, woken, a_set(), TWO)
        await idle()
        agent.online.add(1)
        assert online(await answer(guests, woken, a_set(), other)) == 2
        await idle()
        assert guests.query(a_set(), TWO) is None, "the older answer is forgotten"


async def test_a_pass_is_woken_that_waits_while_a_question_about_other_cpus_ends_without_news(
    guests: Guests, woken: Woken, path: Path
) -> None:
    slow = Delay(1.0, times=2)
    async with FaultyAgent(path, offline={1}, faults={GET: slow}) as agent:
        await answer(guests, woken, a_set(), TWO)
        await until(lambda: slow.struck == 2, LONG, "the second question to be under way")
        assert guests.query(a_set(), THREE) is None
        assert len(agent.received(SYNC)) == 2, "one question at a time"
        await woken.wait(2)
        assert guests.query(a_set(), THREE) is None, "now it is asked"
        await woken.wait(3)
        assert online(guests.query(a_set(), THREE)) == 1


async def test_nobody_is_woken_by_an_answer_that_is_no_news(guests: Guests, woken: Woken, path: Path) -> None:
    async with FaultyAgent(path, offline={1}) as agent:
        await answer(guests, woken, a_set(), TWO)
        for number in range(2, 6):
            await idle()
            assert online(guests.query(a_set(), TWO)) == 1
            assert len(agent.received(SYNC)) <= number
        await idle()
        assert len(agent.received(SYNC)) == 6, "each observation asks again"
        assert len(woken.uids) == 1


async def test_news_wakes_although_the_cpus_are_the_same(guests: Guests, woken: Woken, path: Path) -> None:
    async with FaultyAgent(path, offline={1}) as agent:
        await answer(guests, woken, a_set(), TWO)
        await idle()
        agent.online.add(1)
        assert online(guests.query(a_set(), TWO)) == 1, "a pass does not wait: the next one will know"
        await woken.wait(2)
        assert online(guests.query(a_set(), TWO)) == 2


async def test_however_often_passes_come_a_guest_is_asked_one_question_at_a_time(
    guests: Guests, woken: Woken, path: Path
) -> None:
    async with FaultyAgent(path, faults={GET: Delay(1.0)}) as agent:
        for _ in range(50):
            assert guests.query(a_set(), TWO) is None
            await asyncio.sleep(0.01)
        await woken.wait(1)
        assert len(agent.received(SYNC)) == 1


# Agents that fail.


async def test_a_failure_is_remembered_for_whatever_cpus_and_asked_again_with_growing_pauses(
    guests: Guests, woken: Woken, path: Path
) -> None:
    machines = (a_machine(*range(11, 11 + count)) for count in itertools.count(2))
    woken.then = lambda: guests.query(a_set(), next(machines))
    hold = Holds()
    async with FaultyAgent(path, faults={SYNC: hold}):
        woken.then()
        wanted = [*RETRY_SECONDS, *RETRY_SECONDS[-1:] * 2]
        await until(lambda: len(hold.asked_at) > len(wanted), 4 * LONG, "the questions", interval=1.0)
        report = guests.query(a_set(), next(machines))
        assert report is not None
        assert isinstance(report.error, AgentTimeout)
        gaps = [later - earlier for earlier, later in itertools.pairwise(hold.asked_at)]
        assert gaps == pytest.approx([AGENT_SECONDS + pause for pause in wanted], abs=0.2)


async def test_an_agent_that_is_back_is_asked_after_the_pause_and_its_next_failure_begins_again(
    guests: Guests, woken: Woken, path: Path
) -> None:
    woken.then = lambda: guests.query(a_set(), TWO)
    woken.then()
    await until(lambda: len(woken.uids) == 3, LONG, "two pauses to be over")
    async with FaultyAgent(path):
        report = None
        while report is None or report.cpus is None:
            await asyncio.sleep(1.0)
            report = guests.query(a_set(), TWO)
        await idle()
    told = len(woken.times)
    woken.then()
    await until(lambda: len(woken.times) == told + 2, LONG, "the failure, and the end of its pause")
    assert woken.times[-1] - woken.times[-2] == pytest.approx(RETRY_SECONDS[0], abs=0.2)


async def test_an_agent_that_is_new_in_the_spec_is_asked_at_once_and_the_old_ones_pause_wakes_nobody(
    guests: Guests, woken: Woken, path: Path
) -> None:
    async with FaultyAgent(path, offline={1}):
        failed = await answer(guests, woken, a_set("elsewhere.sock"), TWO)
        assert failed.cpus is None
        report = await answer(guests, woken, a_set(), TWO)
        assert online(report) == 1
        assert woken.times[1] - woken.times[0] < RETRY_SECONDS[0]
        await asyncio.sleep(LONG)
        assert len(woken.uids) == 2


async def test_an_agent_that_is_new_in_the_spec_is_asked_although_the_old_one_has_not_answered(
    guests: Guests, woken: Woken, path: Path, namespace_folder: Path
) -> None:
    async with FaultyAgent(namespace_folder / "deaf.sock", faults={SYNC: Deaf()}) as deaf, FaultyAgent(path):
        assert guests.query(a_set("deaf.sock"), TWO) is None
        await until(lambda: deaf.received(SYNC), LONG, "the first question")
        begun = asyncio.get_running_loop().time()
        assert online(await answer(guests, woken, a_set(), TWO)) == 1
        assert woken.times[0] - begun < AGENT_SECONDS / 2, "virtual time: the old question did not have its own"
        await idle()
        await asyncio.sleep(LONG)
        assert len(woken.uids) == 1


async def test_the_agents_own_refusal_is_reported(guests: Guests, woken: Woken, path: Path) -> None:
    async with FaultyAgent(path, faults={GET: Error("CommandNotFound", "guest-get-vcpus is disabled")}):
        report = await answer(guests, woken, a_set(), TWO)
        assert isinstance(report.error, AgentRefused)
        assert "guest-get-vcpus is disabled" in str(report.error)


async def test_an_unexpected_exception_is_logged_and_reported_and_wakes(
    guests: Guests, woken: Woken, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(guests_module, "find_socket", broken)
    report = await answer(guests, woken, a_set(), TWO)
    assert isinstance(report.error, AgentUnreachable)
    assert "ZeroDivisionError('no such thing')" in str(report.error)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "querying the guest agent of team-a/vm failed unexpectedly" in record.getMessage()
    assert record.exc_info is not None
    caplog.clear()


# Bringing CPUs online.


async def test_cpus_that_the_guest_left_offline_are_brought_online_before_it_counts(
    guests: Guests, woken: Woken, path: Path
) -> None:
    async with FaultyAgent(path, offline={1, 2}) as agent:
        report = await answer(guests, woken, a_set(bring_online=True), THREE)
        assert online(report) == 3
        assert report.resisted == {}
        assert agent.online == {0, 1, 2}


@pytest.mark.parametrize(
    "vcpuset", [a_set(), a_set(bring_online=True, suspend=True)], ids=["not wanted", "the set is suspended"]
)
async def test_cpus_are_left_offline(guests: Guests, woken: Woken, path: Path, vcpuset: VCPUSet) -> None:
    async with FaultyAgent(path, offline={1, 2}) as agent:
        assert online(await answer(guests, woken, vcpuset, THREE)) == 1
        await idle()
        assert agent.received(SET) == []


async def test_bringing_cpus_online_ends_when_the_set_is_suspended(guests: Guests, woken: Woken, path: Path) -> None:
    async with FaultyAgent(path, offline=set(range(1, 8)), faults={SET: Delay(1.0)}) as agent:
        machine = a_machine(*range(11, 19))
        assert guests.query(a_set(bring_online=True), machine) is None
        await until(lambda: agent.received(SET), LONG, "the first batch")
        assert guests.query(a_set(bring_online=True, suspend=True), machine) is None
        await idle()
        await asyncio.sleep(LONG)
        assert len(agent.received(SET)) == 1


async def test_what_is_offline_is_left_so_while_there_are_too_many_or_the_machine_migrates(
    guests: Guests, woken: Woken, path: Path
) -> None:
    async with FaultyAgent(path, offline={1, 2}) as agent:
        vcpuset = a_set(bring_online=True)
        assert guests.query(vcpuset, THREE, surplus=True) is None
        await woken.wait(1)
        assert online(guests.query(vcpuset, THREE, surplus=True)) == 1
        await idle()
        assert guests.query(vcpuset, replace(THREE, migrating=True)) is not None
        await idle()
        assert agent.received(SET) == []
        assert online(guests.query(vcpuset, THREE)) == 1, "asked again, and now to be changed"
        await woken.wait(2)
        assert online(guests.query(vcpuset, THREE)) == 3


async def test_the_cpus_of_another_machines_guest_are_left_alone(guests: Guests, woken: Woken, path: Path) -> None:
    async with FaultyAgent(path, offline={2, 3, 4}) as agent:
        report = await answer(guests, woken, a_set(bring_online=True), TWO)
        assert report.cpus is not None
        assert len(report.cpus.cpus) > TWO.vcpus
        await idle()
        assert agent.received(SET) == []


async def test_cpus_that_the_guest_will_not_set_online_are_named_with_its_words(
    guests: Guests, woken: Woken, path: Path
) -> None:
    async with FaultyAgent(path, offline={1, 2}, faults={SET: Error("GenericError", "no such CPU")}):
        report = await answer(guests, woken, a_set(bring_online=True), THREE)
        assert online(report) == 1
        assert report.resisted.keys() == {1, 2}
        assert all("no such CPU" in words for words in report.resisted.values())


async def test_a_cpu_that_somebody_else_set_online_meanwhile_has_not_resisted(
    guests: Guests, woken: Woken, path: Path
) -> None:
    # Carried out although it is refused: as if the guest had done it by itself.
    late = Error("GenericError", "it is online", executes=True)
    async with FaultyAgent(path, offline={1}, faults={SET: late}):
        report = await answer(guests, woken, a_set(bring_online=True), TWO)
        assert online(report) == 2
        assert report.resisted == {}


# Where the agent is.


def _link(folder: Path) -> None:
    (folder / "agent.sock").symlink_to(folder / "real.sock")


def _folder_link(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "linked").symlink_to("real")


def _nobody(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "agent.sock"))


@pytest.mark.parametrize(
    ("path", "prepare", "words"),
    [
        ("../team-b/agent.sock", None, "must not leave the namespace's directory"),
        ("vm/../../team-b/agent.sock", None, "must not leave the namespace's directory"),
        ("/run/agent.sock", None, "is absolute"),
        ("agent.sock", _link, "is a symbolic link, not a socket"),
        ("linked/agent.sock", _folder_link, "is a symbolic link, not a directory"),
        ("agent.sock", lambda folder: (folder / "agent.sock").touch(), "is a regular file, not a socket"),
        ("agent.sock", None, "there is no team-a/agent.sock below the socket root (yet): check that QEMU is running"),
    ],
    ids=["parent", "parent inside", "absolute", "link", "linked folder", "file", "missing"],
)
async def test_an_agent_socket_that_may_or_can_not_be_opened_is_unreachable_and_the_field_is_named(
    guests: Guests,
    woken: Woken,
    namespace_folder: Path,
    path: str,
    prepare: Callable[[Path], None] | None,
    words: str,
) -> None:
    if prepare is not None:
        prepare(namespace_folder)
    async with FaultyAgent(namespace_folder / "real.sock") as agent:
        report = await answer(guests, woken, a_set(path), TWO)
        assert agent.received(SYNC) == []
    assert isinstance(report.error, AgentUnreachable)
    assert str(report.error).startswith("spec.guestAgent.unix.path")
    assert str(report.error).count("spec.guestAgent") == 1
    assert words in str(report.error)


async def test_a_socket_without_a_listener_is_unreachable(guests: Guests, woken: Woken, namespace_folder: Path) -> None:
    _nobody(namespace_folder)
    report = await answer(guests, woken, a_set(), TWO)
    assert isinstance(report.error, AgentUnreachable)
    assert "nothing listens at team-a/agent.sock" in str(report.error)


async def test_without_a_socket_root_no_agent_can_be_asked_and_the_option_is_named(woken: Woken) -> None:
    guests = Guests(None, woken)
    report = await answer(guests, woken, a_set(), TWO)
    assert isinstance(report.error, AgentUnreachable)
    assert "spec.guestAgent.unix.path" in str(report.error)
    assert "--socket-root" in str(report.error)
    await guests.close()


async def test_a_failure_is_asked_again_though_the_set_was_suspended_meanwhile(guests: Guests, woken: Woken) -> None:
    awake, suspended = a_set("nothing.sock", bring_online=True), a_set("nothing.sock", bring_online=True, suspend=True)
    await answer(guests, woken, awake, TWO)
    told = len(woken.uids)
    guests.query(suspended, TWO)
    await until(lambda: len(woken.uids) > told, LONG, "somebody to be woken")


async def test_a_guest_that_says_something_else_each_time_may_not_wake_without_end(
    guests: Guests, woken: Woken, path: Path
) -> None:
    machine = a_machine(*range(11, 19))
    async with FaultyAgent(path, offline=set(range(1, 8))) as agent:

        def change() -> None:
            agent.online ^= {1}
            guests.query(a_set(), machine)

        woken.then = change
        woken.then()
        await asyncio.sleep(60)
        woken.then = lambda: None
        assert WAKES_AT_ONCE / 2 < len(woken.uids) <= WAKES_AT_ONCE + 60 * WAKES_PER_SECOND + 2


async def test_an_agent_whose_failure_is_told_later_is_asked_again_all_the_same(
    guests: Guests, woken: Woken, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ratelimiter, "WAKES_AT_ONCE", 1)
    monkeypatch.setattr(ratelimiter, "WAKES_PER_SECOND", 0.5)
    woken.then = lambda: guests.query(a_set(), TWO)
    async with FaultyAgent(path, faults={GET: SecondFails()}):
        await answer(guests, woken, a_set(), TWO)
        await idle()
        guests.query(a_set(), TWO)
        await woken.wait(2)
        failed = guests.query(a_set(), TWO)
        assert failed is not None
        assert failed.error is not None
        assert woken.times[1] - woken.times[0] < RETRY_SECONDS[0], "virtual time: what is told later is the failure"
        await woken.wait(3)
        await idle()
        assert online(guests.query(a_set(), TWO)) == 1


# Many guests.


async def test_agents_that_failed_before_do_not_hold_up_the_others(
    woken: Woken, path: Path, namespace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests_module, "AT_ONCE", 2)
    monkeypatch.setattr(guests_module, "RETRIES_AT_ONCE", 1)
    guests = Guests(namespace_folder.parent, woken)
    async with FaultyAgent(namespace_folder / "deaf.sock", faults={SYNC: Holds()}), FaultyAgent(path):
        dead = [a_set("deaf.sock", name=f"dead-{number}") for number in range(4)]
        for vcpuset in dead:
            guests.query(vcpuset, TWO)
        await woken.wait(len(dead))
        await asyncio.sleep(RETRY_SECONDS[0])
        for vcpuset in dead:
            guests.query(vcpuset, TWO)
        begun = asyncio.get_running_loop().time()
        guests.query(a_set(name="healthy"), TWO)
        await until(lambda: UID("uid-of-healthy") in woken.uids, LONG, "the healthy guest's answer")
        assert asyncio.get_running_loop().time() - begun < AGENT_SECONDS, "virtual time"
    await guests.close()


async def test_an_agent_that_hangs_holds_up_no_other(
    guests: Guests, woken: Woken, path: Path, namespace_folder: Path
) -> None:
    async with FaultyAgent(namespace_folder / "deaf.sock", faults={SYNC: Deaf()}) as deaf, FaultyAgent(path):
        hanging, other = a_set("deaf.sock", name="hanging"), a_set(name="other")
        assert guests.query(hanging, TWO) is None
        await until(lambda: deaf.received(SYNC), LONG, "the first question")
        assert guests.query(other, TWO) is None
        await woken.wait(1)
        assert woken.uids == [other.uid]
        assert online(guests.query(other, TWO)) == 1
        await woken.wait(2)
        assert woken.uids == [other.uid, hanging.uid]


async def test_no_more_agents_than_agreed_are_asked_at_once_and_each_has_its_whole_time(
    woken: Woken, namespace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests_module, "AT_ONCE", 2)
    guests = Guests(namespace_folder.parent, woken)
    hold = Holds()
    async with contextlib.AsyncExitStack() as agents:
        names = [f"vm-{number}" for number in range(5)]
        for name in names:
            await agents.enter_async_context(FaultyAgent(namespace_folder / f"{name}.sock", faults={SYNC: hold}))
        for name in names:
            assert guests.query(a_set(f"{name}.sock", name=name), TWO) is None
        await until(lambda: len(set(woken.uids)) == len(names), LONG, "all to have failed")
        assert hold.most == 2
        began = hold.asked_at[0]
        turns = [time - began for time in hold.asked_at]
        assert turns == pytest.approx([AGENT_SECONDS * turn for turn in (0, 0, 1, 1, 2)], abs=0.2)
        await guests.close()


# The end.


async def test_a_set_that_is_let_go_is_asked_no_more_and_its_agent_is_left_at_once(
    guests: Guests, woken: Woken, path: Path
) -> None:
    async with FaultyAgent(path, faults={SYNC: Deaf()}) as agent:
        guests.query(a_set(), TWO)
        await until(lambda: agent.received(SYNC), LONG, "the question")
        await guests.forget(a_set().uid)
        await idle()
        await asyncio.sleep(LONG)
        assert woken.uids == []
        await guests.forget(a_set().uid)


async def test_nothing_is_left_of_a_set_that_was_let_go(guests: Guests, woken: Woken, path: Path) -> None:
    failed = await answer(guests, woken, a_set(), TWO)
    assert failed.cpus is None
    await guests.forget(a_set().uid)
    await asyncio.sleep(LONG)
    assert len(woken.uids) == 1, "the pause has ended with it"
    async with FaultyAgent(path):
        assert online(await answer(guests, woken, a_set(), TWO)) == 1, "no pause, no report"
