"""The tests' own view of a machine, and the hand of "someone else" who changes it behind the operator's back.

Made of the stock qemu.qmp client on purpose: what the tests see must not pass through the code that they test. A
monitor serves one client at a time, so give the operator one monitor of a guest and look through another.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, Message, QMPClient, QMPError, Runstate

__all__ = [
    "SECOND_ON_TCP",
    "Monitor",
    "Raw",
    "count",
    "device_add",
    "device_del",
    "execute",
    "raw",
    "second_on_tcp",
    "slots",
]

Monitor = Path | str | tuple[str, int]
"""A unix socket, or host and port."""

SECOND_ON_TCP = (
    "-chardev",
    "socket,id=second,host=127.0.0.1,port=0,server=on,wait=off",
    "-mon",
    "chardev=second,mode=control",
)
"""QEMU's arguments for a monitor on TCP beside those that a guest has; `second_on_tcp` says where."""

Slot = dict[str, Any]
"""An entry of query-hotpluggable-cpus."""

CONNECT_SECONDS = 20.0
COMMAND_SECONDS = 30.0
CLOSE_SECONDS = 5.0
TOPOLOGY = ("drawer-id", "book-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id")


class Raw(QMPClient):
    """qemu.qmp's client with a deadline on each command."""

    async def call(
        self, command: str, arguments: dict[str, Any] | None = None, timeout: float = COMMAND_SECONDS
    ) -> Any:  # noqa: ANN401 - each command answers in a form of its own
        """`execute` that raises TimeoutError, naming the command, if no answer comes in `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                return await self.execute(command, arguments)
        except TimeoutError as error:
            raise TimeoutError(f"no answer to {command} within {timeout:g} s") from error

    async def _recv(self) -> Message:
        # QEMU 10.0 sends what happens while it accepts a client before its greeting.
        while "event" in (message := await super()._recv()) and self.runstate is Runstate.CONNECTING:
            pass
        return message

    async def slots(self) -> list[Slot]:
        """All CPU slots in ascending order: the position in the list is QEMU's slot index."""
        found: list[Slot] = await self.call("query-hotpluggable-cpus")
        return sorted(found, key=lambda slot: tuple(slot["props"].get(key, -1) for key in TOPOLOGY))

    async def count(self) -> int:
        """How many CPUs the machine has (query-cpus-fast)."""
        return len(await self.call("query-cpus-fast"))

    async def device_add(self, slot: int, ident: str | None = None) -> int:
        """Plug a CPU into the slot with this index; its id is ``vcpu<slot>`` unless given.

        Returns how many CPUs the machine has right after that: an operator may soon unplug it.
        """
        chosen = (await self.slots())[slot]
        arguments = {"driver": chosen["type"], "id": ident or f"vcpu{slot}", **chosen["props"]}
        _, count = await asyncio.gather(self.call("device_add", arguments), self.count())
        return count

    async def device_del(self, slot: int) -> None:
        """Ask the guest for the CPU in the slot with this index. LookupError: the slot is free."""
        path = (await self.slots())[slot].get("qom-path")
        if path is None:
            raise LookupError(f"slot {slot} is free")
        await self.call("device_del", {"id": path})

    async def hmp(self, line: str) -> str:
        """What the human monitor answers to a command line."""
        answer: str = await self.call("human-monitor-command", {"command-line": line})
        return answer.strip()


@contextlib.asynccontextmanager
async def raw(
    monitor: Monitor, timeout: float = CONNECT_SECONDS, hopeless: Callable[[], bool] = lambda: False
) -> AsyncIterator[Raw]:
    """A session with a monitor. It tries again while the monitor refuses or is held by another client.

    TimeoutError: no session within `timeout` seconds, or earlier if `hopeless`; its cause is the last refusal.
    """
    client = await _connected(monitor, timeout, hopeless)
    try:
        yield client
    finally:
        await _close(client)


async def _connected(monitor: Monitor, timeout: float, hopeless: Callable[[], bool]) -> Raw:
    address = str(monitor) if isinstance(monitor, Path) else monitor
    refusal: ConnectError | None = None
    try:
        async with asyncio.timeout(timeout):
            while True:
                client = Raw()
                try:
                    await client.connect(address)
                except ConnectError as error:
                    if not isinstance(error.exc, OSError | EOFError):
                        raise  # somebody answers, but that is no monitor
                    refusal = error  # nobody listens yet, or two others wait already
                    if hopeless():
                        raise TimeoutError from error
                    await asyncio.sleep(0.05)
                else:
                    return client
    except TimeoutError:
        raise TimeoutError(f"no session with the monitor {address} within {timeout:g} s") from refusal


async def _close(client: Raw) -> None:
    """End a session; a machine that was killed or stopped meanwhile is no error here."""
    for _ in range(2):
        if client.runstate is Runstate.IDLE:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                # Raises why the session was lost, if it was: whoever used it has been told by then.
                with contextlib.suppress(OSError, EOFError, ValueError, QMPError):
                    await client.disconnect()
        except TimeoutError:  # the peer does not read: 0.0.6 would wait for ever to flush
            if client._writer is not None:
                client._writer.transport.abort()


async def execute(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - as `call`
    """One command in a session of its own."""
    async with raw(monitor) as client:
        return await client.call(command, arguments)


async def count(monitor: Monitor) -> int:
    """How many CPUs the machine has (query-cpus-fast)."""
    async with raw(monitor) as client:
        return await client.count()


async def second_on_tcp(monitor: Monitor) -> tuple[str, int]:
    """Where the monitor of `SECOND_ON_TCP` is, while no client has it."""
    async with raw(monitor) as client:
        (filename,) = [each["filename"] for each in await client.call("query-chardev") if each["label"] == "second"]
    return "127.0.0.1", int(filename.partition(",")[0].rpartition(":")[2])


async def slots(monitor: Monitor) -> list[Slot]:
    """All CPU slots in ascending order."""
    async with raw(monitor) as client:
        return await client.slots()


async def device_add(monitor: Monitor, *indexes: int, ident: str | None = None) -> None:
    """Plug CPUs into these slots. ExecuteError: QEMU refused one; those before it are plugged."""
    async with raw(monitor) as client:
        for index in indexes:
            await client.device_add(index, ident)


async def device_del(monitor: Monitor, *indexes: int) -> None:
    """Ask the guest for the CPUs in these slots; returns when QEMU has taken the requests, not when they are gone."""
    async with raw(monitor) as client:
        for index in indexes:
            await client.device_del(index)
