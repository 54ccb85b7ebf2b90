"""Proxies, credentials, CA bundles and flags from environment variables.

``requests`` can read these itself (``trust_env``), but sends a ``.netrc`` password to the target of
a redirect and lets it override an explicit token. So that is off: each request gets only the
credentials of its own host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

# Without brackets, more colons are an IPv6 address.
_HOST_PORT = re.compile(r"(\[[^\]]*\]|[^:]*):([0-9]{1,5})")


def proxy(url: str, environ: Mapping[str, str]) -> str:
    """The URL of the proxy for *url*; empty if there is none.

    From ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``; lower-case names take
    precedence, as in curl.
    """

    def get(name: str) -> str:
        return environ.get(name.lower()) or environ.get(name.upper()) or ""

    address = get(f"{urlsplit(url).scheme}_proxy") or get("all_proxy")
    return "" if address and _bypasses_proxy(url, get("no_proxy")) else address


def _bypasses_proxy(url: str, no_proxy: str) -> bool:
    """Whether an entry of ``NO_PROXY``, separated by commas or blanks, matches the URL's host.

    An entry is ``*``, a domain (which includes its subdomains, with or without a leading dot), an
    IP address, or a network in CIDR notation; with ``:port`` it matches that port only. This is the
    union of what curl, Go and requests accept. ``requests.utils.should_bypass_proxies`` is not used:
    it knows neither IPv6 networks nor blanks, takes `notexample.org` for a subdomain of
    `example.org`, and also queries the operating system.
    """
    _, name, port = origin(url)
    host = name.rstrip(".")
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        with_port = _HOST_PORT.fullmatch(entry)
        pattern, only_port = with_port.groups() if with_port else (entry, port)
        if int(only_port) == port and _matches(host, pattern.strip("[]")):
            return True
    return False


def _matches(host: str, pattern: str) -> bool:
    import ipaddress  # 1 ms: only behind a proxy with exceptions

    if pattern == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(pattern, strict=False)
    except ValueError:  # a name
        domain = pattern.removeprefix("*").strip(".")
        return bool(domain) and (host == domain or host.endswith(f".{domain}"))


def netrc_auth(url: str, environ: Mapping[str, str], *, locator: str | None = None) -> tuple[str, str] | None:
    """Login and password for the URL's host from ``NETRC`` or ``~/.netrc``; None if absent.

    The file has no ports. So a redirect of *locator* to another port of the same host gets no
    credentials, except for the usual upgrade from http to https on the default ports.
    """
    import netrc
    import os

    home = environ.get("HOME")
    path = environ.get("NETRC") or (os.path.join(home, ".netrc") if home else "")
    if not path:
        return None
    host = urlsplit(url).hostname or ""
    scheme, locator_host, port = origin(locator or url)
    redirect = origin(url)
    upgraded = (scheme, port, redirect[0], redirect[2]) == ("http", 80, "https", 443)
    if locator_host == redirect[1] and (scheme, locator_host, port) != redirect and not upgraded:
        return None
    try:
        login = netrc.netrc(path).hosts.get(host)  # never `default`: it is bound to no host
    except (OSError, netrc.NetrcParseError, ValueError):  # ValueError: not text
        return None
    return (login[0], login[2] or "") if login else None


def ca_bundle(environ: Mapping[str, str]) -> str | bool:
    """TLS trust store: ``REQUESTS_CA_BUNDLE``, ``CURL_CA_BUNDLE``, or the default (True)."""
    return environ.get("REQUESTS_CA_BUNDLE") or environ.get("CURL_CA_BUNDLE") or True


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: the scope of a credential. Raises ValueError for an invalid port."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


def env_flag(environ: Mapping[str, str], name: str) -> bool:
    """Value of a boolean variable: true unless empty or a "no", so that flags fail safe."""
    return environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")
