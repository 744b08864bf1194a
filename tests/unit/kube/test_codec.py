"""Objects become values, and a status survives being written and read."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.mergepatch import merged
from vcpuset.domain.machine import Answer
from vcpuset.domain.resource import (
    CONDITION_TYPES,
    TLS,
    BootVCPUs,
    Condition,
    Connection,
    GuestAgent,
    Monitor,
    Request,
    Spec,
    Status,
    TCPMonitor,
    UnixMonitor,
    Unplug,
    UnplugPolicy,
    Unsupported,
)
from vcpuset.kube.codec import InvalidObject, decode, encode_status

BODY: dict[str, Any] = {
    "apiVersion": "vcpuset.dev/v1alpha1",
    "kind": "VCPUSet",
    "metadata": {
        "uid": "0000-1",
        "namespace": "default",
        "name": "web",
        "generation": 3,
        "resourceVersion": "17",
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "labels": {"tier": "web"},
    },
    "spec": {"vcpus": 4, "monitor": {"unix": {"path": "web.sock"}}},
}

TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds are naive
COUNTS = st.none() | st.integers(0, 4096)
STATUSES = st.builds(
    Status,
    observed_generation=st.integers(-1, 2**62),
    vcpus=COUNTS,
    min_vcpus=COUNTS,
    max_vcpus=COUNTS,
    online_vcpus=st.none() | st.integers(0, 4096),
    machine_uuid=st.none() | st.uuids().map(str),
    selector=st.none() | st.text(min_size=1),
    unplug_started_at=st.none() | TIMES,
    pending_unplugs=st.lists(
        st.builds(
            Request,
            slot=st.integers(0, 4095),
            path=st.text(min_size=1),
            thread_id=st.integers(0, 2**62),
            requested_at=TIMES,
            attempts=st.integers(1, 1000),
            answer=st.none() | st.sampled_from(Answer),
        ),
        max_size=4,
    ).map(tuple),
    conditions=st.lists(
        st.builds(
            Condition,
            type=st.sampled_from(CONDITION_TYPES),
            status=st.sampled_from(["True", "False"]),
            reason=st.text(min_size=1),
            message=st.text(),
            last_transition_time=TIMES.map(lambda time: time.replace(microsecond=0)),
            observed_generation=st.integers(0, 2**62),
        ),
        max_size=3,
    ).map(tuple),
)


WHOLE: dict[str, Any] = {
    **BODY,
    "metadata": {**BODY["metadata"], "annotations": {"note": "x"}},
    "spec": {
        "vcpus": 4,
        "nodeName": "n1",
        "monitor": {"tcp": {"host": "h", "port": 1, "tls": {"secretName": "s", "serverName": "h"}}},
        "guestAgent": {"unix": {"path": "ga.sock"}, "bringOnline": True},
        "unplug": {"policy": "Enabled", "bootVCPUs": "Keep", "timeoutSeconds": 60, "retrySeconds": 300},
        "suspend": False,
    },
    "status": {
        "observedGeneration": 3,
        "vcpus": 4,
        "unplug": {
            "startedAt": "2026-01-02T03:04:05.678901Z",
            "requests": [
                {
                    "slot": 3,
                    "path": "/machine/peripheral/vcpu3",
                    "threadID": 77,
                    "requestedAt": "2026-01-02T03:04:05Z",
                    "attempts": 2,
                    "answer": "Busy",
                }
            ],
        },
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Converged",
                "message": "",
                "lastTransitionTime": "2026-01-02T03:04:05Z",
                "observedGeneration": 3,
            }
        ],
    },
}
"""An object with about every field."""

ZONES = st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59)).map(
    lambda offset: timezone(timedelta(minutes=offset // timedelta(minutes=1)))
)
ANY_TIME = st.builds(
    lambda time, zone: time.replace(tzinfo=zone).isoformat(),
    st.datetimes() | st.sampled_from([datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]),
    ZONES,
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | ANY_TIME,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: object, way: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to everything within a value."""
    if way:
        yield way
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*way, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*way, number))


def with_another(way: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """WHOLE with something else in one place."""
    changed = copy.deepcopy(WHOLE)
    holder: Any = changed
    for step in way[:-1]:
        holder = holder[step]
    holder[way[-1]] = value
    return changed


PLACES = list(places(WHOLE))
TIME_PLACES = [way for way in PLACES if str(way[-1]).endswith(("At", "Time", "Timestamp"))]


def body(**spec: Any) -> dict[str, Any]:
    """BODY with other fields in its spec."""
    changed = copy.deepcopy(BODY)
    changed["spec"].update(spec)
    return changed


def test_an_object_is_read_with_defaults_for_what_it_leaves_out() -> None:
    vcpuset = decode(BODY)
    assert (vcpuset.uid, vcpuset.namespace, vcpuset.name) == ("0000-1", "default", "web")
    assert (vcpuset.generation, vcpuset.resource_version) == (3, "17")
    assert vcpuset.created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert vcpuset.spec == Spec(4, UnixMonitor("web.sock"))
    assert vcpuset.status == Status()


def test_every_field_of_the_spec_is_read() -> None:
    vcpuset = decode(
        body(
            monitor={"tcp": {"host": "vm.example", "port": 4444, "insecure": True}, "connection": "OnDemand"},
            guestAgent={"unix": {"path": "web/ga.sock"}, "bringOnline": True},
            unplug={"policy": "Disabled", "bootVCPUs": "Keep", "timeoutSeconds": 7, "retrySeconds": 9},
            suspend=True,
            minVCPUs=2,
            maxVCPUs=8,
        )
    )
    unplug = Unplug(UnplugPolicy.DISABLED, BootVCPUs.KEEP, timeout_seconds=7, retry_seconds=9)
    monitor, agent = TCPMonitor("vm.example", 4444), GuestAgent("web/ga.sock", bring_online=True)
    assert vcpuset.spec == Spec(4, monitor, Connection.ON_DEMAND, agent, unplug, suspend=True, min_vcpus=2, max_vcpus=8)


def test_a_count_may_be_left_out() -> None:
    left_out = copy.deepcopy(BODY)
    del left_out["spec"]["vcpus"]
    assert decode(left_out).spec == decode(body(vcpus=None)).spec == Spec(None, UnixMonitor("web.sock"))


def test_a_monitor_on_tls_is_read_with_and_without_a_server_name() -> None:
    def monitor(**tls: str) -> Monitor:
        return decode(body(monitor={"tcp": {"host": "h", "port": 1, "tls": tls}})).spec.monitor

    assert monitor(secretName="one") == TCPMonitor("h", 1, TLS("one"))
    assert monitor(secretName="one", serverName="vm") == TCPMonitor("h", 1, TLS("one", "vm"))


def test_fields_that_this_version_does_not_know_are_skipped() -> None:
    newer = body(shape="round", monitor={"unix": {"path": "web.sock", "mode": "fast"}, "colour": "blue"})
    newer["status"] = {"observedGeneration": 3, "weather": "fine"}
    assert decode(newer).spec == decode(BODY).spec
    assert decode(newer).status == Status(observed_generation=3)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        pytest.param(body(vcpus="4"), "spec.vcpus: Expected `int | null`, got `str`", id="a string as a number"),
        pytest.param(body(suspend=None), "spec.suspend: Expected `bool`, got `null`", id="a null"),
        pytest.param(body(vcpus=0), "spec.vcpus: Expected `int` >= 1", id="no vCPU"),
        pytest.param(body(monitor={}), "spec.monitor: Expected exactly one of `unix` and `tcp`", id="no monitor"),
        pytest.param(
            body(monitor={"unix": {"path": "a"}, "tcp": {"host": "h", "port": 1, "insecure": True}}),
            "spec.monitor: Expected exactly one of `unix` and `tcp`",
            id="two monitors",
        ),
        pytest.param(
            body(monitor={"tcp": {"host": "h", "port": 1}}),
            "spec.monitor.tcp: Expected exactly one of `tls` and `insecure: true`",
            id="plain TCP that nobody agreed to",
        ),
        pytest.param(
            body(monitor={"tcp": {"host": "h", "port": 1, "insecure": True, "tls": {"secretName": "s"}}}),
            "spec.monitor.tcp: Expected exactly one of `tls` and `insecure: true`",
            id="TLS and plain TCP",
        ),
        pytest.param(
            body(monitor={"tcp": {"host": "h", "port": 70000, "insecure": True}}),
            "spec.monitor.tcp.port: Expected `int` <= 65535",
            id="no port",
        ),
        pytest.param(body(monitor={"serial": {}}), "spec.monitor: ", id="a monitor of a kind yet to come"),
        pytest.param(
            body(unplug={"policy": "Sometimes"}),
            "spec.unplug.policy: Invalid enum value 'Sometimes'",
            id="a choice yet to come",
        ),
        pytest.param(
            body(unplug={"retrySeconds": 10**12}),
            "spec.unplug.retrySeconds: Expected `int` <= 1000000000",
            id="a time beyond the calendar",
        ),
        pytest.param(
            {**BODY, "spec": {"vcpus": 4}}, "spec: Object missing required field `monitor`", id="a field left out"
        ),
        pytest.param({**BODY, "spec": None}, "spec: Expected `object`, got `null`", id="nothing"),
        pytest.param({**BODY, "spec": []}, "spec: Expected `object`, got `array`", id="a list"),
    ],
)
def test_a_spec_that_cannot_be_obeyed_is_unsupported_with_the_field_and_what_helps(
    spec: dict[str, Any], words: str
) -> None:
    monitor = decode(spec).spec.monitor
    assert isinstance(monitor, Unsupported)
    assert monitor.message.startswith(words)
    assert monitor.message.endswith("upgrade the operator, or correct the field.")


def test_of_a_spec_that_cannot_be_obeyed_only_the_count_is_read() -> None:
    newer = decode(body(vcpus=7, monitor={"serial": {}}, guestAgent={"unix": {"path": "ga.sock"}}, suspend=True)).spec
    assert newer == Spec(7, newer.monitor)
    assert decode(body(vcpus="many")).spec.vcpus is None


REQUEST = WHOLE["status"]["unplug"]["requests"][0]


@pytest.mark.parametrize("answer", ["OnStrike", 3, None, ["Busy"]])
def test_a_request_with_an_unknown_answer_is_in_flight(answer: object) -> None:
    told = with_another(("status", "unplug", "requests", 0), {**REQUEST, "answer": answer})
    (request,) = decode(told).status.pending_unplugs
    assert request == Request(
        3, "/machine/peripheral/vcpu3", 77, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), attempts=2, answer=None
    )
    assert request.in_flight


STRANGE_TIMES = ["0001-01-01T00:00:00+23:00", "0999-01-01T00:00:00Z", "9999-12-31T23:59:59-10:00", "yesterday", 3, None]
"""Of those, the API server stores the first three, if the definition admits them."""


@pytest.mark.parametrize("time", STRANGE_TIMES)
def test_a_request_whose_time_cannot_be_read_is_in_flight_and_counts_as_made_now(time: object) -> None:
    told = with_another(("status", "unplug", "requests", 0, "requestedAt"), time)
    (request,) = decode(told).status.pending_unplugs
    assert request.requested_at > datetime(2900, 1, 1, tzinfo=UTC)
    # Until it has been observed it may have to be written back as it is, and the definition admits that.
    encoded = encode_status(decode(told).status)["unplug"]["requests"][0]["requestedAt"]
    assert re.fullmatch("[12][0-9]{3}-.*Z", encoded)


@pytest.mark.parametrize("time", STRANGE_TIMES)
def test_other_times_that_cannot_be_read_are_as_if_they_were_not_there(time: object) -> None:
    started = decode(with_another(("status", "unplug", "startedAt"), time)).status
    assert started == replace(decode(WHOLE).status, unplug_started_at=None)
    moved = decode(with_another(("status", "conditions", 0, "lastTransitionTime"), time)).status
    assert moved == replace(decode(WHOLE).status, conditions=())


@pytest.mark.parametrize(
    ("way", "left"),
    [
        (("status", "vcpus"), {"vcpus": None}),
        (("status", "observedGeneration"), {"observed_generation": -1}),
        (("status", "unplug", "requests", 0, "threadID"), {"pending_unplugs": ()}),
        (("status", "unplug", "requests", 0), {"pending_unplugs": ()}),
        (("status", "unplug", "requests"), {"pending_unplugs": ()}),
        (("status", "unplug"), {"pending_unplugs": (), "unplug_started_at": None}),
        (("status", "conditions", 0, "reason"), {"conditions": ()}),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_understood_of_a_status_is_as_if_it_were_not_there(
    way: tuple[str | int, ...], left: dict[str, Any]
) -> None:
    assert decode(with_another(way, {"a": "riddle"})).status == replace(decode(WHOLE).status, **left)


OURS = WHOLE["status"]["conditions"][0]
THEIRS: dict[str, Any] = {
    "type": "example.com/Audited",
    "status": "Unknown",
    "reason": "Pending",
    "message": "",
    "lastTransitionTime": "0001-01-01T00:00:00.120+23:00",
    "colour": {"shade": None},
}
"""With a field that this version does not know, and times as others write them."""


def condition(kind: str) -> dict[str, Any]:
    """One of the operator's conditions, as it is stored."""
    return {**OURS, "type": kind}


FOUR = [condition(kind) for kind in ("Ready", "Reconciling", "Stalled", "GuestAgentConnected")]
THREE = FOUR[:3]
OTHER = {**THEIRS, "type": "Healthy"}


@pytest.mark.parametrize(
    ("stored", "ours", "written"),
    [
        pytest.param([THEIRS], THREE, [THEIRS, *THREE], id="before the first report"),
        pytest.param([*THREE, THEIRS], THREE, [*THREE, THEIRS], id="behind"),
        pytest.param(
            [FOUR[0], THEIRS, FOUR[1], OTHER, FOUR[2]],
            FOUR,
            [FOUR[0], THEIRS, FOUR[1], OTHER, FOUR[2], FOUR[3]],
            id="between",
        ),
        pytest.param([*FOUR, THEIRS], THREE, [*THREE, THEIRS], id="when one of the operator's goes"),
        pytest.param([THEIRS, *FOUR, OTHER], THREE, [THEIRS, *THREE, OTHER], id="on both sides of one that goes"),
        pytest.param([{"type": "Ready"}, THEIRS], THREE, [FOUR[0], THEIRS, *FOUR[1:3]], id="with a broken one"),
        pytest.param([THEIRS], [], [THEIRS], id="alone"),
    ],
)
def test_conditions_of_others_are_written_as_they_are_in_their_places(
    stored: list[dict[str, Any]], ours: list[dict[str, Any]], written: list[dict[str, Any]]
) -> None:
    before = decode({**BODY, "status": {"conditions": stored}}).status
    after = replace(before, conditions=decode({**BODY, "status": {"conditions": ours}}).status.conditions)
    assert json.dumps(encode_status(after)["conditions"]) == json.dumps(written)


def test_conditions_of_others_make_no_difference_between_two_statuses() -> None:
    alone, beside = ({**BODY, "status": {"conditions": each}} for each in (THREE, [THEIRS, *THREE]))
    assert decode(alone).status == decode(beside).status


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"creationTimestamp": "9999-12-31T23:59:59-10:00"}, "metadata.creationTimestamp: 9999-12-31T23:59:59-10:00"),
        ({"uid": None}, "metadata.uid: Expected `str`, got `null`"),
        ({"generation": "3"}, "metadata.generation: Expected `int`, got `str`"),
    ],
    ids=str,
)
def test_an_object_without_usable_metadata_is_refused_with_its_name_and_the_field(
    metadata: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidObject, match=f"default/web .*{re.escape(words)}"):
        decode({**BODY, "metadata": {**BODY["metadata"], **metadata}})


@pytest.mark.parametrize("nonsense", [{}, {"metadata": None}, {"metadata": {}, "spec": 3}], ids=str)
def test_what_is_no_object_at_all_is_refused_too(nonsense: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject):
        decode(nonsense)


@given(
    another=st.tuples(st.sampled_from(PLACES), ANYTHING) | st.tuples(st.sampled_from(TIME_PLACES), ANY_TIME),
)
def test_whatever_the_api_server_tells_is_a_set_whose_status_can_be_written_or_an_invalid_object(
    another: tuple[tuple[str | int, ...], object],
) -> None:
    told = with_another(*another)
    try:
        status = decode(told).status
    except InvalidObject:
        return
    written = encode_status(status)
    assert encode_status(decode({**told, "status": merged({}, written)}).status) == written


@given(body=st.dictionaries(st.sampled_from(["metadata", "spec", "status", "kind"]), ANYTHING))
def test_whatever_else_it_tells_is_an_invalid_object(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject):
        decode(body)


@given(stored=STATUSES, status=STATUSES)
def test_a_written_status_is_read_back_as_the_same_value(stored: Status, status: Status) -> None:
    before = merged({}, encode_status(stored))
    after = merged(before, json.loads(json.dumps(encode_status(status))))
    assert decode({**BODY, "status": after}).status == status


def test_a_status_is_written_with_the_names_and_times_of_the_api() -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    status = Status(
        observed_generation=3,
        vcpus=4,
        online_vcpus=3,
        selector="vcpuset.dev/name=web",
        machine_uuid="a9e0cd9c-8b8a-4a92-9a4b-0e6c3c3a8b5c",
        unplug_started_at=time,
        pending_unplugs=(
            Request(3, "/machine/peripheral/vcpu3", 77, time, attempts=2, answer=Answer.IN_USE),
            Request(2, "/machine/peripheral/vcpu2", 76, time),
        ),
        conditions=(Condition("Ready", "True", "Converged", "as declared", time, 3),),
    )
    assert encode_status(status) == {
        "observedGeneration": 3,
        "vcpus": 4,
        "onlineVCPUs": 3,
        "machine": {"minVCPUs": None, "maxVCPUs": None, "uuid": "a9e0cd9c-8b8a-4a92-9a4b-0e6c3c3a8b5c"},
        "selector": "vcpuset.dev/name=web",
        "unplug": {
            "startedAt": "2026-01-02T03:04:05.678901Z",
            "requests": [
                {
                    "slot": 3,
                    "path": "/machine/peripheral/vcpu3",
                    "threadID": 77,
                    "requestedAt": "2026-01-02T03:04:05.678901Z",
                    "attempts": 2,
                    "answer": "InUse",
                },
                {
                    "slot": 2,
                    "path": "/machine/peripheral/vcpu2",
                    "threadID": 76,
                    "requestedAt": "2026-01-02T03:04:05.678901Z",
                    "attempts": 1,
                },
            ],
        },
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Converged",
                "message": "as declared",
                "lastTransitionTime": "2026-01-02T03:04:05Z",
                "observedGeneration": 3,
            }
        ],
    }


def test_times_of_other_zones_are_written_in_utc() -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    assert encode_status(Status(unplug_started_at=time))["unplug"]["startedAt"] == "2026-01-02T01:04:05.000000Z"
