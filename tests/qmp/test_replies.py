"""Replies of machines that these tests do not run, from QEMU's own documentation and test data."""

from typing import Any

import pytest

from vcpuset.qmp import replies


def cpu(path: str, thread: int, target: str) -> dict[str, Any]:
    return {"cpu-index": thread - 100, "qom-path": path, "thread-id": thread, "target": target, "props": {}}


def test_the_threads_of_a_pseries_core_are_one_device_known_by_its_lowest_thread() -> None:
    paths = ["/machine/unattached/device[0]", "/machine/peripheral/core8"]
    cpus = replies.cpus(
        [cpu(f"{path}/thread[{n}]", 107 - 4 * i - n, "ppc64") for i, path in enumerate(paths) for n in range(4)]
    )
    assert (cpus.arch, cpus.count) == ("ppc64", 8)
    assert cpus.threads == {paths[0]: [104, 105, 106, 107], paths[1]: [100, 101, 102, 103]}
    slots = replies.slots(
        [
            {"props": {"core-id": 16}, "vcpus-count": 4, "type": "power9_v2.0-spapr-cpu-core"},
            {"props": {"core-id": 8}, "vcpus-count": 4, "qom-path": paths[1], "type": "power9_v2.0-spapr-cpu-core"},
            {"props": {"core-id": 0}, "vcpus-count": 4, "qom-path": paths[0], "type": "power9_v2.0-spapr-cpu-core"},
        ],
        cpus.threads,
    )
    assert slots is not None
    assert [(slot.index, slot.props["core-id"], slot.thread_id, slot.vcpus) for slot in slots] == [
        (0, 0, 104, 4),
        (1, 8, 100, 4),
        (2, 16, None, 4),
    ]


def test_s390x_slots_ascend_by_drawer_book_socket_and_core() -> None:
    props = [
        {"drawer-id": drawer, "book-id": book, "socket-id": socket, "core-id": core}
        for drawer, book, socket, core in [(1, 0, 0, 3), (0, 1, 0, 2), (0, 0, 1, 1), (0, 0, 0, 0)]
    ]
    slots = replies.slots([{"props": p, "vcpus-count": 1, "type": "host-s390x-cpu"} for p in props], {})
    assert slots is not None
    assert [slot.props["core-id"] for slot in slots] == [0, 1, 2, 3]


def test_props_are_passed_on_with_keys_that_this_program_does_not_know() -> None:
    props = {"core-id": 1, "node-id": 2, "socket-id": 0, "new-in-qemu-99": "x"}
    slots = replies.slots([{"props": props, "vcpus-count": 1, "type": "t", "new": {}}], {})
    assert slots is not None
    assert slots[0].props == props
    with pytest.raises(TypeError):
        slots[0].props["core-id"] = 2  # type: ignore[index]  # that it cannot be set is what is tested


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("tcp:192.0.2.1:4444,server=on <-> 192.0.2.9:40000", {(("192.0.2.1", 4444), ("192.0.2.9", 40000))}),
        ("tcp:[2001:db8::1]:4444,server=on <-> [2001:db8::9]:5", {(("2001:db8::1", 4444), ("2001:db8::9", 5))}),
        ("tcp:[::ffff:192.0.2.1]:1,server=on <-> [::ffff:192.0.2.9]:2", {(("192.0.2.1", 1), ("192.0.2.9", 2))}),
        ("disconnected:tcp:192.0.2.1:4444,server=on", set()),
        ("unix:/run/vm.sock,server=on", set()),
        ("unix:/run/a <-> b,server=on", set()),
        ("tcp:host:port <-> :", set()),
    ],
)
def test_the_connections_of_chardevs_are_known_by_both_their_ends(filename: str, shown: set[object]) -> None:
    assert replies.connections([{"label": "m", "filename": filename, "frontend-open": True}]) == shown


def test_a_chardev_without_a_filename_is_malformed() -> None:
    with pytest.raises(replies.Malformed, match="filename"):
        replies.connections([{"label": "m"}])


@pytest.mark.parametrize("status", ["setup", "active", "pre-switchover", "device", "postcopy-active", "cancelling"])
def test_a_migration_is_under_way(status: str) -> None:
    assert replies.migrating({"status": status})


@pytest.mark.parametrize("reply", [{}, {"status": "none"}, {"status": "completed"}, {"status": "failed"}])
def test_no_migration_is_under_way(reply: dict[str, str]) -> None:
    assert not replies.migrating(reply)


def test_reports_about_memory_are_no_reports_about_cpus() -> None:
    entry = {"slot-type": "DIMM", "slot": "1", "source": 3, "status": 1}
    assert replies.ost([entry]) == {}
    assert replies.ost_of_event({"info": entry}) is None


def hotpluggable(core: int, **other: Any) -> dict[str, Any]:
    return {"props": {"core-id": core}, "vcpus-count": 1, "type": "t", **other}


@pytest.mark.parametrize(
    "reply",
    [
        [hotpluggable(0, **{"vcpus-count": 0})],
        [hotpluggable(0, **{"vcpus-count": -1})],
        [hotpluggable(0, **{"vcpus-count": 10**30})],
        [hotpluggable(0, **{"vcpus-count": 2}), hotpluggable(1)],
        [hotpluggable(1), hotpluggable(1)],
        [hotpluggable(0, **{"qom-path": "/a"}), hotpluggable(1, **{"qom-path": "/a"})],
        [hotpluggable(0, **{"qom-path": "/" + "a" * 1024})],
        [hotpluggable(0, **{"qom-path": ""})],
        [hotpluggable(0, **{"qom-path": "/\ud800"})],
        [hotpluggable(0, type="t\n")],
    ],
    ids=["none", "negative", "too-many", "two-sizes", "twice", "one-cpu", "long-path", "no-path", "surrogate", "lines"],
)
def test_slots_that_no_machine_has_are_not_believed(reply: list[dict[str, Any]]) -> None:
    with pytest.raises(replies.Malformed):
        replies.slots(reply, {"/a": [100]})


def test_a_core_with_more_or_fewer_vcpus_than_are_counted_is_one_that_comes_or_goes() -> None:
    reply = [hotpluggable(0, **{"qom-path": "/a", "vcpus-count": 2})]
    assert replies.slots(reply, {"/a": [100, 101]}) is not None
    assert replies.slots(reply, {"/a": [100]}) is None
    assert replies.slots(reply, {"/a": [100, 101, 102]}) is None


@pytest.mark.parametrize(
    "reply",
    [
        [cpu("/a", 1, "x86_64"), cpu("/b", 2, "s390x")],
        [cpu("/a", -1, "x86_64")],
        [cpu("/a", 1 << 63, "x86_64")],
        [cpu("/" + "a" * 1024, 1, "x86_64")],
        [cpu("/a", 1, "")],
    ],
    ids=["two-architectures", "negative-thread", "thread-of-64-bits", "long-path", "no-architecture"],
)
def test_cpus_that_no_machine_has_are_not_believed(reply: list[dict[str, Any]]) -> None:
    with pytest.raises(replies.Malformed):
        replies.cpus(reply)


@pytest.mark.parametrize("status", ["", "x" * 1025, "running\n", "\ud800"])
def test_a_run_state_is_one_short_word(status: str) -> None:
    with pytest.raises(replies.Malformed):
        replies.run_state({"status": status})


def test_more_cpus_than_any_machine_has_are_no_machine() -> None:
    cpu = {"target": "x86_64", "thread-id": 1}
    many = [{**cpu, "qom-path": f"/machine/unattached/device[{number}]"} for number in range(4097)]
    assert replies.cpus(many[:4096]).count == 4096
    with pytest.raises(replies.Malformed, match="more than 4096"):
        replies.cpus(many)
    slots = [{"type": "cpu", "vcpus-count": 1, "props": {"core-id": number}} for number in range(4097)]
    assert len(replies.slots(slots[:4096], {}) or ()) == 4096
    with pytest.raises(replies.Malformed, match="more than 4096"):
        replies.slots(slots, {})


def test_reports_about_slots_beyond_any_machine_are_not_kept() -> None:
    report = {"slot-type": "CPU", "source": 3, "status": 1}
    assert replies.ost_of_event({"info": {**report, "slot": "4095"}}) is not None
    with pytest.raises(replies.Malformed):
        replies.ost_of_event({"info": {**report, "slot": "4096"}})


def test_a_uuid_is_written_as_qemu_writes_it() -> None:
    uuid = "12345678-9abc-def0-1234-56789abcdef0"
    assert replies.uuid({"UUID": uuid}) == uuid
    for other in (uuid.upper(), f"{{{uuid}}}", uuid.replace("-", ""), uuid.replace("12", "1_", 1)):
        with pytest.raises(replies.Malformed):
            replies.uuid({"UUID": other})


@pytest.mark.parametrize(
    ("package", "is_one"),
    [
        ("qemu-10.0.2", True),
        ("qemu-10.0.20", False),
        ("qemu-10.0.2-1.fc43", False),
        (" (qemu-kvm-10.0.2-5.el10)", False),
        ("Debian 1:10.0.2+ds-2+deb13u1~bpo12+1", False),
        ("v10.0.2", False),
        ("", False),
    ],
)
def test_a_relay_of_libvirt_is_known_by_its_package(package: str, is_one: bool) -> None:
    assert replies.relayed({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": package}) is is_one
