"""Where a server may send us: which network addresses a redirect may lead to.

A locator's own host is the user's choice and may be anywhere; people run mirrors in their own network. Where a redirect
leads is the server's choice, and a server on the internet has no business with this machine or the network around it:

* from an origin on the internet, redirects lead to the internet only;
* from an origin with a private address (loopback included), also to private addresses;
* to link-local addresses and those at which clouds hand out credentials, only from an origin that has such a one itself.

What decides is what a host resolves to, so ``2130706433``, ``127.1`` and ``[::ffff:127.0.0.1]`` are all ``127.0.0.1``;
and connections are made to the very addresses that were looked at, so a name cannot be another one the next moment.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

_IPV4_EMBEDDING = tuple(ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "::/96"))  # NAT64, and a form long obsolete
# Not link-local, yet of the same use: credentials and settings of cloud machines (IPv6 of AWS, Alibaba, Azure).
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")))


class AllowedScope(IntEnum):
    """How far a redirect may lead; each includes those before it."""

    GLOBAL = 0
    PRIVATE = 1
    ANY = 2


class NotAllowed(Exception):
    """A host has an address outside the reach that was given. Not an OSError, so that no library takes it for one."""


def scope_of(addresses: Iterable[str]) -> AllowedScope:
    """The least reach that includes every address; GLOBAL where there is none."""
    return max((_address_scope(ipaddress.ip_address(text)) for text in addresses), default=AllowedScope.GLOBAL)


def _address_scope(address: IPv4Address | IPv6Address) -> AllowedScope:
    if isinstance(address, IPv6Address) and (inner := _embedded(address)) is not None:
        return _address_scope(inner)
    if address.is_link_local or address in _METADATA:
        return AllowedScope.ANY
    # is_global holds for multicast and for the old site-local addresses; no web server has either.
    excluded = address.is_multicast or (isinstance(address, IPv6Address) and address.is_site_local)
    return AllowedScope.GLOBAL if address.is_global and not excluded else AllowedScope.PRIVATE


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a gateway or the kernel makes of an IPv6 address."""
    if (inner := address.ipv4_mapped or address.sixtofour) is not None:
        return inner
    number = int(address)
    if number > 1 and any(address in net for net in _IPV4_EMBEDDING):  # :: and ::1 are themselves
        return IPv4Address(number & 0xFFFFFFFF)
    return None


def resolve(host: str, port: int, *, literal: bool = False) -> tuple[str, ...]:
    """The addresses of *host*, best first. With *literal* no name is looked up: one has no address then.

    Raises socket.gaierror, and UnicodeError for what cannot be a host name.
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
    """Raises NotAllowed."""
    if scope_of(addresses) > allowed:
        raise NotAllowed(f"{host} is not on the internet" if allowed is AllowedScope.GLOBAL else f"{host} is link-local")
