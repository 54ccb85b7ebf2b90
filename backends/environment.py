"""Proxies and passwords, read from the environment by us and bound to the host they are for.

``requests`` would do this by itself (``trust_env``), but hands a ``.netrc`` password to the target of a redirect and
lets it override an explicit token. So nothing is left to it: each request is given what its own host may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit


def proxy(url: str, environ: Mapping[str, str]) -> str:
    """The address of the proxy for one URL, by ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` (lower case
    wins, as everywhere); empty where there is none."""

    def get(name: str) -> str:
        return environ.get(name.lower()) or environ.get(name.upper()) or ""

    parts = urlsplit(url)
    address = get(f"{parts.scheme}_proxy") or get("all_proxy")
    return "" if address and _bypasses_proxy(parts.hostname or "", get("no_proxy")) else address


def _bypasses_proxy(host: str, no_proxy: str) -> bool:
    for part in no_proxy.split(","):
        name = part.strip().strip("[]")
        name = name.partition(":")[0] if name.count(":") == 1 else name  # a port; more colons are an IPv6 address
        bare = name.lstrip("*.").lower()
        if name == "*" or (bare and (host == bare or host.endswith("." + bare))):
            return True
    return False


def netrc_auth(url: str, environ: Mapping[str, str], *, locator: str | None = None) -> tuple[str, str] | None:
    """Login and password that ``NETRC`` or ``~/.netrc`` keeps for the URL's host.

    The file knows no ports. So where a redirect of *locator* leads to another port of its host, there is none; but
    from http to https as everybody does it, there is.
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
        login = netrc.netrc(path).hosts.get(host)  # not the default entry: it is for no host in particular
    except (OSError, netrc.NetrcParseError, ValueError):  # the last: it is not text
        return None
    return (login[0], login[2] or "") if login else None


def ca_bundle(environ: Mapping[str, str]) -> str | bool:
    """What to verify TLS against: ``REQUESTS_CA_BUNDLE``, ``CURL_CA_BUNDLE``, or the default (True)."""
    return environ.get("REQUESTS_CA_BUNDLE") or environ.get("CURL_CA_BUNDLE") or True


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what a credential is bound to. Raises ValueError for a port that is none."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


def env_flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes: anything that is not a no, since a switch should not fail open."""
    return environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")
