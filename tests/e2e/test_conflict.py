"""Two sets that name one monitor: the older one keeps it, and the next one takes over as soon as it lets go."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from harness.controlplane import ControlPlane
from harness.expect import HELD, READY, STALLED, shows
from harness.faulty import FaultyMonitor
from harness.guest import Guest
from harness.monitortls import MonitorTLS
from harness.operator import OperatorProcess
from harness.pki import Authority
from harness.qmp import SECOND_ON_TCP, count, second_on_tcp
from harness.wait import until
from harness.world import Seen, User


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(control_plane: ControlPlane, socket_root: Path) -> AsyncIterator[OperatorProcess]:
    """An operator that never looks without an occasion: whoever takes over here was told to, at once."""
    flags = ("--resync-seconds=3600", "--allow-tcp=127.0.0.0/8")
    async with OperatorProcess(control_plane, *flags, socket_root=socket_root) as running:
        yield running


async def _pair(user: User, monitor: Path | str, vcpus: int) -> tuple[str, str]:
    """Two sets with one monitor: the names of the older and the younger one."""
    made = [await user.create(name, vcpus, monitor) for name in ("first", "second")]
    made.sort(key=_seniority)
    older, younger = (str(seen.body["metadata"]["name"]) for seen in made)
    return older, younger


async def test_the_younger_of_two_sets_stalls_and_names_the_older_one(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        older, younger = await _pair(user, "vm.sock", 3)
        await user.change(younger, vcpus=5)
        await shows(user, older, "Converged", READY, vcpus=3)
        await user.wait_reason(younger, "MonitorConflict")
        # Created first, the younger one may have been looked at before the older one was there.
        seen = await user.get(younger)
        await shows(
            user,
            younger,
            "MonitorConflict",
            STALLED,
            f"VCPUSet {user.namespace}/{older} is older and names the same monitor",
            "delete one of the two",
            "takes over",
            vcpus=seen.vcpus,
        )
        await user.touch(older)
        await user.change(older, vcpus=4)
        await shows(user, older, "Converged", READY, vcpus=4)
        assert await count(guest.control) == 4


@pytest.mark.parametrize("other", ["unix", "tcp"])
async def test_the_younger_of_two_sets_with_two_monitors_of_one_machine_stalls_and_takes_over_when_the_older_one_goes(
    folder: Path, operator: OperatorProcess, user: User, other: str
) -> None:
    paths = [folder / "vm.sock", folder / "second.sock"]
    uuid = ("-uuid", "6f1b2a52-7f0e-4d0c-9a53-2f6f5e1f7a01") if other == "tcp" else ()
    async with Guest(None, smp="2,maxcpus=16", monitor_paths=paths, tcp=True, extra=uuid) as guest:
        second = guest.tcp_address if other == "tcp" else "second.sock"
        made = [await user.create("first", 3, "vm.sock"), await user.create("second", 3, second)]
        older, younger = (str(seen.body["metadata"]["name"]) for seen in sorted(made, key=_seniority))
        await user.change(older, vcpus=4)
        await shows(user, older, "Converged", READY, vcpus=4)
        seen = await user.wait_reason(younger, "MonitorConflict")
        assert (
            f"VCPUSet {user.namespace}/{older} is older and names another monitor of the same machine" in seen.message
        )
        await user.change(younger, vcpus=6)
        await user.wait_reason(younger, "MonitorConflict")
        assert await count(guest.control) == 4
        await shows(user, older, "Converged", READY, vcpus=4)

        await user.delete(older)
        await shows(user, younger, "Converged", READY, vcpus=6)


async def test_two_sets_with_two_monitors_of_one_machine_on_tcp_do_not_fight_although_it_has_no_uuid(
    operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=16", tcp=True, extra=SECOND_ON_TCP) as guest:
        monitors = (guest.tcp_address, await second_on_tcp(guest.control))
        made = [
            await user.create(name, 3, monitor) for name, monitor in zip(("first", "second"), monitors, strict=True)
        ]
        older, younger = (str(seen.body["metadata"]["name"]) for seen in sorted(made, key=_seniority))
        await user.change(older, vcpus=4)
        await shows(user, older, "Converged", READY, vcpus=4)
        await user.change(younger, vcpus=6)
        seen = await user.wait_reason(younger, "MonitorConflict")
        assert "QEMU reports the connections of both" in seen.message
        assert await count(guest.control) == 4

        await user.delete(older)
        await shows(user, younger, "Converged", READY, vcpus=6)


async def test_nothing_flaps_while_two_sets_name_one_monitor(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with FaultyMonitor(folder / "vm.sock", cpus=2):
        older, younger = await _pair(user, "vm.sock", 2)
        await user.wait_reason(older, "Converged")
        await user.wait_reason(younger, "MonitorConflict")
        statuses = [_without_generations((await user.get(name)).status) for name in (older, younger)]

        since = user.control_plane.audit_offset()

        def writes() -> list[str]:
            return sorted(
                event.name
                for event in user.control_plane.audit_events(since)
                if (event.subresource, event.namespace) == ("status", user.namespace)
            )

        for name in (younger, older) * 3:
            await user.touch(name)
            await user.wait(name, lambda seen: seen.current, "a report on the new generation")
        once_each = sorted([older, younger] * 3)
        await until(lambda: len(writes()) >= len(once_each), 60, "the audit log to have each write")
        assert writes() == once_each, "one write for each generation"
        assert [_without_generations((await user.get(name)).status) for name in (older, younger)] == statuses
        reasons = [each["reason"] for each in await user.events(older)]
        assert reasons.count("Converged") <= 1
        assert "MonitorConflict" not in reasons


async def test_the_younger_one_takes_over_at_once_when_the_older_one_is_deleted(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        older, younger = await _pair(user, "vm.sock", 3)
        await user.wait_reason(older, "Converged")
        await user.wait_reason(younger, "MonitorConflict")
        await user.change(younger, vcpus=5)
        await user.wait_reason(younger, "MonitorConflict")
        assert await count(guest.control) == 3
        await user.delete(older)
        await shows(user, younger, "Converged", READY, vcpus=5)


async def test_the_younger_one_takes_over_at_once_from_a_deleted_one_that_a_finalizer_keeps(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with FaultyMonitor(folder / "vm.sock", cpus=2):
        older, younger = await _pair(user, "vm.sock", 2)
        await user.wait_reason(older, "Converged")
        await user.wait_reason(younger, "MonitorConflict")
        await user.finalizers(older, "example.com/held")
        try:
            await user.delete(older)
            await shows(user, younger, "Converged", READY, vcpus=2)
            await shows(user, older, "Terminating", HELD, "has been deleted", vcpus=2)
        finally:
            await user.finalizers(older)


async def test_the_younger_one_takes_over_at_once_when_the_older_one_names_another_monitor(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with (
        Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]),
        Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "other.sock"]),
    ):
        older, younger = await _pair(user, "vm.sock", 3)
        await user.wait_reason(older, "Converged")
        await user.wait_reason(younger, "MonitorConflict")
        await user.change(younger, vcpus=5)
        await user.change(older, vcpus=4, monitor={"unix": {"path": "other.sock"}})
        await shows(user, older, "Converged", READY, vcpus=4)
        await shows(user, younger, "Converged", READY, vcpus=5)


async def test_the_younger_one_takes_over_at_once_when_the_older_one_goes_to_another_operator(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]):
        older, younger = await _pair(user, "vm.sock", 3)
        await user.wait_reason(older, "Converged")
        await user.wait_reason(younger, "MonitorConflict")
        await user.change(younger, vcpus=5)
        await user.change(older, nodeName="elsewhere")
        await shows(user, younger, "Converged", READY, vcpus=5)


async def test_a_suspended_older_set_keeps_its_monitor(folder: Path, operator: OperatorProcess, user: User) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]) as guest:
        older, younger = await _pair(user, "vm.sock", 2)
        await user.wait_reason(older, "Converged")
        await user.wait_reason(younger, "MonitorConflict")
        await user.change(older, vcpus=4, suspend=True)
        await shows(user, older, "Suspended", HELD, vcpus=2)
        await user.change(younger, vcpus=5)
        await user.wait_reason(younger, "MonitorConflict")
        assert await count(guest.control) == 2


async def test_the_names_of_a_socket_s_hard_links_are_one_monitor(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=16", monitor_paths=[folder / "vm.sock"]) as guest:
        os.link(folder / "vm.sock", folder / "same.sock")
        older, younger = await _pair(user, "vm.sock", 3)
        await user.wait_reason(older, "Converged")
        await user.change(younger, monitor={"unix": {"path": "same.sock"}}, vcpus=5)
        seen = await user.wait_reason(younger, "MonitorConflict")
        assert older in seen.message
        for vcpus in (4, 5, 6):
            for _ in range(5):
                await user.touch(older)
            await user.change(older, vcpus=vcpus)
            await user.wait_ready(older)
        assert await count(guest.control) == 6
        assert (await user.get(younger)).body == seen.body, "nothing flaps, whatever becomes of the older one"
        (folder / "same.sock").unlink()
        await user.touch(younger)
        await user.wait_reason(younger, "MonitorUnreachable")


async def test_a_tcp_monitor_is_one_monitor_in_every_spelling_and_in_every_namespace(
    control_plane: ControlPlane, operator: OperatorProcess, user: User
) -> None:
    other = User(control_plane, await control_plane.namespace())
    async with Guest(None, smp="2,maxcpus=8", tcp=True) as guest:
        _, port = guest.tcp_address
        one = await user.create("vm", 3, ("localhost", port))
        two = await other.create("vm", 3, ("LocalHost", port))
        try:
            (_, its), (_, theirs) = sorted([(one, user), (two, other)], key=lambda each: _seniority(each[0]))
            await its.wait_ready("vm")
            seen = await theirs.wait_reason("vm", "MonitorConflict")
            assert f"VCPUSet {its.namespace}/vm is older" in seen.message
            await its.change("vm", vcpus=4)
            await its.wait_ready("vm")
            await theirs.change("vm", vcpus=5)
            await its.delete("vm")
            await shows(theirs, "vm", "Converged", READY, vcpus=5)
        finally:
            # This namespace has no fixture that empties it.
            await control_plane.request("DELETE", f"/apis/vcpuset.dev/v1alpha1/namespaces/{other.namespace}/vcpusets")


async def test_who_merely_names_a_monitor_on_tls_keeps_nobody_in_another_namespace_from_it(
    control_plane: ControlPlane, operator: OperatorProcess, user: User, tmp_path: Path
) -> None:
    other = User(control_plane, await control_plane.namespace())
    authority = Authority()
    tls = MonitorTLS(authority.server().write(tmp_path / "qemu"), authority.client().name)
    async with Guest(None, smp="2,maxcpus=8", tls=tls) as guest:
        host, port = guest.tcp_address
        monitor = {"host": host, "port": port, "tls": {"secretName": "monitor"}}
        strangers, ours = await other.create("vm", 5, monitor), await user.create("vm", 3, monitor)
        try:
            assert _seniority(strangers)[0] <= _seniority(ours)[0]
            await other.wait_reason("vm", "CredentialsUnavailable")
            path = f"/api/v1/namespaces/{user.namespace}/secrets"
            made = await control_plane.request("POST", path, authority.client().secret("monitor"))
            assert made.status == 201, made
            await shows(user, "vm", "Converged", READY, vcpus=3)
            within = await user.create("second", 4, monitor)
            await user.wait_reason(max((ours, within), key=_seniority).body["metadata"]["name"], "MonitorConflict")
        finally:
            # This namespace has no fixture that empties it.
            await control_plane.request("DELETE", f"/apis/vcpuset.dev/v1alpha1/namespaces/{other.namespace}/vcpusets")


async def test_of_three_sets_the_next_oldest_takes_over_and_the_youngest_is_told_whom_it_waits_for_now(
    folder: Path, operator: OperatorProcess, user: User
) -> None:
    async with Guest(None, smp="2,maxcpus=8", monitor_paths=[folder / "vm.sock"]):
        made = [await user.create(name, 3, "vm.sock") for name in ("a", "b", "c")]
        made.sort(key=_seniority)
        first, second, third = (str(seen.body["metadata"]["name"]) for seen in made)
        await user.wait_reason(first, "Converged")
        await user.wait(third, lambda seen: f"/{first} is older" in seen.message, f"waiting for {first}")
        await user.delete(first)
        await shows(user, second, "Converged", READY, vcpus=3)
        await user.wait(third, lambda seen: f"/{second} is older" in seen.message, f"waiting for {second}")


def _seniority(seen: Seen) -> tuple[str, str]:
    """The smaller is the older: creation times are whole seconds, and within one the smaller uid counts."""
    return seen.body["metadata"]["creationTimestamp"], seen.body["metadata"]["uid"]


def _without_generations(status: Mapping[str, Any]) -> dict[str, Any]:
    """A status without what changes with each generation of the spec."""
    conditions = [{**each, "observedGeneration": None} for each in status["conditions"]]
    return {**status, "observedGeneration": None, "conditions": conditions}
