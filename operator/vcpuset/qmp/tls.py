"""Mutual TLS with a monitor: the certificates, the parameters, and what a failure means.

QEMU (`tls-creds-x509`) never reports why it rejects a client: it completes the handshake and then closes, whether the
client's certificate has expired, is of another CA, or has a name that `tls-authz` does not allow. So everything that
can be checked before is checked before, and the remaining message names the two things to check, with the certificate's
subject in the form of `authz-simple`.

Private keys are never written to disk: OpenSSL reads them from anonymous memory.

`cryptography` costs 10 MB and is imported with the first monitor on TLS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from vcpuset.domain.credentials import CA, CERTIFICATE, KEY, Credentials
from vcpuset.domain.errors import CredentialsUnavailable, InvalidMonitor, MonitorUnreachable, VCPUSetError

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["Access", "ClosedAfterHandshake", "Keys", "keys_of"]

Fetch = Callable[[Credentials | None], Awaitable[Credentials]]

_HANDSHAKE_SECONDS: Final = 3600.0
"""asyncio's own deadline, which must never come first."""

_UNTRUSTED: Final = frozenset({2, 18, 19, 20, 21})
"""OpenSSL's X509_V_ERR_… for a chain that does not end in a trusted certificate."""
_NOT_YET, _EXPIRED, _NAME_MISMATCH, _ADDRESS_MISMATCH = 9, 10, 62, 64

# A handshake is computed in the event loop: no other set is served meanwhile. So neither the author of the Secret nor
# the server may choose keys that take long. (A long chain of certificates remains possible: with as many as OpenSSL
# reads, 100 of P-384, a handshake took 0.2 to 0.5 s. Python cannot limit that.)

_CIPHERS: Final = "@SECLEVEL=2:ECDH+AESGCM:ECDH+CHACHA20:ECDH+AES:!aNULL:!eNULL:!aDSS:!SHA1:!AESCCM"
"""For TLS 1.2: Python's own without DHE, where the server chooses the group (10,000 bits: more than a second)."""

_GROUP: Final = "prime256v1"
"""The only offered group, also in TLS 1.3, where OpenSSL's own list includes ffdhe8192: that takes 0.2 s."""

_KEY_BITS: Final = 4096
"""The longest key (RSA) that signs for the operator: that takes 5 ms; with 8192 bits 50 ms, with 16384 0.35 s."""

_NO_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"})
"""OpenSSL's errors for plain text."""
_SERVER_NAME: Final = re.compile(r"[A-Za-z0-9:._-]+")
_NOTHING_IN_COMMON: Final = re.compile(
    r"UNSUPPORTED_PROTOCOL|ALERT_(PROTOCOL_VERSION|HANDSHAKE_FAILURE|INSUFFICIENT_SECURITY)"
)
_REFUSED: Final = re.compile(r"ALERT_(.*CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR)")

_GNUTLS_NAMES: Final = {
    "1.2.840.113549.1.9.1": "EMAIL", "2.5.4.4": "surName", "2.5.4.5": "serialNumber", "2.5.4.9": "street",
    "2.5.4.12": "title", "2.5.4.13": "description", "2.5.4.15": "businessCategory", "2.5.4.17": "postalCode",
    "2.5.4.20": "telephoneNumber", "2.5.4.41": "name", "2.5.4.42": "givenName", "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier", "2.5.4.46": "dnQualifier", "2.5.4.65": "pseudonym",
}  # fmt: skip
"""The spelling of QEMU's TLS library for the parts of a name without a short name in RFC 4514."""

_SHOWN: Final = 5
"""As many names of a certificate are shown."""


@dataclass(frozen=True, slots=True)
class Access:
    """The access to a monitor on TLS.

    namespace    of the credentials
    secret       their name
    server_name  the DNS name or address that QEMU's certificate must have
    fetch        returns the credentials; given some that have just failed, it checks for newer ones
    """

    namespace: str
    secret: str
    server_name: str
    fetch: Fetch = field(compare=False)


class _Connection(ssl.SSLObject):
    """Keeps the rejected certificate for the message."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLCertVerificationError as error:
            refused: Any = error
            # Without it the message has no names.
            with contextlib.suppress(Exception):
                chain: Any = self._sslobj.get_unverified_chain()  # type: ignore[attr-defined] # only public, and so in typeshed, from Python 3.13 on
                refused.certificate = chain[0].public_bytes(_DER)
            raise


_DER: Final = 2
"""`_ssl.ENCODING_DER`."""


class ClosedAfterHandshake(CredentialsUnavailable):
    """QEMU's reaction to a client that it rejects, each time, and to any client if it happens to end just then."""


class _EncryptedError(Exception):
    """OpenSSL requires a passphrase."""


class Keys:
    """Credentials, parsed and checked."""

    def __init__(self, credentials: Credentials) -> None:
        """Raises CredentialsUnavailable, with what is wrong with them."""
        self._source = credentials.source
        authorities = self._certificates(credentials.ca, CA)
        own = self._certificates(credentials.certificate, CERTIFICATE)[0]
        with self._readable(CERTIFICATE):
            self._valid = (own.not_valid_before_utc, own.not_valid_after_utc)
            self._subject = ",".join(part.rfc4514_string(_spelling()) for part in own.subject.rdns)
            bits = getattr(own.public_key(), "key_size", 0)
        if bits > _KEY_BITS:
            raise CredentialsUnavailable(
                f"{CERTIFICATE} of {self._source} has a key of more than {_KEY_BITS} bits, which would delay other "
                f"VCPUSets at each connection: use an EC key, or RSA of up to {_KEY_BITS} bits"
            )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        """Checks names and certificates, trusts only this CA, and presents this certificate."""
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_ciphers(_CIPHERS)
        # Python documents this for servers only, but since OpenSSL 1.1.1 it is also the list of a client's groups.
        self.context.set_ecdh_curve(_GROUP)
        self.context.sslobject_class = _Connection
        try:
            self._load(authorities, credentials)
        except OSError as error:
            limit = "; raise the operator's limit of open files" if error.errno in {errno.EMFILE, errno.ENFILE} else ""
            raise CredentialsUnavailable(
                f"{self._source} cannot be passed to OpenSSL: {error.strerror}{limit}"
            ) from error

    def require_valid(self) -> None:
        """Raises CredentialsUnavailable if the operator's certificate has expired, or is not valid yet."""
        now = datetime.now(UTC)
        begin, end = self._valid
        if now > end:
            raise CredentialsUnavailable(
                f"the operator's certificate, {CERTIFICATE} of {self._source}, expired at {end:%Y-%m-%dT%H:%M:%SZ}: "
                "renew it (with cert-manager, check the status of the Certificate)"
            )
        if now < begin:
            raise CredentialsUnavailable(
                f"the operator's certificate, {CERTIFICATE} of {self._source}, is not valid before "
                f"{begin:%Y-%m-%dT%H:%M:%SZ}: check the clocks"
            )

    def options(self, server_name: str) -> dict[str, Any]:
        """For `asyncio.open_connection`. Raises InvalidMonitor if no certificate can have such a name."""
        # asyncio checks no name if this is empty.
        if _SERVER_NAME.fullmatch(server_name) is None:
            raise _not_a_name(server_name)
        try:
            # Before there is a connection: if this fails later, uvloop (0.23) leaves its socket open.
            self.context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=server_name)
        except ValueError as error:
            raise _not_a_name(server_name) from error
        return {
            "ssl": self.context,
            "server_hostname": server_name,
            "ssl_handshake_timeout": _HANDSHAKE_SECONDS,
        }

    def failure(self, where: str, server_name: str, error: BaseException, *, agreed: bool) -> VCPUSetError | None:
        """Why a session could not be opened; None: not because of TLS.

        agreed  whether the handshake was completed
        """
        match error:
            case ssl.SSLCertVerificationError():
                return self._unacceptable(where, server_name, error)
            case ssl.SSLError(reason=str(reason)):
                return self._disagreement(where, reason)
            case ConnectionError() | EOFError() | ssl.SSLError() if agreed:
                return ClosedAfterHandshake(self._refusal(where, "closed the connection right after the handshake"))
            case ConnectionError() | EOFError() | ssl.SSLError():
                return _cut_short(where)
            case _:
                return None

    def _unacceptable(
        self, where: str, server_name: str, error: ssl.SSLCertVerificationError
    ) -> CredentialsUnavailable:
        code = error.verify_code
        if code in _UNTRUSTED:
            return CredentialsUnavailable(
                f"the certificate of {where} is not signed by {CA} of {self._source}: put the CA of QEMU's "
                "server-cert.pem there, or use a certificate of that CA for QEMU"
            )
        if code in {_NAME_MISMATCH, _ADDRESS_MISMATCH}:
            return CredentialsUnavailable(
                f"the certificate of {where} is not for {server_name}{_names(getattr(error, 'certificate', None))}: "
                "set spec.monitor.tcp.tls.serverName (--tls-server-name) to a name in the certificate, or use a "
                f"certificate with {server_name} as subject alternative name for QEMU"
            )
        if code == _EXPIRED:
            return CredentialsUnavailable(
                f"the certificate of {where} has expired (or that of a CA between it and {CA} of {self._source}): "
                "renew it and restart QEMU, which only reads it at start-up"
            )
        if code == _NOT_YET:
            return CredentialsUnavailable(
                f"the certificate of {where} is not valid yet: check the clocks of its host and of the operator's host"
            )
        return CredentialsUnavailable(
            f"the certificate of {where} was rejected with {CA} of {self._source}: {error.verify_message}"
        )

    def _disagreement(self, where: str, reason: str) -> VCPUSetError:
        if reason in _NO_TLS:
            return InvalidMonitor(
                f"{where} does not speak TLS: set tls-creds on QEMU's chardev (see docs/monitors.md), or, to connect "
                "without encryption and authentication, set spec.monitor.tcp.insecure instead of tls"
            )
        if _NOTHING_IN_COMMON.search(reason):
            # Whether QEMU's alert arrives before it resets the connection is a race.
            return _cut_short(where)
        if _REFUSED.search(reason):
            return CredentialsUnavailable(self._refusal(where, f"answered {reason}"))
        return MonitorUnreachable(f"{where} and the operator have no TLS parameters in common: {reason}")

    def _refusal(self, where: str, how: str) -> str:
        if not self._subject:
            return (
                f"{where} rejects the operator's certificate ({how}): {CERTIFICATE} of {self._source} has an empty "
                "subject, which QEMU never accepts; set a common name"
            )
        return (
            f"{where} rejects the operator's certificate ({how}): check that QEMU's ca-cert.pem contains the CA of "
            f"{CERTIFICATE} of {self._source}, and that its tls-authz allows the certificate's name: "
            f"authz-simple,identity={_printable(self._subject.replace(',', ',,'))}"
        )

    def _certificates(self, pem: bytes, name: str) -> Sequence[x509.Certificate]:
        from cryptography.x509 import load_pem_x509_certificates  # noqa: PLC0415 - 7 MB of memory that an operator without TLS monitors does not need

        with self._readable(name):
            return load_pem_x509_certificates(pem)

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """`cryptography`'s errors about a certificate, some of which only come when a field is read, as ours."""
        try:
            yield
        except Exception as error:  # it raises more kinds than ValueError (InvalidVersion, DuplicateExtension, …)
            raise CredentialsUnavailable(
                f"{name} of {self._source} contains no readable PEM certificate: {_printable(str(error))}"
            ) from error

    def _load(self, authorities: Sequence[x509.Certificate], credentials: Credentials) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415 - 7 MB of memory that an operator without TLS monitors does not need

        trusted = b"".join(each.public_bytes(Encoding.DER) for each in authorities)
        try:
            self.context.load_verify_locations(cadata=trusted)
        except ssl.SSLError as error:
            raise CredentialsUnavailable(f"{CA} of {self._source} cannot be used: {error.reason}") from error
        with os.fdopen(os.memfd_create("vcpuset-tls"), "wb") as memory:
            memory.write(credentials.certificate + b"\n" + credentials.key)
            memory.flush()
            try:
                self.context.load_cert_chain(f"/proc/self/fd/{memory.fileno()}", password=_no_passphrase)
            except _EncryptedError as error:
                raise CredentialsUnavailable(
                    f"{KEY} of {self._source} is encrypted: store it without a passphrase"
                ) from error
            except ssl.SSLError as error:
                if error.reason in {"KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}:
                    words = f"{KEY} of {self._source} is not the key of its {CERTIFICATE}: store a matching pair"
                else:
                    words = f"{CERTIFICATE} and {KEY} of {self._source} cannot be used: {error.reason or error}"
                raise CredentialsUnavailable(words) from error


_read: WeakKeyDictionary[Credentials, Keys] = WeakKeyDictionary()


def keys_of(credentials: Credentials) -> Keys:
    """The credentials, parsed once for as long as they are kept. Raises CredentialsUnavailable."""
    found = _read.get(credentials)
    if found is None:
        found = _read[credentials] = Keys(credentials)
    found.require_valid()
    return found


def _cut_short(where: str) -> MonitorUnreachable:
    return MonitorUnreachable(
        f"{where} closed the connection during the TLS handshake: QEMU is shutting down, or does not allow TLS 1.2 "
        "or newer, or P-256 (see priority= of its tls-creds-x509, and the key of its certificate)"
    )


def _not_a_name(server_name: str) -> InvalidMonitor:
    return InvalidMonitor(
        f"spec.monitor.tcp.tls.serverName: {server_name[:253]!r} is neither a DNS name nor an address"
    )


def _spelling() -> dict[x509.ObjectIdentifier, str]:
    from cryptography.x509 import ObjectIdentifier  # noqa: PLC0415 - 7 MB of memory that an operator without TLS monitors does not need

    return {ObjectIdentifier(oid): name for oid, name in _GNUTLS_NAMES.items()}


def _no_passphrase() -> bytes:
    raise _EncryptedError


def _names(certificate: bytes | None) -> str:
    """The names of an unverified certificate, in words."""
    if certificate is None:
        return ""
    from cryptography import x509  # noqa: PLC0415 - 7 MB of memory that an operator without TLS monitors does not need

    try:
        names = x509.load_der_x509_certificate(certificate).extensions
        found = [str(each.value) for each in names.get_extension_for_class(x509.SubjectAlternativeName).value]
    except x509.ExtensionNotFound:
        return ", and has no subject alternative name"
    except Exception as error:  # noqa: BLE001 - the server made it, and as in `_readable`
        return f", and cannot be read ({_printable(str(error))})"
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f" but for {_printable(', '.join(found[:_SHOWN]))}{more}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:400])
