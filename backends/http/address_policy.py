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

# IPv6 prefixes that embed an IPv4 address: NAT64, and the deprecated IPv4-compatible form.
_IPV4_EMBEDDING = tuple(ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "::/96"))
# Metadata services outside the link-local ranges: IPv6 of AWS, Alibaba, Azure.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")))


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
    if isinstance(address, IPv6Address) and (inner := _embedded(address)) is not None:
        return _address_scope(inner)
    if address.is_link_local or address in _METADATA:
        return AllowedScope.ANY
    # is_global is true for multicast and deprecated site-local addresses: no web server has one.
    excluded = address.is_multicast or (isinstance(address, IPv6Address) and address.is_site_local)
    return AllowedScope.GLOBAL if address.is_global and not excluded else AllowedScope.PRIVATE


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a gateway or the kernel translates an IPv6 address to."""
    if (inner := address.ipv4_mapped or address.sixtofour) is not None:
        return inner
    number = int(address)
    if number > 1 and any(address in net for net in _IPV4_EMBEDDING):  # :: and ::1 are themselves
        return IPv4Address(number & 0xFFFFFFFF)
    return None


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
