"""The source interface: ``Source`` and ``Target``, bodies and listings, and locator helpers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from urllib.parse import quote

from .errors import SourceError, TimedOut

READ_ALL_TIMEOUT_S = 300.0
"""Seconds for reading a whole small body, however slowly its bytes trickle in."""
_HUB_SCHEME = "hf://"


class Body:
    """A readable stream of bytes ``[start, …)`` of one object; read once, by one thread.

    ``start`` may be less than requested: 0 if the source ignored the range. Then ``ranged`` is
    False and the body extends to the end of the object. ``total`` is the length of the whole
    object, None if unknown. ``fd`` is an open descriptor of the whole object if it is a local file
    that may be read as a whole; ``stat`` its status at the time of the call, None for other objects.
    ``version`` is a validator: two bodies of one locator with equal versions have the same bytes,
    as far as the source can be trusted; empty if there is none.
    """

    def __init__(
        self,
        *,
        start: int,
        total: int | None,
        read_into: Callable[[memoryview], int],
        close: Callable[[], None] = lambda: None,
        fd: int | None = None,
        ranged: bool = True,
        version: str = "",
        stat: Callable[[], os.stat_result] | None = None,
    ) -> None:
        self.start, self.total, self.fd, self.ranged, self.version = start, total, fd, ranged, version
        self.stat = stat
        self._read_into, self._close = read_into, close

    def read_into(self, view: memoryview) -> int:
        """Read up to ``len(view)`` bytes; the count, 0 at the end. Raises SourceError."""
        return self._read_into(view)

    def close(self) -> None:
        """Release the connection or descriptor. Idempotent; may be called from any thread.

        A read blocked in another thread returns soon, with an error or as if at the end.
        """
        self._close()


def replaced(body: Body, read_into: Callable[[memoryview], int], *, ranged: bool = True) -> Body:
    """*body* with another ``read_into``, for wrappers."""
    given = body.ranged and ranged
    return Body(
        start=body.start,
        total=body.total,
        read_into=read_into,
        close=body.close,
        ranged=given,
        version=body.version,
        stat=body.stat,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One file of a listing. Fields that the listing does not provide are None.

    With an *error* it cannot be had, and a path that ends in "/" is a folder that could not be listed.
    """

    path: str  # POSIX, relative to the listed locator; untrusted until validated
    size: int | None = None  # bytes
    sha256: str | None = None  # lower-case hex, as the listing claims
    suffix: str = ""  # appended to the file's locator: pins the listed version
    error: SourceError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files below a locator. ``locator`` is pinned to the listed revision, if there are any."""

    locator: str
    files: tuple[Listed, ...]


@runtime_checkable
class Source(Protocol):
    """An origin of bytes. Knows locators and bytes; knows nothing of digests, stores and lockfiles.

    Contract (checked by ``backends.conformance.SourceContract``):
      * ``open(loc, start=n, stop=m)`` with ``0 <= n < m <= total`` yields bytes from ``n`` to ``m``
        or further (the reader stops by itself); from 0 if ranges are not supported, and says so.
      * A truncated body just ends: the reader counts bytes. Reading raises the same error types as
        opening.
      * Closing a body early frees its connection. Every method may be called from any thread.
      * ``origin(loc)`` is the failure domain: a host, a folder.
    Raises: NotFound, AccessDenied, ProtocolError, NotListable (permanent);
    ConnectionFailed, TimedOut, Throttled (transient).
    """

    network: bool
    """Whether it needs a network, and so is refused while offline."""

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body: ...

    def size(self, locator: str) -> int | None:
        """Length of the object in bytes, without reading it; None if not reported."""
        ...

    def listing(self, locator: str) -> Listing: ...

    def origin(self, locator: str) -> str: ...


FetchObjects = Callable[[Sequence[tuple[str, int]]], Iterator[bytes | None]]
"""Fetches whole small objects of one origin, by locator and expected length in bytes.

Yields their bodies in order, None for one that has to be opened by itself, and ends early where the
rest have to. Raises SourceError for an invalid locator.
"""


@runtime_checkable
class PipelinedSource(Source, Protocol):
    """A source that can request many small objects ahead of their responses."""

    def pipeline(self, locator: str, poll: Callable[[], None]) -> AbstractContextManager[FetchObjects | None]:
        """A function for objects of the origin of *locator*, for one call; None where that is not possible now.

        *poll* is called several times a second while nothing arrives; what it raises is passed on.
        """
        ...


ReadRange = Callable[[int, int], bytes]
"""Returns bytes ``[start, stop)`` of the object to upload. Exceptions abort the upload."""
OnSend = Callable[[int], object]
"""Callback before *count* bytes are sent, 0 while waiting. Exceptions abort the upload."""


@runtime_checkable
class Target(Protocol):
    """A source that accepts uploads."""

    def put(self, locator: str, size: int, read: ReadRange, on_send: OnSend) -> int:
        """Upload an object of *size* bytes to *locator*, atomically; the number of bytes sent.

        Resumes an earlier incomplete upload of the same bytes. On return the object is visible,
        and durable if this process writes the file system itself. Raises SourceError.
        """
        ...


class Wrapper:
    """Base of sources that wrap another one: subclasses define ``open``."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.network = inner.network

    def size(self, locator: str) -> int | None:
        return self._inner.size(locator)

    def listing(self, locator: str) -> Listing:
        return self._inner.listing(locator)

    def origin(self, locator: str) -> str:
        return self._inner.origin(locator)


def join_locator(folder: str, path: str) -> str:
    """The locator of a file below a folder's locator; percent-encoded if locators are URLs."""
    folder = folder.rstrip("/")
    if folder.startswith(_HUB_SCHEME):
        from .hf.locator import folder_locator  # its regexes compile in 1 ms: only for hf://

        folder = folder_locator(folder)
    quoted = folder.startswith(("http://", "https://", "file://", "hf://"))
    return f"{folder}/{quote(path) if quoted else path}"


def locator_prefixes(source: str) -> tuple[str, ...]:
    """Prefixes of the locators of a source's files, whatever revision they are pinned to."""
    if source.startswith(_HUB_SCHEME):
        from .hf.locator import repository_prefix

        if name := repository_prefix(source):
            return f"{name}@", f"{name}/"
    return (join_locator(source, ""),)


def read_all(source: Source, locator: str, *, at_most: int) -> bytes:
    """A whole small object. Raises SourceError, ValueError if it exceeds *at_most* bytes."""
    return read_body(source.open(locator), at_most=at_most, locator=locator)


def read_body(body: Body, *, at_most: int, locator: str) -> bytes:
    """A whole small body; closes it. Raises SourceError, ValueError if over *at_most* bytes."""
    deadline = time.monotonic() + READ_ALL_TIMEOUT_S
    try:
        if body.start != 0:
            raise ValueError(f"the response begins at byte {body.start}")
        data, view = bytearray(), memoryview(bytearray(1 << 16))
        while count := body.read_into(view):
            data += view[:count]
            if len(data) > at_most:
                raise ValueError(f"longer than {at_most:,} bytes")
            if time.monotonic() > deadline:
                raise TimedOut(f"reading took longer than {READ_ALL_TIMEOUT_S:.0f} s", locator=locator)
        return bytes(data)
    finally:
        body.close()
