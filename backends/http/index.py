"""Listings over HTTP: a SHA256SUMS file in the folder, or the index pages of the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urljoin

from ..errors import AccessDenied, NotFound, NotListable, SourceError
from ..source import Listed, Listing, Source, read_all
from . import checksums

_MAX_BYTES = 64 << 20
_MAX_PAGES = 10_000
_CHECKSUMS_HINT = (
    "recreate it in that folder, e.g. with `find . -type f ! -name 'SHA256SUMS*' -exec sha256sum {} + > SHA256SUMS`"
)
_INDEX_TITLE = re.compile(r"\s*(Index of|Directory listing for)\b")  # nginx and Apache; Python's http.server


def listing(source: Source, locator: str) -> Listing:
    """The files below *locator*; links to elsewhere are ignored. Raises SourceError."""
    folder = locator.rstrip("/") + "/"
    try:
        rows = checksums.parse(read_all(source, folder + checksums.NAME, at_most=_MAX_BYTES))
    except (NotFound, AccessDenied) as error:
        # Static servers on object stores respond 403 for a missing object.
        files = tuple(_from_index_pages(source, folder, no_checksums=error))
    except ValueError as error:
        raise NotListable(f"SHA256SUMS is unreadable ({error})", locator=locator, hint=_CHECKSUMS_HINT) from error
    else:
        files = tuple(Listed(path=path, sha256=sha256) for path, sha256 in rows.items())
    return Listing(locator=locator, files=files)


def _from_index_pages(source: Source, folder: str, *, no_checksums: SourceError) -> Iterator[Listed]:
    pending, seen = [folder], {folder}
    while pending:
        page = pending.pop()
        if len(seen) > _MAX_PAGES:
            raise NotListable(f"more than {_MAX_PAGES} index pages", locator=folder, hint="name a folder below it")
        try:
            links = _links(source, page, folder, no_checksums)
        except (NotListable, NotFound, AccessDenied) as error:
            if page == folder:
                raise
            yield Listed(path=unquote(page[len(folder) :]), error=error)
            continue
        for url in links:
            if url.endswith("/"):
                if url not in seen:
                    seen.add(url)
                    pending.append(url)
            else:
                yield Listed(path=unquote(url[len(folder) :]))


def _links(source: Source, page: str, folder: str, no_checksums: SourceError) -> list[str]:
    neither = "neither SHA256SUMS nor an index page" if page == folder else "no index page"
    no_index = NotListable(f"the server has {neither}", locator=page)
    try:
        html = read_all(source, page, at_most=_MAX_BYTES).decode("utf-8", "replace")
    except (NotFound, AccessDenied, ValueError) as error:
        if page == folder and isinstance(error, NotFound) and isinstance(no_checksums, NotFound):
            what, hint = f"nothing is at this address ({error.what})", "check the address"
            raise NotListable(what, locator=folder, hint=hint) from error
        if isinstance(no_checksums, AccessDenied) and isinstance(error, AccessDenied):
            raise error from no_checksums  # access is denied, rather than no listing available
        raise no_index from error
    parser = _LinkParser()
    parser.feed(html)
    if not _INDEX_TITLE.match(parser.title):
        raise no_index
    links = []
    for href in parser.hrefs:
        try:
            url, fragment = urldefrag(urljoin(page, href))
        except ValueError:  # not a valid URL
            continue
        is_below = url.startswith(page) and url != page and not fragment
        if is_below and "?" not in url:
            links.append(url)
    return sorted(set(links))


class _LinkParser(HTMLParser):
    """The title and the links of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []
        self.title = ""
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = tag == "title"
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]

    def handle_endtag(self, tag: str) -> None:
        self._in_title = self._in_title and tag != "title"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
