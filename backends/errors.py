"""Error types of sources; whether a retry can help is data (``transient``), not a guess."""

from __future__ import annotations

import re

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?\Z")


class SourceError(Exception):
    """Base of all errors of a source. ``transient``: whether retrying the same request can help."""

    transient = False
    code = "SOURCE_UNAVAILABLE"

    def __init__(
        self,
        what: str,
        *,
        locator: str,
        hint: str = "",
        retry_after: float | None = None,
        reason: str = "",
        status: int | None = None,
    ) -> None:
        self.what, self.locator, self.hint = what, redact(locator), hint
        self.reason = reason  # machine-readable: the server's error code, or one of the source
        self.status = status  # HTTP status code, if there was a response
        self.retry_after = retry_after  # seconds, from the server; do not retry sooner
        super().__init__(f"{what}: {self.locator}")


class NotFound(SourceError):
    """No object at the locator (404): other files of the model may exist at this source."""

    code = "INCOMPLETE_DOWNLOAD"


class Changed(SourceError):
    """The object changed while it was read, each time that it was tried."""

    code = "CONCURRENT_MODIFICATION"


class AccessDenied(SourceError):
    """Missing or insufficient credentials (401, 403)."""

    code = "AUTH_FAIL"


class TargetFull(SourceError):
    """No space left at the upload target."""

    code = "NO_SPACE"


class ProtocolError(SourceError):
    """An invalid response: a wrong range, an unrequested encoding, a forbidden redirect."""


class NotListable(SourceError):
    """A source without a listing: files can be read by name, but not enumerated."""


class Offline(SourceError):
    """A request to a network source while offline."""


class ConnectionFailed(SourceError):
    """A connection that could not be established, or was lost."""

    transient = True


class EndedEarly(ConnectionFailed):
    """A body shorter than announced."""

    code = "INCOMPLETE_DOWNLOAD"


class TimedOut(SourceError):
    """A timeout: no data within the limit."""

    transient = True
    code = "NETWORK_TIMEOUT"


class Throttled(SourceError):
    """Rate limiting by the source (429, 503); ``retry_after`` may say for how long."""

    transient = True
    code = "RATE_LIMIT"


def redact(locator: str) -> str:
    """A locator without userinfo and query (signed URLs carry secrets): scheme, host and path."""
    scheme, separator, rest = locator.partition("://")
    if not separator:
        return locator  # a path
    authority, slash, path = rest.partition("/")
    is_hub = scheme == "hf" and ":" not in authority  # in hf://gpt2@main, gpt2 is the repository
    host = authority if is_hub else authority.rpartition("@")[2]
    if ("@" in authority and re.search(r"[?#]", authority)) or not _HOST.match(re.split(r"[?#]", host)[0]):
        return f"{scheme}://…"  # a password with ?, # or / in it: its end cannot be determined
    return re.split(r"[?#]", scheme + separator + host + slash + path, maxsplit=1)[0]
