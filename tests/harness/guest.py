"""A real QEMU, with the tiny Linux guest of harness.guestimage or with no guest at all.

    async with Guest() as guest:                 # boots: 3 to 5 s, see harness.saved for 0.4 s
        await guest.ready()
        await device_add(guest.monitors[0], 1)
        await guest.wait_online(2)

    async with Guest(None) as guest: ...         # paused, no kernel: 0.1 s, see harness.acpi

Everything runs under TCG, so it runs everywhere and alike. There, all boot CPUs and all plugs ever made count against
maxcpus, and QEMU aborts at one too many: leave maxcpus generous.

All state is in the process and in files, none in the event loop: a guest may be started in one loop and used in
another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypedDict, TypeVar

from qemu.qmp import QMPError

from harness.guestimage import INITRAMFS, KERNEL
from harness.guestimage import images as built_images
from harness.monitortls import MonitorTLS
from harness.processes import Child, ReservedPort
from harness.qmp import raw
from harness.sockets import LONGEST_PATH, listener, listening, option_value
from harness.wait import until

__all__ = ["Guest", "GuestError", "GuestOptions", "parse_cpu_list", "reported_online"]

T = TypeVar("T")

KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 nokaslr cryptomgr.notests tsc=reliable no_timer_check"
"""All after panic=-1 only make the boot shorter, as does the plain CPU model."""

S390X_START = 0x10000
S390X_LOOP = b"\xa7\xf4\x00\x00"
"""A kernel without end: where s390x begins it, and a branch to itself."""

START_SECONDS = 60.0
BOOT_SECONDS = 180.0
SHELL_SECONDS = 60.0


class GuestError(Exception):
    """QEMU ended or did not start, or a command in the guest failed; the message ends with what it said last."""


class GuestOptions(TypedDict, total=False):
    """The keyword arguments of `Guest`; see there."""

    smp: str
    machine: str
    cpu: str | None
    accel: str
    memory: int
    agent: bool
    append: str
    extra: Sequence[str]
    qemu: str
    monitors: int
    tcp: bool
    tls: MonitorTLS | None
    socket_dir: Path | None
    monitor_paths: Sequence[Path] | None
    agent_path: Path | None


def parse_cpu_list(text: str) -> frozenset[int]:
    """The kernel's CPU list format: ``0,2-4`` is {0, 2, 3, 4}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def reported_online(console: str) -> frozenset[int]:
    """The CPUs that a guest last reported to be online; none before it has booted."""
    reports = re.findall(r"guest: \w+ online=([\d,-]*)", console)
    return parse_cpu_list(reports[-1]) if reports else frozenset()


class Guest:
    """One machine: a QEMU process at a time, on sockets whose paths stay the same over a restart.

    images         folder of kernel and initramfs; None: no guest, QEMU stays paused
    smp            the argument of -smp
    machine, cpu   the arguments of -machine and -cpu; cpu=None leaves the choice to QEMU
    accel          the argument of -accel; "kvm" runs firmware, but may not run a guest
    memory         MiB; Linux with the agent needs 112
    agent          a guest agent, reached through `agent_path`: this one, or one in a temporary folder
    append         more kernel command line: ``online=none`` (plugged CPUs stay offline), ``acpi=off``, …
    extra          more QEMU arguments
    qemu           the program, such as qemu-system-s390x (with images=None, a machine of its own and cpu=None)
    monitors       how many QMP sockets there are for the test and the operator, at the paths `monitors`
    tcp            also one on TCP, at `tcp_address`
    tls            the one on TCP, with TLS; may be changed, for the next start
    socket_dir     existing folder for the monitors' sockets; without it they are in a temporary one
    monitor_paths  the exact paths of the monitors instead
    restore        go on from a file that `save` wrote with the same images, smp, machine, cpu, memory, agent, extra

    `control` is one more monitor, for this class and for tests; the operator never gets to know it.
    """

    def __init__(
        self,
        images: Path | Literal["built"] | None = "built",
        *,
        smp: str = "1,maxcpus=64",
        machine: str = "q35",
        cpu: str | None = "qemu64",
        accel: str = "tcg",
        memory: int = 192,
        agent: bool = False,
        append: str = "",
        extra: Sequence[str] = (),
        qemu: str = "qemu-system-x86_64",
        monitors: int = 1,
        tcp: bool = False,
        tls: MonitorTLS | None = None,
        socket_dir: Path | None = None,
        monitor_paths: Sequence[Path] | None = None,
        agent_path: Path | None = None,
        restore: Path | None = None,
    ) -> None:
        self.qemu = qemu
        self.images = built_images() if images == "built" else images
        self.directory = Path(tempfile.mkdtemp(prefix="vcpuset-guest-"))
        """The guest's own folder: console, QEMU's messages and all sockets that were given no other place."""
        self.monitors: list[Path] = (
            [(socket_dir or self.directory) / f"qmp{i}" for i in range(monitors)]
            if monitor_paths is None
            else list(monitor_paths)
        )
        self.control = self.directory / "control"
        self.agent_path = agent_path or self.directory / "agent"
        self._shell_path = self.directory / "shell"
        self._console_path = self.directory / "console"
        self._messages_path = self.directory / "messages"
        self.tls = tls
        self._port = ReservedPort() if tcp or tls else None
        self._restore = restore
        self._child: Child | None = None
        self._shell_lock = asyncio.Lock()
        self._restored_console = ""

        self.hardware = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", machine]
        """The arguments that make the machine what it is: a saved state fits these only."""
        self.hardware += ["-accel", accel, "-smp", smp, "-m", str(memory)]
        if cpu is not None:
            self.hardware += ["-cpu", cpu]
        self._sockets = [*self.monitors, self.control]
        self._backends: list[str] = []
        if self.images is None:
            self.hardware += ["-S"]
            if "s390x" in qemu:  # its firmware ends the machine at once if it has nothing to boot
                loop = self.directory / "loop"
                loop.write_bytes(bytes(S390X_START) + S390X_LOOP)
                self._backends += ["-kernel", str(loop)]
        else:
            options = f"{KERNEL_OPTIONS} {'ga=1 ' if agent else ''}{append}".strip()
            self.hardware += ["-append", options, "-serial", "chardev:console", "-serial", "chardev:shell"]
            self._backends += ["-kernel", str(self.images / KERNEL), "-initrd", str(self.images / INITRAMFS)]
            self._backends += ["-chardev", f"file,id=console,path={self._console_path}"]
            self._backends += ["-chardev", f"socket,id=shell,path={self._shell_path},server=on,wait=off"]
            self._sockets.append(self._shell_path)
        if agent:
            self.hardware += ["-device", "virtio-serial-pci"]
            self.hardware += ["-device", "virtserialport,chardev=agent,id=agent0,name=org.qemu.guest_agent.0"]
            self._backends += ["-chardev", f"socket,id=agent,path={option_value(self.agent_path)},server=on,wait=off"]
            self._sockets.append(self.agent_path)
        self.hardware += extra
        for path in self._sockets:
            if len(str(path).encode()) > LONGEST_PATH:
                self._release()
                raise ValueError(f"longer than the {LONGEST_PATH} bytes that a socket path may have: {path}")

    @property
    def tcp_address(self) -> tuple[str, int]:
        """Host and port of the TCP monitor; the port stays ours while QEMU is down."""
        if self._port is None:
            raise ValueError("this guest has no TCP monitor: Guest(tcp=True)")
        return "127.0.0.1", self._port.number

    @property
    def pid(self) -> int:
        """The process id of the running or last QEMU."""
        return self._started().pid

    @property
    def returncode(self) -> int | None:
        """None while QEMU runs, else its exit status; negative: the signal that ended it."""
        return self._started().returncode

    @property
    def messages(self) -> str:
        """What QEMU itself has said on its standard output and error, over all restarts."""
        return _read(self._messages_path)

    @property
    def console(self) -> list[str]:
        """The lines of the guest's console since QEMU was started."""
        return (self._restored_console + _read(self._console_path)).splitlines()

    async def start(self) -> Self:
        """Start QEMU and wait until its sockets can be connected to; a guest that boots is not `ready` then.

        With `restore` the guest runs when this returns. GuestError: QEMU has ended, or did not take the state.
        """
        assert self._child is None or self._child.returncode is not None, "started twice"
        self._restored_console = ""
        self._console_path.unlink(missing_ok=True)
        for path in self._sockets:
            path.unlink(missing_ok=True)  # an earlier QEMU's, killed: nobody listens there
        arguments = [self.qemu, *self.hardware, *self._backends]
        for path in [*self.monitors, self.control]:
            arguments += ["-qmp", f"unix:{option_value(path)},server=on,wait=off"]
        if self._restore is not None:
            arguments += ["-incoming", f"file:{self._restore}"]
        with contextlib.ExitStack() as stack:
            descriptors = []
            if self._port is not None:
                descriptor = stack.enter_context(listener(self._port.number)).fileno()
                descriptors.append(descriptor)
                options = self.tls.options if self.tls is not None else ""
                arguments += self.tls.arguments() if self.tls is not None else []
                arguments += ["-chardev", f"socket,id=tcp,fd={descriptor},server=on,wait=off{options}"]
                arguments += ["-mon", "chardev=tcp,mode=control"]
            self._child = Child.start(arguments, name="QEMU", log=self._messages_path, pass_fds=descriptors)
        await self._until(lambda: set(map(str, self._sockets)) <= listening(), START_SECONDS, "QEMU to listen")
        try:
            if self._restore is not None:
                await self._resume()
            elif self.images is None and "-preconfig" not in self.hardware:
                await self._launch()
        except (QMPError, TimeoutError) as error:
            self.kill()
            raise GuestError(self._ended()) from error
        return self

    async def _launch(self) -> None:
        """From "prelaunch", in which the operator changes no CPU, to "paused", with hardly any step of the firmware."""
        async with raw(self.control, hopeless=lambda: self.returncode is not None) as client:
            if (await client.call("query-status"))["status"] == "prelaunch":
                await asyncio.gather(client.call("cont"), client.call("stop"))

    async def _resume(self) -> None:
        """Let a restored guest go on. It does not report by itself then, so its state is asked for."""
        async with raw(self.control, hopeless=lambda: self.returncode is not None) as client:

            async def loaded() -> bool:
                return bool((await client.call("query-status"))["status"] != "inmigrate")

            await until(loaded, START_SECONDS, "the saved state to be loaded", interval=0.01)
            await client.call("cont")
        if self.images is not None:
            cpu = "/sys/devices/system/cpu"
            seen = await self.shell(f"echo online=$(cat {cpu}/online) present=$(cat {cpu}/present)")
            self._restored_console = f"guest: ready {seen.strip()} restored\n"

    async def save(self, path: Path) -> None:
        """Write the guest's state to a file for `restore`; the guest stays stopped after that.

        Only for a guest without plugged CPUs: QEMU wants each of these on the command line of its successor.
        """
        async with raw(self.control) as client:
            await client.call("stop")
            await client.call("migrate-set-parameters", {"max-bandwidth": 1 << 34})
            await client.call("migrate", {"uri": f"file:{path}"})

            async def ended() -> str | None:
                status: str = (await client.call("query-migrate"))["status"]
                return status if status in {"completed", "failed"} else None

            if await until(ended, START_SECONDS, "the state to be saved", interval=0.01) == "failed":
                raise GuestError(f"the state was not saved to {path}: {self._tail()}")

    async def ready(self, timeout: float = BOOT_SECONDS) -> None:
        """Wait until the guest has booted."""
        await self._until(lambda: self._last_report() is not None, timeout, "the guest to boot")

    def online(self) -> frozenset[int]:
        """The CPUs that the guest last said it uses (its own numbers; at most 0.1 s old when it is idle)."""
        report = self._last_report()
        return parse_cpu_list(report[1]) if report else frozenset()

    def present(self) -> frozenset[int]:
        """The CPUs that the guest last said it has, online or not."""
        report = self._last_report()
        return parse_cpu_list(report[2]) if report else frozenset()

    def _last_report(self) -> re.Match[str] | None:
        reports = (re.search(r"guest: \w+ online=([\d,-]*) present=([\d,-]*)", line) for line in reversed(self.console))
        return next(filter(None, reports), None)

    async def wait_online(self, cpus: int | Collection[int], timeout: float = 60.0) -> None:
        """Wait until so many CPUs, or exactly these, are online in the guest."""

        def reached() -> bool:
            online = self.online()
            return len(online) == cpus if isinstance(cpus, int) else online == frozenset(cpus)

        await self._until(reached, timeout, lambda: f"{cpus} online in the guest, which has {sorted(self.online())}")

    async def shell(self, command: str, timeout: float = SHELL_SECONDS, check: bool = True) -> str:
        """Run a command line (below 4 kB) as root in the guest and return what it printed.

        GuestError: it failed, if `check`. TimeoutError: no end in `timeout` seconds.
        """
        async with self._shell_lock:
            reader, writer = await asyncio.open_unix_connection(self._shell_path)
            try:
                async with asyncio.timeout(timeout):
                    mark = secrets.token_hex(6)
                    # The first mark skips what an earlier, interrupted command has left in the line.
                    writer.write(f"echo {mark}\n{command}\necho {mark}$?\n".encode())
                    await reader.readuntil(f"{mark}\n".encode())
                    output = await reader.readuntil(mark.encode())
                    status = int(await reader.readline())
            except TimeoutError as error:
                raise TimeoutError(
                    f"no end of {command!r} in the guest within {timeout:g} s: {self._tail()}"
                ) from error
            except asyncio.IncompleteReadError as error:
                raise GuestError(f"QEMU ended during {command!r}: {self._tail()}") from error
            finally:
                writer.transport.abort()  # nothing more to say; a stopped QEMU could not read a farewell
        text = output[: -len(mark)].decode(errors="replace")
        if check and status:
            raise GuestError(f"{command!r} ended with {status} in the guest: {text.strip()}")
        return text

    async def hold_cpus(self, *cpus: int) -> None:
        """Make Linux refuse (with _OST 0x82) to give up these online CPUs, until `release_cpus`."""
        await self.shell(f"hold-cpus {' '.join(map(str, cpus))}")

    async def release_cpus(self) -> None:
        """Undo every `hold_cpus`."""
        await self.shell("release-cpus")

    def freeze(self) -> None:
        """SIGSTOP: QEMU hangs, its sockets accept connections and nobody answers. Returns when the last thread stands.

        The signal stops the thread that takes it up, and that one the others: on a busy host they go on meanwhile.
        """
        self._started().signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """SIGCONT: go on after `freeze`."""
        self._started().signal(signal.SIGCONT)

    async def wait_ended(self, timeout: float = 60.0) -> int:
        """Wait until QEMU has ended by itself; its exit status."""
        return await self._started().wait(timeout)

    def kill(self) -> None:
        """SIGKILL, as a crash: the sockets' files stay, with nobody behind them. `start` begins a new process."""
        self._started().kill()

    async def restart(self) -> None:
        """A new QEMU process on the same paths, from the beginning: plugged CPUs are gone."""
        self.kill()
        await self.start()

    async def stop(self) -> None:
        """End QEMU at once and remove all that it left; harmless if it has ended or was never started."""
        if self._child is not None:
            self._child.kill()
        for path in self._sockets:
            path.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        if self._port is not None:
            self._port.release()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except BaseException:
            await self.stop()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _started(self) -> Child:
        if self._child is None:
            raise GuestError("the guest was not started")
        return self._child

    def _tail(self) -> str:
        """The end of what QEMU and the guest said, for error messages."""
        return " | ".join([*self.messages.splitlines()[-5:], *self.console[-5:]]) or "nothing was said"

    async def _until(self, predicate: Callable[[], T], timeout: float, what: str | Callable[[], str]) -> T:
        """`until` that gives up when QEMU has ended, and tells what was said last."""

        def look() -> T:
            answer = predicate()
            if not answer and self.returncode is not None:
                raise GuestError(self._ended())
            return answer

        def described() -> str:
            return f"{what if isinstance(what, str) else what()}: {self._tail()}"

        return await until(look, timeout, described, interval=0.02)

    def _ended(self) -> str:
        state = f", started from the saved state {self._restore}" if self._restore is not None else ""
        return f"QEMU ended ({self.returncode}{state}): {self._tail()}"


def _read(path: Path) -> str:
    """The text of a file that may not be there yet. A console is bytes of any kind."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
