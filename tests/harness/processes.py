"""Child processes that cannot be left behind, and ports that cannot be lost.

A child is started through `setpriv --pdeathsig KILL`: the kernel ends it when the thread that started it goes, however
that happened, so also when a test run is killed. That is safer than `preexec_fn` (which runs Python between fork and
exec, unsafe with threads) and, as setpriv replaces itself, the child keeps the pid that we know. Consequence: start
children from the main thread.

`Child` is built on `subprocess.Popen`, not on asyncio's, so that a process may be started in one event loop (of a
session-wide fixture) and ended in another.
"""

import asyncio
import contextlib
import functools
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeVar

from harness.wait import until

__all__ = ["Child", "ChildDied", "CommandFailed", "Completed", "ReservedPort", "free_port", "run"]

T = TypeVar("T")


class ChildDied(Exception):
    """A child process ended though it should run; the message holds the end of its log."""


@dataclass(frozen=True)
class Completed:
    """A command that has ended."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


class CommandFailed(Exception):
    """A command ended with a status other than 0; the message holds all that it said."""

    def __init__(self, completed: Completed) -> None:
        self.completed = completed
        said = "\n".join(part.rstrip() for part in (completed.stdout, completed.stderr) if part.strip())
        super().__init__(f"{shlex.join(completed.argv)}: exit status {completed.returncode}\n{said}")


def _bound_to_us(argv: Sequence[str | Path]) -> list[str]:
    """The command line that runs `argv` in a process that dies with the calling thread."""
    program, *arguments = [str(part) for part in argv]
    found = shutil.which(program)
    if found is None:
        raise FileNotFoundError(f"{program}: no such program; `make setup` installs what the tests need")
    return ["setpriv", "--pdeathsig", "KILL", "--", found, *arguments]


async def run(
    argv: Sequence[str | Path],
    *,
    input: str | None = None,  # noqa: A002 - the name that subprocess.run uses
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    timeout: float = 60,
) -> Completed:
    """Run a command to its end and return what it said.

    Raises:
        CommandFailed: its exit status is not 0, and `check` is set.
        TimeoutError: it took longer than `timeout` seconds; names the command. The process has been killed.

    Cancellation kills the process too, and waits until it has gone.
    """
    words = [str(part) for part in argv]
    process = await asyncio.create_subprocess_exec(
        *_bound_to_us(argv),
        stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
        cwd=cwd,
    )
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(None if input is None else input.encode())
    except TimeoutError as error:
        raise TimeoutError(f"{shlex.join(words)}: no end within {timeout:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()  # also closes the pipes
    status = process.returncode
    assert status is not None, "communicate() returns only after the process has ended"
    completed = Completed(tuple(words), status, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
    if check and completed.returncode != 0:
        raise CommandFailed(completed)
    return completed


class Child:
    """A long-running child process in a session of its own, with everything it says in one log file.

    Ctrl-C in a terminal therefore does not reach it: whoever started it ends it, in the order that is right.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    def start(
        cls,
        argv: Sequence[str | Path],
        *,
        name: str,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Self:
        """Start `argv`; its output is appended to `log`.

        Raises:
            FileNotFoundError: there is no such program.
        """
        with log.open("ab") as output:
            process = subprocess.Popen(
                _bound_to_us(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        """The process id, which is also its process group's."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def require_running(self) -> None:
        """Raise `ChildDied`, with the end of the log, unless the process runs."""
        status = self.returncode
        if status is not None:
            raise ChildDied(f"{self.name} ended with status {status}; its log ends with:\n{self.log_tail()}")

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the log, for error messages."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        self._process.send_signal(number)

    async def until(self, predicate: Callable[[], Awaitable[T | None]], timeout: float, what: str = "to be up") -> T:
        """Wait as `harness.wait.until` does, but only while the process runs; `what` goes after its name.

        Raises:
            ChildDied: it ended; the message has the end of its log.
            TimeoutError: not within `timeout` seconds; the same.
        """

        async def checked() -> T | None:
            self.require_running()
            return await predicate()

        said = lambda: f"{self.name} {what}; its log ends with:\n{self.log_tail()}\n"  # noqa: E731
        return await until(checked, timeout, said, interval=0.1)

    async def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit status.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        await until(lambda: self.returncode is not None, timeout, f"the end of {self.name}", interval=0.01)
        status = self.returncode
        assert status is not None, "the line above waited for it"
        return status

    async def stop(self, timeout: float = 10) -> int:
        """Ask the process to end, kill it and its group after `timeout` seconds, and return the exit status.

        Safe to call again. When cancelled it kills at once.
        """
        if self.returncode is None:
            self.signal(signal.SIGTERM)
            try:
                with contextlib.suppress(TimeoutError):
                    await self.wait(timeout)
            finally:
                self.kill()
        return self._process.wait()

    def kill(self) -> None:
        """End the process and its group now (SIGKILL), and collect it. Safe to call again."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(timeout=30)  # the kernel deals with SIGKILL at once, unless the disk hangs


class ReservedPort:
    """A TCP port on 127.0.0.1 that is ours until released, also while the server that uses it is down.

    The port is held by a socket that is bound, never listens, and has SO_REUSEPORT: a server of the same user that
    sets SO_REUSEPORT too can listen there, nobody else can get the port. So there is no gap between finding a free
    port and using it, and a server can be restarted on its port.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Give the port back. Safe to call again."""
        self._socket.close()


FIRST_PORT: Final = 10_000
PORTS: Final = 100
BLOCKS: Final = 200
"""Up to port 29,999, below those that the kernel hands out (/proc/sys/net/ipv4/ip_local_port_range)."""


def free_port() -> int:
    """A TCP port on 127.0.0.1 for servers that cannot share a `ReservedPort`: no test process is given the same one.

    The kernel does not hand it out either, neither for port 0 nor to a client that connects. Prefer port 0 where the
    server reports what it got.
    """
    first, turn = _own_ports()
    for _ in range(PORTS):
        port = first + next(turn)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"none of the ports from {first} on is free")


@functools.cache
def _own_ports() -> tuple[int, Iterator[int]]:
    """The first port of a block that belongs to this process until it ends, and the order in which they are used.

    A block is taken by an abstract name of a unix socket: that is atomic, and the kernel gives it back.
    """
    for block in range(BLOCKS):
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(f"\0vcpuset-tests-ports-{block}")
        except OSError:
            holder.close()
        else:
            holder.detach()  # open until the process ends
            return FIRST_PORT + block * PORTS, itertools.cycle(range(PORTS))
    raise RuntimeError(f"{BLOCKS} test processes have taken all blocks of ports")
