"""The networks in which TCP monitors may be (`--allow-tcp`), and which addresses are in them.

The operator has access that its users do not have: to the cluster's network, to its host's services, and to the cloud
provider's link-local addresses. A set names any host and port, so without a restriction each author of a set could make
the operator connect to those.

Addresses of special ranges reach something else from every host, so a network like 10.0.0.0/8 or 0.0.0.0/0 does not
include them. They are only allowed by a network within the special range.

An IPv6 address that carries an IPv4 address is treated as that address.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

__all__ = ["Address", "Network", "Networks", "carried", "network"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_SPECIAL: Final[tuple[Network, ...]] = (
    IPv4Network("0.0.0.0/8"),  # unspecified: Linux uses this host
    IPv4Network("127.0.0.0/8"),  # loopback
    IPv4Network("169.254.0.0/16"),  # link-local: metadata services
    IPv4Network("224.0.0.0/4"),  # multicast
    IPv4Network("255.255.255.255/32"),  # broadcast
    IPv6Network("::/128"),  # unspecified: Linux uses this host
    IPv6Network("::1/128"),  # loopback
    IPv6Network("fe80::/10"),  # link-local
    IPv6Network("ff00::/8"),  # multicast
    IPv6Network("64:ff9b:1::/48"),  # NAT64 of a site (RFC 8215): only the site knows which IPv4 address it carries
)

_CARRIERS: Final[tuple[tuple[IPv6Network, int], ...]] = (
    (IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64 (RFC 6052)
    (IPv6Network("2002::/16"), 80),  # 6to4 (RFC 3056)
)
"""IPv6 ranges whose addresses carry an IPv4 address, and the number of bits after it."""


@dataclass(frozen=True, slots=True)
class Networks:
    """The listed networks; none: no address is allowed."""

    listed: tuple[Network, ...] = ()

    def allow(self, address: str) -> bool:
        """Whether a monitor may be at this IPv4 or IPv6 address; a zone is ignored.

        Raises ValueError if it is no address.
        """
        found = carried(ip_address(address.partition("%")[0]))
        special = next((each for each in _SPECIAL if found in each), None)
        return any(found in each and (special is None or _within(each, special)) for each in self.listed)


def network(text: str) -> Network:
    """A network as an administrator lists it: an address with its number of fixed bits, or an address alone.

    Raises ValueError, with the remedy.
    """
    try:
        found = ip_network(text)
    except ValueError as error:
        try:
            meant = ip_network(text, strict=False)
        except ValueError:
            raise ValueError(
                f"{text!r} is not a network: use CIDR notation such as 192.0.2.0/24 or 2001:db8::/32"
            ) from error
        raise ValueError(
            f"{text!r} has host bits set: use {meant} for the network, or "
            f"{meant[0].__class__(text.partition('/')[0])} for the single address"
        ) from error
    if isinstance(found, IPv6Network):
        if found.network_address.scope_id is not None:
            raise ValueError(
                f"{text!r} has a zone, which is not allowed in a network: remove %{found.network_address.scope_id}"
            )
        for carrier, behind in _CARRIERS:
            if found.subnet_of(carrier):
                return _carried_network(text, found, carrier, behind)
    return found


def carried(address: Address) -> Address:
    """The IPv4 address that an IPv6 address carries; otherwise the address itself."""
    if isinstance(address, IPv6Address):
        for carrier, behind in _CARRIERS:
            if address in carrier:
                return IPv4Address(int(address) >> behind & 0xFFFFFFFF)
    return address


def _carried_network(text: str, found: IPv6Network, carrier: IPv6Network, behind: int) -> IPv4Network:
    """The addresses in it are treated as the IPv4 addresses that they carry, so it means a network of those."""
    bits = found.prefixlen - carrier.prefixlen
    if bits > 32:
        raise ValueError(f"{text!r} is part of the range that maps to a single IPv4 address: use that address")
    return IPv4Network((int(found.network_address) >> behind & 0xFFFFFFFF, bits))


def _within(one: Network, other: Network) -> bool:
    match one, other:
        case IPv4Network(), IPv4Network():
            return one.subnet_of(other)
        case IPv6Network(), IPv6Network():
            return one.subnet_of(other)
        case _:
            return False
