"""The laws hold, and the machine gets to its count, whatever users, guests, QEMU, Kubernetes and clocks do."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from unit.reconciler.laws import LawfulWorld
from unit.reconciler.model import Guest, Qemu
from vcpuset.domain.plan import goal

__all__ = ["TestAnythingMayHappen", "TestAsTheGuestPleases"]

EXAMPLES = int(os.environ.get("VCPUSET_TEST_EXAMPLES", "0"))
"""Set it to look for longer, at other examples each time."""

SLOTS = 6
SECONDS = st.sampled_from([0.0, 0.02, 0.5, 1.0, 4.0, 11.0, 61.0, 301.0])
TIMEOUTS = st.sampled_from([1, 4, 60])
RETRIES = st.sampled_from([1, 10, 300])
OTHERS = st.sampled_from([
    "plug", "take away", "guest works", "guest forgets", "restart", "disconnect", "migrate", "new count",
])  # fmt: skip


class _AsTheGuestPleases(RuleBasedStateMachine):
    """One machine of six slots, one VCPUSet; nothing fails, but the guest takes its time, or refuses."""

    @initialize(
        boot=st.integers(1, 4),
        threads=st.sampled_from([1, 1, 2]),
        arch=st.sampled_from(["x86_64", "x86_64", "ppc64"]),
        vcpus=st.integers(1, 8),
        timeout=TIMEOUTS,
        retry=RETRIES,
        guest=st.sampled_from(Guest),
    )
    def begin(self, boot: int, threads: int, arch: str, vcpus: int, timeout: int, retry: int, guest: Guest) -> None:
        self.qemu = Qemu(boot=boot, slots=SLOTS, threads=threads, arch=arch)
        self.qemu.guest = guest
        self.world = LawfulWorld(self.qemu, vcpus=vcpus)
        self.world.apply("web", unplug={"timeoutSeconds": timeout, "retrySeconds": retry})
        self.foreign = 0

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    # --- time and the user ----------------------------------------------------------------------------------------

    @rule(seconds=SECONDS)
    def time_goes_by(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(vcpus=st.integers(1, SLOTS * 2 + 1), deliver=st.booleans())
    def the_user_declares(self, vcpus: int, deliver: bool) -> None:
        self.world.apply("web", vcpus=vcpus, deliver=deliver)
        self.world.run_due()

    @rule(guest=st.sampled_from(Guest))
    def the_guest_changes(self, guest: Guest) -> None:
        self.qemu.guest = guest

    @rule(slots=st.sets(st.integers(1, SLOTS - 1)))
    def the_guest_will_not_give_back(self, slots: set[int]) -> None:
        self.qemu.refused_slots = slots

    @rule()
    def the_guest_gets_round_to_it(self) -> None:
        self.qemu.guest_works()

    # --- the end --------------------------------------------------------------------------------------------------

    @rule()
    def once_the_faults_end_the_machine_gets_to_its_count(self) -> None:
        qemu, world = self.qemu, self.world
        world.heal()
        qemu.guest = Guest.PROMPT
        qemu.refused_slots, qemu.rejected_slots = set(), set()
        qemu.loses_requests = qemu.legacy = qemu.migrating = False
        qemu.run_state, qemu.reachable = "running", True
        world.apply("web", suspend=False)
        world.deliver()
        unplug = world.vcpuset().spec.unplug
        passes = world.passes
        seconds = 2 * max(unplug.retry_seconds, unplug.timeout_seconds) + 200
        world.advance(seconds)

        vcpuset, machine = world.vcpuset(), qemu.machine()
        aim = goal(vcpuset.spec, machine)
        assert machine.vcpus == aim.count
        assert world.reason() == (aim.reason or "Converged")
        assert vcpuset.status.vcpus == machine.vcpus
        assert (world.true_conditions() == ["Ready"]) == (machine.vcpus == vcpuset.spec.vcpus)
        # At most a look every second while something is awaited, and a resync every minute.
        assert world.passes - passes <= 1.2 * seconds + 60

        writes = len(world.api.writes)
        world.advance(200)
        assert len(world.api.writes) == writes, "a steady state costs writes"
        if not vcpuset.status.pending_unplugs:
            assert world.sessions_held == 0


class _AnythingMayHappen(_AsTheGuestPleases):
    """The same in a world where everything else goes wrong too, and one operator follows the other."""

    @rule(seconds=SECONDS)
    def more_time_goes_by(self, seconds: float) -> None:
        """A second rule, so that time goes by more often than each of the many other things happens."""
        self.world.advance(seconds)

    # --- the user and the machine ---------------------------------------------------------------------------------

    @rule(
        timeout=TIMEOUTS,
        retry=RETRIES,
        policy=st.sampled_from(["Enabled", "Enabled", "Disabled"]),
        boot=st.sampled_from(["Unplug", "Unplug", "Keep"]),
    )
    def the_user_changes_the_policy(self, timeout: int, retry: int, policy: str, boot: str) -> None:
        unplug = {"timeoutSeconds": timeout, "retrySeconds": retry, "policy": policy, "bootVCPUs": boot}
        self.world.apply("web", unplug=unplug)
        self.world.run_due()

    @rule(suspend=st.booleans())
    def the_user_suspends(self, suspend: bool) -> None:
        self.world.apply("web", suspend=suspend)
        self.world.run_due()

    @rule()
    def the_watch_catches_up(self) -> None:
        self.world.deliver()
        self.world.run_due()

    @rule(seconds=st.sampled_from([-3600, -5, 5, 3600]))
    def the_clock_is_set(self, seconds: int) -> None:
        self.world.set_clock(seconds)

    @rule(slots=st.sets(st.integers(1, SLOTS - 1), max_size=2))
    def qemu_will_not_ask_for(self, slots: set[int]) -> None:
        self.qemu.rejected_slots = slots

    @rule(loses=st.booleans())
    def requests_get_lost(self, loses: bool) -> None:
        self.qemu.loses_requests = loses

    @rule(legacy=st.booleans())
    def qemu_is_restarted(self, legacy: bool) -> None:
        self.qemu.power_on(legacy=legacy)
        self.world.disturb()
        self.world.run_due()

    @precondition(lambda self: self.qemu.legacy)
    @rule()
    def the_guest_has_booted(self) -> None:
        self.qemu.legacy = False

    @rule(state=st.sampled_from(["running", "running", "paused", "inmigrate", "shutdown", "io-error"]))
    def the_run_state_changes(self, state: str) -> None:
        self.qemu.run_state = state

    @rule(reachable=st.booleans())
    def the_monitor_goes_or_comes(self, reachable: bool) -> None:
        self.qemu.reachable = reachable
        self.qemu.disconnect()

    @rule(other=OTHERS, draw=st.integers(0, 30))
    def somebody_else_acts(self, other: str, draw: int) -> None:
        self._other(other, draw)()
        self.world.run_due()

    # --- in the middle of a pass ----------------------------------------------------------------------------------

    @rule(after=st.integers(0, 14), other=OTHERS, draw=st.integers(0, 30))
    def somebody_else_acts_in_a_pass(self, after: int, other: str, draw: int) -> None:
        self.world.interrupt(after, self._other(other, draw))
        self.world.wake()
        self.world.run_due()

    @rule(after=st.integers(0, 14))
    def a_call_fails(self, after: int) -> None:
        self.world.interrupt(after, "fails")
        self.world.wake()
        self.world.run_due()

    @rule(after=st.integers(0, 14))
    def cpus_move_while_they_are_counted(self, after: int) -> None:
        self.world.interrupt(after, "unsettled")
        self.world.wake()
        self.world.run_due()

    @rule(after=st.integers(0, 14), vcpus=st.integers(1, SLOTS))
    def the_operator_dies(self, after: int, vcpus: int) -> None:
        self.world.apply("web", vcpus=vcpus)
        self.world.interrupt(after, "dies")
        self.world.run_due()

    @rule()
    def the_operator_is_replaced(self) -> None:
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
                        qemu.device_add(free[draw % len(free)], f"foreign{self.foreign}")
                case "take away":
                    taken = [index for index in qemu.cpus if index != 0]
                    if taken:
                        qemu.take_away(taken[draw % len(taken)])
                case "guest works":
                    qemu.guest_works()
                case "guest forgets":
                    qemu.forget()
                case "restart":
                    qemu.power_on()
                case "disconnect":
                    qemu.disconnect()
                case "migrate":
                    qemu.migrating = not qemu.migrating
                case "new count":
                    world.apply("web", vcpus=1 + draw % (SLOTS * 2), deliver=draw % 2 == 0)
                case unknown:
                    raise AssertionError(unknown)

        return act


SETTINGS = settings(
    max_examples=EXAMPLES or 100,
    stateful_step_count=40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

_AsTheGuestPleases.TestCase.settings = SETTINGS
_AnythingMayHappen.TestCase.settings = SETTINGS

TestAsTheGuestPleases = _AsTheGuestPleases.TestCase
TestAnythingMayHappen = _AnythingMayHappen.TestCase
