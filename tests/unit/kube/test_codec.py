"""Objects become values, and a status survives being written and read."""

import copy
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.mergepatch import merged
from vcpuset.domain.machine import Answer
from vcpuset.domain.resource import (
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
            type=st.text(min_size=1),
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
            monitor={"tcp": {"host": "vm.example", "port": 4444, "insecure": True}, "connection": "Persistent"},
            guestAgent={"unix": {"path": "web/ga.sock"}, "bringOnline": True},
            unplug={"policy": "Disabled", "bootVCPUs": "Keep", "timeoutSeconds": 7, "retrySeconds": 9},
            suspend=True,
        )
    )
    unplug = Unplug(UnplugPolicy.DISABLED, BootVCPUs.KEEP, timeout_seconds=7, retry_seconds=9)
    monitor, agent = TCPMonitor("vm.example", 4444), GuestAgent("web/ga.sock", bring_online=True)
    assert vcpuset.spec == Spec(4, monitor, Connection.PERSISTENT, agent, unplug, suspend=True)


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
    ("invalid", "words"),
    [
        pytest.param(body(vcpus="4"), "Expected `int`, got `str` - at `spec.vcpus`", id="a string as a number"),
        pytest.param(body(vcpus=None), "at `spec.vcpus`", id="a null"),
        pytest.param(body(monitor={}), "exactly one of `unix` and `tcp` - at `spec.monitor`", id="no monitor"),
        pytest.param(
            body(monitor={"unix": {"path": "a"}, "tcp": {"host": "h", "port": 1, "insecure": True}}),
            "exactly one of `unix` and `tcp` - at `spec.monitor`",
            id="two monitors",
        ),
        pytest.param(
            body(monitor={"tcp": {"host": "h", "port": 1}}),
            "exactly one of `tls` and `insecure: true` - at `spec.monitor.tcp`",
            id="plain TCP that nobody agreed to",
        ),
        pytest.param(
            body(monitor={"tcp": {"host": "h", "port": 1, "insecure": True, "tls": {"secretName": "s"}}}),
            "exactly one of `tls` and `insecure: true` - at `spec.monitor.tcp`",
            id="TLS and plain TCP",
        ),
        pytest.param(body(monitor={"serial": {}}), "at `spec.monitor`", id="a monitor of a kind yet to come"),
        pytest.param(
            body(unplug={"policy": "Sometimes"}),
            "Invalid enum value 'Sometimes' - at `spec.unplug.policy`",
            id="a choice yet to come",
        ),
        pytest.param({**BODY, "spec": {"vcpus": 4}}, "missing required field `monitor` - at `spec`", id="no field"),
        pytest.param(
            {**BODY, "status": {"unplug": {"startedAt": "yesterday"}}}, "at `status.unplug.startedAt`", id="not a time"
        ),
    ],
)
def test_an_object_that_cannot_be_understood_is_refused_with_its_name_and_the_field(
    invalid: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidObject) as caught:
        decode(invalid)
    assert "default/web" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("nonsense", [{}, {"metadata": None}, {"metadata": {}, "spec": 3}], ids=str)
def test_what_is_no_object_at_all_is_refused_too(nonsense: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject):
        decode(nonsense)


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-10:00"])
@pytest.mark.parametrize("way", TIME_PLACES, ids=lambda way: str(way[-1]))
def test_a_time_that_the_api_server_stores_and_this_calendar_does_not_have_is_refused(
    way: tuple[str | int, ...], time: str
) -> None:
    field = ".".join(step for step in way if isinstance(step, str))
    with pytest.raises(InvalidObject, match=f"{re.escape(time)} is not within the years .* at `{field}`"):
        decode(with_another(way, time))


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
