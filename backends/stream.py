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

from .errors import SourceError

BROKEN = (urllib3.exceptions.HTTPError, HTTPException, OSError)
"""What a broken connection may raise."""
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\Z")


def reading(
    raw: Any, translated: Callable[[Exception], SourceError]
) -> tuple[Callable[[memoryview], int], Callable[[], None]]:
    """How to read the body of *raw*, a urllib3 response, into a buffer, and how to close it: the two halves of a ``Body``.

    A body read to its end gives its connection back; one that ends early simply ends. Closing may happen at any time, from
    any thread, and ends a read that waits.
    """
    # urllib3's own readinto costs five times more than the http.client response beneath it. The attribute is private:
    # the public way is the fall-back, and a test notices when it changes.
    fast = getattr(raw, "_fp", None)
    read = getattr(fast, "readinto", None) or raw.readinto
    done = False

    def read_into(view: memoryview) -> int:
        nonlocal done
        if done:
            return 0
        try:
            count: int = read(view)
        except BROKEN as error:
            raise translated(error) from error
        except (ValueError, AttributeError):  # http.client's words for: closed meanwhile, by another thread
            count = 0
        if count == 0 and len(view):
            done = True
            raw.release_conn()
        return count

    def close() -> None:
        let_go(raw)

    return read_into, close


def let_go(raw: Any) -> None:
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


def span_of(content_range: str | None) -> tuple[int, int, int | None] | None:
    """First byte, byte after the last, and length of the whole (None: not told); None for what is no single range."""
    match = _RANGE.match(content_range or "")
    return (int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])) if match else None


def answers(status: int, content_range: str | None, start: int) -> bool:
    """Whether a ranged request was answered by a range from *start*, or by the whole from byte 0."""
    if status == 416:
        return False
    if content_range is None:
        return status != 206  # several parts, or a server that forgot to say
    # Decided by Content-Range, not by status: some S3 servers send a range with status 200.
    span = span_of(content_range)
    return span is not None and span[0] == start


def retry_after(text: str) -> float | None:
    """Seconds, from a number or a date; never negative."""
    if re.fullmatch("[0-9]{1,18}", text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
