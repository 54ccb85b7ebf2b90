"""A fast path for short responses on an open connection: one write, and mostly one read.

For a body of ten kilobytes, a general HTTP library takes ten times longer than the network. So
short, plain responses are parsed here: status line, header fields, and a body of Content-Length
bytes. Anything else is left to urllib3.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from typing import Any

from urllib3 import HTTPHeaderDict, HTTPResponse

MAX_BODY = 1 << 16
"""Maximum length of a body, in bytes."""
_MAX_HEAD = 1 << 14  # bytes
# Linear time for any input: with two repetitions over the same characters, a line of blanks would
# take minutes and hold the GIL meanwhile.
_STATUS_LINE = re.compile(r"HTTP/1\.1 ([2-5][0-9][0-9])(?: [^\x00-\x1f\x7f]*)?\Z")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_LENGTH = re.compile("[0-9]{1,18}")
_DISCARD_S = 0.1  # how long to wait for the body of an error or a redirect


class NeedsFullParser(Exception):
    """A response outside the fast path. *permanent*: so will be others of this server."""

    def __init__(self, *, permanent: bool) -> None:
        super().__init__("not a short, plain response")
        self.permanent = permanent


def fast_get(connection: Any, target: str, headers: Mapping[str, str], timeout_s: float) -> tuple[HTTPResponse, bool]:
    """The response to GET *target* on an open connection, and whether that is reusable.

    The whole response must arrive within *timeout_s* seconds. Raises NeedsFullParser, also if the
    connection is lost.
    """
    deadline = time.monotonic() + timeout_s
    try:
        connection.sock.settimeout(timeout_s)
        connection.sock.sendall(encode_request(host_header(connection), target, headers))
        return _ResponseReader(connection.sock, deadline).read()
    except TimeoutError as error:  # may happen with every response: do not pay for it again
        raise NeedsFullParser(permanent=True) from error
    except (OSError, ValueError) as error:  # the request over urllib3 will classify it
        raise NeedsFullParser(permanent=False) from error


def host_header(connection: Any) -> str:
    """The Host header as http.client sends it: a signature may cover it."""
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    return str(host if connection.port == connection.default_port else f"{host}:{connection.port}")


def encode_request(host: str, target: str, headers: Mapping[str, str]) -> bytes:
    """A GET request without a body. Raises ValueError for control characters and characters outside ASCII."""
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if any(not line.isprintable() for line in lines):
        raise ValueError("a request must not contain control characters")
    return "\r\n".join((*lines, "", "")).encode("ascii")


class _ResponseReader:
    def __init__(self, sock: Any, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._buffer = bytearray(_MAX_HEAD + MAX_BODY)
        self._count = 0

    def read(self) -> tuple[HTTPResponse, bool]:
        end = -1
        while end < 0:
            if self._count >= _MAX_HEAD or self._buffer.find(b"\n\n", 0, self._count) >= 0:
                raise NeedsFullParser(permanent=True)
            searched = max(0, self._count - 3)
            self._receive()
            end = self._buffer.find(b"\r\n\r\n", searched, min(self._count, _MAX_HEAD))
        status, fields = _parse_head(self._buffer[:end].decode("latin-1"))
        length = int(fields["Content-Length"])
        start, stop = end + 4, end + 4 + length
        if length > MAX_BODY:
            raise NeedsFullParser(permanent=True)
        if status not in (200, 206):
            self._deadline = min(self._deadline, time.monotonic() + _DISCARD_S)
        while self._count < stop:
            self._receive()
        if self._count > stop:  # excess bytes would be read as the next response
            raise NeedsFullParser(permanent=True)
        body = io.BytesIO(self._buffer[start:stop])
        response = HTTPResponse(body, fields, status, preload_content=False, decode_content=False)
        return response, "close" not in fields.get("Connection", "").lower()

    def _receive(self) -> None:
        if self._count:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("the response took too long")
            self._sock.settimeout(remaining)
        count = self._sock.recv_into(memoryview(self._buffer)[self._count :])
        if not count:
            raise ConnectionResetError("closed before the end of the response")
        self._count += count


def _parse_head(head: str) -> tuple[int, HTTPHeaderDict]:
    """Status and header fields of a response with Content-Length. Raises NeedsFullParser."""
    first, *lines = head.split("\r\n")
    status, fields = _STATUS_LINE.match(first), HTTPHeaderDict()
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _FIELD_NAME.match(name) or _CONTROL.search(value):
            raise NeedsFullParser(permanent=True)
        fields.add(name, value.strip(" \t"))
    if status is None:
        raise NeedsFullParser(permanent=True)
    length = fields.get("Content-Length", "")
    if "Transfer-Encoding" in fields or not _LENGTH.fullmatch(length) or int(status[1]) in (204, 304):
        raise NeedsFullParser(permanent=True)
    return int(status[1]), fields
