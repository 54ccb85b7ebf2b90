"""Locators: the rules for those in a lockfile, and for the sources and mirrors that users name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = ("http", "https", "hf", "s3", "file")
EXAMPLES = "https://host/folder, hf://org/name, s3://bucket/prefix"


@dataclass(frozen=True, slots=True)
class LocatorError:
    """Why a locator is not allowed, and what to write instead. Neither text repeats a secret of the locator."""

    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}" if self.hint else self.what


def check_locator(url: str) -> LocatorError | None:
    """The reason why a lockfile must not hold a locator (a secret in it, a malformed part); None for a valid one."""
    if not url or _UNPRINTABLE.search(url):
        return LocatorError("a locator must be text without control characters")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return None
    authority = rest.partition("/")[0].partition("?")[0]
    if "@" in authority and scheme.lower() in ("http", "https", "ftp", "s3"):
        return LocatorError("holds credentials", "put them into ~/.netrc and the locator without them")
    if "\\" in authority:
        return LocatorError("has a backslash in its host")
    query = rest.partition("?")[2]
    pinned = scheme.lower() == "s3" and re.fullmatch(r"versionId=[^&]+", query)  # an S3 version, as `lock` writes it
    if query and not pinned and scheme.lower() in ("http", "https", "s3", "hf"):
        return LocatorError(
            "holds a query, which may be a signature that expires or a secret", "give the address without it"
        )
    return None


def check_source(locator: str) -> LocatorError | None:
    """The reason why a source or mirror is invalid: that of ``check_locator``, or an incomplete address. None if valid."""
    if problem := check_locator(locator):
        return problem
    match = _SCHEME.match(locator)
    if match is None:
        return None
    scheme, authority = match[1].lower(), locator[match.end() :].partition("/")[0]
    if scheme not in _SCHEMES:
        return LocatorError(
            f"{match[1]}:// is not a supported scheme", f"known: paths, {', '.join(s + '://' for s in _SCHEMES)}"
        )
    if scheme == "hf":
        return _check_hub(locator)
    if scheme == "s3":
        return None if authority else LocatorError("names no bucket", "write s3://bucket/prefix")
    if scheme == "file":
        valid = authority in ("", "localhost") and urlsplit(locator).path
        return None if valid else LocatorError("a file URL has a path and no host", "write file:///path")
    return None if authority else LocatorError("names no server", f"write {scheme}://host/folder")


def _check_hub(locator: str) -> LocatorError | None:
    from modelstow.backends import SourceError
    from modelstow.backends.hf.locator import HubPath

    try:
        HubPath.parse(normalize(locator))
    except SourceError as error:
        return LocatorError(error.what, error.hint)
    return None


def normalize(source: str) -> str:
    """The canonical form of a source: the scheme in lower case, no trailing slash (but that of a root or bare scheme)."""
    if match := _SCHEME.match(source):
        source = source[: match.end(1)].lower() + source[match.end(1) :]
    bare = source.rstrip("/")
    return source if not bare or bare.endswith(":") else bare
