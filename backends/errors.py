"""What a source can complain about: one base; whether asking again can help is data, not a guess by the caller."""

from __future__ import annotations

import re

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?\Z")


class SourceError(Exception):
    """A source could not give the bytes. ``transient`` says whether asking the same again can help."""

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
        self.reason = reason  # the server's own code for its refusal, where it gives one
        self.status = status  # of HTTP, where a web server refused
        self.retry_after = retry_after  # seconds the source asks to be left alone
        super().__init__(f"{what}: {self.locator}")


class NotFound(SourceError):
    """There is nothing at the locator: the source may have the rest of the model, not this file."""

    code = "INCOMPLETE_DOWNLOAD"


class AccessDenied(SourceError):
    """The source wants credentials, or others."""

    code = "AUTH_FAIL"


class TargetFull(SourceError):
    """The target has no room."""

    code = "NO_SPACE"


class ProtocolError(SourceError):
    """The answer makes no sense: a wrong range, an encoding nobody asked for, a redirect that must not be followed."""


class NotListable(SourceError):
    """The source has the files but cannot say which."""


class Offline(SourceError):
    """The source needs a network and networks are forbidden."""


class ConnectionFailed(SourceError):
    """The connection could not be made or broke."""

    transient = True


class EndedEarly(ConnectionFailed):
    """The body stopped before its end."""

    code = "INCOMPLETE_DOWNLOAD"


class TimedOut(SourceError):
    """Nothing came for too long."""

    transient = True
    code = "NETWORK_TIMEOUT"


class Throttled(SourceError):
    """The source asks to be left alone for a while."""

    transient = True
    code = "RATE_LIMIT"


def redact(locator: str) -> str:
    """Drop userinfo and query (signed URLs carry secrets); keep scheme, host and path."""
    scheme, separator, rest = locator.partition("://")
    if not separator:
        return locator  # a path
    authority, slash, path = rest.partition("/")
    is_hub = scheme == "hf" and ":" not in authority  # in hf://gpt2@main what stands before the @ is the repository
    host = authority if is_hub else authority.rpartition("@")[2]
    if ("@" in authority and re.search(r"[?#]", authority)) or not _HOST.match(re.split(r"[?#]", host)[0]):
        return f"{scheme}://…"  # a password with a ?, # or / in it: where it ends, nobody can tell
    return re.split(r"[?#]", scheme + separator + host + slash + path, maxsplit=1)[0]
