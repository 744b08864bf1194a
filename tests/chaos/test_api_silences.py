"""An API server that says nothing, says it late, twice or not at all: answers that are lost, watches that leave out."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.outage import DECLARED, TIMES, WAIT, outage
from harness.apifaults import ErrorEvent, Freeze, Hold, LoseAnswer, Replay, Slow, Swallow
from harness.controlplane import ControlPlane
from harness.faultproxy import Asked
from harness.wait import until
from harness.world import User

__all__: list[str] = []


def watches(asked: Asked) -> bool:
    return asked.watch


def about_sets(asked: Asked) -> bool:
    return asked.about_sets


def writes(asked: Asked) -> bool:
    return asked.verb == "PATCH"


async def test_requests_that_are_never_answered_are_given_up_and_made_again_later(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    async with outage(control_plane, user, folder, tmp_path) as scene:
        with scene.proxy.fault(Hold(), about_sets):
            scene.proxy.cut(watches)
            await scene.machine_is_kept()
            await scene.life_goes_on()
            await until(
                lambda: "no answer from 127.0.0.1" in scene.operator.text(), WAIT, "a list or watch to be given up"
            )
        await scene.all_is_obeyed()
        scene.check_writes()


async def test_a_way_on_which_nothing_comes_through_for_a_while_loses_nothing(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    """The connections stand: what the watch could not bring comes when the way is free."""
    async with outage(control_plane, user, folder, tmp_path) as scene:
        scene.proxy.block()
        await scene.machine_is_kept()
        await scene.life_goes_on()
        await until(
            lambda: f"within {TIMES['kube.cluster.REQUEST_SECONDS']:g} s" in scene.operator.text(),
            WAIT,
            "a request to be given up",
        )
        scene.proxy.unblock()
        await scene.all_is_obeyed()
        scene.check_lists()


async def test_a_watch_that_falls_silent_is_given_up_and_begun_again(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    """Everything else goes well, so nothing but the silence tells."""
    freeze = Freeze()
    async with outage(control_plane, user, folder, tmp_path) as scene:
        with scene.proxy.fault(freeze, watches):
            scene.proxy.cut(watches)
            await until(lambda: len(scene.watches()) == 2, WAIT, "the watch that falls silent")
        await scene.machine_is_kept()
        await scene.life_goes_on()
        await scene.all_is_obeyed()
        assert len(scene.watches()) >= 3
        scene.check_lists()


async def test_answers_that_come_in_drops_are_waited_for(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    async with outage(control_plane, user, folder, tmp_path) as scene:
        with scene.proxy.fault(Slow(0.3)):
            scene.proxy.cut(watches)
            await scene.machine_is_kept()
            await scene.life_goes_on()
            await scene.all_is_obeyed()
        assert len(scene.pauses()) <= 1, "for the watch that was cut, if it was a young one, and no other"
        scene.check_lists()


async def test_a_status_write_whose_answer_is_lost_makes_nothing_happen_twice(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    """The write counts: so the request to the guest is not made before the watch has shown it, and then once."""
    async with outage(control_plane, user, folder, tmp_path) as scene:
        with scene.proxy.fault(LoseAnswer(), writes):
            await scene.life_goes_on()
            await until(
                lambda: sum(writes(each) and each.code == 200 for each in scene.proxy.requests) >= len(scene.machines),
                WAIT,
                "lost answers",
            )
        await scene.all_is_obeyed()
        assert len(scene.machines["drifts"].received("device_del")) == 1
        assert len(scene.machines["grows"].received("device_add")) == 2
        scene.check_writes()


async def test_old_news_and_news_that_comes_twice_change_nothing(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    """Also that of a set that is gone: it does not come back."""
    replay = Replay()
    async with outage(control_plane, user, folder, tmp_path) as scene:
        with scene.proxy.fault(replay, watches):
            scene.proxy.cut(watches)
            await until(lambda: len(scene.watches()) == 2, WAIT, "the watch that repeats itself")
            await scene.life_goes_on()
            await scene.all_is_obeyed()
            await user.change("grows", vcpus=5)
            await user.wait_ready("grows")
            await scene.serves(4)
        assert replay.lines > 20
        assert len(scene.machines["grows"].received("device_add")) == 2
        assert len(scene.machines["grows"].received("device_del")) == 1
        assert scene.count("goes") == DECLARED


@pytest.mark.parametrize("sweep", ["--sweep-seconds=2", "--sweep-seconds=3600"], ids=["by-time", "after-a-new-list"])
async def test_a_deletion_that_the_watch_has_missed_is_found_by_a_sweep_and_the_next_set_has_the_monitor(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path, sweep: str
) -> None:
    """By the one that comes from time to time, or by the one after a watch that had to begin again with a list."""
    swallow = Swallow("DELETED", "keeps")
    async with outage(control_plane, user, folder, tmp_path, sweep) as scene:
        with scene.proxy.fault(swallow, watches):
            scene.proxy.cut(watches)
            await until(lambda: len(scene.watches()) == 2, WAIT, "the watch that leaves out")
            await user.create("heir", 6, "keeps.sock")
            await user.wait_reason("heir", "MonitorConflict")
            await user.delete("keeps")
            await until(lambda: swallow.struck == 1, WAIT, "the event to be left out")
            if sweep == "--sweep-seconds=3600":
                assert scene.count("keeps") == DECLARED
                lists = len(scene.lists())
                # The watch ends so that it cannot go on from where it was.
                with scene.proxy.fault(ErrorEvent(), watches):
                    scene.proxy.cut(watches)
                    await until(lambda: len(scene.lists()) > lists, WAIT, "a new list")
            await user.wait_ready("heir")
        assert scene.count("keeps") == 6
        scene.check_lists()
        scene.is_the_same_process()


async def test_lists_of_several_namespaces_and_sweeps_are_made_one_after_the_other(
    control_plane: ControlPlane, user: User, folder: Path, tmp_path: Path
) -> None:
    others = [await control_plane.namespace() for _ in range(3)]
    flags = (*(f"--namespace={name}" for name in others), "--sweep-seconds=1")
    async with outage(control_plane, user, folder, tmp_path, *flags) as scene:
        before = len(scene.lists())

        def ended() -> list[Asked]:
            return [each for each in scene.proxy.requests if each.list and each.ended is not None]

        # All four watches have to begin again, while sweeps go on.
        with scene.proxy.fault(Slow(0.1), lambda asked: asked.list), scene.proxy.fault(ErrorEvent(), watches):
            scene.proxy.cut(watches)
            await until(lambda: len(scene.lists()) >= before + 8, WAIT, "new lists")
            await until(lambda: sum("limit" in each.query for each in ended()) > 8, WAIT, "more than one sweep")
        await scene.life_goes_on()
        await scene.all_is_obeyed()
        assert len({each.path for each in ended()}) == 4
        scene.check_lists()
