"""What tests expect of a VCPUSet's status: the form that every status has, and the reason at hand.

The statuses of the conditions are written out here and in the tests on purpose: taken from the operator's own list of
reasons, they would agree with it whatever it said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from harness.world import Seen, User

__all__ = ["HELD", "READY", "RECONCILING", "STALLED", "check_form", "history", "reasons", "shows"]

WAIT_SECONDS = 90.0

States = tuple[str, str, str]
"""The statuses of Ready, Reconciling and Stalled."""

READY: States = ("True", "False", "False")
RECONCILING: States = ("False", "True", "False")
STALLED: States = ("False", "False", "True")
HELD: States = ("False", "False", "False")


def check_form(seen: Seen) -> None:
    """Check what holds for every status that the operator has written, whatever the reason."""
    conditions = seen.status["conditions"]
    assert [each["type"] for each in conditions] == ["Ready", "Reconciling", "Stalled"]
    assert seen.states in {READY, RECONCILING, STALLED, HELD}
    generation = seen.status["observedGeneration"]
    assert 1 <= generation <= seen.body["metadata"]["generation"]
    for each in conditions:
        assert set(each) == {"type", "status", "reason", "message", "lastTransitionTime", "observedGeneration"}
        assert each["observedGeneration"] == generation
        assert (each["reason"], each["message"]) == (conditions[0]["reason"], conditions[0]["message"])
        assert each["message"].endswith((".", "?")), each["message"]
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
    # A watch from an old version begins with all that has happened since, and ends by itself after a second.
    answer = await user.control_plane.kubectl(
        "get",
        "--raw",
        f"/apis/vcpuset.dev/v1alpha1/namespaces/{user.namespace}/vcpusets?watch=1&timeoutSeconds=1"
        f"&fieldSelector=metadata.name%3D{metadata['name']}&resourceVersion={metadata['resourceVersion']}",
    )
    changes = [json.loads(line) for line in answer.stdout.splitlines()]
    return [since, *(Seen(change["object"]) for change in changes if change["type"] in {"ADDED", "MODIFIED"})]


def reasons(versions: Sequence[Seen]) -> list[tuple[str, States]]:
    """The reasons, with the conditions' statuses, in the order in which they came up."""
    found: list[tuple[str, States]] = []
    for seen in versions:
        if ready := seen.condition("Ready"):
            each = (str(ready["reason"]), (seen.states[0] or "", seen.states[1] or "", seen.states[2] or ""))
            if not found or found[-1] != each:
                found.append(each)
    return found
