"""HTTP responses as bodies: fast reads under urllib3, close from any thread, header parsing."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Any

import urllib3

from ..errors import SourceError
from ..source import Body

SMALL_READ = 1 << 16
"""Reads of up to this many bytes return what has arrived; larger ones fill the buffer."""
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, HTTPException, OSError)
"""Exceptions of a lost connection."""
_DRAIN_S, _DRAIN_READS = 0.1, 4
_STRONG_AFTER_S = 60.0  # Date and Last-Modified may be of different clocks (RFC 7232, 2.2.2)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\Z")


def body_reader(
    raw: Any, to_source_error: Callable[[Exception], SourceError]
) -> tuple[Callable[[memoryview], int], Callable[[], None]]:
    """``read_into`` and ``close`` of a ``Body`` for *raw*, a urllib3 response.

    A body read to its end returns its connection to the pool; a truncated one just ends. ``close``
    may be called at any time from any thread, and interrupts a blocked read.
    """
    # urllib3's readinto costs five times that of the http.client response under it. `_fp` is
    # private: the public method is the fallback, and a test notices if the attribute changes.
    fp = getattr(raw, "_fp", None)
    readinto, read1 = getattr(fp, "readinto", None) or raw.readinto, getattr(fp, "read1", None)
    at_end = False

    def read(view: memoryview) -> int:
        if read1 is None or len(view) > SMALL_READ:
            count: int = readinto(view)  # returns with a full buffer: fastest on a fast connection
            return count
        data = read1(len(view))  # returns what has arrived: lets the caller detect a slow server
        view[: len(data)] = data
        if getattr(fp, "length", None) == 0:
            readinto(bytearray(1))  # read1 does not close the response after its last byte
        return len(data)

    def read_into(view: memoryview) -> int:
        nonlocal at_end
        if at_end:
            return 0
        try:
            count = read(view)
        except CONNECTION_ERRORS as error:
            raise to_source_error(error) from error
        except (ValueError, AttributeError):  # raised by http.client after close in another thread
            count = 0
        if count == 0 and len(view):
            at_end = True
            raw.release_conn()
        return count

    def close() -> None:
        release(raw)

    return read_into, close


def make_body(
    raw: Any,
    content_range: str | None,
    length: int | None,
    to_source_error: Callable[[Exception], SourceError],
    *,
    ranged: bool,
    version: str = "",
) -> Body:
    """A ``Body``. *length*: its Content-Length; *ranged*: whether it is the requested range."""
    start, _, total = parse_content_range(content_range) or (0, 0, length)
    read_into, close = body_reader(raw, to_source_error)
    return Body(start=start, total=total, read_into=read_into, close=close, ranged=ranged, version=version)


def release(raw: Any) -> None:
    """Finish a urllib3 response. Its connection is reused if the body has been read completely."""
    if raw.length_remaining == 0:  # a HEAD, an empty body: http.client notices only on a read
        raw.drain_conn()
    elif getattr(getattr(raw, "_fp", None), "isclosed", lambda: False)():  # at the end
        raw.release_conn()
    else:
        with suppress(OSError, ValueError, RuntimeError):  # wakes a thread blocked in a read
            raw.shutdown()
        raw.close()
        raw.release_conn()


def discard(raw: Any) -> None:
    """Finish a response without using its body; call it from the thread that sent the request.

    A short body that has arrived is drained, so that the connection is reused: redirects and errors
    then cost no handshake.
    """
    fp: Any = getattr(raw, "_fp", None)
    sock: Any = getattr(raw.connection, "sock", None)
    if sock is not None and hasattr(fp, "read1") and 0 < (raw.length_remaining or 0) <= SMALL_READ:
        with suppress(*CONNECTION_ERRORS):
            sock.settimeout(_DRAIN_S)  # the next request sets its own
            for _ in range(_DRAIN_READS):
                if not fp.isclosed() and fp.length:
                    fp.read1(fp.length)
            if fp.length == 0:
                fp.readinto(bytearray(1))  # read1 does not close the response after its last byte
    release(raw)


def parse_content_range(content_range: str | None) -> tuple[int, int, int | None] | None:
    """Start, stop (exclusive) and total length (None: unknown); None if it is invalid."""
    match = _CONTENT_RANGE.match(content_range or "")
    return (int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])) if match else None


def satisfies_range(status: int, content_range: str | None, start: int) -> bool:
    """Whether a response to a range request is a range from *start*, or the whole object."""
    if status == 416:
        return False
    if content_range is None:
        return status != 206  # multipart/byteranges, or a missing Content-Range
    # Content-Range decides, not the status: some S3 servers send a range with status 200.
    span = parse_content_range(content_range)
    return span is not None and span[0] == start


def version_of(etag: str, modified: str, date: str) -> str:
    """The validator of a response: a strong ETag, else Last-Modified; empty if neither is strong.

    Last-Modified is strong only if it is older than Date by a minute: the object may be modified
    again within the same second (RFC 9110, 8.8.2.2).
    """
    if etag and not etag.startswith("W/"):
        return etag
    try:
        age = email.utils.parsedate_to_datetime(date) - email.utils.parsedate_to_datetime(modified)
    except (ValueError, TypeError, OverflowError):
        return ""
    return modified if age.total_seconds() > _STRONG_AFTER_S else ""


def parse_retry_after(text: str) -> float | None:
    """Seconds from a Retry-After header, a number or an HTTP date; never negative."""
    if re.fullmatch("[0-9]{1,18}", text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
