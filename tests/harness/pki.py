"""Certificates for monitors on TLS, and for the operator that connects to them: good ones, and bad ones of every kind.

    authority = Authority()
    client = authority.client()
    async with Guest(None, tls=MonitorTLS(authority.server().write(folder), client.name)) as guest: ...
    secret = client.secret("monitor-credentials")

All of it is trustme's; what is here are the two forms in which certificates are handed on: the folder that QEMU's
tls-creds-x509 reads, and the Secret that cert-manager writes.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

__all__ = ["Authority", "Credentials", "certificate_for_rsa"]

ORGANIZATION: Final = "VCPUSet tests"
UNIT: Final = "machines"


@dataclass(frozen=True)
class Credentials:
    """A certificate (with those between it and its CA), its key, and the CA that its owner trusts; all of them PEM."""

    ca: str
    certificate: str
    key: str
    name: str = ""
    """The distinguished name, as authz-simple wants it."""

    def trusting(self, authority: Authority) -> Self:
        """The same certificate in the hands of somebody who trusts another CA."""
        return type(self)(authority.certificate, self.certificate, self.key, self.name)

    def with_key_of(self, other: Credentials) -> Self:
        """The same certificate with a key that does not belong to it."""
        return type(self)(self.ca, self.certificate, other.key, self.name)

    def write(self, folder: Path) -> Path:
        """Write them to a folder, new or not, as QEMU's server wants them; returns the folder.

        QEMU looks for the issuer of its own certificate in ca-cert.pem only, so those between the two stand there too.
        """
        folder.mkdir(mode=0o700, exist_ok=True)
        _, end, issuers = self.certificate.partition("-----END CERTIFICATE-----\n")
        assert end, "a certificate is PEM"
        for file, text in (
            ("ca-cert.pem", self.ca + issuers),
            ("server-cert.pem", self.certificate),
            ("server-key.pem", self.key),
        ):
            (folder / file).touch(mode=0o600)
            (folder / file).write_text(text)
        return folder

    def write_pem(self, folder: Path, name: str) -> None:
        """Write NAME.ca, NAME.crt and NAME.key to a folder."""
        for kind, text in (("ca", self.ca), ("crt", self.certificate), ("key", self.key)):
            (folder / f"{name}.{kind}").write_text(text)

    def data(self) -> dict[str, bytes]:
        """What the Secret holds."""
        return {"ca.crt": self.ca.encode(), "tls.crt": self.certificate.encode(), "tls.key": self.key.encode()}

    def secret(self, name: str, **changed: bytes | None) -> Mapping[str, Any]:
        """The Secret, as cert-manager writes it.

        changed  other contents of ``ca_crt``, ``tls_crt``, ``tls_key``; None: the key is not there. The type of the
                 Secret is then Opaque, as the API server wants both keys in one of the type kubernetes.io/tls
        """
        data = {**self.data(), **{key.replace("_", "."): text for key, text in changed.items()}}
        kind = "kubernetes.io/tls" if None not in data.values() else "Opaque"
        encoded = {key: base64.b64encode(text).decode() for key, text in data.items() if text is not None}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": kind, "data": encoded}


class Authority:
    """A CA of one's own: certificates of two Authorities know nothing of each other.

    issuer  the CA above this one; whoever trusts that one is satisfied with what this one signs
    """

    def __init__(self, issuer: Authority | None = None) -> None:
        self._root: Authority = issuer._root if issuer is not None else self
        self._ca: trustme.CA = trustme.CA() if issuer is None else issuer._ca.create_child_ca()

    @property
    def certificate(self) -> str:
        """The certificate to trust, as PEM."""
        return self._root._ca.cert_pem.bytes().decode()

    def server(
        self, *names: str, expired: bool = False, key_type: trustme.KeyType = trustme.KeyType.ECDSA
    ) -> Credentials:
        """A server's, for these host names and addresses."""
        return self._issue(names or ("127.0.0.1",), "qemu", expired, key_type)

    def client(self, name: str = "vcpuset", *, expired: bool = False) -> Credentials:
        """A client's, for this common name."""
        return self._issue(("vcpuset.test",), name, expired)

    def _issue(
        self,
        names: tuple[str, ...],
        common_name: str,
        expired: bool,
        key_type: trustme.KeyType = trustme.KeyType.ECDSA,
    ) -> Credentials:
        now = datetime.datetime.now(datetime.UTC)
        begins, ends = (now - datetime.timedelta(days=9), now + datetime.timedelta(days=-2 if expired else 300))
        made = self._ca.issue_cert(
            *names,
            common_name=common_name,
            organization_name=ORGANIZATION,
            organization_unit_name=UNIT,
            not_before=begins,
            not_after=ends,
            key_type=key_type,
        )
        chain = "".join(part.bytes().decode() for part in made.cert_chain_pems)
        name = f"O={ORGANIZATION},OU={UNIT},CN={common_name}"
        return Credentials(self.certificate, chain, made.private_key_pem.bytes().decode(), name)


def certificate_for_rsa(bits: int) -> bytes:
    """A certificate for an RSA key of this length, as PEM. Nobody has the key: a long one takes minutes to make."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vcpuset")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(rsa.RSAPublicNumbers(65537, (1 << bits) - 1).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=300))
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)
