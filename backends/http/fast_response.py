"""A short exchange over a connection that is open: one write, and mostly one read.

A library that can read any answer takes ten times longer for ten kilobytes than the network. So what is short and plain
is read here: a status, fields, and as many bytes as ``Content-Length`` says. Whatever is not so is the library's.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from typing import Any

from urllib3 import HTTPHeaderDict, HTTPResponse

MAX_BODY = 1 << 16
"""The most bytes that a body read here may have."""
_MAX_HEAD = 1 << 14  # bytes
# Each in one pass, whatever a server writes: where two repetitions could take the same character, a line of blanks would
# take minutes, and no other thread runs meanwhile.
_STATUS_LINE = re.compile(r"HTTP/1\.1 ([2-5][0-9][0-9])(?: [^\x00-\x1f\x7f]*)?\Z")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_LENGTH = re.compile("[0-9]{1,18}")
_DISCARD_S = 0.1  # how long the body of a refusal or a redirect is waited for


class NeedsFullParser(Exception):
    """It has to be asked in the common way. *remember*: so will be what this server answers next."""

    def __init__(self, *, permanent: bool) -> None:
        super().__init__("not a brief answer")
        self.permanent = permanent


def fast_get(connection: Any, target: str, headers: Mapping[str, str], timeout_s: float) -> tuple[HTTPResponse, bool]:
    """GET *target* over an open connection of http.client's and read the whole answer, within *timeout_s* seconds; and
    whether the connection serves another.

    Raises NeedsFullParser, also where it broke.
    """
    deadline = time.monotonic() + timeout_s
    try:
        connection.sock.settimeout(timeout_s)
        connection.sock.sendall(_encode_request(_host(connection), target, headers))
        return _ResponseReader(connection.sock, deadline).read()
    except TimeoutError as error:  # it may be so with every answer: none of it is to cost that again
        raise NeedsFullParser(permanent=True) from error
    except (OSError, ValueError) as error:  # whatever it was, asking in the common way finds words for it
        raise NeedsFullParser(permanent=False) from error


def _host(connection: Any) -> str:
    """What http.client would call it: a signature may cover it."""
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    return str(host if connection.port == connection.default_port else f"{host}:{connection.port}")


def _encode_request(host: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if any(not line.isprintable() for line in lines):
        raise ValueError("no request holds control characters")
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
        if self._count > stop:  # more than it announced: what would be read next is not an answer to us
            raise NeedsFullParser(permanent=True)
        body = io.BytesIO(self._buffer[start:stop])
        response = HTTPResponse(body, fields, status, preload_content=False, decode_content=False)
        return response, "close" not in fields.get("Connection", "").lower()

    def _receive(self) -> None:
        if self._count:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("the answer took too long")
            self._sock.settimeout(remaining)
        count = self._sock.recv_into(memoryview(self._buffer)[self._count :])
        if not count:
            raise ConnectionResetError("closed before the answer was over")
        self._count += count


def _parse_head(head: str) -> tuple[int, HTTPHeaderDict]:
    """Status and fields of an answer that says how long it is. Raises NeedsFullParser for every other."""
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
