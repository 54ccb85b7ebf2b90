"""The HTTP client: range requests, redirects under an address policy, classified errors."""

from __future__ import annotations

import functools
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException, IncompleteRead, LineTooLong, RemoteDisconnected
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from .. import environment
from ..errors import AccessDenied, ConnectionFailed, NotFound, ProtocolError, SourceError, Throttled, TimedOut
from ..source import Body, FetchObjects, Listing, read_body
from . import address_policy, connection, fast_response, index, redirects
from .address_policy import AllowedScope, NotAllowed
from .pipeline import Pipeline
from .redirects import RedirectCache, RedirectTarget
from .response import discard, make_body, parse_retry_after, release, satisfies_range, version_of

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
HEAD_TIMEOUT_S = 60.0
"""Seconds for the status line and all headers of one response, however slowly they arrive."""
_MAX_REDIRECTS = 5
_HEADERS = {"User-Agent": "modelstow", "Accept": "*/*", "Accept-Encoding": "identity"}
_LIBRARY_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class _Request:
    """A request, independent of redirects. *short*: ``fast_response`` can read the body."""

    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    short: bool = False

    @classmethod
    def of(cls, start: int, stop: int | None) -> _Request:
        """A request for bytes ``[start, stop)``; None means the end."""
        if not start and stop is None:
            return cls()
        last = "" if stop is None else stop - 1
        return cls("GET", {"Range": f"bytes={start}-{last}"}, stop is not None and stop - start <= fast_response.MAX_BODY)

    @property
    def ranged(self) -> bool:
        return bool(self.headers)


class HttpSource:
    """The source for web servers.

    It requests the ``identity`` encoding: a range of compressed bytes is no range of the object.
    Connections are shared by all threads. Nothing is retried here, except that an expired cached
    redirect is resolved again. Redirects are limited by ``address_policy``.
    """

    network = True

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        token: Callable[[str], str | None] = lambda url: None,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*token*: the bearer token for a URL, requested for every hop; *clock* ages redirects."""
        self._environ = dict(os.environ) if environ is None else environ  # a dict is faster
        self._token = token
        self._redirects = RedirectCache(clock)
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        self._connections = {
            scope: connection.HttpConnections(scope, head_timeout_s=head_timeout_s, timeout=timeout)
            for scope in AllowedScope
        }

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body:
        request = _Request.of(start, stop)
        response = self._request_cached_redirect(locator, request, start) if request.ranged else None
        if response is None:
            response = self._request(request, locator)
        if request.ranged and not _satisfies_range(response, start):
            # 416, multipart/byteranges or another range: the object is not the expected one.
            # Request all of it; the reader compares the length.
            release(response)
            response = self._request(_Request(), locator)
        return _body(response, locator, ranged=not request.ranged or "Content-Range" in response.headers)

    def size(self, locator: str) -> int | None:
        # Some servers refuse HEAD, do not answer it, or answer it with the length 0.
        with suppress(SourceError):
            response = self._request(_Request("HEAD"), locator)
            release(response)
            if length := _length(response):
                return length
        body = self.open(locator, start=0, stop=1)
        body.close()
        return body.total

    def listing(self, locator: str) -> Listing:
        return index.listing(self, locator)

    def origin(self, locator: str) -> str:
        parts = urlsplit(locator)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    @contextmanager
    def pipeline(self, locator: str, poll: Callable[[], None]) -> Iterator[FetchObjects | None]:
        if self._redirects.get(locator) is not None or environment.proxy(locator, self._environ):
            yield None
            return
        redirects.check(locator)
        connections, bundle = self._connections[AllowedScope.ANY], environment.ca_bundle(self._environ)
        with connections.pipeline(locator, bundle, poll) as pipeline:
            if pipeline is None:
                yield None
            else:
                yield functools.partial(_objects, pipeline, {**_HEADERS, **self._authorization(locator, locator)})

    # ---- requests

    def _request(self, request: _Request, locator: str) -> urllib3.BaseHTTPResponse:
        """A response with a body, after redirects. Raises SourceError for any error status."""
        redirects.check(locator)
        redirect_target = RedirectTarget(locator, AllowedScope.ANY)
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._send(request, redirect_target, locator)
            if response.status not in (301, 302, 303, 307, 308):
                _check_response(response, locator, redirect_target.url, ranged=request.ranged)
                if request.method == "GET" and redirect_target.url != locator:
                    self._redirects.put(locator, redirect_target)
                return response
            discard(response)
            url = redirects.follow(redirect_target.url, response.headers.get("Location"), locator)
            redirect_target = RedirectTarget(url, self._allowed_scope(url, locator))
        raise ProtocolError(f"more than {_MAX_REDIRECTS} redirects", locator=locator)

    def page(self, url: str, *, at_most: int) -> tuple[bytes, str]:
        """A small body, and the URL of the next page from its ``Link`` header, else empty.

        Raises SourceError, ValueError if it exceeds *at_most* bytes.
        """
        response = self._request(_Request(), url)
        links = requests.utils.parse_header_links(response.headers.get("Link", ""))
        next_url = next((link["url"] for link in links if link.get("rel") == "next"), "")
        data = read_body(_body(response, url, ranged=True), at_most=at_most, locator=url)
        return data, next_url and urljoin(response.url or url, next_url)

    def _request_cached_redirect(self, locator: str, request: _Request, start: int) -> urllib3.BaseHTTPResponse | None:
        """The response of the cached redirect target; None if there is none, or it fails.

        So an expired signed URL is renewed, and many ranges of a file cost the hub one request.
        """
        redirect_target = self._redirects.get(locator)
        if redirect_target is None:
            return None
        try:
            response = self._send(request, redirect_target, locator)
            if response.status in (200, 206) and _satisfies_range(response, start):
                _check_response(response, locator, redirect_target.url, ranged=True)
                return response
            discard(response)
        except SourceError:
            pass
        self._redirects.discard(locator, redirect_target)
        return None

    def _send(self, request: _Request, redirect_target: RedirectTarget, locator: str) -> urllib3.BaseHTTPResponse:
        """A single request without redirects; any status. Sends only the URL host's credentials."""
        url = redirect_target.url
        bundle = environment.ca_bundle(self._environ)
        if isinstance(bundle, str) and not os.path.exists(bundle):
            hint = "set REQUESTS_CA_BUNDLE to a file of trusted certificates, or unset it"
            raise SourceError("the file of trusted certificates does not exist", locator=locator, hint=hint)
        try:
            response = self._connections[redirect_target.scope].request(
                request.method,
                url,
                {**_HEADERS, **request.headers, **self._authorization(url, locator)},
                proxy=environment.proxy(url, self._environ),
                verify=bundle,
                short=request.short and url == locator,  # a signed URL may work only once
            )
        except NotAllowed as error:
            raise _redirect_not_allowed(error, locator) from None
        except _LIBRARY_ERRORS as error:
            # The text of a library error may contain the URL with its query, also in a printed
            # traceback: only the kind of failure is passed on.
            raise _source_error(error, locator) from None
        response.url = url
        return response

    def _authorization(self, url: str, locator: str) -> dict[str, str]:
        if token := self._token(url):
            return {"Authorization": f"Bearer {token}"}
        login = environment.netrc_auth(url, self._environ, locator=locator)
        return {"Authorization": urllib3.util.make_headers(basic_auth=":".join(login))["authorization"]} if login else {}

    def _allowed_scope(self, url: str, locator: str) -> AllowedScope:
        """The address scope for *url*, a redirect target of *locator*."""
        if environment.origin(url) == environment.origin(locator):
            return AllowedScope.ANY
        try:
            allowed = address_policy.scope_of(self._addresses(locator))
            if environment.proxy(url, self._environ):
                # The proxy resolves names, which cannot be checked here; numeric addresses can.
                address_policy.check(urlsplit(url).hostname or "", self._addresses(url), allowed)
        except NotAllowed as error:
            raise _redirect_not_allowed(error, locator) from None
        except _LIBRARY_ERRORS as error:
            raise _source_error(error, locator) from None
        return allowed

    def _addresses(self, url: str) -> tuple[str, ...]:
        _, host, port = environment.origin(url)
        return address_policy.resolve(host, port, literal=bool(environment.proxy(url, self._environ)))


def _objects(pipeline: Pipeline, headers: Mapping[str, str], objects: Sequence[tuple[str, int]]) -> Iterator[bytes | None]:
    requests = []
    for locator, length in objects:
        redirects.check(locator)
        target = urllib3.util.parse_url(locator).request_uri
        requests.append(pipeline.request(target, {**headers, "Range": f"bytes=0-{length - 1}"}))
    return pipeline.bodies(requests, [length for _, length in objects])


def _satisfies_range(response: urllib3.BaseHTTPResponse, start: int) -> bool:
    return satisfies_range(response.status, response.headers.get("Content-Range"), start)


def _body(response: urllib3.BaseHTTPResponse, locator: str, *, ranged: bool) -> Body:
    headers, length = response.headers, _length(response)
    version = version_of(headers.get("ETag", ""), headers.get("Last-Modified", ""), headers.get("Date", ""))
    content_range = headers.get("Content-Range")
    return make_body(
        response, content_range, length, lambda error: _source_error(error, locator), ranged=ranged, version=version
    )


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _check_response(response: urllib3.BaseHTTPResponse, locator: str, url: str, *, ranged: bool) -> None:
    """Reject any response but one with a body; *url* is the final URL. Raises SourceError."""
    status = response.status
    if status in (200, 206):
        encodings = [response.headers.get("Content-Encoding", ""), response.headers.get("Transfer-Encoding", "")]
        unsupported = [text for text in encodings if text.strip().lower() not in ("", "identity", "chunked")]
        if unsupported:
            release(response)
            # Filtered, since headers may contain terminal escape sequences.
            raise ProtocolError(
                f"the server encodes the body as {re.sub('[^A-Za-z0-9, -]', '', unsupported[0])[:20]}", locator=locator
            )
        return
    if status == 416 and ranged:
        return
    retry_after = parse_retry_after(response.headers.get("Retry-After", ""))
    discard(response)
    error = _status_error(status, locator, url, retry_after)
    error.reason = response.headers.get("X-Error-Code", "")
    error.status = status
    raise error


def _status_error(status: int, locator: str, url: str, retry_after: float | None) -> SourceError:
    what = f"HTTP {status}"
    with suppress(ValueError):  # the standard phrase, not the server's
        what += f" {HTTPStatus(status).phrase}"
    hint = "add a login for this host to ~/.netrc, or check the existing one"
    if environment.origin(url) != environment.origin(locator):
        what += f" from {urlsplit(url).netloc}, where it redirects to"
        hint = f"the redirect target refused, not {urlsplit(locator).netloc}; if this persists, report it to its operator"
    if status in (404, 410):
        return NotFound(what, locator=locator)
    if status in (401, 403, 407):
        return AccessDenied(what, locator=locator, hint=hint)
    if status in (429, 503):
        return Throttled(what, locator=locator, retry_after=retry_after)
    if status == 408 or status >= 500:
        return ConnectionFailed(what, locator=locator, retry_after=retry_after)
    return SourceError(what, locator=locator, hint=hint if url != locator else "")


def _redirect_not_allowed(error: NotAllowed, locator: str) -> ProtocolError:
    hint = "only an origin in a private network may redirect into one; if intended, use the target itself as the source"
    return ProtocolError(f"redirected to an address that is not allowed ({error})", locator=locator, hint=hint)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _source_error(error: Exception, locator: str) -> SourceError:
    """The SourceError for an exception of requests, urllib3 or http.client, without its text."""
    for cause in _chain(error):
        if isinstance(cause, urllib3.exceptions.NewConnectionError):  # a timeout by class only
            break
        if isinstance(cause, (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)):
            return TimedOut("the server did not answer in time", locator=locator)
        if isinstance(cause, urllib3.exceptions.SSLError) and (what := _tls_error(cause)):
            return ProtocolError(what, locator=locator, hint="REQUESTS_CA_BUNDLE names a file of certificates to trust")
        if isinstance(cause, RemoteDisconnected | IncompleteRead | ConnectionError):
            break
        if isinstance(cause, LineTooLong) or type(cause) is HTTPException:  # plain: too many headers
            return ProtocolError("the response header is too large", locator=locator)
        if isinstance(cause, urllib3.exceptions.InvalidHeader | requests.exceptions.InvalidHeader):
            return ProtocolError("the response has conflicting lengths in its header", locator=locator)
    bad_url = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
    if isinstance(error, bad_url) or (isinstance(error, ValueError) and not isinstance(error, OSError)):
        return ProtocolError("not a valid URL", locator=locator)
    *_, root = _chain(error)
    return ConnectionFailed(
        f"connection failed ({getattr(root, 'strerror', None) or type(root).__name__})", locator=locator
    )


def _tls_error(error: urllib3.exceptions.SSLError) -> str:
    """Why TLS does not trust the server; empty if the connection just broke."""
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the server's certificate is not valid ({cause.verify_message})"
        if isinstance(cause, ssl.SSLError):
            broke = isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
            return "" if broke else f"TLS failed ({cause.reason or type(cause).__name__})"
    return ""
