"""What tests expect of a VCPUSet's status: the form that every status has, and the reason at hand.

The statuses of the conditions are written out here and in the tests on purpose: taken from the operator's own list of
reasons, they would agree with it whatever it said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from secrets import token_hex

from harness.audit import AuditEvent
from harness.controlplane import ControlPlane
from harness.wait import until
from harness.world import Seen, User

__all__ = [
    "AGENT",
    "HELD",
    "READY",
    "RECONCILING",
    "STALLED",
    "check_form",
    "history",
    "operators_writes",
    "reasons",
    "settled",
    "shows",
]

WAIT_SECONDS = 90.0

States = tuple[str, str, str]
"""The statuses of Ready, Reconciling and Stalled."""

READY: States = ("True", "False", "False")
RECONCILING: States = ("False", "True", "False")
STALLED: States = ("False", "False", "True")
HELD: States = ("False", "False", "False")

AGENT = "GuestAgentConnected"
AGENT_STATES = {
    "Connected": "True",
    "NotQueried": "Unknown",
    "NoAnswer": "False",
    "Unreachable": "False",
    "Refused": "False",
    "OtherMachine": "False",
}
"""The statuses of GuestAgentConnected, by its reasons."""


def check_form(seen: Seen) -> None:
    """Check what holds for every status that the operator has written, whatever the reason."""
    conditions = seen.status["conditions"]
    state, of_agent = conditions[:3], conditions[3:]
    assert [each["type"] for each in state] == ["Ready", "Reconciling", "Stalled"]
    assert seen.states in {READY, RECONCILING, STALLED, HELD}
    generation = seen.status["observedGeneration"]
    assert 1 <= generation <= seen.body["metadata"]["generation"]
    for each in conditions:
        assert set(each) == {"type", "status", "reason", "message", "lastTransitionTime", "observedGeneration"}
        # What the agent said last stands while it cannot be asked again, for what was declared then.
        assert each["observedGeneration"] == generation or (
            each["type"] == AGENT and not each["observedGeneration"] > generation
        )
        assert each["message"].endswith((".", "?")), each["message"]
    for each in state:
        assert (each["reason"], each["message"]) == (state[0]["reason"], state[0]["message"])
    assert [each["type"] for each in of_agent] in ([], [AGENT])
    if seen.current:
        assert bool(of_agent) == ("guestAgent" in seen.body["spec"])
    for each in of_agent:
        assert each["status"] == AGENT_STATES[each["reason"]]
    if "onlineVCPUs" in seen.status:
        # Not asked just now, or asked and answered: the number stands for as long as nothing speaks against it.
        assert of_agent
        assert of_agent[0]["status"] != "False"
    assert seen.status["selector"] == f"vcpuset.dev/name={seen.body['metadata']['name']}"


async def shows(
    user: User, name: str, reason: str, states: States, *words: str, vcpus: int | None, timeout: float = WAIT_SECONDS
) -> Seen:
    """Wait until a set gives this reason with these statuses and words, and check the whole of its status.

    words  what the message has to say
    vcpus  `status.vcpus`; None: not there
    """
    seen = await user.wait(
        name,
        lambda seen: (
            (seen.reason, seen.states, seen.vcpus) == (reason, states, vcpus)
            and all(word in seen.message for word in words)
        ),
        f"{reason} {states} with {vcpus} vCPUs and a message with {words}",
        timeout,
    )
    check_form(seen)
    return seen


async def history(user: User, since: Seen) -> list[Seen]:
    """All versions of a set from `since` on, as a watch shows them; none is left out."""
    metadata = since.body["metadata"]
    newest = _version(await user.get(metadata["name"]))
    # A watch from an old version begins with all that has happened since. It ends by itself after the time it is given,
    # which on a busy host may be before it has come to now.
    for seconds in (1, 5, 30):
        answer = await user.control_plane.kubectl(
            "get",
            "--raw",
            f"/apis/vcpuset.dev/v1alpha1/namespaces/{user.namespace}/vcpusets?watch=1&timeoutSeconds={seconds}"
            f"&fieldSelector=metadata.name%3D{metadata['name']}&resourceVersion={metadata['resourceVersion']}",
        )
        changes = [json.loads(line) for line in answer.stdout.splitlines()]
        seen = [since, *(Seen(change["object"]) for change in changes if change["type"] in {"ADDED", "MODIFIED"})]
        if newest in map(_version, seen):
            return seen
    raise AssertionError(f"no watch has come to version {newest}; the last one brought: {answer.stdout[-1000:]}")


def _version(seen: Seen) -> str:
    return str(seen.body["metadata"]["resourceVersion"])


def reasons(versions: Sequence[Seen]) -> list[tuple[str, States]]:
    """The reasons, with the conditions' statuses, in the order in which they came up."""
    found: list[tuple[str, States]] = []
    for seen in versions:
        if ready := seen.condition("Ready"):
            each = (str(ready["reason"]), (seen.states[0] or "", seen.states[1] or "", seen.states[2] or ""))
            if not found or found[-1] != each:
                found.append(each)
    return found


async def settled(control_plane: ControlPlane) -> None:
    """Wait until all Events recorded so far are posted, and all requests answered so far are in the audit log."""
    aside = User(control_plane, await control_plane.namespace("settled"))
    await aside.create("last", 2, "nothing-there")
    try:
        # The operator posts Events one by one, in the order in which they were recorded.
        await until(lambda: aside.events("last"), 60, "the operator's Event about the last set")
    finally:
        await aside.delete("last")
    mark = f"mark-{token_hex(8)}"
    since = control_plane.audit_offset()
    await control_plane.request("GET", f"/apis/vcpuset.dev/v1alpha1/namespaces/{aside.namespace}/vcpusets/{mark}")
    await until(
        lambda: any(each.name == mark for each in control_plane.audit_events(since)), 60, "the last request's record"
    )


def operators_writes(user: User, since: int, name: str = "") -> list[AuditEvent]:
    """The operator's writes in the user's namespace since this place in the audit log; see `settled`.

    name  only those about this set
    """
    return [
        each
        for each in user.control_plane.audit_events(since)
        if each.is_write
        and each.user_agent == "vcpuset"
        and each.namespace == user.namespace
        and (not name or each.name == name or each.name.startswith(f"{name}."))
    ]
