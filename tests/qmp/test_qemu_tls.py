"""What QEMU itself makes of certificates: docs/monitors.md tells people what is seen here."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from harness.guest import Guest, GuestError
from harness.monitortls import MonitorTLS
from harness.pki import Authority, Credentials
from harness.processes import run

__all__: list[str] = []

GREETING = b'{"QMP"'


async def greeting(address: tuple[str, int], client: Credentials | None, trust: Authority, folder: Path) -> bytes:
    """The first line that a client reads from the monitor; empty: the connection was closed."""
    (trusted := folder / "trusted").write_text(trust.certificate)
    context = ssl.create_default_context(cafile=trusted)
    if client is not None:
        (pair := folder / "client").write_text(client.certificate + client.key)
        context.load_cert_chain(pair)
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*address, ssl=context)
        try:
            return await reader.readline()
        finally:
            writer.transport.abort()


async def test_nobody_is_greeted_but_the_client_that_is_named_with_a_certificate_of_the_ca(tmp_path: Path) -> None:
    ours, theirs = Authority(), Authority()
    client = ours.client("vcpuset")
    tls = MonitorTLS(ours.server().write(tmp_path / "qemu"), allow=client.name)
    async with Guest(None, memory=64, tls=tls) as guest:

        async def greets(other: Credentials | None) -> bool:
            line = await greeting(guest.tcp_address, other, ours, tmp_path)
            assert line == b"" or line.startswith(GREETING), line
            return bool(line)

        assert await greets(client)
        assert await greets(Authority(ours).client("vcpuset")), "signed by a CA that ours signed"
        assert not await greets(None)
        assert not await greets(ours.client("mallory"))
        assert not await greets(ours.client("vcpuset", expired=True))
        assert not await greets(theirs.client("vcpuset"))
        assert await greets(client), "after all of them"


async def test_qemu_reads_its_certificate_when_it_starts_with_those_between_it_and_the_ca(tmp_path: Path) -> None:
    first, second = Authority(), Authority()
    tls = MonitorTLS(first.server().write(tmp_path / "qemu"))
    async with Guest(None, memory=64, tls=tls) as guest:
        Authority(second).server().write(tls.folder)
        assert await greeting(guest.tcp_address, first.client(), first, tmp_path)
        await guest.restart()
        assert await greeting(guest.tcp_address, second.client(), second, tmp_path)
        with pytest.raises(ssl.SSLCertVerificationError):
            await greeting(guest.tcp_address, first.client(), first, tmp_path)


async def test_qemu_does_not_start_with_a_certificate_of_its_own_that_has_expired(tmp_path: Path) -> None:
    tls = MonitorTLS(Authority().server(expired=True).write(tmp_path / "qemu"))
    with pytest.raises(GuestError, match="has expired"):
        async with Guest(None, memory=64, tls=tls):
            pass


async def test_qemu_does_not_start_with_a_certificate_whose_usage_lacks_key_encipherment(tmp_path: Path) -> None:
    authority = Authority()
    folder = authority.server().write(tmp_path / "qemu")
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj /CN=qemu"
    extensions = ("basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature")
    files = ("-keyout", folder / "server-key.pem", "-out", folder / "server-cert.pem")
    await run(["openssl", *command.split(), *(word for each in extensions for word in ("-addext", each)), *files])
    with pytest.raises(GuestError, match="key encipherment"):
        async with Guest(None, memory=64, tls=MonitorTLS(folder)):
            pass
