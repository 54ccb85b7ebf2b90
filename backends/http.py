"""``http://`` and ``https://``: ranges, redirects followed by ourselves, and folders listed by SHA256SUMS or index page."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html.parser import HTMLParser
from http.client import HTTPException
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import requests
import urllib3

from . import credentials
from .base import Body, Listed, Listing, join, read_all, read_body
from .errors import (
    Denied,
    Misbehaved,
    NotFound,
    NotListable,
    SourceError,
    Throttled,
    TimedOut,
    Unreachable,
    redact,
)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
_REDIRECTS = 5
_LISTING_BYTES = 64 << 20
_PAGES = 10_000
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\Z")
_SUMS_LINE = re.compile(r"\\?([0-9A-Fa-f]{64}) [ *](.+)\Z")
_INDEX_TITLE = re.compile(r"\s*(Index of|Directory listing for)\b")  # nginx and Apache; Python's http.server


class HttpSource:
    """Any web server. Bytes are asked for as they are (``identity``), because a range of a compressed form is no range.

    One session is shared by all threads; nothing is retried here.
    """

    network = True

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        token: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        """*token* gives the bearer token for a URL, asked anew for every hop of a redirect."""
        self._environ = os.environ if environ is None else environ
        self._token = token
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers = requests.structures.CaseInsensitiveDict(
            {"User-Agent": "modelstow", "Accept": "*/*", "Accept-Encoding": "identity"}
        )
        adapter = requests.adapters.HTTPAdapter(pool_connections=16, pool_maxsize=64, max_retries=0)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        headers = {}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        response = self._ask("GET", locator, headers)
        if headers and not _answers(response, start):
            # 416, several parts, another range: the server and we differ about the object. Ask for all of it; the
            # reader compares the length.
            response.close()
            response = self._ask("GET", locator, {})
        return _body(response, locator, ranged=not headers or "Content-Range" in response.headers)

    def size(self, locator: str) -> int | None:
        response = self._ask("HEAD", locator, {})
        response.close()
        if (length := _length(response)) is not None:
            return length
        body = self.open(locator, start=0, stop=1)
        body.close()
        return body.total

    def listing(self, locator: str) -> Listing:
        folder = locator.rstrip("/") + "/"
        try:
            text = read_all(self, folder + "SHA256SUMS", at_most=_LISTING_BYTES).decode("utf-8")
        except (NotFound, Denied) as error:
            # Static servers on object stores answer 403 for what is not there.
            files = tuple(self._index(folder, because=error))
        except ValueError as error:
            raise NotListable(f"SHA256SUMS is unreadable ({error})", locator=locator) from error
        else:
            files = self._sums(folder, text)
        return Listing(locator=locator, files=files)

    def origin(self, locator: str) -> str:
        parts = urlsplit(locator)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    # ---- asking

    def _ask(self, method: str, locator: str, headers: Mapping[str, str]) -> requests.Response:
        """One answer with a body to read, after redirects. Raises SourceError for every other status."""
        url = locator
        _origin(locator, locator)
        for _ in range(_REDIRECTS + 1):
            # Credentials are looked up for the host that is asked, so a redirect takes none along.
            token = self._token(url)
            auth = None if token else credentials.netrc_auth(url, self._environ)
            bearer = {"Authorization": f"Bearer {token}"} if token else {}
            try:
                response = self._session.request(
                    method,
                    url,
                    headers={**headers, **bearer},
                    stream=True,
                    allow_redirects=False,
                    timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                    proxies=credentials.proxies(url, self._environ),
                    verify=credentials.ca_bundle(self._environ),
                    auth=auth,
                )
            except (
                requests.RequestException,
                urllib3.exceptions.HTTPError,
                HTTPException,
                OSError,
                ValueError,
            ) as error:
                raise _translated(error, locator) from error
            if response.status_code not in (301, 302, 303, 307, 308):
                _check_status(response, locator, ranged="Range" in headers)
                return response
            target = urljoin(url, response.headers.get("Location", ""))
            response.close()
            url = _redirect(url, target, locator)
        raise Misbehaved(f"more than {_REDIRECTS} redirects", locator=locator)

    def page(self, url: str, *, at_most: int) -> tuple[bytes, str]:
        """A small answer whole, and the address of the page behind it by its ``Link`` header; empty at the last.

        Raises SourceError, ValueError where it is longer than *at_most* bytes.
        """
        response = self._ask("GET", url, {})
        behind = response.links.get("next", {}).get("url", "")
        return read_body(_body(response, url, ranged=True), at_most=at_most), behind and urljoin(response.url, behind)

    # ---- listing

    def _sums(self, folder: str, text: str) -> tuple[Listed, ...]:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _SUMS_LINE.match(line)
            if match is None:
                raise NotListable(f"SHA256SUMS line {number} is not '<64 hex>  <path>'", locator=folder)
            rows.append((match[2].removeprefix("./"), match[1].lower()))
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(lambda row: self.size(join(folder, row[0])), rows))
        return tuple(Listed(path=p, size=n, sha256=h) for (p, h), n in zip(rows, sizes, strict=True))

    def _index(self, folder: str, *, because: SourceError) -> Iterator[Listed]:
        waiting, seen = [folder], {folder}
        while waiting:
            page = waiting.pop()
            if len(seen) > _PAGES:
                raise NotListable(f"more than {_PAGES} index pages", locator=folder)
            for url in self._links(page, folder, because):
                if url.endswith("/"):
                    if url not in seen:
                        seen.add(url)
                        waiting.append(url)
                else:
                    yield Listed(path=unquote(url[len(folder) :]))

    def _links(self, page: str, folder: str, because: SourceError) -> list[str]:
        no_index = NotListable(
            "the server has neither SHA256SUMS nor an index page",
            locator=folder,
            hint="list the variant's `files` with path, size and sha256 in models.toml",
        )
        try:
            html = read_all(self, page, at_most=_LISTING_BYTES).decode("utf-8", "replace")
        except (NotFound, Denied, ValueError) as error:
            if isinstance(because, Denied) and isinstance(error, Denied):
                raise error from because  # not a missing listing: we may not look
            raise no_index from error
        parser = _Links()
        parser.feed(html)
        if not _INDEX_TITLE.match(parser.title):
            raise no_index
        links = []
        for href in parser.hrefs:
            url, fragment = urldefrag(urljoin(page, href))
            below = url.startswith(page) and url != page and not fragment
            if below and "?" not in url:
                links.append(url)
        return sorted(set(links))


class _Links(HTMLParser):
    """The title and the links of a page."""

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


def _answers(response: requests.Response, start: int) -> bool:
    """Whether a ranged request was answered by that range, or by the whole from byte 0."""
    if response.status_code == 416:
        return False
    span = response.headers.get("Content-Range")
    if span is None:
        return response.status_code != 206  # several parts, or a server that forgot to say
    match = _RANGE.match(span)
    # Decided by Content-Range, not by status: some S3 servers send a range with status 200.
    return match is not None and int(match[1]) == start


def _body(response: requests.Response, locator: str, *, ranged: bool) -> Body:
    span = _RANGE.match(response.headers.get("Content-Range", ""))
    start = int(span[1]) if span else 0
    total = (int(span[3]) if span[3] != "*" else None) if span else _length(response)
    raw = response.raw
    # urllib3's own readinto costs five times more than the http.client response beneath it. The attribute is private:
    # used here only, with the public way as fall-back; a test notices when it changes.
    fast = getattr(raw, "_fp", None)
    read = getattr(fast, "readinto", None) or raw.readinto
    done = False

    def read_into(view: memoryview) -> int:
        nonlocal done
        if done:
            return 0
        try:
            count: int = read(view)
        except (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError) as error:
            raise _translated(error, locator) from error
        if count == 0 and len(view):
            done = True
            raw.release_conn()
        return count

    def close() -> None:
        # At its end http.client has closed the response by itself; then the connection is good for another request.
        if getattr(fast, "isclosed", lambda: done)():
            raw.release_conn()
            return
        with suppress(OSError, ValueError, RuntimeError):  # wakes a thread that waits for bytes
            raw.shutdown()
        response.close()

    return Body(start=start, total=total, read_into=read_into, close=close, ranged=ranged)


def _length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if _is_number(text) else None


def _is_number(text: str) -> bool:
    """Plain digits, and not so many that converting them would be refused."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def _origin(url: str, locator: str) -> tuple[str, str, int]:
    try:
        return credentials.origin(url)
    except ValueError as error:
        raise Misbehaved(f"not a URL that can be asked ({error})", locator=locator) from error


def _redirect(url: str, target: str, locator: str) -> str:
    scheme, host, _ = _origin(target, locator)
    if scheme not in ("http", "https") or not host:
        raise Misbehaved(f"redirected to a {scheme or 'nameless'} address", locator=locator)
    if url.startswith("https:") and scheme == "http":
        raise Misbehaved("redirected from https to http", locator=locator)
    if "@" in urlsplit(target).netloc:
        raise Misbehaved("redirected to an address with credentials in it", locator=locator)
    return target


def _check_status(response: requests.Response, locator: str, *, ranged: bool) -> None:
    status = response.status_code
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if status in (200, 206):
        if encoding not in ("", "identity"):
            response.close()
            raise Misbehaved(f"the server encodes the body as {encoding[:20]}", locator=locator)
        return
    if status == 416 and ranged:
        return
    retry_after = _retry_after(response.headers.get("Retry-After", ""))
    response.close()
    what = f"HTTP {status} {response.reason or ''}".strip()
    reason = response.headers.get("X-Error-Code", "")
    if status in (404, 410):
        raise NotFound(what, locator=locator, reason=reason)
    if status in (401, 403, 407):
        hint = "put a login for this host into ~/.netrc, or check the one there"
        raise Denied(what, locator=locator, hint=hint, reason=reason)
    if status in (429, 503):
        raise Throttled(what, locator=locator, retry_after=retry_after)
    if status == 408 or status >= 500:
        raise Unreachable(what, locator=locator, retry_after=retry_after)
    raise SourceError(what, locator=locator)


def _retry_after(text: str) -> float | None:
    """Seconds, from a number or a date; never negative."""
    if _is_number(text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _translated(error: Exception, locator: str) -> SourceError:
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, urllib3.exceptions.NewConnectionError):  # by its class a timeout, by its meaning none
            break
        if isinstance(chain, (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)):
            return TimedOut("the server did not answer in time", locator=locator)
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, requests.exceptions.SSLError | urllib3.exceptions.SSLError):
        return Misbehaved("the server's certificate is not valid", locator=locator, hint="REQUESTS_CA_BUNDLE names a CA")
    bad_url = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
    if isinstance(error, bad_url) or (isinstance(error, ValueError) and not isinstance(error, OSError)):
        return Misbehaved("the address cannot be asked", locator=locator)
    # The library's own text may hold the URL with its query: only the kind of failure is passed on.
    return Unreachable(f"connection failed ({_root(error)})", locator=redact(locator))


def _root(error: BaseException) -> str:
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return getattr(error, "strerror", None) or type(error).__name__
