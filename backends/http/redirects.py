"""Redirects: which are followed, and for how long the last target of one is remembered."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from urllib.parse import quote, urljoin, urlsplit

from ..environment import origin
from ..errors import ProtocolError, SourceError
from .address_policy import AllowedScope

CACHE_TTL_S = 300.0
_MAX_ENTRIES = 1024  # targets remembered at once
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+(%[0-9A-Za-z.%_~-]+)?\]|[^\s\\@/?#:\[\]]+)(:[0-9]{1,5})?\Z")
_RESERVED = "!#$%&'()*+,/:;=?@[]~"


@dataclass(frozen=True, slots=True)
class RedirectTarget:
    """Where a locator leads, and how far its redirects may reach. The URL may be signed: it is kept here, shown nowhere."""

    url: str
    scope: AllowedScope


class RedirectCache:
    """Last targets of locators that were redirected, for ``REMEMBER_S`` seconds. Safe for threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._mutex = clock, Lock()
        self._entries: OrderedDict[str, tuple[float, RedirectTarget]] = OrderedDict()

    def get(self, locator: str) -> RedirectTarget | None:
        with self._mutex:
            stored_at, redirect_target = self._entries.get(locator, (0.0, None))
            return redirect_target if redirect_target is not None and self._clock() - stored_at < CACHE_TTL_S else None

    def put(self, locator: str, redirect_target: RedirectTarget) -> None:
        with self._mutex:
            self._entries[locator] = self._clock(), redirect_target
            self._entries.move_to_end(locator)
            while len(self._entries) > _MAX_ENTRIES:
                self._entries.popitem(last=False)

    def discard(self, locator: str, redirect_target: RedirectTarget) -> None:
        """Forget *target*, unless another thread has found a newer one by now."""
        with self._mutex:
            if self._entries.get(locator, (0.0, None))[1] == redirect_target:
                del self._entries[locator]


def check(locator: str) -> None:
    """Whether a locator can be asked as it stands. Raises SourceError."""
    try:
        authority = urlsplit(locator).netloc
        origin(locator)
    except ValueError:  # its text may quote a part of a password
        raise ProtocolError("not a URL that can be asked", locator=locator) from None
    if "@" in authority:
        hint = "put them into ~/.netrc and the locator without them"
        raise SourceError("a URL holds no credentials", locator=locator, hint=hint)
    if _CONTROL.search(locator) or not _AUTHORITY.match(authority):
        raise ProtocolError("not a URL that can be asked", locator=locator)


def follow(url: str, location: str | None, locator: str) -> str:
    """The address that an answer of *url* redirects to. Raises ProtocolError where it must not be followed."""
    if not location:
        raise ProtocolError("redirected without saying where", locator=locator)
    if _CONTROL.search(location):
        raise ProtocolError("redirected to an address with control characters", locator=locator)
    try:
        # http.client reads header bytes as latin-1; what servers send there without asking is UTF-8.
        redirect_url = urljoin(url, quote(location.encode("latin-1"), safe=_RESERVED))
        parts = urlsplit(redirect_url)
        scheme, host, _ = origin(redirect_url)
    except ValueError:
        raise ProtocolError("redirected to what is no URL", locator=locator) from None
    if scheme not in ("http", "https") or not host:
        raise ProtocolError(f"redirected to a {scheme[:20] or 'nameless'} address", locator=locator)
    if url.lower().startswith("https:") and scheme == "http":
        raise ProtocolError("redirected from https to http", locator=locator)
    if "@" in parts.netloc:
        raise ProtocolError("redirected to an address with credentials in it", locator=locator)
    if not _AUTHORITY.match(parts.netloc) or ("%" in host and ":" not in host):
        raise ProtocolError("redirected to a host that cannot be", locator=locator)
    return redirect_url
