"""docs/monitors.md, followed to the letter: each kind of monitor ends in a set that is Ready, by the page's own words.

A test sets the variables that the page introduces and runs the blocks of one kind, in the order of the page; the
machine and the operator are started by the page's own command lines.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from harness.cache import REPOSITORY
from harness.controlplane import ControlPlane
from harness.docpage import Block, Page, Reader
from harness.guestimage import INITRAMFS, KERNEL, images
from harness.pki import Credentials
from harness.processes import Child, free_port, run
from harness.qmp import count, raw
from harness.sockets import listening
from harness.wait import until
from harness.world import User

PAGE: Final = Page(REPOSITORY / "docs" / "monitors.md")

NO_GUEST: Final = "-machine q35 -accel tcg -m 64 -nodefaults -no-user-config -display none"
"""A machine without a guest: enough for all but the guest's agent."""

START_SECONDS: Final = 60.0


@pytest.fixture
def reader(tmp_path: Path, control_plane: ControlPlane, socket_root: Path, namespace: str) -> Iterator[Reader]:
    """Somebody who has kubectl, QEMU and vcpuset, and has given the page's variables values of their own."""
    programs = [control_plane.kubectl_path.parent, Path(sys.executable).parent]
    with Reader(
        tmp_path / "place",
        PATH=os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
        PYTHONPATH=os.environ.get("PYTHONPATH", ""),
        KUBECONFIG=str(control_plane.kubeconfig),
        VCPUSET_NAMESPACE=namespace,
        VCPUSET_HTTP_ADDRESS="",
        VCPUSET_RESYNC_SECONDS="2",
        SOCKET_ROOT=str(socket_root),
        OPERATOR_GROUP=str(os.getgid()),
        NAMESPACE=namespace,
        ADDRESS="127.0.0.1",
        PORT=str(free_port()),
        NETWORK="127.0.0.0/8",
        QEMU_TLS=str(tmp_path / "qemu-tls"),
        VM=f"{NO_GUEST} -qmp unix:{tmp_path}/control,server=on,wait=off",
    ) as following:
        yield following


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """The machine's monitor for the tests."""
    return tmp_path / "control"


def test_the_tests_set_each_variable_that_the_page_introduces(reader: Reader) -> None:
    introduced = set(re.findall(r"^(\w+)=", PAGE.block("sh", "variables").text, re.MULTILINE))
    assert {"SOCKET_ROOT", "NAMESPACE", "VM"} < introduced <= set(reader.variables)


@asynccontextmanager
async def followed(
    reader: Reader,
    control: Path,
    kind: str | Sequence[Block],
    operator: str,
    booted: Callable[[], Awaitable[bool] | bool] = lambda: True,
) -> AsyncIterator[Child]:
    """Run the blocks of one kind, or these, with the page's operator beside them; yields the machine.

    The page's last command has then waited until the set was Ready. What follows the start of the machine waits until
    its guest has `booted`.
    """
    running = reader.start(PAGE.block("sh", operator), name=operator)
    try:
        for block in PAGE.blocks(None, kind) if isinstance(kind, str) else kind:
            if block.language == "yaml":
                reader.write(block)
            elif "machine" in block.marks:
                machine = reader.start(block, name="the machine")
                await _up(machine, control)
                await until(booted, START_SECONDS, "the guest to boot")
            else:
                await reader.run(block)
        running.require_running()
        yield machine
    except Exception as error:
        error.add_note(f"the operator said:\n{running.log_tail()}")
        raise
    assert await running.stop(timeout=30) == 0


async def _up(machine: Child, control: Path) -> None:
    def there() -> bool:
        machine.require_running()
        return str(control) in listening()

    await until(there, START_SECONDS, "QEMU to listen")


@pytest.mark.parametrize("kind", ["unix", "second"])
async def test_a_unix_monitor_of_the_page_leads_to_a_set_that_is_ready_and_has_the_page_s_rights(
    reader: Reader, control: Path, socket_root: Path, user: User, kind: str
) -> None:
    async with followed(reader, control, kind, "agent"):
        name = PAGE.block("yaml", kind).document()["metadata"]["name"]
        assert (await user.get(name)).vcpus == await count(control) == 4
        folder = socket_root / user.namespace / name
        assert stat.S_IMODE(folder.stat().st_mode) == 0o2770
        assert stat.S_IMODE((folder / "qmp.sock").stat().st_mode) == 0o770


async def test_the_page_s_rights_let_the_agent_s_group_in_and_nobody_else(
    reader: Reader, control: Path, socket_root: Path, user: User
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be somebody else")
    reader.variables["OPERATOR_GROUP"] = "65532"
    async with followed(reader, control, "unix", "agent") as machine:
        socket = socket_root / user.namespace / "web" / "qmp.sock"
        connect = f"import socket; socket.socket(socket.AF_UNIX).connect({str(socket)!r})"
        for group, status in (("65532", 0), ("65533", 1)):
            who = ["setpriv", f"--reuid={group}", f"--regid={group}", "--clear-groups"]
            done = await run([*who, "/usr/bin/python3", "-c", connect], check=False)
            assert done.returncode == status, done.stderr
            assert status == 0 or "PermissionError" in done.stderr
        machine.require_running()


async def test_the_owner_s_monitor_stays_the_owner_s_while_the_operator_keeps_the_second_one(
    reader: Reader, control: Path, user: User
) -> None:
    async with followed(reader, control, "second", "agent"), raw(reader.folder / "owner.sock") as owner:
        await owner.device_add(9)
        # A machine whose guest has not booted gives nothing back.
        seen = await user.wait_reason("db", "WaitingForGuest")
        assert seen.vcpus == 5


async def test_the_open_tcp_monitor_of_the_page_leads_to_a_set_that_is_ready(
    reader: Reader, control: Path, user: User
) -> None:
    async with followed(reader, control, "plain", "controller"):
        assert (await user.get("build")).vcpus == await count(control) == 4


async def test_the_guest_of_the_page_uses_the_declared_count(
    reader: Reader, control: Path, socket_root: Path, user: User
) -> None:
    built = images()

    async def booted() -> bool:
        incoming, outgoing = await asyncio.open_unix_connection(socket_root / user.namespace / "shop" / "agent.sock")
        try:
            outgoing.write(b'{"execute": "guest-ping"}\n')
            async with asyncio.timeout(1):
                return b"return" in await incoming.readline()
        except TimeoutError:
            return False
        finally:
            outgoing.close()
            await outgoing.wait_closed()

    reader.variables["VM"] = (
        f"-machine q35 -accel tcg -cpu qemu64 -m 192 -nodefaults -no-user-config -display none"
        f" -kernel {built / KERNEL} -initrd {built / INITRAMFS} -serial file:{reader.folder}/console -append ga=1"
        f" -qmp unix:{control},server=on,wait=off"
    )
    # A guest that boots for a minute on a busy host has an agent that is queried again a minute later.
    async with followed(reader, control, "agent-channel", "agent", booted):
        seen = await user.get("shop")
        assert seen.status["onlineVCPUs"] == seen.vcpus == await count(control) == 4


async def test_the_tls_monitor_of_the_page_leads_to_a_set_that_is_ready_with_the_controller_s_own_rights(
    reader: Reader, control: Path, user: User, account: Path
) -> None:
    reader.variables["VCPUSET_KUBECONFIG"] = str(account)
    async with followed(reader, control, "tls", "controller"):
        assert (await user.get("web")).vcpus == await count(control) == 4
        printed = await reader.run(PAGE.block("sh", "tls-identity"))
        (identity,) = re.findall(r"authz-simple,id=\S+,identity=(.*?) \\\n", PAGE.block("sh", "tls", "machine").text)
        assert printed.stdout.strip() == identity


async def test_the_certificates_of_the_page_for_cert_manager_do_as_well(
    reader: Reader, control: Path, user: User, account: Path
) -> None:
    """cert-manager itself does not run here: the certificates are made as its documentation says that it makes them."""
    reader.variables["VCPUSET_KUBECONFIG"] = str(account)
    issuer, *certificates = PAGE.block("yaml", "cert-manager").documents()
    assert all(each["spec"]["issuerRef"] == {"name": issuer["metadata"]["name"]} for each in certificates)
    certificates[1]["spec"]["ipAddresses"] = ["127.0.0.1"]
    authority = CertManager()
    operators, qemus = (authority.issue(each["spec"]) for each in certificates)
    # In place of the page's own way to make certificates, and of kubectl's to make the Secret.
    qemus.write(Path(reader.variables["QEMU_TLS"]))
    name = certificates[0]["spec"]["secretName"]
    secret = json.dumps(operators.secret(name))
    await user.control_plane.kubectl("apply", "-n", user.namespace, "-f", "-", input=secret)
    others = [block for block in PAGE.blocks("sh", "tls") if not re.search("openssl|install|create secret", block.text)]
    assert len(others) == 3
    async with followed(reader, control, others, "controller"):
        assert (await user.get("web")).vcpus == await count(control) == 4


class CertManager:
    """Makes of a Certificate what cert-manager does with a CA issuer: subject, names and usages are as specified."""

    USAGES: Final = {"digital signature": "digital_signature", "key encipherment": "key_encipherment"}
    EXTENDED: Final = {"client auth": ExtendedKeyUsageOID.CLIENT_AUTH, "server auth": ExtendedKeyUsageOID.SERVER_AUTH}

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "VCPUSet monitors")])
        certificate = (
            self._begun(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(self._key_usage("key_cert_sign"), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self._pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, spec: Mapping[str, Any]) -> Credentials:
        """What its Secret then holds."""
        assert set(spec) <= {
            "secretName", "issuerRef", "commonName", "duration", "privateKey", "usages", "dnsNames", "ipAddresses"
        }  # fmt: skip
        assert (spec["privateKey"]["algorithm"], spec["privateKey"]["size"]) == ("ECDSA", 256)
        assert re.fullmatch(r"\d+h", spec["duration"])
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._begun(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spec["commonName"])]), key)
        names: list[x509.GeneralName] = [x509.DNSName(each) for each in spec.get("dnsNames", ())]
        names += [x509.IPAddress(ip_address(each)) for each in spec.get("ipAddresses", ())]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        plain = [self.USAGES[each] for each in spec["usages"] if each in self.USAGES]
        extended = [self.EXTENDED[each] for each in spec["usages"] if each not in self.USAGES]
        certificate = (
            builder.add_extension(self._key_usage(*plain), critical=True)
            .add_extension(x509.ExtendedKeyUsage(extended), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        encoding = serialization.Encoding.PEM
        private = key.private_bytes(
            encoding, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        return Credentials(self._pem, certificate.public_bytes(encoding).decode(), private.decode())

    def _begun(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
        )

    def _key_usage(self, *usages: str) -> x509.KeyUsage:
        kinds = (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        )  # fmt: skip
        return x509.KeyUsage(**{each: each in usages for each in kinds})
