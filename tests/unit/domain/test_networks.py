"""Which addresses are in the networks that an administrator lists, held against what the `ipaddress` module knows."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcpuset.domain.networks import Networks, carried, network

__all__: list[str] = []

V4 = st.integers(0, 2**32 - 1).map(IPv4Address)
V6 = st.integers(0, 2**128 - 1).map(IPv6Address)


def v4_network(address: IPv4Address, bits: int) -> IPv4Network:
    return IPv4Network((address, bits), strict=False)


V4_NETWORKS = st.builds(v4_network, V4, st.integers(0, 32))
V6_NETWORKS = st.builds(lambda address, bits: IPv6Network((address, bits), strict=False), V6, st.integers(0, 128))
SPELLINGS = {
    "mapped": lambda it: f"::ffff:{it}",
    "NAT64": lambda it: f"64:ff9b::{it}",
    "6to4": lambda it: str(IPv6Address(0x2002 << 112 | int(it) << 80 | 7)),
}
"""IPv6 addresses that lead to an IPv4 address."""


def networks(*texts: str) -> Networks:
    return Networks(tuple(network(text) for text in texts))


def ordinary(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is in no range that is special to every host, by what the standard library says of it."""
    special = (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address == IPv4Address("255.255.255.255")
        or address in IPv4Network("0.0.0.0/8")
        or address in IPv6Network("64:ff9b:1::/48")
    )
    return not special


@given(st.one_of(V4, V6))
def test_without_a_network_no_address_is_allowed(address: IPv4Address | IPv6Address) -> None:
    assert not Networks().allow(str(address))


@given(V4, V4_NETWORKS)
def test_an_ordinary_ipv4_address_is_allowed_exactly_if_a_listed_network_has_it(
    address: IPv4Address, listed: IPv4Network
) -> None:
    if ordinary(address):
        assert networks(str(listed)).allow(str(address)) == (address in listed)


@given(V4, st.sampled_from(sorted(SPELLINGS)), st.one_of(V4_NETWORKS, V6_NETWORKS))
def test_an_ipv4_address_in_the_clothes_of_ipv6_is_judged_as_what_it_leads_to(
    address: IPv4Address, spelling: str, listed: IPv4Network | IPv6Network
) -> None:
    dressed = SPELLINGS[spelling](address)
    assert carried(ip_address(dressed)) == address
    some = Networks((listed,))
    assert some.allow(dressed) == some.allow(str(address))


@given(st.one_of(V4, V6))
def test_everything_allows_what_is_ordinary_and_nothing_special(address: IPv4Address | IPv6Address) -> None:
    leads_to = carried(address)
    assert networks("0.0.0.0/0", "::/0").allow(str(address)) == ordinary(leads_to)


@pytest.mark.parametrize(
    ("listed", "address"),
    [
        ("127.0.0.0/8", "127.0.0.1"),
        ("127.0.0.1/32", "127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("::1", "::1"),
        ("169.254.0.0/16", "169.254.169.254"),
        ("fe80::/10", "fe80::1%eth0"),
        ("0.0.0.0/32", "0.0.0.0"),  # noqa: S104 - nothing listens here
        ("::/128", "::"),
        ("224.0.0.0/4", "224.0.0.1"),
        ("ff02::/16", "ff02::1"),
        ("64:ff9b:1::/48", "64:ff9b:1::1"),
    ],
)
def test_a_special_address_is_allowed_by_a_network_of_its_range(listed: str, address: str) -> None:
    assert networks(listed).allow(address)
    assert not networks("0.0.0.0/0", "::/0", "126.0.0.0/7", "169.0.0.0/8", "fe00::/8", "::/127").allow(address)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("64:ff9b::/96", "0.0.0.0/0"),
        ("64:ff9b::10.0.0.0/104", "10.0.0.0/8"),
        ("2002:a00::/24", "10.0.0.0/8"),
        ("::/0", "::/0"),
    ],
)
def test_a_network_of_addresses_that_carry_ipv4_ones_is_the_network_of_those(text: str, same: str) -> None:
    assert network(text) == ip_network(same)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("10.0.0.1/8", "use 10.0.0.0/8 for the network, or 10.0.0.1 for the single address"),
        ("2001:db8::1/32", "use 2001:db8::/32 for the network, or 2001:db8::1 for the single address"),
        ("10.0.0.0/33", "is not a network: use CIDR notation such as 192.0.2.0/24"),
        ("vm.example.com", "is not a network"),
        ("", "is not a network"),
        ("10.0.0.0/8,10.1.0.0/16", "is not a network"),
        ("fe80::%eth0/64", "remove %eth0"),
        ("2002:a00:1::/64", "use that address"),
    ],
)
def test_what_is_no_network_is_refused_with_the_remedy(text: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        network(text)
    assert remedy in str(refusal.value)
