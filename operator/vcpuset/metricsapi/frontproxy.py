"""Whom a request is from, by the API server's front proxy.

The API server authenticates a user, and proxies the request with its own client certificate and the user in headers. So
only the holder of that certificate is believed. Its CA, its names and the names of the headers are in the ConfigMap
`kube-system/extension-apiserver-authentication`, which each API server writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import unquote

import msgspec
from multidict import CIMultiDictProxy

from vcpuset.domain.errors import VCPUSetError

__all__ = ["CONFIG_MAP", "FrontProxy", "InvalidFrontProxy", "User", "common_names"]

CONFIG_MAP: Final = ("kube-system", "extension-apiserver-authentication")
"""Namespace and name."""

_CA: Final = "requestheader-client-ca-file"


class InvalidFrontProxy(VCPUSetError):
    """The ConfigMap has no CA of a front proxy, or cannot be read."""


@dataclass(frozen=True)
class User:
    """A user, as the API server has authenticated them."""

    name: str
    uid: str
    groups: tuple[str, ...]
    extra: tuple[tuple[str, tuple[str, ...]], ...]

    def spec(self) -> dict[str, Any]:
        """The user's part of a SubjectAccessReview's `spec`."""
        extra = {key: list(values) for key, values in self.extra}
        return {"user": self.name, "uid": self.uid, "groups": list(self.groups), "extra": extra}


@dataclass(frozen=True)
class FrontProxy:
    """What identifies the front proxy, and where it puts the user.

    ca             PEM
    allowed_names  common names of its certificate; empty: any
    """

    ca: str
    allowed_names: tuple[str, ...]
    username_headers: tuple[str, ...]
    uid_headers: tuple[str, ...]
    group_headers: tuple[str, ...]
    extra_prefixes: tuple[str, ...]

    @classmethod
    def of(cls, entries: Mapping[str, str]) -> Self:
        """From the entries of the ConfigMap.

        Raises:
            InvalidFrontProxy: an entry is missing or is not what it should be.
        """

        def names(key: str) -> tuple[str, ...]:
            try:
                return tuple(msgspec.json.decode(entries.get(key, "[]"), type=list[str]))
            except msgspec.DecodeError as error:
                raise InvalidFrontProxy(f"{key} of ConfigMap {'/'.join(CONFIG_MAP)}: {error}") from error

        if not entries.get(_CA, "").strip():
            raise InvalidFrontProxy(
                f"ConfigMap {'/'.join(CONFIG_MAP)} has no {_CA}: start kube-apiserver with the --requestheader-… and "
                "--proxy-client-… flags of the aggregation layer"
            )
        return cls(
            entries[_CA],
            names("requestheader-allowed-names"),
            names("requestheader-username-headers"),
            names("requestheader-uid-headers"),
            names("requestheader-group-headers"),
            names("requestheader-extra-headers-prefix"),
        )

    def user(self, certificate_names: Iterable[str], headers: CIMultiDictProxy[str]) -> User | None:
        """The user of a request from a client whose certificate is of this CA and has these common names.

        None: the client is not the front proxy, or names no user.
        """
        if self.allowed_names and not set(certificate_names) & set(self.allowed_names):
            return None
        name = _first(self.username_headers, headers)
        if not name:
            return None
        groups = tuple(value for header in self.group_headers for value in headers.getall(header, ()))
        extra: dict[str, tuple[str, ...]] = {}
        for prefix in self.extra_prefixes:
            for header in headers:
                if header.lower().startswith(prefix.lower()):
                    extra[unquote(header[len(prefix) :].lower())] = tuple(headers.getall(header))
        return User(name, _first(self.uid_headers, headers), groups, tuple(sorted(extra.items())))


def common_names(certificate: Mapping[str, Any] | None) -> list[str]:
    """The common names of a verified certificate, as `ssl.SSLSocket.getpeercert` returns it."""
    parts = (certificate or {}).get("subject", ())
    return [value for part in parts for key, value in part if key == "commonName"]


def _first(names: Iterable[str], headers: CIMultiDictProxy[str]) -> str:
    return next((value for name in names if (value := headers.get(name, ""))), "")
