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

MOST = 1 << 16
"""The most bytes that a body read here may have."""
_HEAD = 1 << 14  # bytes
# Each in one pass, whatever a server writes: where two repetitions could take the same character, a line of blanks would
# take minutes, and no other thread runs meanwhile.
_STATUS = re.compile(r"HTTP/1\.1 ([2-5][0-9][0-9])(?: [^\x00-\x1f\x7f]*)?\Z")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_LENGTH = re.compile("[0-9]{1,18}")
_UNWANTED_S = 0.1  # how long the body of a refusal or a redirect is waited for


class NeedsFullParser(Exception):
    """It has to be asked in the common way. *remember*: so will be what this server answers next."""

    def __init__(self, *, remember: bool) -> None:
        super().__init__("not a brief answer")
        self.remember = remember


def fast_get(connection: Any, target: str, headers: Mapping[str, str], timeout_s: float) -> tuple[HTTPResponse, bool]:
    """GET *target* over an open connection of http.client's and read the whole answer, within *timeout_s* seconds; and
    whether the connection serves another.

    Raises NeedsFullParser, also where it broke.
    """
    until = time.monotonic() + timeout_s
    try:
        connection.sock.settimeout(timeout_s)
        connection.sock.sendall(_request(_host(connection), target, headers))
        return _Reading(connection.sock, until).answer()
    except TimeoutError as error:  # it may be so with every answer: none of it is to cost that again
        raise NeedsFullParser(remember=True) from error
    except (OSError, ValueError) as error:  # whatever it was, asking in the common way finds words for it
        raise NeedsFullParser(remember=False) from error


def _host(connection: Any) -> str:
    """What http.client would call it: a signature may cover it."""
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    return str(host if connection.port == connection.default_port else f"{host}:{connection.port}")


def _request(host: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if any(not line.isprintable() for line in lines):
        raise ValueError("no request holds control characters")
    return "\r\n".join((*lines, "", "")).encode("ascii")


class _Reading:
    def __init__(self, sock: Any, until: float) -> None:
        self._sock, self._until = sock, until
        self._buffer = bytearray(_HEAD + MOST)
        self._count = 0

    def answer(self) -> tuple[HTTPResponse, bool]:
        end = -1
        while end < 0:
            if self._count >= _HEAD or self._buffer.find(b"\n\n", 0, self._count) >= 0:
                raise NeedsFullParser(remember=True)
            searched = max(0, self._count - 3)
            self._more()
            end = self._buffer.find(b"\r\n\r\n", searched, min(self._count, _HEAD))
        status, fields = _parsed(self._buffer[:end].decode("latin-1"))
        length = int(fields["Content-Length"])
        begin, stop = end + 4, end + 4 + length
        if length > MOST:
            raise NeedsFullParser(remember=True)
        if status not in (200, 206):
            self._until = min(self._until, time.monotonic() + _UNWANTED_S)
        while self._count < stop:
            self._more()
        if self._count > stop:  # more than it announced: what would be read next is not an answer to us
            raise NeedsFullParser(remember=True)
        body = io.BytesIO(self._buffer[begin:stop])
        answer = HTTPResponse(body, fields, status, preload_content=False, decode_content=False)
        return answer, "close" not in fields.get("Connection", "").lower()

    def _more(self) -> None:
        if self._count:
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer took too long")
            self._sock.settimeout(left)
        count = self._sock.recv_into(memoryview(self._buffer)[self._count :])
        if not count:
            raise ConnectionResetError("closed before the answer was over")
        self._count += count


def _parsed(head: str) -> tuple[int, HTTPHeaderDict]:
    """Status and fields of an answer that says how long it is. Raises NeedsFullParser for every other."""
    first, *lines = head.split("\r\n")
    status, found = _STATUS.match(first), HTTPHeaderDict()
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.match(name) or _UNPRINTABLE.search(value):
            raise NeedsFullParser(remember=True)
        found.add(name, value.strip(" \t"))
    if status is None:
        raise NeedsFullParser(remember=True)
    length = found.get("Content-Length", "")
    if "Transfer-Encoding" in found or not _LENGTH.fullmatch(length) or int(status[1]) in (204, 304):
        raise NeedsFullParser(remember=True)
    return int(status[1]), found
