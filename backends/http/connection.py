"""Connection pools with checked addresses, and a deadline for the header of a response.

The library's read timeout restarts with every byte, so a server that trickles its header never
exceeds it. Here the file that http.client reads from limits each read of the header to the time
left until the deadline; no thread is needed to enforce it.
"""

from __future__ import annotations

import errno
import functools
import http.client
import io
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import create_connection

from . import fast_response
from .address_policy import AllowedScope, check, resolve
from .pipeline import Pipeline

_MAX_ADDRESSES = 6  # tried per host: each may take the whole connect timeout
_MAX_POOLS = 64  # origins whose pools are kept
_WHOLE_TIMEOUT = 0.99  # with this share of the read timeout left, it is not lowered for one read


@dataclass(frozen=True, slots=True)
class _Route:
    """The pool for one origin. *absolute_form*: the proxy needs whole URLs (RFC 9112, 3.2.2)."""

    pool: HTTPConnectionPool
    absolute_form: bool


class HttpConnections:
    """Connection pools for servers within *scope*; NotAllowed propagates unchanged. Thread-safe.

    requests sets up proxies, certificates and pools, once per origin. Each request goes straight to
    the urllib3 pool: requests takes three times as long to prepare and wrap one as to send it.
    Each scope needs its own instance: a pooled connection was checked when it was opened.
    """

    def __init__(self, scope: AllowedScope, *, head_timeout_s: float, timeout: urllib3.Timeout) -> None:
        self._adapter, self._timeout = _Adapter(scope, head_timeout_s), timeout
        self._route = functools.lru_cache(_MAX_POOLS)(self._find_route)
        self._no_fast_path: set[_Route] = set()  # routes whose responses need the full parser
        self._no_pipeline: set[_Route] = set()

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        proxy: str = "",
        verify: str | bool = True,
        short: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """A single request, without redirects or retries; any status.

        *proxy*: its URL, if any; *verify*: as in requests; *short*: a short body is expected.
        Raises the exceptions of requests, urllib3 and http.client.
        """
        parts = urllib3.util.parse_url(url)
        key = parts.scheme or "", parts.netloc or "", proxy, verify
        for _ in range(2):
            route = self._route(*key)
            if short and not proxy and (response := self._fast_get(route, parts.request_uri, headers)):
                return response
            target = parts._replace(auth=None, fragment=None).url if route.absolute_form else parts.request_uri
            with suppress(urllib3.exceptions.ClosedPoolError):  # evicted: too many origins
                return route.pool.urlopen(
                    method,
                    target,
                    headers=headers,
                    redirect=False,
                    retries=False,
                    assert_same_host=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=self._timeout,
                )
            self._route.cache_clear()
            self._no_fast_path.clear()
            self._no_pipeline.clear()
        raise urllib3.exceptions.PoolError(route.pool, "closed repeatedly")

    def _fast_get(self, route: _Route, target: str, headers: Mapping[str, str]) -> urllib3.HTTPResponse | None:
        """The response by the fast path; None if it does not apply, or no connection is idle."""
        with self._idle_connection(route) as connection:
            if connection is None:
                return None
            try:
                response, reusable = fast_response.fast_get(connection, target, headers, connection.head_timeout_s)
                if not reusable:
                    connection.close()
                return response
            except fast_response.NeedsFullParser as error:
                connection.close()
                if error.permanent:
                    self._no_fast_path.add(route)
                return None

    @contextmanager
    def _idle_connection(self, route: _Route) -> Iterator[Any]:
        """An open connection of the pool, borrowed; None if there is none. Closed if the block raises.

        Pools lend connections only to their own requests; borrowing one takes two private methods.
        If a later version lacks them, every request takes the full path.
        """
        get_conn, put_conn = getattr(route.pool, "_get_conn", None), getattr(route.pool, "_put_conn", None)
        if route in self._no_fast_path or get_conn is None or put_conn is None:
            yield None
            return
        try:
            connection: Any = get_conn()
        except urllib3.exceptions.ClosedPoolError:
            yield None
            return
        try:
            yield connection if connection.sock is not None else None
        except BaseException:
            connection.close()  # the rest of the response may be in it
            raise
        finally:
            put_conn(connection)

    @contextmanager
    def pipeline(self, url: str, verify: str | bool, poll: Callable[[], None]) -> Iterator[Pipeline | None]:
        """A pipeline to the origin of *url*, which has no proxy; None if no connection to it is idle, or none applies."""
        parts = urllib3.util.parse_url(url)
        route = self._route(parts.scheme or "", parts.netloc or "", "", verify)
        with self._idle_connection(route) as connection:
            if connection is None or route in self._no_pipeline:
                yield None
                return
            pipeline = Pipeline(connection, poll)
            yield pipeline
            if not pipeline.reusable:
                connection.close()
            if not pipeline.plain:
                self._no_pipeline.add(route)

    def _find_route(self, scheme: str, netloc: str, proxy: str, verify: str | bool) -> _Route:
        request = requests.Request("GET", f"{scheme}://{netloc}/").prepare()
        proxies = {scheme: proxy} if proxy else {}
        pool = cast(HTTPConnectionPool, self._adapter.get_connection_with_tls_context(request, verify, proxies))
        self._adapter.cert_verify(pool, request.url, verify, None)  # type: ignore[no-untyped-call]
        return _Route(pool, absolute_form=self._adapter.request_url(request, proxies) != "/")


class _Adapter(requests.adapters.HTTPAdapter):
    """The pool manager of requests, with checked connections, also to proxies."""

    def __init__(self, scope: AllowedScope, head_timeout_s: float) -> None:
        own = {"scope": scope, "head_timeout_s": head_timeout_s}
        plain, secure = type("Plain", (_CheckedHTTPConnection,), own), type("Secure", (_CheckedHTTPSConnection,), own)
        self._pools = {
            "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
        }
        super().__init__(pool_connections=_MAX_POOLS, pool_maxsize=64)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if isinstance(manager, urllib3.ProxyManager):  # SOCKS managers have their own pools
            manager.pool_classes_by_scheme = self._pools
        return manager


class _CheckedHTTPConnection(HTTPConnection):
    """A connection to a checked address of its host; TLS still verifies the host name."""

    scope: AllowedScope
    head_timeout_s: float

    def _new_conn(self) -> socket.socket:
        if self.proxy is not None:  # chosen by the user; it resolves the host itself
            return super()._new_conn()
        try:
            addresses = resolve(self.host, self.port)
        except socket.gaierror as error:
            raise urllib3.exceptions.NameResolutionError(self.host, self, error) from error
        check(self.host, addresses, self.scope)
        failure: OSError = OSError("the host has no address")
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                # A numeric address is not looked up again.
                return create_connection(
                    (address, self.port), self.timeout, self.source_address, socket_options=self.socket_options
                )
            except OSError as error:
                failure = error
        if isinstance(failure, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(self, "connect timeout") from failure
        raise urllib3.exceptions.NewConnectionError(self, "cannot connect") from failure

    def response_class(  # type: ignore[override]  # http.client only calls it: it need not be a class
        self, sock: socket.socket, **options: Any
    ) -> http.client.HTTPResponse:
        """Construct a response for http.client, also that of a proxy to CONNECT."""
        return _Response(_DeadlineReader(sock, time.monotonic() + self.head_timeout_s), **options)


class _CheckedHTTPSConnection(_CheckedHTTPConnection, HTTPSConnection):
    """The same with TLS."""


class _Response(http.client.HTTPResponse):
    """A response with a deadline for its header."""

    def __init__(self, reader: _DeadlineReader, **options: Any) -> None:
        super().__init__(reader, **options)  # type: ignore[arg-type]  # it only calls sock.makefile
        self._reader = reader

    def begin(self) -> None:
        super().begin()
        self._reader.deadline = None


class _DeadlineReader(io.RawIOBase):
    """The bytes of a socket. While *deadline* is set, in monotonic seconds, reads end by then."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._raw = sock, sock.makefile("rb", buffering=0)
        self.deadline: float | None = deadline
        self._read_timeout = sock.gettimeout()  # seconds

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        if self.deadline is None:
            return self._raw.readinto(buffer)
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the response header took too long")
        if self._read_timeout is not None and remaining > _WHOLE_TIMEOUT * self._read_timeout:
            count = self._raw.readinto(buffer)  # mostly the whole header arrives at once
        else:
            self._sock.settimeout(remaining)
            try:
                count = self._raw.readinto(buffer)
            finally:
                self._sock.settimeout(self._read_timeout)
        if count == 0:  # http.client would accept a truncated header, with half a Location in it
            raise ConnectionResetError(errno.ECONNRESET, "closed before the end of the response header")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _QueryRedactor(logging.Filter):
    """A log filter that removes queries from the library's messages: in a signed URL, they are credentials."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args, record.exc_info = re.sub(r"\?[^\s\"']*", "?…", record.getMessage()), (), None
        return True


for _name in ("urllib3.connection", "urllib3.connectionpool"):
    logging.getLogger(_name).addFilter(_QueryRedactor())
