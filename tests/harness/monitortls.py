"""How QEMU is told to serve a monitor on TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.sockets import option_value

__all__ = ["MonitorTLS"]


@dataclass(frozen=True)
class MonitorTLS:
    """How QEMU is to serve a monitor on TLS.

    folder    with ca-cert.pem, server-cert.pem and server-key.pem; QEMU reads them when it starts
    allow     the distinguished name that a client's certificate has to have; None: any that the CA signed
    verify    whether a client needs a certificate at all
    check     whether QEMU looks at its own certificate first: it does not start with one that has expired
    priority  GnuTLS' priority string, which limits the versions of TLS among other things; None: QEMU's own
    """

    folder: Path
    allow: str | None = None
    verify: bool = True
    check: bool = True
    priority: str | None = None

    def arguments(self) -> list[str]:
        """QEMU's arguments for the objects; a chardev refers to them by `options`."""
        creds = f"tls-creds-x509,id=tls0,dir={option_value(self.folder)},endpoint=server"
        creds += f",verify-peer={'on' if self.verify else 'off'}"
        if not self.check:
            creds += ",sanity-check=off"
        if self.priority is not None:
            creds += f",priority={option_value(self.priority)}"
        made = ["-object", creds]
        if self.allow is not None:
            made += ["-object", f"authz-simple,id=authz0,identity={option_value(self.allow)}"]
        return made

    @property
    def options(self) -> str:
        """What a chardev of the kind `socket` needs besides host and port."""
        return ",tls-creds=tls0" + (",tls-authz=authz0" if self.allow is not None else "")
