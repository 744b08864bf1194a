"""`spec.pod` with the rights that an administrator grants: none at first, too few, and the shipped role."""

from __future__ import annotations

from pathlib import Path

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.faulty import FaultyMonitor
from harness.operator import OperatorProcess
from harness.vmpod import VMPod, of_pod
from harness.world import User

__all__: list[str] = []

ROLE = REPOSITORY / "deploy" / "base" / "pods.yaml"


async def test_without_the_right_the_reason_names_the_role(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User, account: Path
) -> None:
    await control_plane.kubectl("apply", "--server-side", "--filename", ROLE)
    flags = (f"--namespace={user.namespace}", "--resync-seconds=5")
    async with (
        VMPod(user, "vm") as pod,
        FaultyMonitor(folder / "vm.sock", cpus=2),
        OperatorProcess(control_plane, *flags, socket_root=socket_root, kubeconfig=account),
    ):
        await user.create("vm", 3, "vm.sock", pod=of_pod("vm", timeout=2))
        seen = await user.wait_reason("vm", "PodNotFound")
        assert "must bind the ClusterRole vcpuset-pods to its service account" in seen.message
        account_and_place = ("--serviceaccount=vcpuset-system:vcpuset-controller", "-n", user.namespace)
        await control_plane.kubectl("create", "role", "list", "--verb=list", "--resource=pods", "-n", user.namespace)
        await control_plane.kubectl("create", "rolebinding", "list", "--role=list", *account_and_place)
        seen = await user.wait_reason("vm", "PodResizeRefused")
        assert "It may not be resized by this operator: an administrator must bind the ClusterRole" in seen.message
        await control_plane.kubectl("create", "rolebinding", "pods", "--clusterrole=vcpuset-pods", *account_and_place)
        async with pod.obeying():
            await user.wait_ready("vm")
