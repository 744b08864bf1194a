"""`make demo`: the main job, before the reader's eyes, with real components and nothing left behind.

An API server (etcd, kube-apiserver), a QEMU with a Linux guest, and the operator run as separate processes. kubectl
declares counts; every change of what kubectl shows, of what QEMU has and of what the guest itself has online is a line.

Environment: KEEP=1 leaves everything running (a process in the background owns it and ends it); DEMO_CLUSTER=current
uses the cluster of KUBECONFIG instead of starting one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.binaries import BinariesMissing, binaries
from harness.controlplane import ControlPlane
from harness.guest import Guest, GuestError
from harness.operator import OperatorProcess
from harness.processes import ChildDied, CommandFailed, Completed, run
from harness.qmp import execute, raw
from harness.wait import until
from harness.world import manifest

__all__ = ["main"]

CRDS = Path(__file__).resolve().parents[2] / "crds"
BOOT, SLOTS = 2, 8
KEPT_SLOTS = 64
"""Under software emulation QEMU ends once boot CPUs and all plugs ever made exceed maxcpus: room to play with."""
STEP_SECONDS = 60.0


class DemoFailed(Exception):
    """The demo did not show what it promises."""


class Cluster:
    """kubectl with one kubeconfig, in one namespace."""

    def __init__(self, kubectl: Path, kubeconfig: Path) -> None:
        self.kubectl = kubectl
        self.kubeconfig = kubeconfig
        self.namespace = "default"

    def argv(self, *arguments: str | Path) -> list[str | Path]:
        """The command line of one kubectl call."""
        return [self.kubectl, "--kubeconfig", self.kubeconfig, "--namespace", self.namespace, *arguments]

    async def run(self, *arguments: str | Path, text: str | None = None, check: bool = True) -> Completed:
        """Run kubectl. CommandFailed: it failed, if `check`."""
        return await run(self.argv(*arguments), input=text, check=check, timeout=120)


@dataclass
class Screen:
    """The lines that the reader sees, each with the time since the start."""

    begun: float = field(default_factory=time.monotonic)

    def line(self, text: str = "", *, who: str = "") -> None:
        """One line of the log."""
        print(f"{time.monotonic() - self.begun:6.2f} s  {who:<9}{text}".rstrip(), flush=True)

    def command(self, text: str) -> None:
        """A command that the reader could type."""
        print(flush=True)
        self.line(f"$ {text}", who="")


@dataclass(frozen=True)
class Step:
    """One row of the table at the end."""

    what: str
    declared: int
    qemu: int
    guest: int
    ready: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether all who can tell agree."""
        return self.declared == self.qemu == self.guest and self.ready == "True"


class Demo:
    """One run, with what it has started."""

    def __init__(self, screen: Screen, cluster: Cluster, guest: Guest) -> None:
        self._screen = screen
        self._cluster = cluster
        self._guest = guest
        self._watch: asyncio.subprocess.Process | None = None
        self._count: int | None = None
        """What QEMU was last seen to have."""
        self.steps: list[Step] = []

    async def play(self, vm: str) -> None:
        """Declare, scale up, scale down, undo a stranger's change."""
        screen = self._screen
        text = json.dumps(manifest(self._cluster.namespace, "vm", BOOT, vm))
        screen.command(f"kubectl apply -f - <<< '{text}'")
        begun = time.monotonic()
        await self._cluster.run("apply", "-f", "-", text=text)
        async with self._eyes():
            await self._settled(f"apply {BOOT}", BOOT, begun)
            for count in (6, 3):
                screen.command(f"kubectl scale vcpuset vm --replicas={count}")
                begun = time.monotonic()
                await self._cluster.run("scale", "vcpuset", "vm", f"--replicas={count}")
                await self._settled(f"scale to {count}", count, begun)
            print(flush=True)
            screen.line("another client plugs a CPU: device_add id=stranger", who="")
            begun = time.monotonic()
            async with raw(self._guest.control) as control:
                # The operator may be faster than the next look.
                self._show_qemu(await control.device_add(5, ident="stranger"))
            await until(lambda: self._qemu_has(3), STEP_SECONDS, "the stranger's CPU to be gone", interval=0.02)
            await self._settled("undo drift", 3, begun)

    async def _settled(self, what: str, declared: int, begun: float) -> None:
        """Wait for Ready and for the guest, and note what each of them says."""
        await self._cluster.run("wait", "--for=condition=Ready", "vcpuset/vm", f"--timeout={STEP_SECONDS:.0f}s")
        await self._guest.wait_online(declared, STEP_SECONDS)
        seconds = time.monotonic() - begun
        shown = await self._cluster.run("get", "vcpuset", "vm", "-o", "json")
        status = json.loads(shown.stdout)["status"]
        ready = next(each["status"] for each in status["conditions"] if each["type"] == "Ready")
        qemu = len(await execute(self._guest.control, "query-cpus-fast"))
        self.steps.append(Step(what, declared, qemu, len(self._guest.online()), ready, seconds))
        await asyncio.sleep(0.2)  # lets the last lines of the watch arrive before the next command is shown

    async def _qemu_has(self, count: int) -> bool:
        return len(await execute(self._guest.control, "query-cpus-fast")) == count

    @contextlib.asynccontextmanager
    async def _eyes(self) -> AsyncIterator[None]:
        """While in the context, a line is shown whenever kubectl, QEMU or the guest has something new."""
        watch = self._cluster.argv("get", "vcpuset", "vm", "--watch", "--no-headers", "-o", _COLUMNS)
        self._watch = await asyncio.create_subprocess_exec(
            *map(str, watch), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        tasks = [asyncio.create_task(look()) for look in (self._watch_kubectl, self._watch_machine)]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                self._watch.kill()
            await self._watch.communicate()

    async def _watch_kubectl(self) -> None:
        assert self._watch is not None
        assert self._watch.stdout is not None
        last = ""
        while line := (await self._watch.stdout.readline()).decode().strip():
            if line != last:
                desired, current, ready, reason, generation, seen = line.split()
                stale = "" if generation == seen else "   (status of the previous generation)"
                self._screen.line(f"desired {desired}, current {current}, Ready={ready} {reason}{stale}", who="kubectl")
            last = line
        raise DemoFailed("kubectl get --watch ended")

    async def _watch_machine(self) -> None:
        guest: frozenset[int] | None = None
        while True:
            self._show_qemu(len(await execute(self._guest.control, "query-cpus-fast")))
            online = self._guest.online()
            if online != guest:
                self._screen.line(f"online: {len(online)} ({_ranges(online)})", who="guest")
            guest = online
            await asyncio.sleep(0.05)

    def _show_qemu(self, count: int) -> None:
        if count != self._count:
            self._screen.line(f"query-cpus-fast shows {count}", who="QEMU")
        self._count = count


_COLUMNS = (
    "custom-columns=D:.spec.vcpus,C:.status.vcpus,"
    "R:.status.conditions[?(@.type=='Ready')].status,W:.status.conditions[?(@.type=='Ready')].reason,"
    "G:.metadata.generation,O:.status.observedGeneration"
)


def _ranges(cpus: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


@contextlib.asynccontextmanager
async def _own_cluster(screen: Screen) -> AsyncIterator[Cluster]:
    screen.line("starting etcd and kube-apiserver …")
    async with ControlPlane() as control_plane:
        cluster = Cluster(control_plane.kubectl_path, control_plane.kubeconfig)
        await control_plane.install_crd()
        yield cluster


def _cluster_of_the_user() -> Cluster:
    named = os.environ.get("KUBECONFIG", "")
    if not named or not Path(named).is_file():
        raise DemoFailed("DEMO_CLUSTER=current needs KUBECONFIG to name a kubeconfig file")
    found = shutil.which("kubectl")
    return Cluster(Path(found) if found else binaries().kubectl, Path(named))


@contextlib.asynccontextmanager
async def _current_cluster(screen: Screen) -> AsyncIterator[Cluster]:
    """The user's own: gets the definition if it has none, and a namespace; both are removed again."""
    cluster = _cluster_of_the_user()
    host = (await cluster.run("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")).stdout
    screen.line(f"using the cluster at {host}")
    had = await cluster.run("get", "crd", "vcpusets.vcpuset.dev", "-o", "name", check=False)
    try:
        await cluster.run("apply", "--server-side", "-k", CRDS)
        await cluster.run("wait", "--for=condition=Established", "crd/vcpusets.vcpuset.dev", "--timeout=60s")
        yield cluster
    finally:
        if had.returncode != 0:
            await cluster.run("delete", "-k", CRDS, "--wait=false", check=False)


@contextlib.asynccontextmanager
async def _namespace(cluster: Cluster) -> AsyncIterator[str]:
    name = f"vcpuset-demo-{os.getpid()}"
    await cluster.run("create", "namespace", name)
    cluster.namespace = name
    try:
        yield name
    finally:
        await cluster.run("delete", "vcpusets", "--all", check=False)
        await cluster.run("delete", "namespace", name, "--wait=false", check=False)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="vcpuset-demo-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def demo(report_to: int | None) -> None:
    """The whole run; with a descriptor to report to, everything is then left running until SIGTERM.

    Raises DemoFailed, or whatever a component says.
    """
    keep = report_to is not None
    screen = Screen()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _interrupt, asyncio.current_task(), stop)
    current = os.environ.get("DEMO_CLUSTER") == "current"
    slots = KEPT_SLOTS if keep else SLOTS
    async with contextlib.AsyncExitStack() as stack:
        root = stack.enter_context(_folder())
        cluster = await stack.enter_async_context(_current_cluster(screen) if current else _own_cluster(screen))
        namespace = await stack.enter_async_context(_namespace(cluster))
        folder = root / namespace
        folder.mkdir()

        guest = Guest(smp=f"{BOOT},maxcpus={slots}", monitor_paths=[folder / "vm.sock"])
        await stack.enter_async_context(guest)
        screen.line("booting a Linux guest in QEMU (software emulation) …")
        await guest.ready()
        screen.line(f"the guest is running: {BOOT} of {slots} vCPUs, kernel {(await guest.shell('uname -r')).strip()}")
        flag = f"--namespace={namespace}"
        operator = OperatorProcess(cluster, flag, socket_root=root)
        await stack.enter_async_context(operator)
        screen.line(f"the operator is running: vcpuset run --socket-root={root} {flag}")

        played = Demo(screen, cluster, guest)
        try:
            await played.play("vm.sock")
        except (TimeoutError, CommandFailed) as error:
            raise DemoFailed(f"{error}\nThe operator's log ends with:\n{operator.tail()}") from error
        finally:
            _show(played.steps)
        if not all(step.right for step in played.steps):
            raise DemoFailed("the counts do not match")
        print(
            "\nSUCCESS: in each step, QEMU had the declared number of vCPUs and the guest had all of them online.",
            flush=True,
        )
        if report_to is not None:
            _say_how_to_play(cluster, guest, operator)
            _let_go(report_to)
            await stop.wait()


def _show(steps: list[Step]) -> None:
    print(f"\n  {'step':<14}{'declared':>9}{'QEMU':>6}{'guest':>7}{'Ready':>7}{'seconds':>9}", flush=True)
    for step in steps:
        print(
            f"  {step.what:<14}{step.declared:>9}{step.qemu:>6}{step.guest:>7}{step.ready:>7}{step.seconds:>9.2f}",
            flush=True,
        )
    print("  (seconds until Ready and online in the guest)", flush=True)


def _say_how_to_play(cluster: Cluster, guest: Guest, operator: OperatorProcess) -> None:
    kubectl = f"{shlex.quote(str(cluster.kubectl))} -n {cluster.namespace}"
    vcpuset = shlex.quote(str(Path(sys.executable).with_name("vcpuset")))
    print(
        f"""
Everything is still running. The status page is at {operator.url}/
Try:
  export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}
  {kubectl} scale vcpuset vm --replicas=5
  {kubectl} get vcpuset vm --watch
  {kubectl} describe vcpuset vm
  tail -f {shlex.quote(str(operator.log))}
  tail -f {shlex.quote(str(guest.directory / "console"))}     # the guest's online CPUs
  {vcpuset} inspect {shlex.quote(str(guest.control))}     # the machine's second monitor
To stop everything and clean up:
  kill {os.getpid()}
""",
        flush=True,
    )


def _interrupt(task: asyncio.Task[None] | None, stop: asyncio.Event) -> None:
    """End a kept demo in good order; cut one that still plays short."""
    if _kept.is_set():
        stop.set()
    elif task is not None:
        task.cancel()


_kept = asyncio.Event()


def _let_go(report_to: int) -> None:
    """Tell the process in the foreground that all went well, and stop writing to its terminal."""
    _kept.set()
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.write(report_to, b"0")
    os.close(report_to)


def _play(report_to: int | None = None) -> int:
    try:
        asyncio.run(demo(report_to))
    except (
        DemoFailed,
        BinariesMissing,
        FileNotFoundError,
        GuestError,
        ChildDied,
        CommandFailed,
        TimeoutError,
    ) as error:
        print(f"\nFAILURE: {error}", flush=True)
        return 1
    except asyncio.CancelledError:
        print("\nINTERRUPTED: everything has been stopped.", flush=True)
        return 130
    return 0


def _play_in_background() -> int:
    """Run the demo in a process of its own, which stays when this one returns."""
    reader, writer = os.pipe()
    argv = [sys.executable, "-m", "harness.demo", "--report-to", str(writer)]
    owner = subprocess.Popen(argv, pass_fds=[writer], start_new_session=True)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as report:
            if report.read() == b"0":
                return 0
    except KeyboardInterrupt:
        owner.terminate()
    return owner.wait()


def main() -> int:
    """Exit status 0: every step was right."""
    match sys.argv[1:]:
        case ["--report-to", descriptor]:
            return _play(int(descriptor))
        case _ if os.environ.get("KEEP", "") not in {"", "0"}:
            return _play_in_background()
        case _:
            return _play()


if __name__ == "__main__":
    sys.exit(main())
