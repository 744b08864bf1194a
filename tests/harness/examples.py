"""A VCPUSet for each reason, with the status that the product makes in such a situation.

Situations are given, such as a machine, its requests and its pod, or an error; reason, message and counts are the
product's. docs/reasons.md shows them, and GitOps engines are shown them (`harness.gitops`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from harness.world import manifest
from unit.domain.builders import NOW, a_machine, a_request, a_set, a_spec, ago, findings_of
from vcpuset.domain.assessment import (
    Assessment,
    assess,
    conflict,
    contested,
    failure,
    plugging,
    terminating,
    with_pod,
)
from vcpuset.domain.contest import Contest
from vcpuset.domain.credentials import Credentials
from vcpuset.domain.errors import UnsupportedSpec, VCPUSetError
from vcpuset.domain.findings import Findings
from vcpuset.domain.guest import GuestCPU, GuestCPUs, GuestReport
from vcpuset.domain.machine import Answer
from vcpuset.domain.pod import Container, Pod, PodFindings, decide, the_pod
from vcpuset.domain.reasons import State
from vcpuset.domain.report import state_of, status_of, unserved_status
from vcpuset.domain.resource import (
    BootVCPUs,
    GuestAgent,
    PodCPU,
    Spec,
    UnplugPolicy,
    Unsupported,
    VCPUSet,
    VMPod,
)
from vcpuset.kube.codec import decode
from vcpuset.qmp import translate
from vcpuset.qmp.session import COMMAND_SECONDS
from vcpuset.qmp.sockets import open_socket

__all__ = ["GENERATION", "NOW", "examples"]

GENERATION: Final = 3

_MONITOR: Final = "default/web.sock"
_POD: Final = VMPod("app=web", "qemu", PodCPU(1000, 200))
_TWO: Final = a_machine()
_FOUR: Final = a_machine(plugged=[2, 3])


def examples() -> Mapping[tuple[str, State], VCPUSet]:
    """The VCPUSet default/web, reported on at `NOW`, for each reason in each of its states."""
    found = {}
    for vcpuset in _all():
        state, reason = state_of(vcpuset)
        assert (reason, state) not in found, f"two examples of {reason}"
        found[reason, state] = vcpuset
    return found


def _all() -> Iterator[VCPUSet]:
    yield from _of_machines()
    yield from _of_unplugs()
    yield from _of_pods()
    yield from _of_errors()
    yield _reported(a_spec(2), conflict("default/web-old"))
    yield _reported(a_spec(2), terminating())
    yield replace(_before(), status=unserved_status(_before(), NOW))


def _of_machines() -> Iterator[VCPUSet]:
    yield _seen(findings_of(a_spec(2), _TWO))
    yield _seen(findings_of(a_spec(None), _FOUR))
    growing = findings_of(a_spec(4), _TWO)
    yield _reported(growing.spec, plugging(growing), growing)
    yield _reported(growing.spec, contested(assess(growing), growing, Contest(60)), growing)
    yield _seen(findings_of(a_spec(4), a_machine(migrating=True)))
    yield _seen(findings_of(a_spec(2), a_machine(run_state="guest-panicked")))
    yield _seen(findings_of(a_spec(12), a_machine(plugged=range(2, 8))))
    yield _seen(findings_of(a_spec(1), a_machine(arch="s390x", ost=None)))
    yield _seen(findings_of(a_spec(2, policy=UnplugPolicy.DISABLED), _FOUR))
    yield _seen(findings_of(a_spec(1, boot_vcpus=BootVCPUs.KEEP), _TWO))
    yield _seen(findings_of(a_spec(6), a_machine(boot=[0], slots=4, threads=4, arch="ppc64", ost=None)))
    yield _seen(findings_of(a_spec(4), a_machine(slots=None, arch="aarch64")))
    yield _seen(findings_of(a_spec(4, suspend=True), _TWO))
    cpus = GuestCPUs(tuple(GuestCPU(number, number < 2, number > 0) for number in range(4)))
    with_agent = a_spec(4, agent=GuestAgent("web-agent.sock", bring_online=False))
    yield _seen(findings_of(with_agent, _FOUR, guest=GuestReport(cpus), plugged=ago(10)))


def _of_unplugs() -> Iterator[VCPUSet]:
    shrinking = a_spec(2)
    yield _seen(findings_of(shrinking, _FOUR, [a_request(2), a_request(3)]))
    yield _seen(findings_of(shrinking, _FOUR, [a_request(slot, at=ago(5)) for slot in (2, 3)]))
    yield _seen(findings_of(shrinking, a_machine(plugged=[2, 3], ost={})))
    busy = [a_request(slot, at=ago(8), attempts=2, boot=slot == 1, answer=Answer.BUSY) for slot in (1, 2, 3)]
    yield _seen(findings_of(a_spec(1), _FOUR, busy, started=ago(14)))
    yield _seen(findings_of(a_spec(1), _FOUR, [replace(each, attempts=5) for each in busy], started=ago(60)))
    silent = [a_request(slot, at=ago(20), attempts=4) for slot in (2, 3)]
    yield _seen(findings_of(shrinking, _FOUR, silent, started=ago(60)))


def _of_pods() -> Iterator[VCPUSet]:
    def with_(pod: PodFindings) -> VCPUSet:
        return _seen(findings_of(a_spec(4, pod=_POD), _TWO, pod=pod))

    def judged(size: int, **fields: Any) -> PodFindings:
        """What a pod means in which two vCPUs have their CPU, and this size was requested."""
        pod = Pod("uid", "web-0", (Container("qemu", size, size, 2200),), **fields)
        resize, attempt, meaning = decide(_POD, pod, present=2, target=4, attempt=None, now=NOW)
        if resize is not None:
            back = replace(pod, containers=(Container("qemu", 2200, 2200, 2200),), pending=None)
            _, _, meaning = decide(_POD, back, present=2, target=4, attempt=attempt, now=NOW)
        return meaning

    for pods in ([], [Pod(name, name) for name in ("web-0", "web-1")]):
        meaning = the_pod(_POD, pods)
        assert isinstance(meaning, PodFindings)
        yield with_(meaning)
    deferred = ("Deferred", "Node didn't have enough resource: cpu, requested: 4200, used: 6500, capacity: 8000")
    infeasible = ("Infeasible", "Node didn't have enough capacity: cpu, requested: 4200, capacity: 4000")
    yield with_(judged(4200, pending=deferred))
    yield with_(judged(4200, pending=infeasible))
    unlimited = Pod("uid", "web-0", (Container("qemu"),))
    yield with_(decide(_POD, unlimited, present=2, target=4, attempt=None, now=NOW)[2])


def _of_errors() -> Iterator[VCPUSet]:
    def failed(error: VCPUSetError) -> VCPUSet:
        return _reported(a_spec(2), failure(error))

    yield failed(translate.connect_failure(_MONITOR, ConnectionRefusedError()))
    yield failed(translate.busy(_MONITOR))
    yield failed(translate.unanswered(_MONITOR, "query-status", COMMAND_SECONDS))
    with _refused() as errors:
        open_socket(Path("/"), "default", "../other/web.sock")
    yield failed(errors[0])
    with _refused() as errors:
        Credentials.of("Secret default/web-qmp", {"ca.crt": b"a", "tls.crt": b"b"})
    yield failed(errors[0])
    later = manifest("default", "web", unplug={"policy": "Sometimes"})
    by_server = {"uid": "1", "resourceVersion": "1", "generation": 3, "creationTimestamp": "2026-01-02T11:00:00Z"}
    later["metadata"] |= by_server
    spec = decode(later).spec
    assert isinstance(spec.monitor, Unsupported)
    yield replace(failed(UnsupportedSpec(spec.monitor.message)), spec=spec)


@contextmanager
def _refused() -> Iterator[list[VCPUSetError]]:
    """The error that the product raises."""
    errors: list[VCPUSetError] = []
    try:
        yield errors
    except VCPUSetError as error:
        errors.append(error)


def _before() -> VCPUSet:
    """What the examples were an hour ago."""
    vcpuset = replace(a_set(a_spec(2), generation=GENERATION), node_name="node-1")
    findings = replace(findings_of(a_spec(2), _TWO), now=ago(3600))
    return replace(vcpuset, status=status_of(vcpuset, assess(findings), findings, findings.now))


def _seen(findings: Findings) -> VCPUSet:
    return _reported(findings.spec, with_pod(assess(findings), findings), findings)


def _reported(spec: Spec, assessment: Assessment, findings: Findings | None = None) -> VCPUSet:
    vcpuset = replace(_before(), spec=spec)
    return replace(vcpuset, status=status_of(vcpuset, assessment, findings, NOW))
