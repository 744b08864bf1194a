"""Monitors on TLS: a real QEMU with tls-creds-x509, each way to fail with it, and what is said of that."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import errno
import os
import random
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from harness.effort import SEED
from harness.guest import Guest
from harness.monitortls import MonitorTLS
from harness.pki import Authority, certificate_for_rsa
from harness.pki import Credentials as Made
from harness.wait import until
from qmp.fuzzing import EXAMPLES
from vcpuset.domain.credentials import Credentials
from vcpuset.domain.errors import CredentialsUnavailable, InvalidMonitor, MonitorBusy, MonitorUnreachable
from vcpuset.domain.networks import Networks, network
from vcpuset.domain.resource import TLS, UID, Monitor, Spec, TCPMonitor, UnixMonitor, VCPUSet
from vcpuset.qmp.monitors import Monitors
from vcpuset.qmp.session import Session
from vcpuset.qmp.tcp import TCPEndpoint
from vcpuset.qmp.tls import Access, Keys, keys_of

SOURCE = "Secret team-a/monitor"
GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}\r\n'
)


def given(made: Made) -> Credentials:
    """As the operator reads them from a Secret."""
    return Credentials.of(SOURCE, made.data())


class Store:
    """Holds the Secret: first one value, and when that failed perhaps another one."""

    def __init__(self, *made: Made) -> None:
        self.values = [given(each) for each in made]
        self.doubts = 0

    async def fetch(self, doubted: Credentials | None) -> Credentials:
        """As `Access.fetch`."""
        if doubted is not None:
            self.doubts += 1
            if len(self.values) > 1:
                self.values.pop(0)
        return self.values[0]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
async def guest(authority: Authority, tmp_path: Path) -> AsyncIterator[Guest]:
    """A machine that lets the client `vcpuset` of the authority in."""
    async with machine(tmp_path, authority.server(), authority.client().name) as running:
        yield running


def machine(folder: Path, server: Made, allow: str | None, **tls: object) -> Guest:
    """A real QEMU with a monitor on TLS."""
    made = MonitorTLS(server.write(folder / "qemu"), allow, **tls)  # type: ignore[arg-type]
    return Guest(None, memory=64, tls=made)


def server_context(authority: Authority, folder: Path) -> ssl.SSLContext:
    """For what plays a server where a real QEMU cannot be made to."""
    made = authority.server().write(folder / "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "server-cert.pem", made / "server-key.pem")
    return context


async def opened(
    address: tuple[str, int], store: Store | Made, server_name: str = "127.0.0.1", seconds: float = 60
) -> Session:
    """A session; the caller closes it."""
    store = store if isinstance(store, Store) else Store(store)
    endpoint = TCPEndpoint(*address, tls=Access("team-a", "monitor", server_name, store.fetch))
    return await Session.open(endpoint, lambda: None, open_seconds=seconds)


async def vcpus(address: tuple[str, int], store: Store | Made, server_name: str = "127.0.0.1") -> int:
    """What is observed there."""
    session = await opened(address, store, server_name)
    try:
        return (await session.observe()).vcpus
    finally:
        await session.close()


async def failure(
    kind: type[Exception],
    address: tuple[str, int],
    store: Store | Made,
    server_name: str = "127.0.0.1",
    seconds: float = 60,
) -> str:
    """Why nothing is observed there."""
    with pytest.raises(kind) as caught:
        await (await opened(address, store, server_name, seconds)).close()
    return str(caught.value)


async def test_a_machine_is_observed_and_changed_through_a_monitor_on_tls(authority: Authority, tmp_path: Path) -> None:
    made = MonitorTLS(authority.server().write(tmp_path / "qemu"), authority.client().name)
    async with Guest(None, smp="2,maxcpus=64", memory=64, tls=made) as guest:
        session = await opened(guest.tcp_address, authority.client())
        machine = await session.observe()
        assert machine.slots is not None
        await session.plug(machine.slots[2])
        assert (await session.observe()).vcpus == 3
        await session.close()
        assert await vcpus(guest.tcp_address, authority.client()) == 3, "the first session has let go"


async def test_the_server_name_is_what_the_certificate_has_to_be_for(authority: Authority, tmp_path: Path) -> None:
    names = ("vm-1.example.com", "*.lab.example.com", "10.1.2.3")
    async with machine(tmp_path, authority.server(*names), None) as guest:
        for name in ("vm-1.example.com", "VM-1.example.com", "a.lab.example.com", "10.1.2.3"):
            assert await vcpus(guest.tcp_address, authority.client(), name) == 1
        for name in ("127.0.0.1", "vm-2.example.com"):
            words = await failure(CredentialsUnavailable, guest.tcp_address, authority.client(), name)
            assert f"is not for {name} but for vm-1.example.com, *.lab.example.com, 10.1.2.3: " in words
            assert "spec.monitor.tcp.tls.serverName" in words


async def test_a_server_of_another_ca_is_not_trusted(guest: Guest, authority: Authority) -> None:
    words = await failure(CredentialsUnavailable, guest.tcp_address, authority.client().trusting(Authority()))
    assert f"127.0.0.1:{guest.tcp_address[1]} is not signed by ca.crt of {SOURCE}" in words
    assert "put the CA of QEMU's server-cert.pem there" in words


async def test_a_server_whose_certificate_has_expired_is_not_trusted(authority: Authority, tmp_path: Path) -> None:
    async with machine(tmp_path, authority.server(expired=True), None, check=False) as guest:
        words = await failure(CredentialsUnavailable, guest.tcp_address, authority.client())
        assert "has expired" in words
        assert "renew it" in words


async def test_a_chain_over_an_intermediate_ca_is_trusted_on_both_sides(authority: Authority, tmp_path: Path) -> None:
    below = Authority(authority)
    async with machine(tmp_path, below.server(), below.client().name) as guest:
        assert await vcpus(guest.tcp_address, below.client()) == 1


@pytest.mark.parametrize(
    ("refused", "hint"),
    [
        (lambda authority: authority.client("stranger"), "identity=O=VCPUSet tests,,OU=machines,,CN=stranger"),
        (lambda authority: Authority().client().trusting(authority), "QEMU's ca-cert.pem contains the CA of tls.crt"),
    ],
    ids=["another name", "another CA"],
)
async def test_a_client_that_qemu_refuses_is_told_what_qemu_looks_at(
    guest: Guest, authority: Authority, refused: Callable[[Authority], Made], hint: str
) -> None:
    store = Store(refused(authority))
    words = await failure(CredentialsUnavailable, guest.tcp_address, store)
    assert "rejects the operator's certificate" in words
    assert hint in words
    assert SOURCE in words
    assert store.doubts == 1, "whether there is another one by now was looked at"


async def test_a_certificate_that_was_replaced_meanwhile_is_tried_at_once(guest: Guest, authority: Authority) -> None:
    store = Store(authority.client("old"), authority.client())
    assert await vcpus(guest.tcp_address, store) == 1
    assert await vcpus(guest.tcp_address, store) == 1
    assert store.doubts == 1


class Secrets:
    """A `CredentialStore`: what each Secret of each namespace holds, and which sets it was told to forget."""

    def __init__(self, **made: Made) -> None:
        self.values = {name: given(each) for name, each in made.items()}
        self.read: list[str] = []
        self.forgotten: list[UID] = []

    async def fetch(self, uid: UID, namespace: str, name: str, doubted: Credentials | None = None) -> Credentials:
        """As the operator's own."""
        self.read.append(f"{namespace}/{name}")
        return self.values[name]

    def forget(self, uid: UID) -> None:
        """As the operator's own."""
        self.forgotten.append(uid)


def a_set(monitor: Monitor, namespace: str = "team-a") -> VCPUSet:
    """A set with this monitor."""
    return VCPUSet(UID("one"), namespace, "vm", 1, "1", datetime.datetime.now(datetime.UTC), Spec(2, monitor))


async def a_pass(monitors: Monitors, monitor: Monitor) -> Session:
    """What a pass gets."""
    with await monitors.resolve(a_set(monitor)) as endpoint:
        return await monitors.session(UID("one"), endpoint)


async def test_a_kept_session_outlives_a_rotation_and_the_next_one_uses_the_new_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    secrets = Secrets(monitor=authority.client())
    monitors = Monitors(None, lambda _: None, networks=Networks((network("127.0.0.1"),)), credentials=secrets)
    async with machine(tmp_path, authority.server(), None) as guest:
        monitor = TCPMonitor(*guest.tcp_address, TLS("monitor"))
        kept = await a_pass(monitors, monitor)
        secrets.values["monitor"] = given(authority.client("stranger").trusting(Authority()))
        assert await a_pass(monitors, monitor) is kept
        assert (await kept.observe()).vcpus == 1
        assert secrets.read == ["team-a/monitor"], "who is connected needs no Secret"
        await monitors.release(UID("one"))
        with pytest.raises(CredentialsUnavailable, match=r"is not signed by ca\.crt"):
            await a_pass(monitors, monitor)
        secrets.values["monitor"] = given(authority.client("rotated"))
        assert (await (await a_pass(monitors, monitor)).observe()).vcpus == 1
    await monitors.close()


async def test_another_secret_or_server_name_makes_for_another_session(authority: Authority, tmp_path: Path) -> None:
    secrets = Secrets(one=authority.client("one"), two=authority.client("two"))
    monitors = Monitors(None, lambda _: None, networks=Networks((network("127.0.0.1"),)), credentials=secrets)
    async with machine(tmp_path, authority.server("127.0.0.1", "vm"), None) as guest:
        host, port = guest.tcp_address
        seen = [
            await a_pass(monitors, TCPMonitor(host, port, tls))
            for tls in (TLS("one"), TLS("two"), TLS("two", "vm"), TLS("two", "vm"))
        ]
        assert [each is before for before, each in pairwise(seen)] == [False, False, True]
        with pytest.raises(InvalidMonitor, match="does not connect to unix monitors"):
            await a_pass(monitors, UnixMonitor("vm.sock"))
        assert secrets.forgotten == [UID("one")], "a set that names no Secret any more needs none"
        await monitors.forget(UID("one"))
        assert len(secrets.forgotten) == 2
    await monitors.close()


async def test_a_monitor_on_tls_is_one_within_a_namespace_only() -> None:
    monitors = Monitors(None, lambda _: None, networks=Networks((network("10.0.0.0/8"),)), credentials=Secrets())

    async def identity(monitor: TCPMonitor, namespace: str) -> object:
        with await monitors.resolve(a_set(monitor, namespace)) as endpoint:
            return endpoint.identity

    ours = await identity(TCPMonitor("10.0.0.1", 4444, TLS("one")), "team-a")
    assert await identity(TCPMonitor("10.0.0.1", 4444, TLS("two", "vm")), "team-a") == ours
    assert await identity(TCPMonitor("10.0.0.1", 4444, TLS("one")), "team-b") != ours
    assert await identity(TCPMonitor("10.0.0.1", 4444), "team-b") != ours
    plain = await identity(TCPMonitor("10.0.0.1", 4444), "team-a")
    assert await identity(TCPMonitor("10.0.0.1", 4444), "team-b") == plain


async def test_a_process_without_credentials_serves_no_monitor_on_tls() -> None:
    monitors = Monitors(None, lambda _: None, networks=None)
    with pytest.raises(CredentialsUnavailable, match="this process has no credentials"):
        await a_pass(monitors, TCPMonitor("127.0.0.1", 1, TLS("monitor")))


async def test_a_certificate_of_ours_that_has_expired_is_told_before_anybody_is_asked(authority: Authority) -> None:
    store = Store(authority.client(expired=True))
    words = await failure(CredentialsUnavailable, ("192.0.2.1", 4444), store)
    assert f"tls.crt of {SOURCE}, expired at 20" in words
    assert "renew it" in words


async def test_a_certificate_of_ours_that_begins_tomorrow_is_told_before_anybody_is_asked() -> None:
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    words = await failure(CredentialsUnavailable, ("192.0.2.1", 4444), signed(x509.Name([]), tomorrow))
    assert "is not valid before 20" in words


async def test_plain_text_on_the_other_side_is_an_invalid_monitor(authority: Authority) -> None:
    async with Guest(None, memory=64, tcp=True) as guest:
        words = await failure(InvalidMonitor, guest.tcp_address, authority.client())
        assert "does not speak TLS: set tls-creds on QEMU's chardev" in words
        assert "spec.monitor.tcp.insecure" in words


async def test_plain_text_on_our_side_is_a_monitor_without_a_greeting_that_may_wait_for_tls(guest: Guest) -> None:
    with pytest.raises(MonitorBusy, match=r"or waits for TLS, which spec\.monitor\.tcp\.tls and "):
        await Session.open(TCPEndpoint(*guest.tcp_address), lambda: None, open_seconds=0.3)


async def test_a_monitor_that_another_client_holds_is_busy_and_served_again_after_that(
    guest: Guest, authority: Authority
) -> None:
    holder = await opened(guest.tcp_address, authority.client())
    words = await failure(MonitorBusy, guest.tcp_address, authority.client(), seconds=0.3)
    assert "does not answer the TLS handshake: another client holds this monitor, QEMU hangs" in words
    await holder.close()

    async def served() -> bool:
        try:
            return await vcpus(guest.tcp_address, authority.client()) == 1
        except MonitorUnreachable:  # the one that waited in vain is seen off first
            return False

    await until(served, 60, "the monitor to be free")


async def test_a_monitor_that_others_wait_for_already_may_not_even_take_the_connection(
    guest: Guest, authority: Authority
) -> None:
    holder = await opened(guest.tcp_address, authority.client())

    async def turned_away() -> str:
        try:
            return await failure(MonitorUnreachable, guest.tcp_address, authority.client(), seconds=0.3)
        except MonitorBusy:  # it was let into the queue, and stays there
            return ""

    words = await until(turned_away, 60, "the queue to be full")
    assert "did not accept the connection" in words
    assert "another client holds the monitor and its queue is full" in words
    await holder.close()


async def test_a_server_of_tls_1_1_is_not_talked_to_and_told_from_a_refusal(
    authority: Authority, tmp_path: Path
) -> None:
    old = "NORMAL:-VERS-ALL:+VERS-TLS1.1"
    async with machine(tmp_path, authority.server(), None, priority=old) as guest:
        words = await failure(MonitorUnreachable, guest.tcp_address, authority.client())
        assert "during the TLS handshake" in words
        assert "or newer, or P-256 (see priority= of its tls-creds-x509, and the key" in words


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_both_versions_of_tls_work_and_a_refusal_is_one_in_both(
    authority: Authority, tmp_path: Path, version: str
) -> None:
    only = f"NORMAL:-VERS-ALL:+VERS-TLS{version}"
    async with machine(tmp_path, authority.server(), authority.client().name, priority=only) as guest:
        assert await vcpus(guest.tcp_address, authority.client()) == 1
        words = await failure(CredentialsUnavailable, guest.tcp_address, authority.client("stranger"))
        assert "rejects the operator's certificate" in words


@pytest.mark.parametrize(
    "only",
    [
        "NORMAL:-VERS-ALL:+VERS-TLS1.2:-KX-ALL:+DHE-RSA",
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:-GROUP-ALL:+GROUP-FFDHE8192",
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:-GROUP-ALL:+GROUP-X25519",
    ],
)
async def test_a_server_does_not_choose_how_long_a_handshake_takes(
    authority: Authority, tmp_path: Path, only: str
) -> None:
    # With other groups than the one that is offered it could take some with which each takes seconds of computing.
    server = authority.server(key_type=trustme.KeyType.RSA)
    async with machine(tmp_path, server, None, priority=only) as guest:
        words = await failure(MonitorUnreachable, guest.tcp_address, authority.client())
        assert "during the TLS handshake: QEMU is shutting down, or does not allow" in words
    for version in ("1.2", "1.3"):
        good = f"NORMAL:-VERS-ALL:+VERS-TLS{version}:-GROUP-ALL:+GROUP-SECP256R1"
        async with machine(tmp_path, server, None, priority=good) as guest:
            assert await vcpus(guest.tcp_address, authority.client()) == 1


async def test_qemu_wants_the_names_that_the_messages_give(tmp_path: Path, authority: Authority) -> None:
    parts = [
        (NameOID.DOMAIN_COMPONENT, "example"), (NameOID.COUNTRY_NAME, "CH"), (NameOID.STATE_OR_PROVINCE_NAME, "Zürich"),
        (NameOID.STREET_ADDRESS, "Bahnhof 1"), (NameOID.POSTAL_CODE, "8000"), (NameOID.ORGANIZATION_NAME, "Acme, Inc."),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, ' a+b"c '), (NameOID.SERIAL_NUMBER, "77"), (NameOID.TITLE, "Dr"),
        (NameOID.GIVEN_NAME, "G"), (NameOID.SURNAME, "S"), (NameOID.PSEUDONYM, "P"), (NameOID.INITIALS, "I"),
        (NameOID.DN_QUALIFIER, "Q"), (NameOID.GENERATION_QUALIFIER, "III"), (NameOID.BUSINESS_CATEGORY, "B"),
        (NameOID.USER_ID, "u1"), (NameOID.EMAIL_ADDRESS, "a@b.example"), (NameOID.COMMON_NAME, "#o;p<e>\\=r"),
    ]  # fmt: skip
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])
    client = signed(name).trusting(authority)
    server = authority.server()
    both = Made(server.ca + signed_ca(), server.certificate, server.key)
    async with machine(tmp_path, both, "CN=somebody-else") as guest:
        words = await failure(CredentialsUnavailable, guest.tcp_address, client)
    identity = words.partition("authz-simple,identity=")[2].replace(",,", ",")
    assert identity.startswith("DC=example,C=CH,")
    async with machine(tmp_path, both, identity) as guest:
        assert await vcpus(guest.tcp_address, client) == 1


async def test_a_client_certificate_without_a_subject_is_refused_with_that_as_the_reason(
    tmp_path: Path, authority: Authority
) -> None:
    server = authority.server()
    both = Made(server.ca + signed_ca(), server.certificate, server.key)
    async with machine(tmp_path, both, None) as guest:
        words = await failure(CredentialsUnavailable, guest.tcp_address, signed(x509.Name([])).trusting(authority))
        assert "has an empty subject" in words
        assert "set a common name" in words


@pytest.mark.parametrize("name", ["", ".", ".vm", "a" * 64, "ü" * 200, "a\0b"])
async def test_a_server_name_that_is_none_is_an_invalid_monitor(guest: Guest, authority: Authority, name: str) -> None:
    words = await failure(InvalidMonitor, guest.tcp_address, authority.client(), name)
    assert words.startswith("spec.monitor.tcp.tls.serverName: ")
    assert words.endswith("is neither a DNS name nor an address")


async def test_a_port_that_nobody_listens_on_is_told_as_that(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    words = await failure(MonitorUnreachable, address, authority.client())
    assert "refuses the connection: check that QEMU is running" in words


async def test_a_connection_that_ends_in_the_handshake_is_unreachable(authority: Authority) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        words = await failure(MonitorUnreachable, server.sockets[0].getsockname(), authority.client())
        assert "closed the connection during the TLS handshake: QEMU is shutting down" in words


@pytest.mark.parametrize("said", [GREETING, GREETING[:20]], ids=["the greeting", "half of it"])
async def test_a_qemu_that_ends_after_it_has_greeted_has_refused_nobody(
    authority: Authority, tmp_path: Path, said: bytes
) -> None:
    context = server_context(authority, tmp_path)
    store = Store(authority.client())

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        if said.endswith(b"\n"):
            await reader.read(1)  # the negotiation
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context) as server:
        words = await failure(MonitorUnreachable, server.sockets[0].getsockname(), store)
        assert "closed the connection before the session was established: check" in words
        assert store.doubts == 0


@pytest.mark.parametrize("comes_back", [False, True], ids=["and stays away", "and is started again"])
async def test_a_qemu_that_ends_right_after_the_handshake_is_not_said_to_refuse_anybody(
    authority: Authority, guest: Guest, tmp_path: Path, comes_back: bool
) -> None:
    context = server_context(authority, tmp_path)
    store = Store(authority.client())

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.start_tls(context)
        server.close()
        if comes_back:
            sockets.append(await asyncio.start_server(pass_on, *address))
        writer.transport.abort()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*guest.tcp_address)
        await asyncio.gather(_copy(reader, back), _copy(there, writer))

    sockets: list[asyncio.Server] = []
    server = await asyncio.start_server(end, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    try:
        if comes_back:
            assert await vcpus(address, store) == 1
        else:
            assert "refuses the connection" in await failure(MonitorUnreachable, address, store)
    finally:
        for each in (server, *sockets):
            each.close()
            await each.wait_closed()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    target.close()


async def test_an_alert_about_our_certificate_is_a_refusal(authority: Authority, tmp_path: Path) -> None:
    # Proxies in front of QEMU say why, as QEMU does not.
    context = server_context(authority, tmp_path)
    context.load_verify_locations(cadata=Authority().certificate)
    context.verify_mode = ssl.CERT_REQUIRED

    def serve(listener: socket.socket) -> None:
        # asyncio's server closes before it has sent the alert.
        for _ in range(2):
            connection, _ = listener.accept()
            with connection, pytest.raises(ssl.SSLCertVerificationError):
                context.wrap_socket(connection, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(asyncio.to_thread(serve, listener))
        for _ in range(2):
            words = await failure(CredentialsUnavailable, listener.getsockname(), authority.client())
            assert "rejects the operator's certificate (answered TLSV1_ALERT_UNKNOWN_CA)" in words
        await serving


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            {"ca.crt": b"nonsense"}, "ca.crt of Secret team-a/monitor contains no readable PEM certificate", id="CA"
        ),
        pytest.param(
            {"tls.crt": b"nonsense"},
            "tls.crt of Secret team-a/monitor contains no readable PEM certificate",
            id="certificate",
        ),
        pytest.param({"tls.key": b"nonsense"}, "tls.crt and tls.key of Secret team-a/monitor cannot be used", id="key"),
        pytest.param({"tls.key": b" \n"}, "Secret team-a/monitor has no tls.key: it needs ca.crt", id="an empty entry"),
    ],
)
def test_what_is_wrong_in_a_secret_is_named(authority: Authority, change: dict[str, bytes], words: str) -> None:
    with pytest.raises(CredentialsUnavailable) as caught:
        keys_of(Credentials.of(SOURCE, {**authority.client().data(), **change}))
    assert words in str(caught.value)


def _mutilated(pem: str, chance: random.Random) -> bytes:
    """With some bytes of what it encodes, or of the text itself, replaced."""
    head, body, foot = re.split(r"(?<=-----\n)|(?=-----END)", pem, maxsplit=2)
    found = bytearray(base64.b64decode(body))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found))
        found[at] = chance.choice([0, 1, 2, 0x30, 0x17, 0xFF, found[at] ^ 1, found[at] ^ 0x20])
    text = (head + base64.encodebytes(found).decode() + foot).encode()
    return text if chance.random() > 0.1 else text[: chance.randrange(len(text))]


def test_whatever_bytes_a_secret_holds_they_are_used_or_told_to_be_wrong(authority: Authority) -> None:
    chance = random.Random(SEED)
    data = {name: text.decode() for name, text in authority.client().data().items()}
    told: list[str] = []
    for _ in range(EXAMPLES or 400):
        name = chance.choice(list(data))
        changed = {**{key: text.encode() for key, text in data.items()}, name: _mutilated(data[name], chance)}
        try:
            keys = keys_of(Credentials.of(SOURCE, changed))
        except CredentialsUnavailable as error:
            told.append(str(error))
        else:
            assert keys.failure("there", "vm", EOFError(), agreed=True) is not None
    assert len(told) > 100, "nearly every change does harm"
    assert all(SOURCE in words for words in told), "the Secret is named"


@pytest.mark.parametrize("version", [1, 34])
def test_a_certificate_that_says_it_is_of_no_known_version_is_told_on_either_side(
    authority: Authority, version: int
) -> None:
    good = x509.load_pem_x509_certificate(authority.client().certificate.encode())
    der = good.public_bytes(serialization.Encoding.DER)
    odd = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01" + bytes([version]), 1)
    assert odd != der
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(odd) + b"-----END CERTIFICATE-----\n"
    for name in ("ca.crt", "tls.crt"):
        with pytest.raises(
            CredentialsUnavailable, match=f"{name} of .* contains no readable PEM certificate.*not a valid X509 version"
        ):
            keys_of(Credentials.of(SOURCE, {**authority.client().data(), name: pem}))
    error = ssl.SSLCertVerificationError()
    error.verify_code = 62
    error.certificate = odd  # type: ignore[attr-defined]
    words = str(keys_of(given(authority.client())).failure("there", "vm", error, agreed=False))
    assert "is not for vm, and cannot be read (" in words


def test_a_secret_without_entries_is_told_of_all_that_it_lacks() -> None:
    with pytest.raises(CredentialsUnavailable, match=r"has no ca\.crt and no tls\.crt and no tls\.key"):
        Credentials.of(SOURCE, {"password": b"x"})


def test_a_secret_that_would_take_much_memory_is_refused(authority: Authority) -> None:
    data = authority.client().data()
    chain = {**data, "ca.crt": data["ca.crt"] * 20}
    keys_of(Credentials.of(SOURCE, chain))
    with pytest.raises(CredentialsUnavailable, match=r"Secret team-a/monitor is too large: .* \d+ bytes in total"):
        Credentials.of(SOURCE, {**data, "ca.crt": data["ca.crt"] * 1000})


def test_a_key_of_another_certificate_is_told(authority: Authority) -> None:
    with pytest.raises(
        CredentialsUnavailable, match=r"tls\.key of Secret team-a/monitor is not the key of its tls\.crt"
    ):
        keys_of(given(authority.client().with_key_of(authority.client("other"))))


@pytest.mark.parametrize(
    ("bits", "told"), [(4096, "is not the key of its"), (4104, "has a key of more than 4096 bits")]
)
def test_a_key_with_which_each_connection_would_hold_up_the_other_sets_is_not_used(
    authority: Authority, bits: int, told: str
) -> None:
    data = {**authority.client().data(), "tls.crt": certificate_for_rsa(bits)}
    with pytest.raises(CredentialsUnavailable, match=rf"^tls\.\w+ of {SOURCE} {told}"):
        keys_of(Credentials.of(SOURCE, data))


def test_an_encrypted_key_is_told_and_nobody_asked_for_the_passphrase(authority: Authority) -> None:
    made = authority.client()
    key = serialization.load_pem_private_key(made.key.encode(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(CredentialsUnavailable, match=r"tls\.key of Secret team-a/monitor is encrypted"):
        keys_of(Credentials.of(SOURCE, {**made.data(), "tls.key": locked}))


def test_a_process_without_a_free_descriptor_says_so(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", full)
    with pytest.raises(CredentialsUnavailable, match="Too many open files; raise the operator's limit of open files"):
        keys_of(given(authority.client()))


def test_credentials_are_read_once_and_their_key_is_nowhere_to_be_seen(authority: Authority) -> None:
    credentials = given(authority.client())
    before = set(Path("/proc/self/fd").iterdir())
    keys = keys_of(credentials)
    assert isinstance(keys, Keys)
    assert keys_of(credentials) is keys
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert "PRIVATE" not in repr(credentials)


_CA_KEY = ec.generate_private_key(ec.SECP256R1())
_CA_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA of these tests")])


def _certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime.datetime, *, ca: bool) -> str:
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_CA_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=3))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(_CA_KEY, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


def _yesterday() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


def signed_ca() -> str:
    """The CA of what `signed` makes."""
    return _certificate(_CA_NAME, _CA_KEY, _yesterday(), ca=True)


def signed(subject: x509.Name, begin: datetime.datetime | None = None) -> Made:
    """A client's certificate with any subject."""
    key = ec.generate_private_key(ec.SECP256R1())
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return Made(signed_ca(), _certificate(subject, key, begin or _yesterday(), ca=False), text)
