"""The replies of QEMU, and of a guest's agent, as domain values.

Each function takes the reply of one query. Unknown keys are ignored, because every QEMU release adds some; a known key
of another type, or a missing one, raises `Malformed`: a number made of something else would end up in a plan.
"""

from __future__ import annotations

import contextlib
import functools
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TypeVar
from uuid import UUID

from vcpuset.domain.busy import Halts, Used
from vcpuset.domain.guest import GuestCPU, GuestCPUs
from vcpuset.domain.machine import Ost, Slot
from vcpuset.qmp.peer import Link, address

__all__ = [
    "CPUs",
    "Malformed",
    "connections",
    "cpus",
    "guest_cpus",
    "halts",
    "migrating",
    "ost",
    "ost_of_event",
    "processed",
    "relayed",
    "run_state",
    "slots",
    "used",
    "uuid",
    "version",
]

_T = TypeVar("_T")

_TOPOLOGY = ("drawer-id", "book-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id")
"""The ids that order slots, outermost first. On x86 a slot's rank in this order is QEMU's cpu-index."""

_USUAL = frozenset({*_TOPOLOGY, "node-id"})

_NOT_MIGRATING = frozenset({"none", "cancelled", "completed", "failed"})
"""The values of `MigrationStatus` (QEMU 10.0, qapi/migration.json) without a migration. QEMU's releases add others; an
unknown one counts as a migration, because a change would disturb that."""


_MOST_THREADS = 1024
"""vCPUs of one slot. A slot holds one, or a POWER core's threads, of which QEMU allows 8."""

_MOST_CPUS = 4096
"""More than any machine of QEMU has (10.0: 4096 on x86)."""

_LARGEST = (1 << 63) - 1
"""The largest number that the Kubernetes API accepts."""

_LONGEST = 1024
"""Characters of a name."""


_HALTED = ("halt_wait_ns", "halt_poll_success_ns", "halt_poll_fail_ns")

_USED = ("user", "nice", "system", "irq", "softirq", "steal")


class Malformed(ValueError):
    """A reply does not have the form of its command."""


@dataclass(frozen=True, slots=True)
class CPUs:
    """`query-cpus-fast`: architecture, number of vCPUs, and the host threads of each CPU device, ascending.

    arch  "unknown" for a machine without CPUs (`-M none`, `x-remote`)
    """

    arch: str
    count: int
    threads: Mapping[str, Sequence[int]]


def run_state(reply: object) -> str:
    """`query-status`: the run state."""
    return _name(_object(reply), "status")


def uuid(reply: object) -> str | None:
    """`query-uuid`; None: the machine was started without one, which QEMU reports as zeros."""
    text = _member(_object(reply), "UUID", str)
    try:
        found = UUID(text)
    except ValueError as error:
        raise Malformed(f"'UUID' is {reprlib.repr(text)}") from error
    if str(found) != text:  # Python accepts many UUIDs in other forms than QEMU's.
        raise Malformed(f"'UUID' is {reprlib.repr(text)}")
    return str(found) if found.int else None


def connections(reply: object) -> frozenset[Link]:
    """The TCP connections of `query-chardev`, in "tcp:192.0.2.1:4444,server=on <-> 192.0.2.9:40000" and the like.

    Other forms are skipped.
    """
    found: set[Link] = set()
    for each in _objects(reply):
        here, arrow, there = _member(each, "filename", str).partition(" <-> ")
        if arrow:
            with contextlib.suppress(ValueError):
                found.add((_end(here.partition(":")[2].partition(",")[0]), _end(there)))
    return frozenset(found)


def _end(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return address(host.removeprefix("[").removesuffix("]"), int(port))


def version(greeting: object) -> str | None:
    """`QMP.version` of the greeting, for people; None: not in QEMU's form. Nothing depends on it."""
    try:
        entry = _object(greeting)
        numbers = _member(entry, "qemu", dict)
        found = ".".join(str(_member(numbers, key, int)) for key in ("major", "minor", "micro"))
        package = _member(entry, "package", str).strip(" ()") if "package" in entry else ""
    except Malformed:
        return None
    return f"{found} ({package})" if package else found


def relayed(greeting: object) -> bool:
    """Whether the `QMP.version` is that of libvirt's `virt-qemu-qmp-proxy`: its package is "qemu-" and QEMU's version,
    while QEMU's own package is that of a distribution, or empty."""
    return re.fullmatch(r"(\S+) \(qemu-\1\)", version(greeting) or "") is not None


def cpus(reply: object) -> CPUs:
    """`query-cpus-fast`. Devices are named by their QOM path; a device of several vCPUs (a core) has one entry."""
    archs: set[str] = set()
    count = 0
    threads: dict[str, list[int]] = {}
    for entry in _objects(reply):
        if count == _MOST_CPUS:
            raise Malformed(f"more than {_MOST_CPUS} CPUs")
        archs.add(_name(entry, "target"))
        count += 1
        threads.setdefault(_device(_name(entry, "qom-path")), []).append(_number(entry, "thread-id", 0, _LARGEST))
    if len(archs) > 1:
        raise Malformed(f"CPUs of several architectures: {reprlib.repr(sorted(archs))}")
    return CPUs(archs.pop() if archs else "unknown", count, {path: sorted(each) for path, each in threads.items()})


def slots(reply: object, threads: Mapping[str, Sequence[int]]) -> tuple[Slot, ...] | None:
    """`query-hotpluggable-cpus`, ascending; `threads` is that of `cpus`.

    None: the two replies are not about the same CPUs; one came or went between them.
    """
    if isinstance(reply, list) and len(reply) > _MOST_CPUS:
        raise Malformed(f"{len(reply)} CPU slots, more than {_MOST_CPUS}")
    entries = [(_place(props), props, entry) for entry in _objects(reply) for props in (_props(entry),)]
    entries.sort(key=lambda each: each[0])
    if any(one[0] == other[0] for one, other in pairwise(entries)):
        raise Malformed("two slots with the same ids")
    found = []
    held: dict[str, int] = {}
    # Many machines with thousands of slots may be observed at once: equal strings are kept once.
    known = {path: path for path in threads}
    for index, (_, props, entry) in enumerate(entries):
        driver = _name(entry, "type")
        driver = known.setdefault(driver, driver)
        path = _name(entry, "qom-path") if "qom-path" in entry else None
        path = path and known.get(path, path)
        vcpus = _number(entry, "vcpus-count", 1, _MOST_THREADS)
        if path is not None:
            if path in held:
                raise Malformed(f"two slots with the CPU {reprlib.repr(path)}")
            held[path] = vcpus
        found.append(
            Slot(
                index=index,
                driver=driver,
                props=props,
                vcpus=vcpus,
                path=path,
                thread_id=threads[path][0] if path is not None and path in threads else None,
            )
        )
    if len({slot.vcpus for slot in found}) > 1:
        raise Malformed("slots of several sizes")
    return tuple(found) if held == {path: len(each) for path, each in threads.items()} else None


def ost(reply: object) -> Mapping[int, Ost]:
    """`query-acpi-ospm-status`: the last report about each CPU slot. Empty while the guest's ACPI is not up."""
    reports = {}
    for entry in _objects(reply):
        if _member(entry, "slot-type", str) == "CPU":
            reports[_slot(entry)] = Ost(_member(entry, "source", int), _member(entry, "status", int))
    return MappingProxyType(reports)


def ost_of_event(data: object) -> tuple[int, Ost] | None:
    """`ACPI_DEVICE_OST`: slot and report; None: it is not about a CPU."""
    entry = _object(_member(_object(data), "info", dict))
    if _member(entry, "slot-type", str) != "CPU":
        return None
    return _slot(entry), Ost(_member(entry, "source", int), _member(entry, "status", int))


def migrating(reply: object) -> bool:
    """`query-migrate`: whether a migration is in progress. If there was never one, the reply is an empty object."""
    entry = _object(reply)
    return "status" in entry and _name(entry, "status") not in _NOT_MIGRATING


def halts(reply: object) -> Mapping[str, Halts] | None:
    """`query-stats`: KVM's counters of each vCPU, by its QOM path.

    None: there are none, such as under TCG. Their names may change with each QEMU (qapi/stats.json), so a reply in
    another form is none either.
    """
    try:
        found = {}
        for entry in _few(reply):
            stats = {_name(each, "name"): each.get("value") for each in _objects(entry.get("stats"))}
            halted = sum(_number(stats, name, 0, _LARGEST) for name in _HALTED)
            exits = _number(stats, "exits", 0, _LARGEST)
            found[_name(entry, "qom-path")] = Halts(exits, halted / 1e9, _member(stats, "blocking", bool))
    except Malformed:
        return None
    return found or None


def used(reply: object) -> Mapping[int, Used] | None:
    """`guest-get-cpustats` of a Linux guest: milliseconds of each of its CPUs. None: the reply has another form."""
    try:
        found = {}
        for entry in _few(reply):
            # "guest" and "guestnice" are part of "user" and "nice" (proc(5)).
            spent = sum(_number(entry, name, 0, _LARGEST) for name in _USED if name in entry)
            found[_number(entry, "cpu", 0, _LARGEST)] = Used(spent / 1e3)
    except Malformed:
        return None
    return found or None


def load(reply: object) -> float | None:
    """`guest-get-load`: the load average of the last minute. None: the reply has another form."""
    value = reply.get("load1m") if isinstance(reply, dict) else None
    return float(value) if isinstance(value, int | float) and 0 <= value <= _LARGEST else None


def guest_cpus(reply: object) -> GuestCPUs:
    """`guest-get-vcpus`, by ascending logical id; the agent lists them in any order."""
    found: dict[int, GuestCPU] = {}
    for entry in _objects(reply):
        if len(found) == _MOST_CPUS:
            raise Malformed(f"more than {_MOST_CPUS} CPUs")
        logical_id = _member(entry, "logical-id", int)
        if not 0 <= logical_id <= _LARGEST or logical_id in found:
            raise Malformed(f"'logical-id' {reprlib.repr(logical_id)}, which is negative, too large or a duplicate")
        can_offline = "can-offline" in entry and _member(entry, "can-offline", bool)
        found[logical_id] = GuestCPU(logical_id, _member(entry, "online", bool), can_offline)
    if not found:
        raise Malformed("an empty list")
    return GuestCPUs(tuple(found[logical_id] for logical_id in sorted(found)))


def processed(reply: object, requested: int) -> int:
    """`guest-set-vcpus`: how many entries were carried out, from the first on; at least one, else it is an error."""
    if isinstance(reply, bool) or not isinstance(reply, int) or not 1 <= reply <= requested:
        raise Malformed(f"{reprlib.repr(reply)} of {requested} entries")
    return reply


def _device(path: str) -> str:
    """The QOM path of the device that a vCPU belongs to: on pseries its threads are children of the core."""
    parent, _, child = path.rpartition("/")
    return parent if child.startswith("thread[") else path


def _props(entry: Mapping[str, object]) -> Mapping[str, int | str]:
    props: dict[str, int | str] = {}
    for key, value in _object(_member(entry, "props", dict)).items():
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise Malformed(f"{key!r} is {reprlib.repr(value)}")
        props[key] = value
    usual = all(key in _USUAL and isinstance(value, int) for key, value in props.items())
    return _shared(tuple(props.items())) if usual else MappingProxyType(props)


@functools.lru_cache(maxsize=4096)
def _shared(props: tuple[tuple[str, int | str], ...]) -> Mapping[str, int | str]:
    """One value for the properties that slots of many machines have."""
    return MappingProxyType(dict(props))


def _place(props: Mapping[str, int | str]) -> tuple[int, ...]:
    """Orders the slot with these properties among the others."""
    place = []
    for key in _TOPOLOGY:
        value = props.get(key, -1)
        if not isinstance(value, int):
            raise Malformed(f"{key!r} is {reprlib.repr(value)}")
        place.append(value)
    return tuple(place)


def _slot(entry: Mapping[str, object]) -> int:
    """QEMU sends the number of a slot as a string. Bounded, because values are kept by slot."""
    text = _member(entry, "slot", str)
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < _MOST_CPUS):
        raise Malformed(f"'slot' is {reprlib.repr(text)}")
    return int(text)


def _name(entry: Mapping[str, object], key: str) -> str:
    """A text that is safe in a status and in a log line; QEMU's are short and in ASCII."""
    text = _member(entry, key, str)
    if not (0 < len(text) <= _LONGEST and text.isprintable()):
        raise Malformed(f"{key!r} is {reprlib.repr(text)}")
    return text


def _number(entry: Mapping[str, object], key: str, least: int, most: int) -> int:
    number = _member(entry, key, int)
    if not least <= number <= most:
        raise Malformed(f"{key!r} is {reprlib.repr(number)}")
    return number


def _member(entry: Mapping[str, object], key: str, kind: type[_T]) -> _T:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise Malformed(f"{key!r} is {reprlib.repr(value)}" if key in entry else f"an entry without {key!r}")
    return value


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise Malformed(reprlib.repr(value))
    return value


def _few(value: object) -> Iterator[Mapping[str, object]]:
    """The entries of a list with one for each CPU."""
    if isinstance(value, list) and len(value) > _MOST_CPUS:
        raise Malformed(f"more than {_MOST_CPUS} CPUs")
    return _objects(value)


def _objects(value: object) -> Iterator[Mapping[str, object]]:
    if not isinstance(value, list):
        raise Malformed(reprlib.repr(value))
    return map(_object, value)
