"""A response of urllib3 from under a library that wraps it: read fast, ended from any thread, its headers understood."""

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
"""Up to so many bytes a read returns with what there is, a larger one when it is full or at the end."""
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, HTTPException, OSError)
"""What a broken connection may raise."""
_DRAIN_S, _DRAIN_READS = 0.1, 4
_STRONG_AFTER_S = 60.0
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\Z")


def body_reader(
    raw: Any, to_source_error: Callable[[Exception], SourceError]
) -> tuple[Callable[[memoryview], int], Callable[[], None]]:
    """How to read the body of *raw*, a urllib3 response, into a buffer, and how to close it: the two halves of a ``Body``.

    A body read to its end gives its connection back; one that ends early simply ends. Closing may happen at any time, from
    any thread, and ends a read that waits.
    """
    # urllib3's own readinto costs five times more than the http.client response beneath it. The attribute is private:
    # the public way is the fall-back, and a test notices when it changes.
    fp = getattr(raw, "_fp", None)
    readinto, read1 = getattr(fp, "readinto", None) or raw.readinto, getattr(fp, "read1", None)
    at_end = False

    def read(view: memoryview) -> int:
        if read1 is None or len(view) > SMALL_READ:
            count: int = readinto(view)  # returns when the view is full: quickest where bytes come quickly
            return count
        data = read1(len(view))  # returns with what has come: for whoever must notice that little does
        view[: len(data)] = data
        if getattr(fp, "length", None) == 0:
            readinto(bytearray(1))  # read1 does not notice that it was the last, readinto does
        return len(data)

    def read_into(view: memoryview) -> int:
        nonlocal at_end
        if at_end:
            return 0
        try:
            count = read(view)
        except CONNECTION_ERRORS as error:
            raise to_source_error(error) from error
        except (ValueError, AttributeError):  # http.client's words for: closed meanwhile, by another thread
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
    """An answer with its headers understood. *length*: of this body; *ranged*: whether it gives what was asked."""
    start, _, total = parse_content_range(content_range) or (0, 0, length)
    read_into, close = body_reader(raw, to_source_error)
    return Body(start=start, total=total, read_into=read_into, close=close, ranged=ranged, version=version)


def release(raw: Any) -> None:
    """Be done with a urllib3 response. Its connection serves another request if nothing of the body is left to come."""
    if raw.length_remaining == 0:  # a HEAD, an empty body: http.client notices when it is read
        raw.drain_conn()
    elif getattr(getattr(raw, "_fp", None), "isclosed", lambda: False)():  # at its end http.client closes by itself
        raw.release_conn()
    else:
        with suppress(OSError, ValueError, RuntimeError):  # wakes a thread that waits for bytes
            raw.shutdown()
        raw.close()
        raw.release_conn()


def discard(raw: Any) -> None:
    """Be done with an answer whose body nobody reads, from the thread that asked. A short one that has come is read over,
    so that its connection serves the next request: a redirect and a refusal cost no handshake."""
    fp: Any = getattr(raw, "_fp", None)
    sock: Any = getattr(raw.connection, "sock", None)
    if sock is not None and hasattr(fp, "read1") and 0 < (raw.length_remaining or 0) <= SMALL_READ:
        with suppress(*CONNECTION_ERRORS):
            sock.settimeout(_DRAIN_S)  # the next answer sets its own
            for _ in range(_DRAIN_READS):
                if not fp.isclosed() and fp.length:
                    fp.read1(fp.length)
            if fp.length == 0:
                fp.readinto(bytearray(1))  # read1 does not notice that it was the last
    release(raw)


def parse_content_range(content_range: str | None) -> tuple[int, int, int | None] | None:
    """First byte, byte after the last, and length of the whole (None: not told); None for what is no single range."""
    match = _CONTENT_RANGE.match(content_range or "")
    return (int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])) if match else None


def satisfies_range(status: int, content_range: str | None, start: int) -> bool:
    """Whether a ranged request was answered by a range from *start*, or by the whole from byte 0."""
    if status == 416:
        return False
    if content_range is None:
        return status != 206  # several parts, or a server that forgot to say
    # Decided by Content-Range, not by status: some S3 servers send a range with status 200.
    span = parse_content_range(content_range)
    return span is not None and span[0] == start


def version_of(etag: str, modified: str, date: str) -> str:
    """What tells one content of an object from another: a strong ETag, else when it was modified, unless that was so
    lately that it may be modified again within the second (RFC 9110, 8.8.2.2); empty where nothing does."""
    if etag and not etag.startswith("W/"):
        return etag
    try:
        age = email.utils.parsedate_to_datetime(date) - email.utils.parsedate_to_datetime(modified)
    except (ValueError, TypeError, OverflowError):
        return ""
    return modified if age.total_seconds() > _STRONG_AFTER_S else ""


def parse_retry_after(text: str) -> float | None:
    """Seconds, from a number or a date; never negative."""
    if re.fullmatch("[0-9]{1,18}", text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
