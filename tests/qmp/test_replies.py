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
    assert cpus.threads == {paths[0]: 104, paths[1]: 100}
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
