"""Foreign errors as ours: the only place that reads QEMU's error texts or knows what `qemu.qmp` raises.

QEMU guarantees the class of an error but not its text, and nearly every class is GenericError. So the texts below are
hints, from QEMU's source and verified by running it where stated. A text without a match becomes `CommandRefused`,
which is tried again, slowly: a wrong guess must not give up on a machine.
"""

from __future__ import annotations

import os
import re

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPError, StateError
from qemu.qmp.qmp_client import NegotiationError

from vcpuset.domain.errors import (
    AgentError,
    AgentRefused,
    AgentTimeout,
    AgentUnreachable,
    CommandError,
    CommandRefused,
    DeviceGone,
    GuestNotReady,
    Migrating,
    MonitorBusy,
    MonitorError,
    MonitorTimeout,
    MonitorUnreachable,
    PermanentError,
    Preconfig,
    SlotTaken,
)

__all__ = [
    "agent_failure",
    "agent_refusal",
    "agent_silent",
    "busy",
    "cause",
    "connect_failure",
    "loss",
    "named",
    "refusal",
    "says_no_hotplug",
    "strip",
    "unanswered",
]

_BY_TEXT: tuple[tuple[re.Pattern[str], type[CommandError]], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        # device_del on pc and q35 before the guest's ACPI took over; permanently with acpi=off. hw/acpi/{ich9,piix4}.c
        # up to 10.2 (run: 7.2, 10.0); 11.1 accepts and latches instead.
        ("device unplug request for not supported device type", GuestNotReady),
        # device_add, device_del. system/qdev-monitor.c (run: 7.2 to 11.1).
        ("not allowed while migrating", Migrating),
        # Any command that needs the machine. qapi/qmp-dispatch.c (run: 10.0).
        ("permitted only after machine initialization has completed", Preconfig),
        # device_add; also while the unplug of that id is pending. system/qdev-monitor.c (run: 7.2 to 11.1); without
        # the word "device" in older releases.
        (r"^Duplicate (device )?ID '", SlotTaken),
        # device_add. "CPU[3] with APIC ID 3 exists", hw/i386/x86-common.c (run: 7.2 to 11.1);
        # "cpu(id2=0:0:2) with arch-id 2 exists", hw/loongarch/virt.c (10.0).
        (r"with (APIC ID|arch-id) \S+ exists", SlotTaken),
        # device_add. "core 8 already populated", hw/ppc/spapr.c.
        (r"^core \d+ already populated", SlotTaken),
        # device_add. "Unable to add CPU with core-id: 2, it already exists", target/s390x/cpu-system.c.
        ("it already exists", SlotTaken),
        # device_del of slot 0. hw/i386/x86-common.c (run: 7.2 to 11.1).
        ("Boot CPU is unpluggable", PermanentError),
        # device_del of core 0. hw/ppc/spapr.c.
        ("Boot CPU core may not be unplugged", PermanentError),
        # device_del. "hot-unplug of boot cpu(id0=0:0:0) not supported", hw/loongarch/virt.c (run: 11.1).
        (r"hot-unplug of boot cpu", PermanentError),
        # device_del. "CPU hot unplug not supported on this machine", hw/s390x/s390-virtio-ccw.c (run: 11.1), spapr with
        # old machine types; "CPU hot unplug not supported without ACPI", hw/i386/pc.c (isapc).
        ("hot unplug not supported", PermanentError),
        # "unplug not supported by microvm", hw/i386/microvm.c (run: 10.0).
        ("unplug not supported by", PermanentError),
        # OVMF with SMM whose firmware negotiated broadcast SMIs but no CPU hotplug. hw/isa/lpc_ich9.c, hw/acpi/ich9.c.
        (r"SMI was(n't| not) enabled by firmware", PermanentError),
        # "Bus 'main-system-bus' does not support hotplugging", "Device 'x' does not support hotplugging".
        # hw/core/qdev.c, system/qdev-monitor.c (run: 7.2, 11.1).
        ("does not support hotplugging", PermanentError),
        # "Parameter 'driver' expects a pluggable device type". system/qdev-monitor.c (run: arm and riscv, 11.1).
        ("expects a pluggable device type", PermanentError),
        # "Device 'max-arm-cpu' can not be hotplugged on this machine". hw/core/qdev.c (run: 11.1).
        ("can not be hotplugged", PermanentError),
        # "current -smp configuration requires kernel irqchip and X2APIC API support." hw/i386/x86.c, KVM.
        ("requires kernel irqchip and X2APIC", PermanentError),
        # Wrong driver or properties: the list of slots does not match what QEMU accepts. hw/i386/x86-common.c,
        # qom/object.c, system/qdev-monitor.c (run: 7.2 to 11.1), hw/ppc/spapr.c.
        ("Invalid CPU type", PermanentError),
        ("CPU core type should be", PermanentError),
        (r"^Property '.*' not found", PermanentError),
        ("is not a valid device model name", PermanentError),
        (r"^Invalid parameter type for '", PermanentError),
        (r"^Invalid CPU [a-z]+-id: \S+ must be in range", PermanentError),
        (r"^invalid (core|node)[- ]id", PermanentError),
        (r"^core id \S+ out of range", PermanentError),
        (r"^CPU [a-z]+-id is not set", PermanentError),
    )
)

# hw/core/machine-qmp-cmds.c: "machine does not support hot-plugging CPUs" (run: microvm, 10.0); before 8.0 "The feature
# 'query-hotpluggable-cpus' is not enabled".
_NO_HOTPLUG = re.compile(r"does not support hot-?plugging|feature 'query-hotpluggable-cpus' is not enabled")

_AGENT_QUERIES = frozenset({"guest-sync-delimited", "guest-get-vcpus", "guest-get-cpustats"})

_LONGEST = 200
"""Characters of a foreign message that are shown; `qemu.qmp` includes whole replies."""


def refusal(command: str, error: ExecuteError) -> CommandError:
    """QEMU's error reply to `command`."""
    words = _brief(error)
    return _kind(command, error.error_class, words)(command, error.error_class, words)


def _kind(command: str, error_class: str, words: str) -> type[CommandError]:
    if error_class == "DeviceNotFound" and command == "device_del":
        return DeviceGone
    if error_class == "CommandNotFound":
        return PermanentError
    return next((kind for pattern, kind in _BY_TEXT if pattern.search(words)), CommandRefused)


def says_no_hotplug(error: ExecuteError) -> bool:
    """Whether this error of `query-hotpluggable-cpus` means that the machine type has no CPU hotplug."""
    return error.error_class == "CommandNotFound" or _NO_HOTPLUG.search(_brief(error)) is not None


def busy(where: str, what: str = "does not greet") -> MonitorBusy:
    """Connected or queued, but what should come next, the greeting or a handshake before it, does not come."""
    return MonitorBusy(
        f"{where} {what}: another client holds this monitor, QEMU hangs, or this is not a QMP monitor (but a guest "
        "agent's channel or a serial port); give the operator a dedicated monitor"
    )


def unanswered(where: str, command: str, seconds: float) -> MonitorTimeout:
    """A session is established, and QEMU has not replied to `command` in time."""
    late = "" if command.startswith("query-") else "; it may still execute it"
    return MonitorTimeout(
        f"{where} has not answered {named(command)} within {seconds:g} s{late}: check whether the QEMU process is "
        "stopped, waits for storage or has too little CPU time"
    )


def named(command: str) -> str:
    """A command in a message. All queries have one name: which one fails first is a matter of timing."""
    return "a query" if command.startswith("query-") or command in _AGENT_QUERIES else command


def cause(error: BaseException) -> BaseException:
    """The original error of one of `qemu.qmp`'s `connect`."""
    return error.exc if isinstance(error, ConnectError) else error


def strip(error: BaseException) -> None:
    """Remove the tracebacks of an error: their frames hold replies, which can be long, and errors are kept."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__


def connect_failure(where: str, error: BaseException) -> MonitorError:
    """Why a session could not be opened; `error` is what the operating system or `qemu.qmp` raised."""
    found = cause(error)
    match found:
        case BlockingIOError():  # the listener's queue is full: other clients already wait for the monitor
            return busy(where)
        case ConnectionResetError() | BrokenPipeError() | EOFError():
            return MonitorUnreachable(
                f"{where} closed the connection before the session was established: check whether QEMU is shutting down"
            )
        case ConnectionRefusedError() | FileNotFoundError():
            return MonitorUnreachable(f"nothing listens at {where}: check that QEMU is running")
        case PermissionError():
            return MonitorUnreachable(
                f"{where} may not be connected to: give the operator's user (uid {os.geteuid()}) write access to it"
            )
        case OSError():
            return MonitorUnreachable(f"{where} cannot be reached: {_brief(found)}")
        case NegotiationError():
            return MonitorUnreachable(f"{where} sent a QMP greeting, but did not accept qmp_capabilities")
        case _:
            return MonitorUnreachable(f"{where} does not speak QMP: {_brief(found)}")


def loss(where: str, command: str, error: BaseException, cause: BaseException | None) -> MonitorUnreachable:
    """A command without a connection, whose connection was lost, or with an unusable reply.

    error  what `execute` raised
    cause  what broke the connection, if known
    """
    if cause is None and isinstance(error, QMPError) and not isinstance(error, StateError):
        return MonitorUnreachable(f"{where} did not answer {command}: {_brief(error)}")
    # Whether this is found when the command is sent or later, and as an end or a reset, is a race.
    if isinstance(cause or error, EOFError | ConnectionError | StateError):
        command, why = named(command), "it was closed by the other end"
    else:
        why = _brief(cause or error)
    return MonitorUnreachable(f"the connection to {where} broke before {command} was answered: {why}")


def agent_refusal(command: str, error: ExecuteError) -> AgentRefused:
    """The error reply of a guest's agent to `command`."""
    return AgentRefused(command, error.error_class, _brief(error))


def agent_silent(where: str, command: str, seconds: float) -> AgentTimeout:
    """Connected or queued, and `command` was not answered."""
    return AgentTimeout(
        f"{where} has not answered {named(command)} within {seconds:g} s: qemu-guest-agent is not running in the "
        "guest, hangs, or another client holds its socket; start the agent in the guest, and use its socket only for "
        "the operator"
    )


def agent_failure(where: str, command: str, error: BaseException, cause: BaseException | None) -> AgentError:
    """Why `command`, or its connection, failed with a guest's agent, or why its reply is unusable.

    error  what the operating system, `qemu.qmp` or the decoding of the reply raised
    cause  what broke the connection, if known
    """
    match cause or (error.exc if isinstance(error, ConnectError) else error):
        case ConnectionResetError() | BrokenPipeError() | EOFError() | StateError() | ExecInterruptedError():
            return AgentUnreachable(f"the connection to {where} was closed before {named(command)} was answered")
        case ConnectionRefusedError() | FileNotFoundError():
            return AgentUnreachable(f"nothing listens at {where}: check that QEMU is running")
        case PermissionError():
            return AgentUnreachable(
                f"{where} may not be connected to: give the operator's user (uid {os.geteuid()}) write access to it"
            )
        case OSError() as failure:
            return AgentUnreachable(f"{where} cannot be reached: {_brief(failure)}")
        case MonitorUnreachable() as failure:  # the file system that the socket is on hangs
            return AgentUnreachable(str(failure))
        case failure:
            return AgentUnreachable(f"{where} answered {command} with {_brief(failure)}: this is not a guest agent")


def _brief(error: BaseException) -> str:
    """The text of an error in one printable line."""
    words = " ".join(str(error).split()) or type(error).__name__
    words = "".join(letter if letter.isprintable() else "?" for letter in words[: _LONGEST + 1])
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
