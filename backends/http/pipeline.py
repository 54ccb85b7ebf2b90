"""Pipelined requests: short bodies over one open connection, many requests ahead of their responses (RFC 9112, 9.3.2).

Only plain responses are read here: 200 or 206, one Content-Length, the whole object at the expected
length. Another object, or none, has no body; anything else ends the pipeline. What has no body is to be
requested by itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .fast_response import MAX_BODY, encode_request, host_header

_WINDOW = 32  # requests without a response; all of them fit in the buffers of a socket
_MAX_HEAD = 1 << 14  # bytes
_TIMEOUT_S, _POLL_S = 10.0, 0.2  # for one response; how often *poll* is called meanwhile
# Linear time for any input: nothing that a repetition matches can begin what follows it.
_HEAD = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9])[\t -~]*(?:\r\n[!-9;-~]+:[\t -~\x80-\xff]*)*")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*(?=\r\n|\Z)")
_ANSWERS = (b"200", b"206", b"404", b"410")  # another status says something about the server, not one object
_CLOSE = re.compile(rb"\r\nconnection:[^\r]*close")


class Pipeline:
    """Requests sent ahead of their responses over an idle connection, for one use by one thread.

    *reusable* afterwards: every response was read to its end. *plain*: false if other responses of
    this server will not be plain either.
    """

    def __init__(self, connection: Any, poll: Callable[[], None]) -> None:
        self.reusable, self.plain = True, True
        self._sock, self._host, self._poll = connection.sock, host_header(connection), poll
        self._buffer = bytearray(1 << 18)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what was received and not consumed

    def request(self, target: str, headers: Mapping[str, str]) -> bytes:
        """A GET request. Raises ValueError for control characters."""
        return encode_request(self._host, target, headers)

    def bodies(self, requests: Sequence[bytes], lengths: Sequence[int]) -> Iterator[bytes | None]:
        """The bodies in order; None for a response that has another; ends early if the rest is unanswered.

        *lengths*: of the objects in bytes, at most ``MAX_BODY`` each. Passes on what *poll* raises.
        """
        sent = 0
        try:
            for number, length in enumerate(lengths):
                if sent - number <= _WINDOW // 2 and sent < len(requests):
                    self.reusable = False
                    self._sock.settimeout(_TIMEOUT_S)
                    self._sock.sendall(b"".join(requests[sent : number + _WINDOW]))
                    self._sock.settimeout(_POLL_S)
                    sent = min(len(requests), number + _WINDOW)
                self._deadline = time.monotonic() + _TIMEOUT_S
                body, more = self._response(length)
                self.reusable = more and sent == number + 1 and self._start == self._end
                yield body
                if not more:
                    return
        except TimeoutError:
            self.plain = False  # may happen each time: do not pay for it again
        except OSError:
            pass
        except _NotPlain:
            self.plain = False

    def _response(self, length: int) -> tuple[bytes | None, bool]:
        """The body, if it is the object; and whether another response follows."""
        end = -1
        while (end := self._buffer.find(b"\r\n\r\n", self._start, self._end)) < 0:
            if self._end - self._start > _MAX_HEAD:
                raise _NotPlain
            self._receive()
        head = bytes(self._view[self._start : end])
        self._start = end + 4
        match, fields = _HEAD.fullmatch(head), head.lower()
        found = _LENGTH.findall(fields)
        if match is None or len(found) != 1 or fields.count(b"\r\ncontent-length:") != 1:
            raise _NotPlain
        if b"\r\ntransfer-encoding:" in fields:
            raise _NotPlain
        if match[1] not in _ANSWERS:
            raise _NotPlain
        if int(found[0]) > MAX_BODY:
            raise ConnectionAbortedError  # another object than was expected: not worth reading
        body = self._body(int(found[0]))
        content_range = b"\r\ncontent-range: bytes 0-%d/%d\r\n" % (length - 1, length)
        whole = match[1] == b"200" or (match[1] == b"206" and content_range in fields + b"\r\n")
        right = whole and len(body) == length and b"\r\ncontent-encoding:" not in fields
        return body if right else None, _CLOSE.search(fields) is None

    def _body(self, length: int) -> bytes:
        while self._end - self._start < length:
            self._receive()
        body = bytes(self._view[self._start : self._start + length])
        self._start += length
        return body

    def _receive(self) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while True:
            try:
                count = self._sock.recv_into(self._view[self._end :])
                break
            except TimeoutError:
                self._poll()
                if time.monotonic() >= self._deadline:
                    raise
        if not count:
            raise ConnectionResetError
        self._poll()
        if time.monotonic() >= self._deadline:  # a server that trickles bytes
            raise TimeoutError
        self._end += count


class _NotPlain(Exception):
    """A response that only a full parser understands."""
