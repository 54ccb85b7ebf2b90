"""The address policy: which network addresses a redirect may connect to (protection against SSRF).

The host of a locator is the user's choice and may be anywhere, since people run mirrors in their
own network. The target of a redirect is the server's choice, and a server on the internet must not
reach this machine or its network:

* an origin on the internet may redirect to global addresses only;
* an origin with a private address (loopback included) also to private addresses;
* only an origin with a link-local or cloud metadata address may redirect to such addresses.

The resolved address decides, so ``2130706433``, ``127.1`` and ``[::ffff:127.0.0.1]`` are all
``127.0.0.1``. Connections are made to the very addresses that were checked, which rules out DNS
rebinding.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

# IPv6 prefixes that embed an IPv4 address in their last 32 bits: NAT64 (RFC 6052), SIIT (RFC 2765), and the deprecated
# IPv4-compatible form.
_IPV4_EMBEDDING = tuple(ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96"))
# NAT64 for local use (RFC 8215): where the IPv4 address is in it, only that network knows.
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
_ISATAP = (0x00005EFE, 0x02005EFE)  # before an IPv4 address in the last 64 bits (RFC 5214)
# Metadata services outside the link-local ranges: IPv6 of AWS, Alibaba, Azure, Oracle.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
# The special-purpose registries of IANA (RFC 6890), as of 2026: what an older Python takes for global is not.
_NOT_GLOBAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
            *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/3", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        ),
    )
)
_GLOBAL_AFTER_ALL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("192.0.0.9/32", "192.0.0.10/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:3::/32"),
            *("2001:4:112::/48", "2001:20::/28", "2001:30::/28"),
        ),
    )
)
_UNICAST = ipaddress.IPv6Network("2000::/3")  # the only global addresses that are assigned


class AllowedScope(IntEnum):
    """The range of addresses that a redirect may connect to; each includes those before it."""

    GLOBAL = 0
    PRIVATE = 1
    ANY = 2


class NotAllowed(Exception):
    """An address outside the allowed scope. Not an OSError, which libraries would handle."""


def scope_of(addresses: Iterable[str]) -> AllowedScope:
    """The smallest scope that includes every address; GLOBAL if there are none."""
    return max((_address_scope(ipaddress.ip_address(text)) for text in addresses), default=AllowedScope.GLOBAL)


def _address_scope(address: IPv4Address | IPv6Address) -> AllowedScope:
    if isinstance(address, IPv6Address):
        if (inner := _translated(address)) is not None:
            return _address_scope(inner)
        if ends := _tunnel(address):
            return max(_plain_scope(address), *map(_address_scope, ends))
    return _plain_scope(address)


def _plain_scope(address: IPv4Address | IPv6Address) -> AllowedScope:
    if address.is_link_local or address in _METADATA or address in _LOCAL_NAT64:
        return AllowedScope.ANY
    if any(address in net for net in _GLOBAL_AFTER_ALL):
        return AllowedScope.GLOBAL
    special = any(address in net for net in _NOT_GLOBAL) or (isinstance(address, IPv6Address) and address not in _UNICAST)
    return AllowedScope.PRIVATE if special or not address.is_global else AllowedScope.GLOBAL


def _translated(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a gateway or the kernel translates an IPv6 address to."""
    if (inner := address.ipv4_mapped or address.sixtofour) is not None:
        return inner
    number = int(address)
    if number > 1 and any(address in net for net in _IPV4_EMBEDDING):  # :: and ::1 are themselves
        return IPv4Address(number & 0xFFFFFFFF)
    return None


def _tunnel(address: IPv6Address) -> tuple[IPv4Address, ...]:
    """The IPv4 addresses that packets to an IPv6 address may be tunnelled to: Teredo, ISATAP."""
    if address.teredo is not None:
        return address.teredo
    number = int(address)
    return (IPv4Address(number & 0xFFFFFFFF),) if (number >> 32 & 0xFFFFFFFF) in _ISATAP else ()


def resolve(host: str, port: int, *, literal: bool = False) -> tuple[str, ...]:
    """The addresses of *host*, best first. With *literal* only a numeric address; none for a name.

    Raises socket.gaierror, and UnicodeError for an invalid host name.
    """
    flags = socket.AI_NUMERICHOST if literal else 0
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        if literal:
            return ()
        raise
    return tuple(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in infos))


def check(host: str, addresses: Iterable[str], allowed: AllowedScope) -> None:
    """Check addresses against the allowed scope. Raises NotAllowed."""
    if scope_of(addresses) > allowed:
        raise NotAllowed(f"{host} is not on the internet" if allowed is AllowedScope.GLOBAL else f"{host} is link-local")
