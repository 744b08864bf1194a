"""One connection to the QEMU guest agent (qemu-ga): which CPUs the guest uses, and the command to use more.

The socket is the host's end of a serial line into the guest, which makes it unlike a monitor (run: agent 7.2):

- QEMU accepts the connection whether or not an agent runs, and an agent sends nothing by itself. So only a missing
  answer shows that there is none; a second client does not learn either that another one is served.
- The line outlives its clients. It may hold half a request of an earlier client, which swallows the beginning of ours,
  and answers that no client has read, the first of which may be truncated at its start. The byte 0xFF makes the agent
  discard what it has read, at the price of an error without an id; and `guest-sync-delimited` is answered after such a
  byte, with the number that was sent. `guest-sync`, without the bytes, is not enough: after half a request the agent
  answers its first use with several parse errors.
- Requests are executed one by one. After a request that timed out, the next one waits for it.

Agents older than QEMU 3.0 refuse requests with an id and are not supported.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from qemu.qmp import ExecuteError, Message

from vcpuset.domain.busy import Used
from vcpuset.domain.errors import AgentRefused, AgentUnreachable
from vcpuset.domain.guest import GuestCPUs
from vcpuset.qmp import replies, translate
from vcpuset.qmp.client import Client
from vcpuset.qmp.session import CLOSE_SECONDS
from vcpuset.qmp.sockets import UnixEndpoint

__all__ = ["AGENT_SECONDS", "FIRST_BATCH", "Agent"]

AGENT_SECONDS: Final = 5.0
"""For connecting and the first answer together, and for each answer after that. An idle agent takes some ms."""

FIRST_BATCH: Final = 4
"""How many CPUs are set online by the first command. One takes a guest from some ms (KVM) to 0.3 s (TCG, idle host)."""

BRING_ONLINE_SECONDS: Final = 10.0
"""How long one call of `bring_online` starts commands."""

LONGEST: Final = 512 * 1024
"""The longest reply that is read, in bytes. A reply about 4096 CPUs has half of it."""

_T = TypeVar("_T")

_SYNC: Final = "guest-sync-delimited"
_DELIMITER: Final = b"\xff"


class Agent:
    """A connection to a guest's agent, opened by `Agent.open`; close it, also after an error.

    After AgentUnreachable and AgentTimeout it has ended; every later call raises.
    """

    def __init__(self, where: str, seconds: float, permit: Callable[[], None] | None = None) -> None:
        self._where = where
        self._seconds = seconds
        self._client = _AgentClient(permit)

    @classmethod
    async def open(
        cls, endpoint: UnixEndpoint, *, permit: Callable[[], None] | None = None, seconds: float = AGENT_SECONDS
    ) -> Agent:
        """Connect, and wait for one answer of the agent. The endpoint may be closed afterwards.

        permit   called right before each command is sent; if it raises, the connection is closed instead
        seconds  for this, and later for each command

        Raises AgentUnreachable if nothing listens or what listens is no agent, AgentTimeout if nothing is answered,
        AgentRefused if the agent is not allowed to answer even this.
        """
        agent = cls(str(endpoint), seconds, permit)
        try:
            async with agent._deadline(_SYNC):
                await agent._client.open(endpoint)
                await agent._client.sync()
        except BaseException:
            await agent.close()
            raise
        return agent

    async def cpus(self) -> GuestCPUs:
        """The guest's CPUs (`guest-get-vcpus`), by ascending logical id.

        Raises AgentUnreachable (also for a malformed reply), AgentTimeout, AgentRefused.
        """
        command = "guest-get-vcpus"
        async with self._deadline(command):
            return await self._client.execute(command, read=replies.guest_cpus)

    async def used(self) -> Mapping[int, Used] | None:
        """How long each of the guest's CPUs has been busy (`guest-get-cpustats`), by logical id.

        None: the agent does not say (older than 7.1, not on Linux, or not allowed to). Raises AgentUnreachable,
        AgentTimeout.
        """
        return await self._query_if_known("guest-get-cpustats", replies.used)

    async def load(self) -> float | None:
        """The guest's load average of the last minute (`guest-get-load`).

        None: the agent does not say (older than 10.0, or not allowed to). Raises AgentUnreachable, AgentTimeout.
        """
        return await self._query_if_known("guest-get-load", replies.load)

    async def _query_if_known(self, command: str, read: Callable[[object], _T]) -> _T | None:
        try:
            async with self._deadline(command):
                return await self._client.execute(command, read=read)
        except AgentRefused:
            return None

    async def bring_online(self, ids: Sequence[int]) -> Mapping[int, str]:
        """Set these CPUs online, by logical id (`guest-set-vcpus`); one that is online already is left as it is.

        Returns those that the agent could not set online, with its message. Sends several commands if there are many,
        each with its deadline, and starts none after `BRING_ONLINE_SECONDS`: the rest is left as it is.

        Raises AgentUnreachable and AgentTimeout; the guest may still be working on the command then.
        """
        refused: dict[int, str] = {}
        left = list(dict.fromkeys(ids))
        size = FIRST_BATCH
        clock = asyncio.get_running_loop().time
        end = clock() + BRING_ONLINE_SECONDS
        while left and clock() < end:
            batch, began = left[:size], clock()
            try:
                done = await self._set_online(batch)
            except AgentRefused as error:
                if error.error_class == "CommandNotFound":  # Disabled in the agent, or its file systems are frozen.
                    return refused | dict.fromkeys(left, error.description)
                # An error is about the first entry. One that fails later shortens the list, and comes first next.
                refused[batch[0]] = error.description
                done = 1
            del left[:done]
            # No command has more CPUs than fit the deadline at the guest's speed so far.
            took = clock() - began
            if took > self._seconds / 2:
                size = max(size // 2, 1)
            elif took < self._seconds / 4 and done == size:
                size *= 2
        return refused

    async def _set_online(self, batch: Sequence[int]) -> int:
        """How many of them, from the first on, are online now: at least one."""
        command = "guest-set-vcpus"
        entries = [{"logical-id": logical_id, "online": True} for logical_id in batch]
        async with self._deadline(command):
            read = partial(replies.processed, requested=len(batch))
            return await self._client.execute(command, {"vcpus": entries}, read=read)

    async def close(self) -> None:
        """Close the connection at once. Never raises, may be called again; it is closed also if this is cancelled."""
        await self._client.end(CLOSE_SECONDS)

    @contextlib.asynccontextmanager
    async def _deadline(self, command: str) -> AsyncIterator[None]:
        """The deadline for one command, and foreign errors as ours."""
        try:
            async with asyncio.timeout(self._seconds):
                yield
        except ExecuteError as error:
            raise translate.agent_refusal(command, error) from error
        except (TimeoutError, BlockingIOError) as error:  # or the queue of waiting clients is full
            await self.close()
            if self._client.strange is not None:
                raise AgentUnreachable(
                    f"{self._where} did not answer {translate.named(command)} within {self._seconds:g} s, but sent"
                    " other data: this is not a guest agent"
                ) from self._client.strange
            raise translate.agent_silent(self._where, command, self._seconds) from error
        except Exception as error:
            await self.close()
            translate.strip(error)
            raise translate.agent_failure(self._where, command, error, self._client.cause) from error


class _NotAnAgent(Exception):
    """Something that no agent sends."""


class _AgentClient(Client):
    """The client on an agent's line: no greeting, no negotiation, and a start that has to be found.

    strange  why the first line that came in was not understood; None: it was, or has not arrived
    """

    def __init__(self, permit: Callable[[], None] | None) -> None:
        # An agent sends no events, and a loss shows at the next command.
        super().__init__(lambda _: None, lambda: None, permit, LONGEST)
        self.await_greeting = self.negotiate = False
        self.strange: Exception | None = None
        self._synced = False
        self._begun = False

    async def sync(self) -> None:
        """Skip all that earlier clients have left on the line, in either direction."""
        number = secrets.randbits(53)
        self._write(_DELIMITER)
        answer: object = await self.execute(_SYNC, {"id": number})
        if answer != number:
            raise _NotAnAgent("a different number than the one sent")
        self._synced = True
        self.strange = None

    # Overrides of the library's hooks.

    def _awaits_reply(self) -> bool:
        # An answer to an earlier client may be on the line before our first request.
        return not self._synced or super()._awaits_reply()

    async def _readline(self) -> bytes:
        # Nothing before a 0xFF is for us, and no JSON text contains one.
        return (await self._read_until(b"\n")).rpartition(_DELIMITER)[2]

    async def _do_recv(self) -> Message:
        begun, self._begun = self._begun, True
        try:
            return await super()._do_recv()
        except Exception as error:
            if begun or isinstance(error, EOFError | OSError):
                raise
            # The rest of an answer whose beginning an earlier client has read. Only the first line can be one.
            self.strange = error
            return await super()._do_recv()

    async def _on_message(self, msg: Message) -> None:
        if "QMP" in msg:
            raise _NotAnAgent("the greeting of a QMP monitor")
        if "return" not in msg and "error" not in msg:
            raise _NotAnAgent("a message that is not a reply")
        ident = msg.get("id")
        if not self._synced and not (isinstance(ident, str) and ident in self._pending):
            return  # For an earlier client, or the error that our 0xFF has caused.
        await super()._on_message(msg)
