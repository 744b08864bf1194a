"""Debian's libvirt with machines of its own, for a test: the daemon as root, as on a host, without systemd.

    async with Libvirt() as libvirt:
        machine = await libvirt.machine("web", XML)  # as `virsh define`; its guest is that of harness.guestimage
        await machine.start()
        await machine.wait_online(2)
        await libvirt.virsh("setvcpus", "web", "4", "--live")

The daemon's folders are fixed. So it runs in a mount namespace with a /run, a /var and an /etc/libvirt of its own, and
with Debian's account `libvirt-qemu`, which QEMU runs as. Its machines outlive it, which is tested; they are in a
process namespace, and the kernel ends all of it with the test. Only QEMU's program for x86 is found: libvirt asks each
that it finds for all that it can do, which takes seconds.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from harness.guest import KERNEL_OPTIONS, reported_online
from harness.guestimage import INITRAMFS, KERNEL, images
from harness.processes import Child, Completed, run
from harness.runnable import Runnable
from harness.wait import until

__all__ = ["QEMU_USER", "Libvirt", "Machine"]

QEMU_USER: Final = 64055
"""Debian's `libvirt-qemu`."""

QEMU_GROUP: Final = 64055

BOOT_SECONDS: Final = 180.0
COMMAND_SECONDS: Final = 120.0

ElementTree.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")

_ACCOUNTS: Final = {
    "passwd": f"libvirt-qemu:x:{QEMU_USER}:{QEMU_GROUP}::/var/lib/libvirt:/usr/sbin/nologin\n",
    "group": f"libvirt-qemu:x:{QEMU_GROUP}:\n",
}

_CONFIGURATION: Final = {
    "libvirtd.conf": 'auth_unix_ro = "none"\nauth_unix_rw = "none"\n'
    'host_uuid = "6b1c9c0e-5d5f-4d8e-9d53-000000000001"\nlog_outputs = "2:file:/var/log/libvirt/libvirtd.log"\n',
    # No virtlogd; none of the host's cgroups, which are of another process namespace; and QEMU gets no /dev of its own,
    # since libvirt cannot make one of this one.
    "qemu.conf": 'stdio_handler = "file"\ncgroup_controllers = []\nnamespaces = []\n',
}

_NAMESPACE: Final = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var
ln -s /run /var/run
mkdir -p /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /var/tmp
mount --bind {0}/etc /etc/libvirt
mount --bind {0}/log /var/log/libvirt
mount --bind {0}/passwd /etc/passwd
mount --bind {0}/group /etc/group
# libvirt asks QEMU again at each use if QEMU's user may not use the KVM that root may.
if [ -e /dev/kvm ]; then touch {0}/kvm; chmod 0 {0}/kvm; mount --bind {0}/kvm /dev/kvm; fi
touch {0}/ready
# The parent of all that has lost its own: it collects them.
while :; do sleep 3600 & wait; done
"""


class Libvirt(Runnable):
    """One daemon. Needs root."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vcpuset-libvirt-"))
        """Readable for QEMU; what machines need is here."""
        self.directory.chmod(0o755)
        self._log = self.directory / "output"
        self._namespace: Child | None = None
        self._enter: list[str] = []

    async def start(self) -> None:
        """Make the namespaces, start the daemon in them, and wait until it answers."""
        for folder in ("etc", "log", "bin"):
            (self.directory / folder).mkdir()
        for name, text in _CONFIGURATION.items():
            (self.directory / "etc" / name).write_text(text)
        for name, text in _ACCOUNTS.items():
            (self.directory / name).write_text(_read("/etc", name) + text)
        for name in (KERNEL, INITRAMFS):  # libvirt changes the owner of both
            shutil.copyfile(images() / name, self.directory / name)
        qemu = shutil.which("qemu-system-x86_64")
        assert qemu is not None, "`make setup` installs it"
        (self.directory / "bin" / "qemu-system-x86_64").symlink_to(qemu)
        script = _NAMESPACE.format(self.directory)
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        self._namespace = Child.start(words, name="the namespaces of libvirt", log=self._log)
        await self._namespace.until(self._is_made, 60)
        pid = str(self._namespace.pid)
        first = _read("/proc", pid, "task", pid, "children").split()[0]
        self._enter = ["nsenter", f"--target={first}", "--mount", "--pid", "--"]
        await self.start_daemon()

    async def _is_made(self) -> bool:
        return (self.directory / "ready").exists()

    async def start_daemon(self) -> None:
        """Start the daemon alone, and wait until it answers."""
        daemon = ["libvirtd", "--daemon", "--config=/etc/libvirt/libvirtd.conf", "--pid-file=/run/libvirtd.pid"]
        await self.inside("env", f"PATH={self.directory}/bin:/usr/sbin:/sbin", *daemon)

        async def answers() -> bool:
            return (await self.virsh("list", check=False)).returncode == 0

        await until(answers, 60, self.log)

    async def restart_daemon(self) -> None:
        """As `systemctl restart libvirtd`; its machines keep running."""
        await self.inside("sh", "-c", "kill $(cat /run/libvirtd.pid)")

        async def over() -> bool:
            return (await self.inside("test", "-e", "/run/libvirtd.pid", check=False)).returncode != 0

        await until(over, 60, "the end of libvirtd")
        await self.start_daemon()

    async def inside(self, *words: str | Path, check: bool = True, timeout: float = COMMAND_SECONDS) -> Completed:
        """Run a command on the daemon's side."""
        return await run([*self._enter, *words], check=check, timeout=timeout)

    async def virsh(self, *words: str | Path, check: bool = True) -> Completed:
        """Run `virsh`. CommandFailed: it reported an error."""
        return await self.inside("virsh", "--connect=qemu:///system", *words, check=check)

    def start_inside(self, *words: str | Path, name: str) -> Child:
        """Start a program on the daemon's side that ends with it."""
        # Debian's scripts need Debian's Python.
        clean = ["env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "setpriv", "--pdeathsig", "KILL"]
        return Child.start([*self._enter, *clean, *words], name=name, log=self._log)

    def log(self) -> str:
        """The end of what the daemon and QEMU have reported, for messages."""
        files = [self._log, *sorted((self.directory / "log").rglob("*.log"))]
        return "\n".join(f"{each.name}: {each.read_text(errors='replace')[-2000:]}" for each in files if each.exists())

    async def machine(self, name: str, xml: str) -> Machine:
        """Define a machine with the tests' guest, under TCG; the rest is as in `xml`."""
        console = self.directory / f"{name}.console"
        domain = ElementTree.fromstring(xml)  # noqa: S314 - the tests' own
        domain.set("type", "qemu")
        _only(domain, "name").text = name
        memory, system, cpu = _only(domain, "memory"), _only(domain, "os"), _only(domain, "cpu")
        memory.text, memory.attrib = "192", {"unit": "MiB"}
        cpu.attrib = {"mode": "custom", "match": "exact"}
        _only(cpu, "model").text = "qemu64"
        for tag, text in (
            ("kernel", str(self.directory / KERNEL)),
            ("initrd", str(self.directory / INITRAMFS)),
            ("cmdline", KERNEL_OPTIONS),
        ):
            _only(system, tag).text = text
        devices = _only(domain, "devices")
        for disk in devices.findall("disk"):
            devices.remove(disk)
        serial = ElementTree.SubElement(devices, "serial", type="file")
        ElementTree.SubElement(serial, "source", path=str(console))
        file = self.directory / f"{name}.xml"
        file.write_bytes(ElementTree.tostring(domain))
        await self.virsh("define", file)
        return Machine(self, name, console)

    async def stop(self) -> None:
        """End the daemon, its machines and all else inside, and remove what they left. Safe to call again."""
        if self._namespace is not None:
            self._namespace.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


class Machine:
    """A machine that libvirt starts."""

    def __init__(self, libvirt: Libvirt, name: str, console: Path) -> None:
        self.libvirt = libvirt
        self.name = name
        self._console = console

    async def start(self) -> None:
        """Start it, and wait until its guest has booted."""
        self._console.unlink(missing_ok=True)
        await self.virsh("start")
        await self.wait_online()

    async def virsh(self, command: str, *words: str | Path, check: bool = True) -> Completed:
        """A command of `virsh` about this machine."""
        return await self.libvirt.virsh(command, self.name, *words, check=check)

    async def refused(self, command: str, *words: str | Path) -> str:
        """The error with which `virsh` ends."""
        answer = await self.virsh(command, *words, check=False)
        assert answer.returncode != 0, f"virsh {command} was not refused: {answer.stdout}"
        return answer.stderr

    async def count(self, *, live: bool = True) -> int:
        """What `virsh vcpucount` says, of the running machine or of its configuration."""
        answer = await self.virsh("vcpucount", "--active", "--live" if live else "--config")
        return int(answer.stdout)

    async def xml(self, *options: str) -> ElementTree.Element:
        """What `virsh dumpxml` says."""
        return ElementTree.fromstring((await self.virsh("dumpxml", *options)).stdout)  # noqa: S314 - libvirt's

    def online(self) -> frozenset[int]:
        """The CPUs that the guest last reported to be online."""
        return reported_online(self._console.read_text(errors="replace") if self._console.exists() else "")

    async def qmp(self, command: str) -> Any:  # noqa: ANN401 - each command answers in a form of its own
        """The result of a QMP command, which libvirt sends."""
        answer = await self.virsh("qemu-monitor-command", json.dumps({"execute": command}))
        return json.loads(answer.stdout)["return"]

    async def wait_booted(self, times: int) -> None:
        """Wait until the guest has booted so often since the start."""

        def reached() -> bool:
            return self._console.read_text(errors="replace").count("guest: ready") >= times

        await until(reached, BOOT_SECONDS, lambda: f"{times} boots of {self.name}: {self.libvirt.log()}")

    async def wait_online(self, cpus: int | None = None) -> None:
        """Wait until so many CPUs are online in the guest; None: until it has booted."""

        def reached() -> bool:
            return bool(self.online()) if cpus is None else len(self.online()) == cpus

        await until(reached, BOOT_SECONDS, lambda: f"{cpus} CPUs in the guest of {self.name}: {self.libvirt.log()}")


def _read(*path: str) -> str:
    return Path(*path).read_text()


def _only(parent: ElementTree.Element, tag: str) -> ElementTree.Element:
    """The child with this tag, made if it is not there."""
    found = parent.find(tag)
    return ElementTree.SubElement(parent, tag) if found is None else found
