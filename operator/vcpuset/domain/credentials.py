"""Certificates and a key for a TLS connection, as in the Secret of a monitor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, Self

from vcpuset.domain.errors import CredentialsUnavailable
from vcpuset.domain.resource import UID

__all__ = ["CA", "CERTIFICATE", "KEY", "MOST_BYTES", "CredentialStore", "Credentials", "NoCredentials"]

CA: Final = "ca.crt"
CERTIFICATE: Final = "tls.crt"
KEY: Final = "tls.key"
"""The names that cert-manager and the Secret type kubernetes.io/tls use."""

MOST_BYTES: Final = 32 * 1024
"""Limit for the three together. Four certificates and a key of 4096 bits have 12 KiB. OpenSSL keeps ten times as much
memory as it has read, for each Secret that a set names; users may create many Secrets of 1 MiB."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Credentials:
    """Certificates and a key, in PEM, not parsed yet.

    source       where they come from, for messages: "Secret team-a/monitor"
    ca           the CAs of QEMU's certificate
    certificate  the operator's, with the intermediate ones up to its CA
    key          the key of that certificate
    """

    source: str
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, source: str, entries: Mapping[str, bytes]) -> Self:
        """From the entries of a Secret.

        Raises CredentialsUnavailable if one is missing or empty, or if they are longer than `MOST_BYTES`.
        """
        missing = [name for name in (CA, CERTIFICATE, KEY) if not entries.get(name, b"").strip()]
        if missing:
            raise CredentialsUnavailable(
                f"{source} has no {' and no '.join(missing)}: it needs {CA} (the CA of QEMU's certificate), "
                f"{CERTIFICATE} and {KEY} (of the operator), as cert-manager writes them"
            )
        if (length := sum(len(entries[name]) for name in (CA, CERTIFICATE, KEY))) > MOST_BYTES:
            raise CredentialsUnavailable(
                f"{source} is too large: {CA}, {CERTIFICATE} and {KEY} have {length} bytes in total, and the limit is "
                f"{MOST_BYTES}; only keep the CA of QEMU's certificate in {CA}"
            )
        return cls(source, entries[CA], entries[CERTIFICATE], entries[KEY])


class CredentialStore(Protocol):
    """Where the credentials of sets come from."""

    async def fetch(self, uid: UID, namespace: str, name: str, doubted: Credentials | None = None) -> Credentials:
        """The content of the Secret; it may be some seconds old.

        doubted  these have just failed: check whether there are newer ones

        Raises CredentialsUnavailable.
        """

    def forget(self, uid: UID) -> None:
        """The set no longer needs credentials."""


class NoCredentials:
    """A `CredentialStore` without credentials.

    remedy  for the error message
    """

    def __init__(self, remedy: str = "this process has no credentials") -> None:
        self._remedy = remedy

    async def fetch(self, uid: UID, namespace: str, name: str, doubted: Credentials | None = None) -> Credentials:
        """Raises CredentialsUnavailable."""
        raise CredentialsUnavailable(f"spec.monitor.tcp.tls: {self._remedy}")

    def forget(self, uid: UID) -> None:
        """Nothing is kept."""
