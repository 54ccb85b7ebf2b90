"""Which locators may stand where: in a lockfile, and as the source or mirror that people name."""

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
    """Why a locator may not stand somewhere, and what to write instead. Neither holds a secret of it."""

    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}" if self.hint else self.what


def check_locator(url: str) -> LocatorError | None:
    """Why a locator may not stand in a lockfile: it holds a secret or is malformed. None for a good one."""
    if not url or _UNPRINTABLE.search(url):
        return LocatorError("a locator is text without control characters")
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
    """Why a locator may be no source and no mirror: as in a lockfile, or it names none. None for a good one."""
    if flaw := check_locator(locator):
        return flaw
    match = _SCHEME.match(locator)
    if match is None:
        return None
    scheme, authority = match[1].lower(), locator[match.end() :].partition("/")[0]
    if scheme not in _SCHEMES:
        return LocatorError(
            f"{match[1]}:// is not a kind of source", f"known: paths, {', '.join(s + '://' for s in _SCHEMES)}"
        )
    if scheme == "hf":
        return _check_hub(locator)
    if scheme == "s3":
        return None if authority else LocatorError("names no bucket", "write s3://bucket/prefix")
    if scheme == "file":
        good = authority in ("", "localhost") and urlsplit(locator).path
        return None if good else LocatorError("a file URL names a path, and no host", "write file:///path")
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
    """A folder is one with or without the last slash, and a scheme is one in any case; what is only a scheme or a root
    stays as it is."""
    if match := _SCHEME.match(source):
        source = source[: match.end(1)].lower() + source[match.end(1) :]
    bare = source.rstrip("/")
    return source if not bare or bare.endswith(":") else bare
