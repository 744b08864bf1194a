"""The operator dies while the pod of a VM grows or shrinks with it: its successor ends it right.

The kubelet's part is played: a size comes into force some moments after it was requested.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.apifaults import Hold, LoseAnswer
from harness.controlplane import ControlPlane
from harness.faultproxy import Asked, FaultProxy, Passes
from harness.faulty import FaultyMonitor, Hang
from harness.operator import OperatorProcess
from harness.vmpod import VMPod, of_pod
from harness.wait import until
from harness.world import User

__all__: list[str] = []

WAIT = 90.0


@dataclass(frozen=True)
class Death:
    """When the operator dies: at a request to resize the pod, or at a command.

    vcpus   what is declared, of 4
    api     what becomes of the resize
    number  of which one: the first raises or lowers the pod
    command that it waits for, and whether QEMU has carried it out
    """

    vcpus: int
    api: type[Hold | LoseAnswer] | None = None
    command: str | None = None
    executes: bool = False


DEATHS = {
    "before-the-pod-is-raised": Death(6, api=Hold),
    "when-the-pod-is-raised": Death(6, api=LoseAnswer),
    "before-the-first-plug": Death(6, command="device_add"),
    "after-the-first-plug": Death(6, command="device_add", executes=True),
    "before-the-first-unplug": Death(2, command="device_del"),
    "after-the-first-unplug": Death(2, command="device_del", executes=True),
    "before-the-pod-is-lowered": Death(2, api=Hold),
    "when-the-pod-is-lowered": Death(2, api=LoseAnswer),
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())
async def test_wherever_the_operator_dies_no_vcpu_is_plugged_that_the_pod_may_not_use(
    control_plane: ControlPlane, socket_root: Path, folder: Path, user: User, death: Death
) -> None:
    def is_resize(asked: Asked) -> bool:
        return asked.path.endswith("/resize")

    async with (
        FaultProxy(control_plane, folder) as proxy,
        VMPod(user, "vm", limit="4") as pod,
        FaultyMonitor(folder / "vm.sock", cpus=4) as machine,
        OperatorProcess(
            control_plane,
            f"--namespace={user.namespace}",
            socket_root=socket_root,
            kubeconfig=proxy.kubeconfig(control_plane.kubeconfig),
        ) as operator,
    ):

        def check() -> None:
            assert len(machine.cpus.occupied()) <= int(pod.in_force), "plugged before the kubelet has confirmed"

        await user.create("vm", 4, "vm.sock", pod=of_pod("vm"))
        await user.wait_ready("vm")
        with contextlib.ExitStack() as faults:
            if death.api is not None:
                fault: Passes = death.api()
                faults.enter_context(proxy.fault(fault, is_resize))
            if death.command is not None:
                machine.faults[death.command] = Hang(executes=death.executes)
            async with pod.obeying(check):
                await user.change("vm", vcpus=death.vcpus)

                def reached() -> bool:
                    asked = any(is_resize(each) for each in proxy.requests)
                    return asked if death.command is None else bool(machine.received(death.command))

                await until(reached, WAIT, lambda: f"the moment; {operator.tail()}")
                operator.kill()
        check()
        machine.faults.clear()
        await operator.start(ready=False)
        if death.vcpus > 4:
            await pod.wait_size("6")
            check()
        async with pod.obeying(check):
            done = await user.wait_ready("vm")
            assert done.vcpus == death.vcpus
            await pod.wait_size(str(death.vcpus))
        assert "Traceback" not in operator.text(), operator.text()
