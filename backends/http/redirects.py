"""Redirects: which ones are followed, and a cache of their final targets."""

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
_MAX_ENTRIES = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+(%[0-9A-Za-z.%_~-]+)?\]|[^\s\\@/?#:\[\]]+)(:[0-9]{1,5})?\Z")
_RESERVED = "!#$%&'()*+,/:;=?@[]~"


@dataclass(frozen=True, slots=True)
class RedirectTarget:
    """The final URL of a locator, and the address scope of its connections.

    The URL may be signed, so it must appear in no message.
    """

    url: str
    scope: AllowedScope


class RedirectCache:
    """Final redirect targets by locator, kept for ``CACHE_TTL_S`` seconds. Thread-safe."""

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
        """Remove *redirect_target*, unless another thread has replaced it meanwhile."""
        with self._mutex:
            if self._entries.get(locator, (0.0, None))[1] == redirect_target:
                del self._entries[locator]


def check(locator: str) -> None:
    """Validate the URL of a locator. Raises SourceError."""
    try:
        authority = urlsplit(locator).netloc
        origin(locator)
    except ValueError:  # its text may quote part of a password
        raise ProtocolError("not a valid URL", locator=locator) from None
    if "@" in authority:
        hint = "put credentials into ~/.netrc, and remove them from the locator"
        raise SourceError("a URL must not contain credentials", locator=locator, hint=hint)
    if _CONTROL.search(locator) or not _AUTHORITY.match(authority):
        raise ProtocolError("not a valid URL", locator=locator)


def follow(url: str, location: str | None, locator: str) -> str:
    """The absolute URL of a ``Location`` header. Raises ProtocolError if it is forbidden."""
    if not location:
        raise ProtocolError("redirected without a Location header", locator=locator)
    if _CONTROL.search(location):
        raise ProtocolError("redirected to an address with control characters", locator=locator)
    try:
        # http.client decodes headers as latin-1; servers that send raw bytes there mean UTF-8.
        redirect_url = urljoin(url, quote(location.encode("latin-1"), safe=_RESERVED))
        parts = urlsplit(redirect_url)
        scheme, host, _ = origin(redirect_url)
    except ValueError:
        raise ProtocolError("redirected to an invalid URL", locator=locator) from None
    if scheme not in ("http", "https") or not host:
        raise ProtocolError(f"redirected to a {scheme[:20] or 'nameless'} address", locator=locator)
    if url.lower().startswith("https:") and scheme == "http":
        raise ProtocolError("redirected from https to http", locator=locator)
    if "@" in parts.netloc:
        raise ProtocolError("redirected to an address with credentials in it", locator=locator)
    if not _AUTHORITY.match(parts.netloc) or ("%" in host and ":" not in host):
        raise ProtocolError("redirected to an invalid host", locator=locator)
    return redirect_url
