"""What a pass reports: an assessment for every situation, stable while there is no news."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

import pytest

from unit.domain.builders import NOW, a_machine, a_request, a_spec, ago, assessment_on, findings_of
from vcpuset.domain.assessment import (
    Assessment,
    RequeuePolicy,
    assess,
    conflict,
    conflict_over_machine,
    contested,
    failure,
    plugging,
    terminating,
)
from vcpuset.domain.contest import Contest
from vcpuset.domain.errors import (
    AgentTimeout,
    CommandRefused,
    CredentialsUnavailable,
    GuestNotReady,
    InvalidMonitor,
    Migrating,
    MonitorBusy,
    MonitorTimeout,
    MonitorUnreachable,
    PermanentError,
    Preconfig,
    SlotTaken,
    UnsupportedSpec,
    VCPUSetError,
)
from vcpuset.domain.guest import GuestCPU, GuestCPUs, GuestReport
from vcpuset.domain.machine import Answer
from vcpuset.domain.pod import PodFindings
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.requests import cpu_of
from vcpuset.domain.resource import BootVCPUs, GuestAgent, Spec, UnplugPolicy

__all__: list[str] = []

NO = Answer.IN_USE
FOUR = a_machine(plugged=[2, 3])
SMALL = a_machine(boot=[0], plugged=[1])
"""Two CPUs, one of which can go: whatever is asked for it, there is no other candidate."""

AT_COUNT = findings_of(a_spec(2), a_machine())
BELOW = findings_of(a_spec(4), a_machine())
FULL = findings_of(a_spec(9), a_machine(boot=range(8)))

WORDS = "qemu's own words"


def with_agent(vcpus: int, *, bring_online: bool = False) -> Spec:
    """A spec that names a guest agent."""
    return a_spec(vcpus, agent=GuestAgent("ga.sock", bring_online))


def guest_with(cpus: str) -> GuestReport:
    """A guest that uses the CPUs shown as + and has left those shown as - offline."""
    return GuestReport(GuestCPUs(tuple(GuestCPU(i, shown == "+", i > 0) for i, shown in enumerate(cpus))))


@dataclass
class Said:
    """What is reported, and until when nothing is expected to change.

    says   words that the message has
    event  the type of the Kubernetes Event
    due    seconds after NOW
    """

    reason: Reason
    state: State
    policy: RequeuePolicy
    says: str
    event: Literal["Normal", "Warning"] = "Normal"
    due: float | None = None


def on_pod(declared: int, sufficient_for: int, reason: Reason, seconds: float | None = None) -> Assessment:
    """What is reported of a machine of two vCPUs whose pod has this trouble."""
    due = None if seconds is None else NOW + timedelta(seconds=seconds)
    return assessment_on(a_spec(declared), a_machine(), pod=PodFindings(sufficient_for, (reason, "words"), due))


CASES = {
    "count matches": (
        assessment_on(a_spec(4), FOUR),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.RESYNC, "QEMU has 4 vCPUs, as declared."),
    ),
    "one vCPU is no vCPUs": (
        assessment_on(a_spec(1), a_machine(boot=[0])),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.RESYNC, "QEMU has 1 vCPU, as declared."),
    ),
    "count matches, suspended": (
        assessment_on(a_spec(4, suspend=True), FOUR),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.RESYNC, "as declared"),
    ),
    "count matches, migrating": (
        assessment_on(a_spec(4), a_machine(plugged=[2, 3], migrating=True)),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.RESYNC, "as declared"),
    ),
    "count matches, a request is still with the guest": (
        assessment_on(a_spec(4), FOUR, [a_request(3, at=ago(5))]),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.POLL, "may still unplug slot 3"),
    ),
    "count matches, an old request is still with the guest": (
        assessment_on(a_spec(4), FOUR, [a_request(3, at=ago(61))]),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.RESYNC, "may still unplug slot 3"),
    ),
    "count matches, a request was made just now": (
        assessment_on(a_spec(4), FOUR, [a_request(3, at=ago(1))]),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.HOLD, "may still unplug slot 3"),
    ),
    "count matches, and the guest uses them all": (
        assessment_on(with_agent(4), FOUR, guest=guest_with("++++")),
        Said(
            Reason.CONVERGED,
            State.READY,
            RequeuePolicy.RESYNC,
            "QEMU has 4 vCPUs, as declared, and the guest uses them all.",
        ),
    ),
    "count matches, and the agent does not answer": (
        assessment_on(with_agent(4), FOUR, guest=GuestReport(None, AgentTimeout("no agent answers"))),
        Said(
            Reason.CONVERGED,
            State.READY,
            RequeuePolicy.RESYNC,
            "it is unknown whether the guest uses them: no agent answers.",
        ),
    ),
    "count matches, and the machine is paused": (
        assessment_on(with_agent(4), a_machine(plugged=[2, 3], run_state="paused")),
        Said(
            Reason.CONVERGED,
            State.READY,
            RequeuePolicy.RESYNC,
            "it cannot be queried while the machine's run state is 'paused'",
        ),
    ),
    "count matches, and the agent is another machine's": (
        assessment_on(with_agent(4), FOUR, guest=guest_with("+++++")),
        Said(
            Reason.CONVERGED, State.READY, RequeuePolicy.RESYNC, "spec.guestAgent names the socket of another machine"
        ),
    ),
    "plugged, and the guest is taking them up": (
        assessment_on(with_agent(4), FOUR, guest=guest_with("++"), plugged=ago(1)),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.HOLD, "the guest uses 2 of them so far.", due=0.25),
    ),
    "plugged, and the guest has left them offline": (
        assessment_on(with_agent(4), FOUR, guest=guest_with("++--"), plugged=ago(3)),
        Said(
            Reason.GUEST_CPUS_OFFLINE,
            State.RECONCILING,
            RequeuePolicy.RETRY,
            "the guest uses 2 of them and has left its CPUs 2-3 offline. Add the udev rule SUBSYSTEM",
            "Warning",
        ),
    ),
    "offline, and the agent cannot bring it online": (
        assessment_on(
            with_agent(4, bring_online=True), FOUR, guest=replace(guest_with("+++-"), resisted={3: "no such file"})
        ),
        Said(
            Reason.GUEST_CPUS_OFFLINE,
            State.RECONCILING,
            RequeuePolicy.RETRY,
            "has left its CPU 3 offline. It did not bring CPU 3 online: No such file. See the guest's log.",
            "Warning",
        ),
    ),
    "the guest's kernel does not know of them": (
        assessment_on(with_agent(4), FOUR, guest=guest_with("++")),
        Said(
            Reason.GUEST_CPUS_OFFLINE,
            State.RECONCILING,
            RequeuePolicy.RETRY,
            "does not know of 2. Its kernel has not accepted all plugged vCPUs: check its log",
            "Warning",
        ),
    ),
    "offline and unknown": (
        assessment_on(with_agent(6, bring_online=True), a_machine(plugged=[2, 3, 4, 5]), guest=guest_with("++--")),
        Said(
            Reason.GUEST_CPUS_OFFLINE,
            State.RECONCILING,
            RequeuePolicy.RETRY,
            "has left its CPUs 2-3 offline, and does not know of 2. They are being brought online, a few at a time.",
            "Warning",
        ),
    ),
    "offline, to be brought online, and suspended": (
        assessment_on(replace(with_agent(4, bring_online=True), suspend=True), FOUR, guest=guest_with("+++-")),
        Said(Reason.SUSPENDED, State.HELD, RequeuePolicy.RESYNC, "the guest uses 3 of them; nothing is changed"),
    ),
    "plugging": (
        plugging(findings_of(a_spec(6), FOUR)),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.HOLD, "4 vCPUs present, 6 declared; plugging 2."),
    ),
    "plugging up to the ceiling only": (
        plugging(findings_of(a_spec(99), FOUR)),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.HOLD, "plugging 4"),
    ),
    "a plug was refused for now": (
        assessment_on(a_spec(6), FOUR, blocked=SlotTaken("device_add", "GenericError", WORDS)),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.RETRY, WORDS),
    ),
    "a plug was refused with unknown words": (
        assessment_on(a_spec(6), FOUR, blocked=CommandRefused("device_add", "GenericError", WORDS)),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.RETRY, WORDS),
    ),
    "a plug can never succeed": (
        assessment_on(a_spec(6), FOUR, blocked=PermanentError("device_add", "GenericError", WORDS)),
        Said(Reason.HOTPLUG_UNSUPPORTED, State.STALLED, RequeuePolicy.RESYNC, WORDS, "Warning"),
    ),
    "a CPU left while others were plugged": (
        assessment_on(a_spec(6), FOUR),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.RETRY, "a vCPU was unplugged"),
    ),
    "asked": (
        assessment_on(a_spec(2), FOUR, [a_request(2), a_request(3)]),
        Said(
            Reason.UNPLUGGING,
            State.RECONCILING,
            RequeuePolicy.HOLD,
            "4 vCPUs present, 2 declared; unplug of slots 2-3 requested at 2026-01-02T12:00:00Z.",
            due=5,
        ),
    ),
    "asked, and in progress for a while": (
        assessment_on(a_spec(3), FOUR, [a_request(3, at=ago(30), answer=Answer.IN_PROGRESS)]),
        Said(Reason.UNPLUGGING, State.RECONCILING, RequeuePolicy.POLL, "slot 3", due=30),
    ),
    "asked, one refused, another asked instead": (
        assessment_on(a_spec(3), FOUR, [a_request(3, at=ago(2), answer=NO), a_request(2)]),
        Said(
            Reason.UNPLUGGING,
            State.RECONCILING,
            RequeuePolicy.HOLD,
            "after the guest had refused slot 3: device in use (_OST 0x81)",
            due=3,
        ),
    ),
    "asked, no answer for three seconds": (
        assessment_on(a_spec(3), FOUR, [a_request(3, at=ago(3))]),
        Said(Reason.UNPLUG_PENDING, State.RECONCILING, RequeuePolicy.POLL, "has not answered yet", due=2),
    ),
    "asked, no answer for a while, and only an event could tell": (
        assessment_on(a_spec(3), a_machine(plugged=[2, 3], ost=None), [a_request(3, at=ago(30))]),
        Said(Reason.UNPLUG_PENDING, State.RECONCILING, RequeuePolicy.HOLD, "has not answered yet", due=30),
    ),
    "asked long ago, and one has left just now": (
        assessment_on(a_spec(2), FOUR, [a_request(2, at=ago(90)), a_request(3, at=ago(90))], moved=ago(1)),
        Said(Reason.UNPLUG_TIMED_OUT, State.STALLED, RequeuePolicy.HOLD, "slots 2-3", "Warning", due=4),
    ),
    "asked long ago, and one has left a while ago": (
        assessment_on(a_spec(2), FOUR, [a_request(n, at=ago(90), attempts=5) for n in (2, 3)], moved=ago(50)),
        Said(Reason.UNPLUG_TIMED_OUT, State.STALLED, RequeuePolicy.POLL, "slots 2-3", "Warning", due=30),
    ),
    "asked, no answer from one, progress of another": (
        assessment_on(a_spec(2), FOUR, [a_request(2, at=ago(5)), a_request(3, at=ago(5), answer=Answer.IN_PROGRESS)]),
        Said(Reason.UNPLUGGING, State.RECONCILING, RequeuePolicy.POLL, "slots 2-3", due=55),
    ),
    "asked long ago for an earlier declaration": (
        assessment_on(a_spec(2), FOUR, [a_request(2, at=ago(240)), a_request(3, at=ago(200))], started=ago(10)),
        Said(Reason.UNPLUG_PENDING, State.RECONCILING, RequeuePolicy.RESYNC, "slots 2-3", due=50),
    ),
    "asked long ago for an earlier declaration, and it falls due": (
        assessment_on(
            a_spec(2), FOUR, [a_request(2, at=ago(270), attempts=7), a_request(3, at=ago(200))], started=ago(10)
        ),
        Said(Reason.UNPLUG_PENDING, State.RECONCILING, RequeuePolicy.RESYNC, "slots 2-3", due=30),
    ),
    "the guest is not up": (
        assessment_on(a_spec(1), a_machine(ost={})),
        Said(
            Reason.WAITING_FOR_GUEST,
            State.RECONCILING,
            RequeuePolicy.RETRY,
            "still booting, or was booted with acpi=off",
        ),
    ),
    "device_del says that the guest is not up": (
        assessment_on(a_spec(1), SMALL, blocked=GuestNotReady("device_del", "GenericError", WORDS)),
        Said(Reason.WAITING_FOR_GUEST, State.RECONCILING, RequeuePolicy.RETRY, WORDS),
    ),
    "refused, nobody else to ask": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(10), answer=NO)]),
        Said(
            Reason.UNPLUG_REFUSED, State.RECONCILING, RequeuePolicy.RESYNC, "slot 1: device in use", "Warning", due=50
        ),
    ),
    "refused, and so for timeoutSeconds": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(60), attempts=7, answer=NO)]),
        Said(
            Reason.UNPLUG_REFUSED,
            State.STALLED,
            RequeuePolicy.RESYNC,
            "The request is repeated after 5 s, then with doubling delays of up to 300 s.",
            "Warning",
            due=240,
        ),
    ),
    "refused, and repeated at a constant pace": (
        assessment_on(a_spec(1, retry=4), SMALL, [a_request(1, at=ago(1), attempts=7, answer=NO)]),
        Said(
            Reason.UNPLUG_REFUSED,
            State.RECONCILING,
            RequeuePolicy.RESYNC,
            "or declare more vCPUs. The request is repeated every 4 s.",
            "Warning",
            due=3,
        ),
    ),
    "refused, overdue, asked again just now": (
        assessment_on(
            a_spec(1), SMALL, [a_request(1, attempts=2)], started=ago(300), reported=Reason.UNPLUG_REFUSED.value
        ),
        Said(
            Reason.UNPLUG_REFUSED,
            State.STALLED,
            RequeuePolicy.HOLD,
            "last sent for slot 1 at 2026-01-02T12:00:00Z",
            "Warning",
            10,
        ),
    ),
    "refused, asked again, and no answer this time": (
        assessment_on(
            a_spec(1),
            SMALL,
            [a_request(1, at=ago(60), attempts=7)],
            started=ago(400),
            reported=Reason.UNPLUG_REFUSED.value,
        ),
        Said(
            Reason.UNPLUG_TIMED_OUT, State.STALLED, RequeuePolicy.RESYNC, "has not unplugged slot 1", "Warning", due=240
        ),
    ),
    "several refuse, with several words": (
        assessment_on(
            a_spec(1),
            a_machine(boot=[0], plugged=[1, 2, 3]),
            [
                a_request(1, at=ago(9), answer=NO),
                a_request(2, at=ago(9), answer=Answer.BUSY),
                a_request(3, at=ago(9), answer=NO),
            ],
        ),
        Said(
            Reason.UNPLUG_REFUSED,
            State.RECONCILING,
            RequeuePolicy.RESYNC,
            "slots 1, 3: device in use (_OST 0x81), slot 2: device busy (_OST 0x82)",
            "Warning",
            due=51,
        ),
    ),
    "no answer within timeoutSeconds": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(60), attempts=7)]),
        Said(
            Reason.UNPLUG_TIMED_OUT,
            State.STALLED,
            RequeuePolicy.RESYNC,
            "A late answer is still accepted",
            "Warning",
            due=240,
        ),
    ),
    "no answer, and the machine was reset meanwhile": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(40), attempts=5)], started=ago(75), reset=ago(60)),
        Said(
            Reason.UNPLUG_TIMED_OUT,
            State.STALLED,
            RequeuePolicy.POLL,
            "The machine was reset meanwhile: its guest may still be booting.",
            "Warning",
            due=40,
        ),
    ),
    "no answer for a moment, and the machine was reset just before": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(3))], reset=ago(9)),
        Said(
            Reason.UNPLUG_PENDING,
            State.RECONCILING,
            RequeuePolicy.POLL,
            "the guest has not answered yet. The machine was reset meanwhile",
            due=2,
        ),
    ),
    "refused by a guest that has just been reset": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(3), answer=Answer.FAILURE)], reset=ago(5)),
        Said(Reason.UNPLUG_REFUSED, State.RECONCILING, RequeuePolicy.RESYNC, "may still be booting.", "Warning", due=2),
    ),
    "no answer, and a reset was long ago": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(3))], reset=ago(90)),
        Said(Reason.UNPLUG_PENDING, State.RECONCILING, RequeuePolicy.POLL, "has not answered yet.", due=2),
    ),
    "a request without an answer is repeated": (
        assessment_on(a_spec(1), SMALL, [a_request(1, attempts=2)], started=ago(5)),
        Said(Reason.UNPLUG_PENDING, State.RECONCILING, RequeuePolicy.HOLD, "has not answered yet.", due=10),
    ),
    "the guest has given a sign, so only the first pause counts": (
        assessment_on(
            a_spec(1), SMALL, [a_request(1, at=ago(3), attempts=6)], started=ago(90), early=[cpu_of(a_request(1))]
        ),
        Said(Reason.UNPLUG_TIMED_OUT, State.STALLED, RequeuePolicy.POLL, "has not unplugged slot 1", "Warning", due=2),
    ),
    "another client has plugged while this pass did": (
        assessment_on(a_spec(3), FOUR, blocked=SlotTaken("device_add", "GenericError", WORDS)),
        Said(
            Reason.UNPLUGGING,
            State.RECONCILING,
            RequeuePolicy.RETRY,
            "4 vCPUs present, 3 declared; unplug requests follow.",
        ),
    ),
    "suspended while a request is still with the guest": (
        assessment_on(a_spec(3, suspend=True), FOUR, [a_request(3, at=ago(5))]),
        Said(
            Reason.SUSPENDED,
            State.HELD,
            RequeuePolicy.POLL,
            "while spec.suspend is set. An earlier request may still unplug slot 3.",
        ),
    ),
    "count matches, suspended while a request is still with the guest": (
        assessment_on(a_spec(4, suspend=True), FOUR, [a_request(3, at=ago(5))]),
        Said(
            Reason.CONVERGED,
            State.READY,
            RequeuePolicy.POLL,
            "as declared. An earlier request may still unplug slot 3.",
        ),
    ),
    "what is due but not wanted is nothing to come back for": (
        assessment_on(a_spec(3), FOUR, [a_request(n, at=ago(at), attempts=7) for n, at in ((2, 400), (3, 100))]),
        Said(Reason.UNPLUG_TIMED_OUT, State.STALLED, RequeuePolicy.RESYNC, "slots 2-3", "Warning", due=200),
    ),
    "QEMU refuses every one": (
        assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(5), answer=Answer.REJECTED)]),
        Said(
            Reason.UNPLUG_UNSUPPORTED,
            State.STALLED,
            RequeuePolicy.RESYNC,
            "QEMU refused to unplug slot 1",
            "Warning",
            due=55,
        ),
    ),
    "migrating": (
        assessment_on(a_spec(6), a_machine(migrating=True)),
        Said(Reason.MACHINE_BUSY, State.RECONCILING, RequeuePolicy.RETRY, "a migration is in progress"),
    ),
    "device_add says that a migration runs": (
        assessment_on(a_spec(6), FOUR, blocked=Migrating("device_add", "GenericError", WORDS)),
        Said(Reason.MACHINE_BUSY, State.RECONCILING, RequeuePolicy.RETRY, "a migration is in progress"),
    ),
    "saving": (
        assessment_on(a_spec(6), a_machine(run_state="save-vm")),
        Said(Reason.MACHINE_BUSY, State.RECONCILING, RequeuePolicy.RETRY, "run state 'save-vm'"),
    ),
    "shut down": (
        assessment_on(a_spec(6), a_machine(run_state="shutdown")),
        Said(Reason.MACHINE_NOT_RUNNING, State.RECONCILING, RequeuePolicy.RESYNC, "'shutdown'", "Warning"),
    ),
    "panicked, though the count matches": (
        assessment_on(a_spec(2), a_machine(run_state="guest-panicked")),
        Said(Reason.MACHINE_NOT_RUNNING, State.RECONCILING, RequeuePolicy.RESYNC, "'guest-panicked'", "Warning"),
    ),
    "at the ceiling": (
        assessment_on(a_spec(9), a_machine(plugged=range(2, 8))),
        Said(Reason.INSUFFICIENT_SLOTS, State.STALLED, RequeuePolicy.RESYNC, "8 vCPUs present, 9 declared", "Warning"),
    ),
    "at the ceiling, but one may leave": (
        assessment_on(a_spec(9), a_machine(plugged=range(2, 8)), [a_request(7, at=ago(4))]),
        Said(Reason.INSUFFICIENT_SLOTS, State.STALLED, RequeuePolicy.POLL, "may still unplug slot 7", "Warning"),
    ),
    "at the floor": (
        assessment_on(a_spec(1), a_machine(plugged=[2], arch="s390x")),
        Said(Reason.UNPLUG_UNSUPPORTED, State.STALLED, RequeuePolicy.RESYNC, "QEMU cannot unplug", "Warning"),
    ),
    "grow only": (
        assessment_on(a_spec(1, policy=UnplugPolicy.DISABLED), FOUR),
        Said(Reason.UNPLUG_DISABLED, State.STALLED, RequeuePolicy.RESYNC, "policy is Disabled", "Warning"),
    ),
    "boot CPUs kept": (
        assessment_on(a_spec(1, boot_vcpus=BootVCPUs.KEEP), a_machine()),
        Said(Reason.BOOT_VCPUS_KEPT, State.STALLED, RequeuePolicy.RESYNC, "bootVCPUs is Keep", "Warning"),
    ),
    "whole cores only": (
        assessment_on(a_spec(3), a_machine(boot=[0], threads=2)),
        Said(Reason.UNSUPPORTED_VCPU_COUNT, State.STALLED, RequeuePolicy.RESYNC, "declare 2 or 4", "Warning"),
    ),
    "no hotplug": (
        assessment_on(a_spec(3), a_machine(slots=None)),
        Said(Reason.HOTPLUG_UNSUPPORTED, State.STALLED, RequeuePolicy.RESYNC, "another machine type", "Warning"),
    ),
    "suspended": (
        assessment_on(a_spec(3, suspend=True), a_machine()),
        Said(Reason.SUSPENDED, State.HELD, RequeuePolicy.RESYNC, "2 vCPUs present, 3 declared; nothing is changed"),
    ),
    "suspended and migrating": (
        assessment_on(a_spec(3, suspend=True), a_machine(migrating=True)),
        Said(Reason.SUSPENDED, State.HELD, RequeuePolicy.RESYNC, "nothing is changed"),
    ),
    "suspended and shut down": (
        assessment_on(a_spec(3, suspend=True), a_machine(run_state="shutdown")),
        Said(Reason.MACHINE_NOT_RUNNING, State.RECONCILING, RequeuePolicy.RESYNC, "'shutdown'", "Warning"),
    ),
    "another set has another monitor of the machine": (
        conflict_over_machine("default/elder", "one process listens on both"),
        Said(
            Reason.MONITOR_CONFLICT,
            State.STALLED,
            RequeuePolicy.RESYNC,
            "(one process listens on both): delete",
            "Warning",
        ),
    ),
    "something else changes the machine, which is at its count now": (
        contested(assess(AT_COUNT), AT_COUNT, Contest(60)),
        Said(
            Reason.CONTESTED, State.STALLED, RequeuePolicy.RESYNC, "another client has changed them 5 times", "Warning"
        ),
    ),
    "something else changes the machine, and it is not to be corrected yet": (
        contested(assess(BELOW), BELOW, Contest(60)),
        Said(
            Reason.CONTESTED,
            State.STALLED,
            RequeuePolicy.RESYNC,
            "2 vCPUs present, 4 declared; another client",
            "Warning",
        ),
    ),
    "no count": (
        assessment_on(a_spec(None), FOUR),
        Said(
            Reason.ADOPTING,
            State.RECONCILING,
            RequeuePolicy.RESYNC,
            "4 vCPUs present, and spec.vcpus is not set: it is being set to 4, the present count.",
        ),
    ),
    "no count, and more than may be": (
        assessment_on(a_spec(None, bounds=(1, 3)), FOUR),
        Said(
            Reason.ADOPTING,
            State.RECONCILING,
            RequeuePolicy.RESYNC,
            "being set to 3, the present count brought within minVCPUs and maxVCPUs.",
        ),
    ),
    "no count, and CPUs that may still leave": (
        assessment_on(a_spec(None), FOUR, [a_request(3)]),
        Said(
            Reason.ADOPTING,
            State.RECONCILING,
            RequeuePolicy.HOLD,
            "An earlier request may still unplug slot 3",
        ),
    ),
    "no count, and a migration, which is no obstacle": (
        assessment_on(a_spec(None), a_machine(migrating=True)),
        Said(Reason.ADOPTING, State.RECONCILING, RequeuePolicy.RESYNC, "being set to 2"),
    ),
    "no count, and no machine any more": (
        assessment_on(a_spec(None), a_machine(run_state="postmigrate")),
        Said(Reason.MACHINE_NOT_RUNNING, State.RECONCILING, RequeuePolicy.RESYNC, "'postmigrate'", "Warning"),
    ),
    "no count, and suspended": (
        assessment_on(a_spec(None, suspend=True, bounds=(6, 8)), FOUR),
        Said(
            Reason.SUSPENDED,
            State.HELD,
            RequeuePolicy.RESYNC,
            "4 vCPUs present, and spec.vcpus is not set; it is set to 6, the present count brought within minVCPUs and "
            "maxVCPUs, once spec.suspend is not set.",
        ),
    ),
    "something else changes the machine, and it cannot be corrected": (
        contested(assess(FULL), FULL, Contest(60)),
        Said(Reason.INSUFFICIENT_SLOTS, State.STALLED, RequeuePolicy.RESYNC, "8 vCPUs present, 9 declared", "Warning"),
    ),
    "another set keeps the monitor": (
        conflict("default/elder"),
        Said(Reason.MONITOR_CONFLICT, State.STALLED, RequeuePolicy.RESYNC, "VCPUSet default/elder is older", "Warning"),
    ),
    "nobody listens": (
        failure(MonitorUnreachable("nobody listens at a.sock")),
        Said(Reason.MONITOR_UNREACHABLE, State.RECONCILING, RequeuePolicy.RETRY, "a.sock", "Warning"),
    ),
    "another client": (
        failure(MonitorBusy("no greeting from a.sock")),
        Said(Reason.MONITOR_BUSY, State.RECONCILING, RequeuePolicy.RETRY, "o greeting from a.sock", "Warning"),
    ),
    "no reply": (
        failure(MonitorTimeout("no answer to query-status")),
        Said(Reason.MONITOR_TIMEOUT, State.RECONCILING, RequeuePolicy.RETRY, "query-status", "Warning"),
    ),
    "not made yet": (
        failure(Preconfig("query-migrate", "GenericError", "permitted only after machine initialization")),
        Said(Reason.MACHINE_BUSY, State.RECONCILING, RequeuePolicy.RETRY, "(x-exit-preconfig)"),
    ),
    "a bad path": (
        failure(InvalidMonitor("a.sock is a folder")),
        Said(Reason.INVALID_MONITOR, State.STALLED, RequeuePolicy.RETRY, "a.sock is a folder", "Warning"),
    ),
    "a deleted set whose object a finalizer keeps": (
        terminating(),
        Said(Reason.TERMINATING, State.HELD, RequeuePolicy.RESYNC, "has been deleted"),
    ),
    "a spec of a newer version, which no later look can obey": (
        failure(UnsupportedSpec("spec.unplug.policy: Invalid enum value 'Sometimes'")),
        Said(Reason.UNSUPPORTED_SPEC, State.STALLED, RequeuePolicy.RESYNC, "spec.unplug.policy: Invalid", "Warning"),
    ),
    "the pod's CPU is being raised": (
        on_pod(4, 2, Reason.PLUGGING, 0.5),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.RESYNC, "2 vCPUs present, 4 declared; words.", due=0.5),
    ),
    "the pod's CPU is being raised, and the machine has what was declared": (
        on_pod(2, 2, Reason.PLUGGING, 0.5),
        Said(Reason.CONVERGED, State.READY, RequeuePolicy.RESYNC, "QEMU has 2 vCPUs, as declared."),
    ),
    "the pod allows some of the missing vCPUs, which were not plugged": (
        on_pod(4, 3, Reason.PLUGGING, 0.5),
        Said(Reason.PLUGGING, State.RECONCILING, RequeuePolicy.RETRY, "2 vCPUs present, 4 declared; "),
    ),
    "no pod": (
        on_pod(4, 0, Reason.POD_NOT_FOUND),
        Said(Reason.POD_NOT_FOUND, State.RECONCILING, RequeuePolicy.RETRY, "4 declared; words.", "Warning"),
    ),
    "no pod, and the machine has what was declared": (
        on_pod(2, 0, Reason.POD_NOT_FOUND),
        Said(Reason.POD_NOT_FOUND, State.RECONCILING, RequeuePolicy.RETRY, "2 declared; words.", "Warning"),
    ),
    "no pod, and too many vCPUs": (
        on_pod(1, 0, Reason.POD_NOT_FOUND),
        Said(Reason.UNPLUGGING, State.RECONCILING, RequeuePolicy.RETRY, "unplug requests follow"),
    ),
    "two pods": (
        on_pod(4, 0, Reason.POD_AMBIGUOUS),
        Said(Reason.POD_AMBIGUOUS, State.RECONCILING, RequeuePolicy.RETRY, "words", "Warning"),
    ),
    "the pod's node has no room": (
        on_pod(4, 2, Reason.POD_RESIZE_DEFERRED, 5),
        Said(Reason.POD_RESIZE_DEFERRED, State.RECONCILING, RequeuePolicy.RESYNC, "words", "Warning", due=5),
    ),
    "the pod's node is too small": (
        on_pod(4, 2, Reason.POD_RESIZE_INFEASIBLE, 60),
        Said(Reason.POD_RESIZE_INFEASIBLE, State.STALLED, RequeuePolicy.RESYNC, "words", "Warning", due=60),
    ),
    "the pod's size is refused": (
        on_pod(4, 2, Reason.POD_RESIZE_REFUSED, 60),
        Said(Reason.POD_RESIZE_REFUSED, State.STALLED, RequeuePolicy.RESYNC, "words", "Warning", due=60),
    ),
    "no Secret, which nobody would tell of when it comes": (
        failure(CredentialsUnavailable("there is no Secret team-a/monitor")),
        Said(Reason.CREDENTIALS_UNAVAILABLE, State.STALLED, RequeuePolicy.RETRY, "no Secret team-a/monitor", "Warning"),
    ),
}


@pytest.mark.parametrize(("assessment", "said"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_a_situation_has_its_reason_state_and_words(assessment: Assessment, said: Said) -> None:
    assert (assessment.reason, assessment.state, assessment.policy) == (said.reason, said.state, said.policy), (
        assessment.message
    )
    assert said.says in assessment.message
    assert assessment.event_type == said.event
    due = None if assessment.due is None else (assessment.due - NOW).total_seconds()
    assert due == said.due


@pytest.mark.parametrize("name", CASES)
def test_a_message_is_a_sentence(name: str) -> None:
    message = CASES[name][0].message

    assert message.endswith(".")
    assert ".." not in message.replace("...", "")
    assert "  " not in message


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.AGENT_UNAVAILABLE])
def test_every_reason_of_an_observation_occurs_in_each_of_its_states_and_in_no_other(reason: Reason) -> None:
    states = {assessment.state for assessment, _ in CASES.values() if assessment.reason is reason}

    assert states == set(reason.states)


def test_every_reason_has_a_name_of_one_word_and_a_meaning() -> None:
    for reason in Reason:
        assert reason.value.isalnum()
        assert reason.value[0].isupper()
        assert reason.meaning.endswith(".")


@pytest.mark.parametrize(
    ("report", "between"),
    [
        pytest.param(lambda now: assessment_on(a_spec(1), SMALL, [a_request(1)], now=now), (3, 59), id="pending"),
        pytest.param(
            lambda now: assessment_on(a_spec(1), SMALL, [a_request(1, answer=Answer.IN_PROGRESS)], now=now),
            (0, 59),
            id="in progress",
        ),
        pytest.param(lambda now: assessment_on(a_spec(1), SMALL, [a_request(1)], now=now), (60, 9999), id="timed out"),
        pytest.param(
            lambda now: assessment_on(a_spec(1), SMALL, [a_request(1, answer=NO)], now=now), (0, 59), id="refused"
        ),
        pytest.param(
            lambda now: assessment_on(a_spec(1), SMALL, [a_request(1, answer=NO)], now=now),
            (60, 9999),
            id="refused for long",
        ),
        pytest.param(
            lambda now: assessment_on(a_spec(4), FOUR, [a_request(3)], now=now), (0, 9999), id="ready, one may leave"
        ),
        pytest.param(lambda now: assessment_on(a_spec(6), a_machine(migrating=True), now=now), (0, 9999), id="busy"),
        pytest.param(lambda now: assessment_on(a_spec(1), a_machine(ost={}), now=now), (0, 9999), id="guest not up"),
    ],
)
def test_without_news_the_report_does_not_change(
    report: Callable[[datetime], Assessment], between: tuple[float, float]
) -> None:
    first, last = (report(NOW + timedelta(seconds=seconds)) for seconds in between)

    assert (first.reason, first.state, first.message) == (last.reason, last.state, last.message)


@pytest.mark.parametrize("reported", [Reason.UNPLUG_REFUSED, Reason.UNPLUG_TIMED_OUT])
def test_stalled_stays_through_the_retries(reported: Reason) -> None:
    answer = NO if reported is Reason.UNPLUG_REFUSED else None
    before = assessment_on(a_spec(1), SMALL, [a_request(1, at=ago(300), answer=answer)])

    asking = assessment_on(
        a_spec(1), SMALL, [a_request(1, attempts=2)], started=ago(300), reported=before.reason.value, now=NOW
    )
    a_look_later = assessment_on(
        a_spec(1),
        SMALL,
        [a_request(1, attempts=2)],
        started=ago(300),
        reported=asking.reason.value,
        now=NOW + timedelta(seconds=10),
    )

    assert [each.state for each in (before, asking, a_look_later)] == [State.STALLED] * 3
    assert [each.reason for each in (before, asking, a_look_later)] == [reported] * 3


def test_a_retry_before_the_time_is_up_does_not_make_a_refusal_a_fresh_start() -> None:
    spec = a_spec(1, timeout=60, retry=5)
    refused = assessment_on(spec, SMALL, [a_request(1, at=ago(5), answer=NO)])

    asking = assessment_on(spec, SMALL, [a_request(1, attempts=2)], started=ago(5), reported=refused.reason.value)

    assert (
        (asking.reason, asking.state) == (refused.reason, refused.state) == (Reason.UNPLUG_REFUSED, State.RECONCILING)
    )


def test_a_refused_set_is_looked_at_when_it_becomes_stalled_and_then_when_it_is_due() -> None:
    def due_in(seconds: float) -> datetime | None:
        request = a_request(1, attempts=7, answer=NO)
        return assessment_on(a_spec(1), SMALL, [request], now=NOW + timedelta(seconds=seconds)).due

    assert due_in(0) == due_in(59) == NOW + timedelta(seconds=60)
    assert due_in(60) == due_in(299) == NOW + timedelta(seconds=300)
    assert due_in(300) is None, "it would be asked now; a time that has passed would make the operator spin"


def test_an_error_that_begins_with_a_name_keeps_its_spelling() -> None:
    path = failure(InvalidMonitor("/run/vcpuset/a.sock is a folder")).message
    words: VCPUSetError = MonitorUnreachable("nobody listens")

    assert path.startswith("/run/vcpuset/a.sock is a folder")
    assert failure(words).message == "Nobody listens."
