"""`kubectl vcpuset explain`: what the operator does with one VCPUSet, what it waits for, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from vcpuset.cli.kubectl.status import Row, status_document
from vcpuset.cli.outcome import remedy
from vcpuset.cli.render import STATE_COLOURS, Block, Cell, Facts, Heading, Lines, Listing, Styled
from vcpuset.cli.text import age, count, monitor
from vcpuset.domain.reasons import Reason, State
from vcpuset.domain.report import AGENT, UNREPORTED, state_of
from vcpuset.domain.resource import Request, Unsupported, VCPUSet

if TYPE_CHECKING:
    from vcpuset.kube.user import Busy, Event

__all__ = ["Explanation", "document", "documentation", "page"]

_PAGE: Final = "docs/reasons.md"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known of one VCPUSet.

    busy    None: not known
    events  oldest first; None: they could not be read
    """

    vcpuset: VCPUSet
    busy: Busy | None
    events: Sequence[Event] | None
    now: datetime


def documentation(reason: str) -> str:
    """Where the project's documentation says what to do about a reason: a page of its sources, and the section."""
    return f"{_PAGE}#{reason.lower()}" if reason in (*Reason, UNREPORTED) else _PAGE


def document(found: Explanation) -> dict[str, Any]:
    """The result for programs."""
    vcpuset = found.vcpuset
    (item,) = status_document([Row(vcpuset, found.busy)])["items"]
    status = vcpuset.status
    return {
        **item,
        "minVCPUs": status.min_vcpus,
        "maxVCPUs": status.max_vcpus,
        "uuid": status.machine_uuid,
        "suspend": vcpuset.spec.suspend,
        "remedy": remedy(item["reason"]),
        "documentation": documentation(item["reason"]),
        "unplugRequests": [
            {
                "slot": each.slot,
                "requestedAt": _time(each.requested_at),
                "attempts": each.attempts,
                "answer": None if each.answer is None else each.answer.value,
            }
            for each in status.pending_unplugs
        ],
        "events": None
        if found.events is None
        else [
            {
                "time": None if each.last is None else _time(each.last),
                "count": each.count,
                "type": each.type,
                "reason": each.reason,
                "message": each.message,
            }
            for each in found.events
        ],
    }


def page(found: Explanation) -> list[Block]:
    """The result for people."""
    vcpuset, now = found.vcpuset, found.now
    blocks: list[Block] = [Heading(f"VCPUSet {vcpuset}"), Facts(list(_facts(found))), *_reason(found)]
    if requests := vcpuset.status.pending_unplugs:
        blocks.append(Lines(["", Styled("Unplug requests", "bold")]))
        blocks.append(Listing(["SLOT", "REQUESTED", "TIMES", "ANSWER"], _requests(requests, now)))
    if found.events is None:
        return blocks
    blocks.append(Lines(["", Styled("Events", "bold")] if found.events else ["", "No Events."]))
    if found.events:
        rows = [_event(each, now) for each in found.events]
        blocks.append(Listing(["LAST SEEN", "TYPE", "REASON", "COUNT", "MESSAGE"], rows, labels=0, prose=True))
    return blocks


def _facts(found: Explanation) -> Iterator[tuple[str, Cell]]:
    vcpuset = found.vcpuset
    spec, status = vcpuset.spec, vcpuset.status
    if not isinstance(spec.monitor, Unsupported):  # its message says why there is none
        yield "Monitor", monitor(vcpuset)
    yield "Managed by", "the central controller" if vcpuset.node_name is None else f"the agent on {vcpuset.node_name}"
    bounds = (
        "" if (spec.min_vcpus, spec.max_vcpus) == (1, 4096) else f" (allowed: {spec.min_vcpus} to {spec.max_vcpus})"
    )
    yield "Desired", f"{count(spec.vcpus)}{bounds}"
    if status.vcpus is None:
        yield "Current", "not observed yet"
    else:
        yield "Current", f"{status.vcpus}{_reach(vcpuset)}"
    if spec.guest_agent is not None:
        agent = status.condition(AGENT)
        why = "" if agent is None or agent.status == "True" else f" ({agent.reason}: {agent.message})"
        yield "Online", f"{count(status.online_vcpus)}{why}"
    if found.busy is not None:
        yield "Busy", f"{found.busy.vcpus:.1f} vCPUs, mean of {found.busy.seconds:g} s"


def _reach(vcpuset: VCPUSet) -> str:
    least, most = vcpuset.status.min_vcpus, vcpuset.status.max_vcpus
    if least is None or most is None:
        return ""
    return " (cannot be changed)" if least == most else f" ({least} to {most} possible; {_free(vcpuset, most)})"


def _free(vcpuset: VCPUSet, most: int) -> str:
    free = most - (vcpuset.status.vcpus or 0)
    leaving = sum(request.in_flight for request in vcpuset.status.pending_unplugs)
    return f"{free} free" + (f", {leaving} asked to leave" if leaving else "")


def _reason(found: Explanation) -> Iterator[Block]:
    vcpuset = found.vcpuset
    ready = vcpuset.status.ready
    state, reason = state_of(vcpuset)
    if ready is None or reason == UNREPORTED:
        message = "No operator has reported on this VCPUSet."
        if ready is not None:
            message = (
                "No operator has reported on the present spec. The last report was about generation "
                f"{ready.observed_generation} of {vcpuset.generation}: {ready.reason}: {ready.message}"
            )
        since = ""
    else:
        message, since = ready.message, f", for {age(ready.last_transition_time, found.now)}"
    true = f" ({state.value}=True{since})" if state not in {State.HELD, State.UNKNOWN} else since
    if state is State.UNKNOWN:
        true = f" (Ready=Unknown{since})"
    if reason == UNREPORTED:
        true = ""
    yield Lines(["", Styled(f"{reason}{true}", f"bold {STATE_COLOURS[state]}")])
    helps: list[Cell] = [] if state is State.READY else [Styled(f"Remedy: {remedy(reason)}", "green")]
    yield Lines([message, *helps, f"See {documentation(reason)} in the project's documentation."], indent=2)


def _requests(requests: Sequence[Request], now: datetime) -> list[Sequence[Cell]]:
    """A row for each slot; one for slots in a row of which there is the same to say."""
    found: list[tuple[list[int], Sequence[Cell]]] = []
    for each in sorted(requests, key=lambda request: request.slot):
        said = _request(each, now)
        if found and (found[-1][0][-1] + 1, found[-1][1]) == (each.slot, said):
            found[-1][0].append(each.slot)
        else:
            found.append(([each.slot], said))
    return [[str(slots[0]) if len(slots) == 1 else f"{slots[0]}-{slots[-1]}", *said] for slots, said in found]


def _request(request: Request, now: datetime) -> Sequence[Cell]:
    answer: Cell = Styled("none yet", "yellow")
    if request.answer is not None:
        answer = Styled(request.answer.words, "red" if request.answer.refused else "yellow")
    return [f"{age(request.requested_at, now)} ago", str(request.attempts), answer]


def _event(event: Event, now: datetime) -> Sequence[Cell]:
    last = "-" if event.last is None else f"{age(event.last, now)} ago"
    kind: Cell = Styled(event.type, "yellow") if event.type == "Warning" else event.type
    return [last, kind, event.reason, str(event.count), event.message]


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
