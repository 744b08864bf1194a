"""`vcpuset plan`: what the operator would do for a VCPUSet now, and each blocker.

The decisions are the operator's own (`domain`); this module observes the machine and prints.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vcpuset.cli.inspect import guest_document, guest_facts, machine_document, reach
from vcpuset.cli.manifests import Manifest
from vcpuset.cli.observation import Given, Observation, observe_machine, open_monitor, query_guest
from vcpuset.cli.render import STATE_COLOURS, Block, Cell, Facts, Heading, Lines, Styled
from vcpuset.cli.text import monitor
from vcpuset.domain.assessment import Assessment, conflict, failure, terminating
from vcpuset.domain.blockers import Blocker, blocker_of
from vcpuset.domain.credentials import Credentials, NoCredentials
from vcpuset.domain.errors import (
    AgentUnreachable,
    CommandError,
    CredentialsUnavailable,
    InvalidMonitor,
    MachineUnsettled,
    MonitorError,
)
from vcpuset.domain.guest import GuestReport
from vcpuset.domain.machine import Slot
from vcpuset.domain.preview import PlanPreview, preview
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import status_of
from vcpuset.domain.resource import TLS, UID, Connection, TCPMonitor, UnixMonitor, Unsupported, VCPUSet
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.sockets import Endpoint, UnixEndpoint, find_socket
from vcpuset.qmp.tcp import TCPEndpoint
from vcpuset.runtime.claims import Claims

__all__ = ["PlanResult", "Sources", "document", "page", "preview_all"]

_LISTED: Final = 8
"""As many slots are named one by one; more of them as ranges."""

_NO_ROOT: Final = "Pass the same --socket-root to plan, or a monitor with --monitor."

_NO_CREDENTIALS: Final = (
    "plan reads no Secrets: pass a directory with ca.crt, tls.crt and tls.key with --tls-credentials"
)

_PERSISTENT: Final = (
    "spec.monitor.connection is Persistent, the default, so the operator may hold the monitor. Add a second monitor to "
    "QEMU (-qmp) and use it with vcpuset plan --monitor."
)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where to observe.

    socket_root  as the operator's --socket-root; None: not given
    monitor      used instead of the one that the set names
    seconds      how long each answer may take
    credentials  for monitors on TLS, instead of the sets' Secrets; None: not given
    server_name  what the certificate of `monitor` is for; None: the set's server name, or its own host
    """

    socket_root: Path | None
    monitor: Path | TCPEndpoint | None
    seconds: float
    credentials: Credentials | None = None
    server_name: str | None = None

    @property
    def monitors(self) -> Monitors:
        """The monitors that the sets name. The local user may connect to any address."""
        store = NoCredentials(_NO_CREDENTIALS) if self.credentials is None else Given(self.credentials)
        return Monitors(self.socket_root, lambda _: None, networks=None, credentials=store)


@dataclass(frozen=True, slots=True)
class PlanResult:
    """The result for one manifest.

    observation  None: the machine could not be observed, is another set's, or the set has been deleted
    guest        what the guest's agent says; None: not queried
    preview      None: as `observation`
    failed       whether the monitor should have been observed and could not
    notes        what a reader should know
    """

    manifest: Manifest
    observation: Observation | None
    guest: GuestReport | None
    preview: PlanPreview | None
    assessment: Assessment
    blockers: tuple[Blocker, ...]
    failed: bool
    notes: tuple[str, ...]
    now: datetime

    @property
    def vcpuset(self) -> VCPUSet:
        """The set."""
        return self.manifest.vcpuset


async def preview_all(manifests: Sequence[Manifest], sources: Sources) -> list[PlanResult]:
    """The preview of each manifest, in their order."""
    claims: Claims[UID] = Claims()
    by_uid = {each.vcpuset.uid: each for each in manifests}
    for manifest in manifests:
        if not manifest.vcpuset.deleting:
            claims.claim(manifest.vcpuset.uid, manifest.vcpuset.seniority, await _keys(manifest, sources))
    found = []
    for manifest in manifests:
        holder = claims.conflicting_owner(manifest.vcpuset.uid)
        if manifest.vcpuset.deleting:
            found.append(_left_alone(manifest, terminating()))
        elif holder is None:
            found.append(await _preview(manifest, sources))
        else:
            found.append(_yielding(manifest, by_uid[holder]))
    return found


async def _keys(manifest: Manifest, sources: Sources) -> list[Hashable]:
    """What the set claims, as for the operator: the address as spelled, and what is found there."""
    # Sets of two nodes are served by two operators, and a path leads to another socket on each.
    keys: list[Hashable] = []
    match manifest.vcpuset.spec.monitor:
        case UnixMonitor(path):
            keys.append((manifest.node, manifest.vcpuset.namespace, path))
        case TCPMonitor(host, port, tls):
            keys.append((manifest.node, host, port, "" if tls is None else manifest.vcpuset.namespace))
        case Unsupported():
            pass  # it holds no monitor
    try:
        with await sources.monitors.resolve(manifest.vcpuset, connect=False) as endpoint:
            keys.append((manifest.node, endpoint.identity))
    except (InvalidMonitor, MonitorError):
        pass  # reported by the observation
    return keys


def _yielding(manifest: Manifest, holder: Manifest) -> PlanResult:
    assessment = conflict(str(holder.vcpuset))
    notes = []
    if not (manifest.created and holder.created):
        notes.append("Not both say when they were created: those that do count as older, others by their order here.")
    return _left_alone(manifest, assessment, notes)


def _left_alone(manifest: Manifest, assessment: Assessment, notes: Sequence[str] = ()) -> PlanResult:
    blocker = blocker_of(assessment)
    return PlanResult(
        manifest, None, None, None, assessment, (blocker,), failed=False, notes=tuple(notes), now=_clock()
    )


async def _preview(manifest: Manifest, sources: Sources) -> PlanResult:
    vcpuset = manifest.vcpuset
    notes = tuple(_notes(manifest, sources))
    try:
        observation = await observe_machine(await _endpoint(vcpuset, sources), sources.seconds)
    except (InvalidMonitor, CredentialsUnavailable, MonitorError, MachineUnsettled, CommandError) as error:
        assessment = failure(error)
        unseen = tuple(_unseen(vcpuset, assessment, sources))
        return PlanResult(manifest, None, None, None, assessment, unseen, failed=True, notes=notes, now=_clock())
    guest: GuestReport | None = None
    if vcpuset.spec.guest_agent is not None and observation.machine.run_state == "running":
        guest = await query_guest(_agent_socket(vcpuset, sources), sources.seconds)
    now = _clock()
    found = preview(vcpuset, observation.machine, guest, now)
    return PlanResult(
        manifest, observation, guest, found, found.assessment, found.blockers, failed=False, notes=notes, now=now
    )


async def _endpoint(vcpuset: VCPUSet, sources: Sources) -> Endpoint:
    if sources.monitor is not None:
        server_name = sources.server_name
        match vcpuset.spec.monitor:
            case TCPMonitor(tls=TLS()) as monitor if server_name is None:
                # The host's address from here can differ from its address from the operator.
                server_name = monitor.server_name
        return await open_monitor(sources.monitor, sources.credentials, server_name)
    # `observe_machine` closes it.
    return (await sources.monitors.resolve(vcpuset)).__enter__()


async def _agent_socket(vcpuset: VCPUSet, sources: Sources) -> UnixEndpoint:
    assert vcpuset.spec.guest_agent is not None
    if sources.socket_root is None:
        raise AgentUnreachable("spec.guestAgent: plan was started without --socket-root")
    field = "spec.guestAgent.unix.path"
    return await find_socket(sources.socket_root, vcpuset.namespace, vcpuset.spec.guest_agent.path, field)


def _unseen(vcpuset: VCPUSet, assessment: Assessment, sources: Sources) -> Iterator[Blocker]:
    if isinstance(vcpuset.spec.monitor, UnixMonitor) and sources.socket_root is None and sources.monitor is None:
        message = f"The location of {monitor(vcpuset)} is unknown without the operator's --socket-root."
        yield Blocker(assessment.reason, message, _NO_ROOT)
    elif (
        assessment.reason is Reason.MONITOR_BUSY
        and vcpuset.spec.connection is Connection.PERSISTENT
        and sources.monitor is None
    ):
        yield Blocker(assessment.reason, assessment.message, _PERSISTENT)
    else:
        yield blocker_of(assessment)
    if vcpuset.spec.suspend:
        yield Blocker(Reason.SUSPENDED, "spec.suspend is set: nothing would be changed.", Reason.SUSPENDED.remedy)


def _notes(manifest: Manifest, sources: Sources) -> Iterator[str]:
    if sources.monitor is not None:
        yield f"Observed through {sources.monitor}; the operator uses the monitor in the VCPUSet."
    elif manifest.node is not None and isinstance(manifest.vcpuset.spec.monitor, UnixMonitor):
        yield f"spec.nodeName is {manifest.node}: the sockets are those of that node, so this has to be run there."
    if manifest.record is not None:
        yield f"The unplug requests are those of an earlier vcpuset apply, recorded in {manifest.record}."
    pod = manifest.vcpuset.spec.pod
    if pod is not None and pod.cpu is not None:
        yield "spec.pod.cpu is set, and plan reads no pods: the operator plugs vCPUs once the pod's CPU allows them."


def _clock() -> datetime:
    return datetime.now(UTC)


def document(results: Sequence[PlanResult]) -> dict[str, Any]:
    """The result for programs."""
    return {"items": [_item(each) for each in results]}


def _item(found: PlanResult) -> dict[str, Any]:
    work, vcpuset = found.preview, found.vcpuset
    machine = None if found.observation is None else found.observation.machine
    return {
        "namespace": vcpuset.namespace,
        "name": vcpuset.name,
        "monitor": monitor(vcpuset),
        "machine": None if machine is None else machine_document(machine),
        "guest": None if machine is None else guest_document(found.guest, machine, None),
        "desiredVCPUs": vcpuset.spec.vcpus,
        "reachableVCPUs": None if work is None else work.findings.target.count,
        "adopt": None if work is None else work.adopt,
        "plug": [] if work is None else [{"slot": slot.index} for slot in work.plug],
        "unplug": [] if work is None else [{"slot": slot.index, "path": slot.path} for slot in work.unplug],
        "standby": [] if work is None else [slot.index for slot in work.standby],
        "bringOnline": [] if work is None else list(work.bring_online),
        "blockers": [
            {"reason": each.reason.value, "message": each.message, "remedy": each.remedy} for each in found.blockers
        ],
        "status": {
            "reason": found.assessment.reason.value,
            "message": found.assessment.message,
            "conditions": [
                {"type": each.type, "status": each.status, "reason": each.reason, "message": each.message}
                for each in status_of(
                    vcpuset, found.assessment, None if work is None else work.findings, found.now
                ).conditions
            ],
        },
        "expected": None
        if work is None or work.expected is None
        else {"reason": work.expected.reason.value, "message": work.expected.message},
        "notes": list(found.notes),
    }


def page(results: Sequence[PlanResult]) -> list[Block]:
    """The result for people."""
    blocks: list[Block] = []
    for number, found in enumerate(results):
        if number:
            blocks.append(Lines([""]))
        blocks.append(Heading(f"VCPUSet {found.vcpuset}"))
        blocks.append(Facts(list(_facts(found))))
        if found.blockers:
            blocks.append(Lines(["", "Blockers:"]))
            for blocker in found.blockers:
                blocks.append(Lines([Styled(blocker.reason, "bold yellow")], indent=2))
                blocks.append(Lines([blocker.message, Styled(f"Remedy: {blocker.remedy}", "green")], indent=4))
        else:
            blocks.append(Lines(["", "No blockers."]))
        if found.notes:
            blocks.append(Lines(["", *found.notes]))
    return blocks


def _facts(found: PlanResult) -> Iterator[tuple[str, Cell]]:
    vcpuset, work = found.vcpuset, found.preview
    yield "Monitor", monitor(vcpuset)
    if work is None or found.observation is None:
        yield "Desired", _desired(vcpuset)
        if vcpuset.deleting:
            yield "Actions", "none: the VCPUSet has been deleted"
        else:
            why = "the machine was not observed" if found.failed else "the machine belongs to another VCPUSet"
            yield "Actions", f"none: {why}"
    else:
        machine = found.observation.machine
        yield "Machine", f"{machine.run_state}, {_count(machine.vcpus)} present, {reach(machine)}"
        yield from guest_facts(found.guest, machine, None)
        target = (
            ""
            if vcpuset.spec.vcpus in {None, work.findings.target.count}
            else f"; currently possible: {work.findings.target.count}"
        )
        yield "Desired", f"{_desired(vcpuset)}{target}"
        yield "Actions", Styled("; ".join(_actions(work)) or "none", "bold")
        if work.standby:
            yield "Standby", _slots(work.standby, in_order=bool(work.unplug))
    yield "Status", _status(found.assessment)
    if work is not None and work.expected is not None:
        yield "Expected", _status(work.expected)


def _status(assessment: Assessment) -> Cell:
    true = "" if assessment.state is State.HELD else f" ({assessment.state.value}=True)"
    return Styled(f"{assessment.reason}{true}: {assessment.message}", STATE_COLOURS[assessment.state])


def _actions(work: PlanPreview) -> Iterator[str]:
    if work.adopt is not None:
        yield f"set spec.vcpus to {work.adopt}"
    if work.plug:
        yield f"plug {_slots(work.plug)}"
    if work.unplug:
        yield f"unplug {_slots(work.unplug, in_order=True)}"
    if work.bring_online:
        cpus = ", ".join(map(str, work.bring_online))
        yield f"bring guest CPU{'s' if len(work.bring_online) > 1 else ''} {cpus} online"


def _slots(slots: Sequence[Slot], *, in_order: bool = False) -> str:
    """ "slot 5" or "slots 1-3, 5"; in the order given, "slots 5-3, 1"."""
    runs: list[list[int]] = []
    for slot in slots:
        run = runs[-1] if runs else []
        step = slot.index - run[-1] if run else 0
        if step in {1, -1} and (len(run) == 1 or step == run[1] - run[0]):
            run.append(slot.index)
        else:
            runs.append([slot.index])
    if len(slots) <= _LISTED:
        text = ", ".join(str(slot.index) for slot in slots)
    else:
        text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"slot{'s' if len(slots) > 1 else ''} {text}{' (in this order)' if in_order and len(slots) > 1 else ''}"


def _desired(vcpuset: VCPUSet) -> str:
    return "not set" if vcpuset.spec.vcpus is None else _count(vcpuset.spec.vcpus)


def _count(vcpus: int) -> str:
    return "1 vCPU" if vcpus == 1 else f"{vcpus} vCPUs"
