"""The serving certificate: in a Secret that all replicas share, made and renewed by them; or from files.

A certificate that is made here is self-signed, and no CA: its key can sign nothing else. The API server trusts it by
the CA bundle of the APIService. The Secret also has the certificate before, and the bundle has both. So the API server
trusts each replica, also while only one of them has seen a renewal. A replica presents a new certificate only once it
has found it in the bundle.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vcpuset.domain.credentials import CA, CERTIFICATE, KEY
from vcpuset.domain.errors import Conflict, ObjectGone, VCPUSetError
from vcpuset.kube.aggregation import AggregatedAPI
from vcpuset.metricsapi.settings import CertificateFiles

__all__ = ["Certificate", "CertificateUnavailable", "Files", "OwnCertificate", "make", "server_context"]

VALID: Final = timedelta(days=90)

RENEWED_BEFORE: Final = timedelta(days=30)
"""How long before its end a certificate is replaced."""

_CLOCK_SKEW: Final = timedelta(hours=1)

_log = logging.getLogger(__name__)


class CertificateUnavailable(VCPUSetError):
    """There is no certificate that can be served, or the API server does not trust it (yet)."""


@dataclass(frozen=True)
class Certificate:
    """A certificate, with those between it and its CA, and its key; PEM."""

    chain: bytes
    key: bytes = field(repr=False)


class CertificateSource(Protocol):
    """Where the serving certificate comes from."""

    async def current(self) -> Certificate:
        """The certificate to serve from now on.

        Raises:
            CertificateUnavailable: there is none; the message has the remedy.
            APIError: the API server does not answer.
        """


class Files:
    """A certificate that something else makes and renews."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files

    async def current(self) -> Certificate:
        """As `CertificateSource`. Files that are being replaced may not belong together; they do at the next call."""
        try:
            return await asyncio.to_thread(self._read)
        except OSError as error:
            raise CertificateUnavailable(f"cannot read {error.filename}: {error.strerror}") from error

    def _read(self) -> Certificate:
        return Certificate(self._files.certificate.read_bytes(), self._files.key.read_bytes())


class OwnCertificate:
    """The certificate in the Secret, for the DNS name of the Service that the APIService names.

    registration  the name of the APIService
    clock         wall-clock time
    """

    def __init__(
        self, cluster: AggregatedAPI, registration: str, namespace: str, service: str, clock: Callable[[], datetime]
    ) -> None:
        self._cluster = cluster
        self._registration = registration
        self._namespace = namespace
        self._service = service
        self._clock = clock
        self._served: Certificate | None = None

    async def current(self) -> Certificate:
        """As `CertificateSource`. Renews the certificate, and has the API server trust it, if need be."""
        entries = await self._entries()
        certificate = Certificate(entries[CERTIFICATE], entries[KEY])
        if await self._trusted(entries[CA]) or self._served is None:
            self._served = certificate
        # Otherwise the API server may not have noticed yet: the new one is served from the next call on.
        return self._served

    async def _entries(self) -> Mapping[str, bytes]:
        """The entries of the Secret, once they are good for some time."""
        name = f"{self._namespace}/{self._service}"
        while True:
            try:
                secret = await self._cluster.read_stored_secret(self._namespace, self._service)
            except ObjectGone as error:
                raise CertificateUnavailable(
                    f"there is no Secret {name}: apply the manifests of the metrics API again, which have it without "
                    "contents"
                ) from error
            dns_name, now = f"{self._service}.{self._namespace}.svc", self._clock()
            if _is_good(secret.entries, dns_name, now):
                return secret.entries
            made = make(dns_name, now, secret.entries.get(CERTIFICATE, b""))
            try:
                await self._cluster.replace_secret(secret, made)
            except Conflict:  # another replica was faster
                continue
            _log.info("made a certificate for %s, valid for %d days, in Secret %s", dns_name, VALID.days, name)
            return made

    async def _trusted(self, bundle: bytes) -> bool:
        """Whether the APIService had this CA bundle already; it has now."""
        try:
            service, present = await self._cluster.read_registration(self._registration)
        except ObjectGone as error:
            raise CertificateUnavailable(
                f"there is no APIService {self._registration}: apply the manifests of the metrics API again"
            ) from error
        if service != (self._namespace, self._service):
            owner = "no Service" if service is None else f"Service {'/'.join(service)}"
            raise CertificateUnavailable(
                f"APIService {self._registration} names {owner}, so another metrics API owns it: remove one of the two"
            )
        if present == bundle:
            return True
        await self._cluster.write_ca_bundle(self._registration, bundle)
        _log.info("set the CA bundle of APIService %s", self._registration)
        return False


def make(dns_name: str, now: datetime, previous: bytes) -> Mapping[str, bytes]:
    """The entries of the Secret: a new certificate, its key, and as CA bundle this and the previous certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vcpuset-metrics-api")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    return {
        CERTIFICATE: certificate,
        KEY: key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        CA: certificate + (previous if _parsed(previous) is not None else b""),
    }


def server_context(certificate: Certificate, client_ca: str) -> ssl.SSLContext:
    """A context that lets in only clients with a certificate of this CA.

    Raises:
        CertificateUnavailable: the certificate, the key or the CA cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    # As in kube-apiserver, each certificate of the CA file is an end of the chain, also an intermediate one.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.num_tickets = 0  # a resumed session would not be verified again
    try:
        context.load_verify_locations(cadata=client_ca)
        # OpenSSL only reads files, and the key must not be on a disk.
        with os.fdopen(os.memfd_create("vcpuset-tls"), "wb") as memory:
            memory.write(certificate.chain + b"\n" + certificate.key)
            memory.flush()
            context.load_cert_chain(f"/proc/self/fd/{memory.fileno()}", password=_no_passphrase)
    except (ssl.SSLError, ValueError) as error:
        raise CertificateUnavailable(
            f"the serving certificate, its key, or the CA of the front proxy cannot be used: {error}"
        ) from error
    return context


def _no_passphrase() -> str:
    raise ValueError("the key is encrypted")


def _parsed(pem: bytes) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        return None


def _is_good(entries: Mapping[str, bytes], dns_name: str, now: datetime) -> bool:
    """Whether the entries can be served, and for some time."""
    certificate = _parsed(entries.get(CERTIFICATE, b""))
    if certificate is None or entries[CERTIFICATE] not in entries.get(CA, b""):
        return False
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = serialization.load_pem_private_key(entries.get(KEY, b""), None)
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return False
    return (
        names.get_values_for_type(x509.DNSName) == [dns_name]
        and key.public_key() == certificate.public_key()
        and certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc - RENEWED_BEFORE
    )
