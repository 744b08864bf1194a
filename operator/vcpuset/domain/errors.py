"""What can go wrong between a VCPUSet and its machine, by what to do about it.

    VCPUSetError
     +-- InvalidMonitor           the set names a monitor that cannot be used: its author has to act
     |    +-- UnsupportedSpec     its spec has a value that this version does not support
     +-- CredentialsUnavailable   the credentials of a monitor on TLS are missing or not accepted
     +-- MonitorError             talking to QEMU failed; the last command may or may not have run: observe again
     |    +-- MonitorUnreachable  nothing listens, or what listens is no QMP monitor
     |    +-- MonitorBusy         connected, but no greeting: another client holds the monitor, or QEMU hangs
     |    +-- MonitorTimeout      a command was sent and no reply came in time
     +-- MachineUnsettled         CPUs came or went while they were counted: observe again in a moment
     +-- CommandError             QEMU answered with an error: the command did not run
     |    +-- TransientError      the same command can succeed later without a change
     |    |    +-- GuestNotReady  the guest's ACPI does not accept unplug requests (yet)
     |    |    +-- Migrating      a migration runs
     |    |    +-- Preconfig      QEMU has not made the machine yet (-preconfig)
     |    |    +-- SlotTaken      the slot or the device id came into use since it was observed
     |    +-- DeviceGone          the device is not there (any more): for an unplug, success
     |    +-- PermanentError      it can never succeed on this machine as it is
     |    +-- CommandRefused      an error of QEMU that is unknown to us: tried again, slowly, and shown to the user
     +-- AgentError               the guest's agent could not be queried: only what the guest says is missing
     |    +-- AgentUnreachable    nothing listens, the connection broke, or what listens is no guest agent
     |    +-- AgentTimeout        no answer: no agent runs in the guest, it hangs, or another client has it
     |    +-- AgentRefused        the agent answered with an error
     +-- InvalidObject            an object that is no VCPUSet, or has no usable metadata (raised in kube/codec.py)
     +-- APIError                 the Kubernetes API server refused a request, failed, or could not be reached
          +-- Unavailable         it does not run, or is starting: it may answer soon
          +-- Conflict            the object has changed since it was read: read it again
          +-- ObjectGone          the object does not exist (any more)
          +-- Rejected            the same request would be refused again
          |    +-- Forbidden      this process may not do that
          +-- NotLeading          another replica may be the leader by now: this process must change nothing

Every message names the thing and the cause; the original exception is chained.
"""

from typing import ClassVar

__all__ = [
    "APIError",
    "AgentError",
    "AgentRefused",
    "AgentTimeout",
    "AgentUnreachable",
    "CommandError",
    "CommandRefused",
    "Conflict",
    "CredentialsUnavailable",
    "DeviceGone",
    "Forbidden",
    "GuestNotReady",
    "InvalidMonitor",
    "MachineUnsettled",
    "Migrating",
    "MonitorBusy",
    "MonitorError",
    "MonitorTimeout",
    "MonitorUnreachable",
    "NoAnswer",
    "NotLeading",
    "ObjectGone",
    "PermanentError",
    "Preconfig",
    "Rejected",
    "SlotTaken",
    "TransientError",
    "Unavailable",
    "UnsupportedSpec",
    "VCPUSetError",
]


class VCPUSetError(Exception):
    """Base of every error that this program raises on purpose."""


class InvalidMonitor(VCPUSetError):
    """`spec.monitor` names something that this operator must not or cannot open."""


class UnsupportedSpec(InvalidMonitor):
    """`spec` has a value that this version does not support, so no monitor may be opened for it."""


class CredentialsUnavailable(VCPUSetError):
    """The Secret of a monitor on TLS, its certificates or QEMU's are missing, wrong or not accepted."""


class MonitorError(VCPUSetError):
    """Talking to QEMU failed. Whether the last command ran is not known."""


class MonitorUnreachable(MonitorError):
    """Nothing listens at the monitor's address, the connection broke, or its other end does not speak QMP."""


class MonitorBusy(MonitorError):
    """Connected, or in the queue of the socket, but QEMU sends no greeting.

    A monitor serves one client at a time. From outside, another client and a QEMU that hangs cannot be distinguished.
    """


class MonitorTimeout(MonitorError):
    """QEMU did not answer a command within its deadline. The command may still run later."""


class MachineUnsettled(VCPUSetError):
    """CPUs came or went between the two queries of an observation."""


class CommandError(VCPUSetError):
    """QEMU answered a command with an error.

    command      the QMP command
    error_class  QEMU's class, the only stable part ("GenericError", "DeviceNotFound", …)
    description  QEMU's own words
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class TransientError(CommandError):
    """The same command can succeed later without a change of the machine's configuration."""


class GuestNotReady(TransientError):
    """The guest's firmware or kernel has not taken over CPU hotplug: still booting, or booted with acpi=off."""


class Migrating(TransientError):
    """QEMU refuses changes while a migration runs."""


class Preconfig(TransientError):
    """QEMU was started with -preconfig and has not made the machine yet."""


class SlotTaken(TransientError):
    """The slot is occupied, or the device id is in use (also by a device whose unplug is pending)."""


class DeviceGone(CommandError):
    """The device does not exist (QEMU's class DeviceNotFound)."""


class PermanentError(CommandError):
    """The command can never succeed on this machine as it was started."""


class CommandRefused(CommandError):
    """QEMU refused with an error that this program does not know."""


class AgentError(VCPUSetError):
    """The guest's agent could not be queried. Neither plug nor unplug needs it."""


class AgentUnreachable(AgentError):
    """Nothing listens at the agent's socket, the connection broke, or its other end is no guest agent."""


class AgentTimeout(AgentError):
    """Connected, but no answer within the deadline.

    QEMU accepts the connection whether or not an agent runs in the guest, and serves one client at a time.
    """


class AgentRefused(AgentError):
    """The agent answered a command with an error.

    command      the agent's command
    error_class  its class ("GenericError", "CommandNotFound", …)
    description  its own words
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class APIError(VCPUSetError):
    """The Kubernetes API server refused a request, failed, or could not be reached in time.

    retry_after    seconds of the response's Retry-After; 0: none
    longest_pause  in seconds: the longest back-off, unless Retry-After is longer
    """

    longest_pause: ClassVar[float] = 30.0

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(APIError):
    """Nothing listens at its address, the connection was closed, or it is starting."""

    longest_pause: ClassVar[float] = 10.0


class NoAnswer(APIError):
    """It has not answered in time."""


class Conflict(APIError):
    """HTTP 409: the object has changed since it was read."""


class ObjectGone(APIError):
    """HTTP 404: the object does not exist (any more)."""


class Rejected(APIError):
    """HTTP 400, 403, 413 or 422: not allowed or not valid, so the same request would be refused again."""


class Forbidden(Rejected):
    """HTTP 403: this process may not do that."""


class NotLeading(APIError):
    """The API server has not confirmed for too long that this process is the leader.

    Another replica may be the leader by now, so this one must change nothing, neither a machine nor a status.
    """
