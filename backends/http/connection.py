"""Connections of our own make: to addresses that were checked, and with a deadline for the head of an answer.

The library's timeout counts from byte to byte, so a server that drips its headers would never meet it. Here the file that
http.client reads from gives each read of the head what is left of the deadline: no thread watches.
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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import create_connection

from . import fast_response
from .address_policy import AllowedScope, check, resolve

_ADDRESSES = 6  # of one host that are tried: each may take the whole connect timeout
_POOLS = 64  # origins whose connections are kept
_NEARLY = 0.99


@dataclass(frozen=True, slots=True)
class _Route:
    """How one origin is reached. *whole*: a proxy is asked, which wants whole addresses."""

    pool: HTTPConnectionPool
    whole: bool


class HttpConnections:
    """Asks servers within *reach*; NotAllowed comes through as it is. Safe for threads.

    requests knows proxies, certificates and pools of connections, and is asked once an origin. Each request goes to the
    pool beneath: to prepare and wrap one costs requests three times what it costs to send it.
    Each reach needs an object of its own: a pooled connection was checked when it was made, by the reach of then.
    """

    def __init__(self, reach: AllowedScope, *, head_timeout_s: float, timeout: urllib3.Timeout) -> None:
        self._adapter, self._timeout = _Adapter(reach, head_timeout_s), timeout
        self._route = functools.lru_cache(_POOLS)(self._find_route)
        self._no_fast_path: set[_Route] = set()  # whose answers are not brief

    def ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        proxy: str = "",
        verify: str | bool = True,
        briefly: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """One request and the head of its answer, whatever it is. *proxy* is its address, if there is one; *verify* as in
        requests; *briefly*: the body should be short. Raises what requests, urllib3 and http.client raise."""
        parts = urllib3.util.parse_url(url)
        where = parts.scheme or "", parts.netloc or "", proxy, verify
        for _ in range(2):
            route = self._route(*where)
            if briefly and not proxy and (answer := self._fast_get(route, parts.request_uri, headers)):
                return answer
            target = parts._replace(auth=None, fragment=None).url if route.whole else parts.request_uri
            with suppress(urllib3.exceptions.ClosedPoolError):  # one of too many origins
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
        raise urllib3.exceptions.PoolError(route.pool, "closed again and again")

    def _fast_get(self, route: _Route, target: str, headers: Mapping[str, str]) -> urllib3.HTTPResponse | None:
        """The same of a connection that is open; None where none is, or where it has to be asked in the common route.

        Pools give connections to their own requests alone; to take one takes two methods that are private. Where a later
        version has others, everything is asked in the common route.
        """
        take, put = getattr(route.pool, "_get_conn", None), getattr(route.pool, "_put_conn", None)
        if route in self._no_fast_path or take is None or put is None:
            return None
        try:
            connection: Any = take()
        except urllib3.exceptions.ClosedPoolError:
            return None
        try:
            if connection.sock is None:
                return None
            answer, again = fast_response.fast_get(connection, target, headers, connection.head_timeout_s)
            if not again:
                connection.close()
            return answer
        except fast_response.NeedsFullParser as what:
            connection.close()
            if what.remember:
                self._no_fast_path.add(route)
            return None
        except BaseException:
            connection.close()  # half an answer may be in it
            raise
        finally:
            put(connection)

    def _find_route(self, scheme: str, netloc: str, proxy: str, verify: str | bool) -> _Route:
        request = requests.Request("GET", f"{scheme}://{netloc}/").prepare()
        proxies = {scheme: proxy} if proxy else {}
        pool = cast(HTTPConnectionPool, self._adapter.get_connection_with_tls_context(request, verify, proxies))
        self._adapter.cert_verify(pool, request.url, verify, None)  # type: ignore[no-untyped-call]
        return _Route(pool, whole=self._adapter.request_url(request, proxies) != "/")


class _Adapter(requests.adapters.HTTPAdapter):
    """Pools of our connections, also those to proxies."""

    def __init__(self, reach: AllowedScope, head_timeout_s: float) -> None:
        own = {"reach": reach, "head_timeout_s": head_timeout_s}
        plain, secure = type("Plain", (_Plain,), own), type("Secure", (_Secure,), own)
        self._pools = {
            "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
        }
        super().__init__(pool_connections=_POOLS, pool_maxsize=64)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        made = super().proxy_manager_for(proxy, **options)
        if isinstance(made, urllib3.ProxyManager):  # SOCKS ones have connections of their own
            made.pool_classes_by_scheme = self._pools
        return made


class _Plain(HTTPConnection):
    """Resolves once, checks every address, and connects to one of those; the name stays what TLS verifies."""

    reach: AllowedScope
    head_timeout_s: float

    def _new_conn(self) -> socket.socket:
        if self.proxy is not None:  # the user's choice; and it is the proxy that resolves the host
            return super()._new_conn()
        try:
            addresses = resolve(self.host, self.port)
        except socket.gaierror as error:
            raise urllib3.exceptions.NameResolutionError(self.host, self, error) from error
        check(self.host, addresses, self.reach)
        failure: OSError = OSError("the host has no address")
        for address in addresses[:_ADDRESSES]:
            try:
                # A numeric address is not looked up again.
                return create_connection(
                    (address, self.port), self.timeout, self.source_address, socket_options=self.socket_options
                )
            except OSError as error:
                failure = error
        if isinstance(failure, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(self, "connecting took too long") from failure
        raise urllib3.exceptions.NewConnectionError(self, "cannot connect") from failure

    def response_class(  # type: ignore[override]  # http.client calls it, be it a class or not
        self, sock: socket.socket, **options: Any
    ) -> http.client.HTTPResponse:
        """What http.client makes an answer with, that of a proxy to CONNECT included."""
        return _Answer(_Incoming(sock, time.monotonic() + self.head_timeout_s), **options)


class _Secure(_Plain, HTTPSConnection):
    """The same with TLS."""


class _Answer(http.client.HTTPResponse):
    """An answer whose head has a deadline."""

    def __init__(self, incoming: _Incoming, **options: Any) -> None:
        super().__init__(incoming, **options)  # type: ignore[arg-type]  # it asks a socket for makefile only
        self._incoming = incoming

    def begin(self) -> None:
        super().begin()
        self._incoming.deadline = None


class _Incoming(io.RawIOBase):
    """What arrives at a socket. While *deadline* (monotonic seconds) is set, no read waits beyond it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._raw = sock, sock.makefile("rb", buffering=0)
        self.deadline: float | None = deadline
        self._patience = sock.gettimeout()  # seconds between two reads

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        if self.deadline is None:
            return self._raw.readinto(buffer)
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the head of the answer took too long")
        if self._patience is not None and left > _NEARLY * self._patience:
            count = self._raw.readinto(buffer)  # mostly the whole head comes at once
        else:
            self._sock.settimeout(left)
            try:
                count = self._raw.readinto(buffer)
            finally:
                self._sock.settimeout(self._patience)
        if count == 0:  # http.client would take half a head, with half a Location in it, for a whole one
            raise ConnectionResetError(errno.ECONNRESET, "closed before the head of the answer was over")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _WithoutQueries(logging.Filter):
    """The library logs addresses: a signed query is a credential, whoever listens."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args, record.exc_info = re.sub(r"\?[^\s\"']*", "?…", record.getMessage()), (), None
        return True


for _name in ("urllib3.connection", "urllib3.connectionpool"):
    logging.getLogger(_name).addFilter(_WithoutQueries())
