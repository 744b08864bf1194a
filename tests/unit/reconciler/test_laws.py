"""The laws hold, and the machine gets to its count, whatever users, guests, QEMU, Kubernetes and clocks do."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from harness.effort import scaled
from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import AgentMode, Guest, Qemu
from unit.reconciler.world import RESYNC_SECONDS
from vcpuset.domain.contest import PAUSE_RESYNCS, WINDOW_RESYNCS
from vcpuset.domain.resource import Connection
from vcpuset.domain.target import target_for

__all__ = ["TestAnythingMayHappen", "TestAsTheGuestPleases"]

pytestmark = pytest.mark.timeout(1200)
"""A quarter of a minute of computing, for which a busy machine may have a twentieth of a core."""

EXAMPLES = int(os.environ.get("VCPUSET_TEST_EXAMPLES", "0"))
"""Set it to look for longer, at other examples each time."""

STEPS: Counter[str] = Counter()
"""How many rules have been executed, for each machine."""

SLOTS = 6
CONTESTED_SECONDS = (PAUSE_RESYNCS + WINDOW_RESYNCS + 2) * RESYNC_SECONDS
"""After so long a set is contested no more, if nothing else changes its machine."""

SECONDS = st.sampled_from([0.02, 0.5, 1.0, 2.0, 4.0, 11.0, 61.0, 301.0])
SHORT = st.sampled_from([0.02, 0.5, 1.0, 2.0, 4.0, 11.0])
TIMEOUTS = st.sampled_from([1, 4, 60])
RETRIES = st.sampled_from([1, 10, 300])
ANY_SLOTS = st.sets(st.integers(1, SLOTS - 1), max_size=3)
OTHERS = st.sampled_from([
    "plug", "take away", "guest works", "guest forgets", "restart", "disconnect", "migrate", "other client",
    "new count",
])  # fmt: skip
AGENTS = st.sampled_from([
    None, {"unix": {"path": "a.agent"}}, {"unix": {"path": "a.agent"}, "bringOnline": True},
])  # fmt: skip


def step(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that is counted."""

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def counted(self: RuleBasedStateMachine, **values: Any) -> None:
            STEPS[type(self).__name__] += 1
            method(self, **values)

        # Its overloads do not take what is passed on.
        decorated: Callable[..., None] = cast("Any", rule)(**drawn)(counted)
        return decorated

    return decorate


class _AsTheGuestPleases(RuleBasedStateMachine):
    """One machine of six slots, one VCPUSet; nothing fails, but the guest takes its time, or refuses."""

    @initialize(
        machine=st.fixed_dictionaries(
            {
                "boot": st.integers(1, 4),
                "threads": st.sampled_from([1, 1, 2]),
                "arch": st.sampled_from(["x86_64", "x86_64", "ppc64"]),
                "repeats_ids": st.booleans(),
                "known_by": st.sampled_from(["age", "uuid", "both"]),
            }
        ),
        vcpus=st.integers(1, 8),
        timeout=TIMEOUTS,
        retry=RETRIES,
        guest=st.sampled_from(Guest),
        connection=st.sampled_from(["OnDemand", "Persistent"]),
        agent=AGENTS,
        agent_mode=st.sampled_from([AgentMode.WORKS, AgentMode.WORKS, AgentMode.LATE]),
    )
    def begin(
        self,
        machine: dict[str, Any],
        vcpus: int,
        timeout: int,
        retry: int,
        guest: Guest,
        connection: str,
        agent: dict[str, Any] | None,
        agent_mode: AgentMode,
    ) -> None:
        known_by = machine.pop("known_by")
        self.qemu = Qemu(slots=SLOTS, dated=known_by != "uuid", has_uuid=known_by != "age", **machine)
        self.qemu.guest, self.qemu.agent = guest, agent_mode
        self.world = LawfulWorld(self.qemu, vcpus=vcpus)
        self.foreign = 0
        self.connect(connection)
        self.world.apply("web", unplug={"timeoutSeconds": timeout, "retrySeconds": retry}, guestAgent=agent)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    def connect(self, connection: str) -> None:
        self.world.apply("web", monitor={"unix": {"path": "a.sock"}, "connection": connection})

    # --- time and the user ----------------------------------------------------------------------------------------

    @step(seconds=SECONDS)
    def time_goes_by(self, seconds: float) -> None:
        self.world.advance(seconds)

    @step(cores=st.integers(1, SLOTS + 1), odd=st.booleans(), deliver=st.booleans())
    def the_user_declares(self, cores: int, odd: bool, deliver: bool) -> None:
        vcpus = cores * self.qemu.threads - (odd and self.qemu.threads > 1)
        self.world.apply("web", vcpus=vcpus, deliver=deliver)
        self.world.run_due()

    @step(most=st.booleans(), guest=st.sampled_from(Guest), seconds=SHORT)
    def the_user_wants_to_have_cpus_back(self, most: bool, guest: Guest, seconds: float) -> None:
        self.qemu.guest = guest
        vcpus = self.qemu.threads if most else self.qemu.vcpus - self.qemu.threads
        self.world.apply("web", vcpus=max(vcpus, 1))
        self.world.advance(seconds)

    @step(least=st.integers(1, 4), most=st.integers(4, SLOTS), deliver=st.booleans())
    def the_user_leaves_the_count_out(self, least: int, most: int, deliver: bool) -> None:
        self.world.apply("web", vcpus=None, minVCPUs=least, maxVCPUs=most, deliver=deliver)
        self.world.run_due()
        # Nobody else's counts are outside of them.
        self.world.apply("web", minVCPUs=1, maxVCPUs=4096, deliver=deliver)
        self.world.run_due()

    @step(guest=st.sampled_from(Guest))
    def the_guest_changes(self, guest: Guest) -> None:
        self.qemu.guest = guest

    @step(slots=st.sets(st.integers(1, SLOTS - 1)))
    def the_guest_will_not_give_back(self, slots: set[int]) -> None:
        self.qemu.refused_slots = slots

    @step(leaves_offline=st.booleans())
    def the_guest_leaves_offline_what_is_plugged(self, leaves_offline: bool) -> None:
        self.qemu.leaves_offline = leaves_offline

    @step()
    def the_guest_gets_round_to_it(self) -> None:
        self.qemu.guest_works()

    # --- the end --------------------------------------------------------------------------------------------------

    @step()
    def once_the_faults_end_the_machine_gets_to_its_count(self) -> None:
        qemu, world = self.qemu, self.world
        world.heal()
        self._heal_machine()
        world.apply("web", suspend=False)
        world.deliver()
        unplug = world.vcpuset().spec.unplug
        passes = world.passes
        # An agent that has failed often is asked again after five minutes.
        seconds = 2 * max(unplug.retry_seconds, unplug.timeout_seconds) + 400
        world.advance(seconds)

        if world.reason() == "Contested":
            # Nothing else changes the machine any more.
            world.advance(CONTESTED_SECONDS)

        vcpuset, machine = world.vcpuset(), qemu.machine()
        target = target_for(vcpuset.spec, machine)
        assert machine.vcpus == target.count
        assert world.reason() == (target.reason or "Converged")
        assert vcpuset.status.vcpus == machine.vcpus
        assert (world.true_conditions()[:1] == ["Ready"]) == (machine.vcpus == vcpuset.spec.vcpus)
        if vcpuset.spec.guest_agent is not None:
            assert qemu.used == machine.vcpus == vcpuset.status.online_vcpus
            assert world.true_conditions()[-1] == "GuestAgentConnected"
        # At most a look every second while something is awaited, and a resync every minute.
        assert world.passes - passes <= 1.2 * (seconds + CONTESTED_SECONDS) + 60

        writes = len(world.api.writes)
        world.advance(200)
        assert len(world.api.writes) == writes, "a steady state costs writes"
        if not vcpuset.status.pending_unplugs:
            assert world.sessions_held == (vcpuset.spec.connection is Connection.PERSISTENT)

    def _heal_machine(self) -> None:
        """Guest, QEMU and the host are as they should be from here on."""
        qemu = self.qemu
        if qemu.legacy:
            qemu.booted()
        qemu.guest = Guest.PROMPT
        qemu.refused_slots, qemu.rejected_slots, qemu.never_online = set(), set(), set()
        qemu.loses_requests = qemu.leaves_offline = qemu.migrating = qemu.moving = False
        qemu.agent = AgentMode.WORKS
        qemu.run_state, qemu.reachable = "running", True
        qemu.other_client_goes()
        agent = self.world.vcpuset().spec.guest_agent
        if agent is not None and not agent.bring_online:
            # The guest's owner reads the message of GuestCPUsOffline.
            qemu.taken_up = dict.fromkeys(qemu.taken_up, True)
        qemu.guest_works()


class _AnythingMayHappen(_AsTheGuestPleases):
    """The same in a world where everything else goes wrong too, and one operator follows the other."""

    @step(seconds=SHORT)
    def more_time_goes_by(self, seconds: float) -> None:
        """A second rule, so that time goes by more often than each of the many other things happens."""
        self.world.advance(seconds)

    # --- the user and the machine ---------------------------------------------------------------------------------

    @step(
        timeout=TIMEOUTS,
        retry=RETRIES,
        policy=st.sampled_from(["Enabled", "Enabled", "Disabled"]),
        boot=st.sampled_from(["Unplug", "Unplug", "Keep"]),
    )
    def the_user_changes_the_policy(self, timeout: int, retry: int, policy: str, boot: str) -> None:
        unplug = {"timeoutSeconds": timeout, "retrySeconds": retry, "policy": policy, "bootVCPUs": boot}
        self.world.apply("web", unplug=unplug)
        self.world.run_due()

    @step(suspend=st.booleans())
    def the_user_suspends(self, suspend: bool) -> None:
        self.world.apply("web", suspend=suspend)
        self.world.run_due()

    @step(connection=st.sampled_from(["OnDemand", "Persistent"]))
    def the_user_chooses_how_to_connect(self, connection: str) -> None:
        self.connect(connection)
        self.world.run_due()

    @step(agent=AGENTS)
    def the_user_names_an_agent(self, agent: dict[str, Any] | None) -> None:
        self.world.apply("web", guestAgent=agent)
        self.world.run_due()

    @step()
    def the_watch_catches_up(self) -> None:
        self.world.deliver()
        self.world.run_due()

    @step(seconds=st.sampled_from([-3600, -5, 5, 3600]))
    def the_clock_is_set(self, seconds: int) -> None:
        self.world.set_clock(seconds)

    @step(slots=st.sets(st.integers(1, SLOTS - 1), max_size=2))
    def qemu_will_not_ask_for(self, slots: set[int]) -> None:
        self.qemu.rejected_slots = slots

    @step(seconds=st.sampled_from([0.0, 0.3, 1.5]))
    def qemu_takes_its_time(self, seconds: float) -> None:
        self.qemu.seconds["device_add"] = seconds

    @step(loses=st.booleans())
    def requests_get_lost(self, loses: bool) -> None:
        self.qemu.loses_requests = loses

    @step(legacy=st.booleans(), other_machine=st.booleans())
    def qemu_is_restarted(self, legacy: bool, other_machine: bool) -> None:
        self._restart(legacy=legacy, other_machine=other_machine)
        self.world.run_due()

    @precondition(lambda self: self.qemu.legacy)
    @step()
    def the_guest_has_booted(self) -> None:
        self.qemu.booted()

    @step(agent=st.sampled_from(AgentMode))
    def the_agent_changes(self, agent: AgentMode) -> None:
        self.qemu.agent = agent

    @step(slots=ANY_SLOTS, never=st.booleans())
    def somebody_in_the_guest_takes_cpus_out_of_use(self, slots: set[int], never: bool) -> None:
        self.qemu.set_offline(slots)
        if never:
            self.qemu.never_online = slots

    @step(wants=st.booleans())
    def another_client_wants_the_monitor(self, wants: bool) -> None:
        if wants:
            self.qemu.other_client_comes()
        else:
            self.qemu.other_client_goes()

    @step(state=st.sampled_from(["running", "running", "paused", "inmigrate", "shutdown", "io-error"]))
    def the_run_state_changes(self, state: str) -> None:
        self.qemu.run_state = state

    @step(reachable=st.booleans())
    def the_monitor_goes_or_comes(self, reachable: bool) -> None:
        self.qemu.reachable = reachable
        self.qemu.disconnect()

    @step(other=OTHERS, draw=st.integers(0, 30))
    def somebody_else_acts(self, other: str, draw: int) -> None:
        self._other(other, draw)()
        self.world.run_due()

    # --- in the middle of a pass ----------------------------------------------------------------------------------

    @step(after=st.integers(0, 14), other=OTHERS, draw=st.integers(0, 30))
    def somebody_else_acts_in_a_pass(self, after: int, other: str, draw: int) -> None:
        self.world.interrupt(after, self._other(other, draw))
        self.world.wake()
        self.world.run_due()

    @step(after=st.integers(0, 14))
    def a_call_fails(self, after: int) -> None:
        self.world.interrupt(after, "fails")
        self.world.wake()
        self.world.run_due()

    @step(after=st.integers(0, 14))
    def cpus_move_while_they_are_counted(self, after: int) -> None:
        def move() -> None:
            self.qemu.moving = True

        self.world.interrupt(after, move)
        self.world.wake()
        self.world.run_due()

    @step(after=st.integers(0, 14), vcpus=st.integers(1, SLOTS))
    def the_operator_dies(self, after: int, vcpus: int) -> None:
        self.world.apply("web", vcpus=vcpus)
        self.world.interrupt(after, "dies")
        self.world.run_due()

    @step()
    def the_operator_is_replaced(self) -> None:
        self.world.restart_operator()
        self.world.run_due()

    @step(other_machine=st.booleans())
    def the_host_reboots(self, other_machine: bool) -> None:
        self._restart(other_machine=other_machine)
        self.world.restart_operator()
        self.world.run_due()

    def _other(self, other: str, draw: int) -> Callable[[], None]:
        """Something that can also happen between two commands of the operator."""
        qemu, world = self.qemu, self.world

        def act() -> None:
            world.disturb()
            match other:
                case "plug":
                    free = [index for index in range(SLOTS) if index not in qemu.cpus]
                    if free and not qemu.migrating:
                        self.foreign += 1
                        qemu.come_by_another_hand(free[draw % len(free)], f"foreign{self.foreign}")
                case "take away":
                    taken = [index for index in qemu.cpus if index != 0]
                    if taken:
                        qemu.take_away(taken[draw % len(taken)])
                case "guest works":
                    qemu.guest_works()
                case "guest forgets":
                    qemu.forget()
                case "restart":
                    self._restart(other_machine=draw % 3 == 0)
                case "disconnect":
                    qemu.disconnect()
                case "migrate":
                    qemu.migrating = not qemu.migrating
                case "other client":
                    qemu.other_client_comes()
                case "new count":
                    world.apply("web", vcpus=1 + draw % (SLOTS * 2), deliver=draw % 2 == 0)
                case unknown:
                    raise AssertionError(unknown)

        return act

    def _restart(self, *, legacy: bool = False, other_machine: bool = False) -> None:
        # Whatever was asked for before, was asked for some time before.
        self.world.tick()
        # A process that can be told from the one before by nothing at all is not told from it.
        other_machine |= not self.qemu.dated
        self.qemu.power_on(legacy=legacy, other_machine=other_machine)
        self.world.disturb()


SETTINGS = settings(
    stateful_step_count=50,
    derandomize=not EXAMPLES,
    database=None,
)

_AsTheGuestPleases.TestCase.settings = settings(SETTINGS, max_examples=EXAMPLES or scaled(200))
_AnythingMayHappen.TestCase.settings = settings(SETTINGS, max_examples=EXAMPLES or scaled(350))

TestAsTheGuestPleases = _AsTheGuestPleases.TestCase
TestAnythingMayHappen = _AnythingMayHappen.TestCase


def test_the_laws_have_held_for_thousands_of_steps() -> None:
    if len(STEPS) < 2:
        pytest.skip("counts what both machines above have done in this run")
    assert STEPS.total() >= scaled(20_000)
