"""A watch that was away for so long that etcd has forgotten where it was."""

from __future__ import annotations

from pathlib import Path

from chaos.outage import AFTER, WAIT, outage
from harness.apifaults import Refuse
from harness.controlplane import ControlPlane
from harness.faultproxy import Asked
from harness.wait import until
from harness.world import API, User

__all__: list[str] = []


def watches(asked: Asked) -> bool:
    return asked.watch


async def test_a_watch_from_a_version_that_etcd_has_forgotten_begins_again_with_a_list_and_nothing_is_lost(
    socket_root: Path, tmp_path: Path
) -> None:
    async with ControlPlane(compaction_seconds=4) as control_plane:
        await control_plane.install_crd()
        user = User(control_plane, await control_plane.namespace())
        sets = f"{API}/namespaces/{user.namespace}/vcpusets"
        folder = socket_root / user.namespace
        folder.mkdir()

        async def is_compacted(version: str) -> bool:
            answer = await control_plane.request(
                "GET", f"{sets}?limit=1&resourceVersionMatch=Exact&resourceVersion={version}"
            )
            return answer.status == 410

        # No sweep: what is not heard of by the new watch and its list is never heard of.
        async with outage(control_plane, user, folder, tmp_path, "--sweep-seconds=3600") as scene:
            with scene.proxy.fault(Refuse(503), watches):
                scene.proxy.cut(watches)
                await until(lambda: scene.watches()[-1].code == 503, WAIT, "the watch to be refused")
                version = scene.watches()[-1].query["resourceVersion"]
                await scene.life_goes_on()
                await until(lambda: is_compacted(version), WAIT, "etcd to forget the watch's version")
                # It would know the latest changes still, whatever etcd has.
                await control_plane.stop_apiserver()
                await control_plane.start_apiserver()
                said = await control_plane.kubectl(
                    "get", "--raw", f"{sets}?watch=true&timeoutSeconds=1&resourceVersion={version}"
                )
                assert '"type":"ERROR"' in said.stdout
                assert '"code":410' in said.stdout
                assert scene.watches()[-1].query["resourceVersion"] == version
                lists, tries = len(scene.lists()), len(scene.watches())
            await scene.all_is_obeyed()
            began = [each for each in scene.watches()[tries:] if each.code == 200]
            assert began[0].query["resourceVersion"] == version
            assert int(began[1].query["resourceVersion"]) > int(version)
            assert len(scene.lists()) == lists + 1
            assert scene.operator.sets_served() == len(AFTER)
            scene.check_lists()
