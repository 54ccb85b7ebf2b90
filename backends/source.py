"""The seam between the engine and everything that can give bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from urllib.parse import quote

from .errors import TimedOut

READ_ALL_TIMEOUT_S = 300.0
"""How long a small body may take, however it drips."""
_HUB_SCHEME = "hf://"


class Body:
    """Bytes ``[start, …)`` of one object, read once, by one thread.

    ``start`` may be less than asked for: 0 when the source ignored the range; ``ranged`` is False then, and the body goes
    to the object's end. ``total`` is the whole object's length, None when the source does not say. ``fd`` is an open
    descriptor of the whole object where it is a local file. ``version`` is equal for two bodies of one locator only where
    they are of the same bytes, as far as the source can be believed; empty where it does not say.
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
    ) -> None:
        self.start, self.total, self.fd, self.ranged, self.version = start, total, fd, ranged, version
        self._read_into, self._close = read_into, close

    def read_into(self, view: memoryview) -> int:
        """Put some bytes at the beginning of *view*; how many, 0 at the end. Raises SourceError."""
        return self._read_into(view)

    def close(self) -> None:
        """Free what the body holds; may be called at any time, from any thread, more than once.

        A read that another thread is waiting in ends soon, with an error or as if the body were over.
        """
        self._close()


def replaced(body: Body, read_into: Callable[[memoryview], int], *, ranged: bool = True) -> Body:
    """*body* read in another way, for wrappers."""
    given = body.ranged and ranged
    return Body(
        start=body.start, total=body.total, read_into=read_into, close=body.close, ranged=given, version=body.version
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One file that a source lists. What the listing does not tell is None."""

    path: str  # POSIX, relative to the listed locator; hostile until checked
    size: int | None = None  # bytes
    sha256: str | None = None  # lower-case hex, as the listing claims
    suffix: str = ""  # to be put behind the file's locator: the version that was listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What is below a locator. ``locator`` names the very revision that was listed, where the source keeps revisions."""

    locator: str
    files: tuple[Listed, ...]


@runtime_checkable
class Source(Protocol):
    """Where bytes come from. Knows locators and bytes; knows nothing of digests, stores and lockfiles.

    Contract (checked by ``backends.conformance.SourceContract``):
      * ``open(loc, start=n, stop=m)`` with ``0 <= n < m <= total`` yields bytes from ``n`` (to ``m``, or to the end: the
        reader stops by itself) or, where ranges are refused, from 0, and says which.
      * A body that ends early simply ends: the reader counts. Errors while reading are of the same types as while opening.
      * Closing a body early frees its connection. Every method may be called from any thread.
      * ``origin(loc)`` names what fails together: a host, a folder.
    Raises: NotFound, AccessDenied, ProtocolError, NotListable (permanent);
    ConnectionFailed, TimedOut, Throttled (transient).
    """

    network: bool
    """Whether ``--offline`` forbids it."""

    def open(self, locator: str, *, start: int = 0, stop: int | None = None) -> Body: ...

    def size(self, locator: str) -> int | None:
        """Bytes in the object, without reading it; None where the source does not say."""
        ...

    def listing(self, locator: str) -> Listing: ...

    def origin(self, locator: str) -> str: ...


ReadRange = Callable[[int, int], bytes]
"""Gives bytes ``[start, stop)`` of what is to be put. Whatever it raises ends the putting."""
OnSend = Callable[[int], object]
"""Is told of bytes about to be sent, 0 while only waiting. Whatever it raises ends the putting."""


@runtime_checkable
class Target(Protocol):
    """A source that can be written to."""

    def put(self, locator: str, size: int, read: ReadRange, on_send: OnSend) -> int:
        """Let an object of *size* bytes stand at *locator*, whole or not at all; how many bytes were sent.

        What an earlier call with the same bytes left unfinished is not sent again. On return it is there, and
        durable where we write the disk ourselves. Raises SourceError.
        """
        ...


class Wrapper:
    """A source around another: subclass it and say what opening does."""

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
    """The locator of a file below a folder's locator; quoted where locators are URLs."""
    folder = folder.rstrip("/")
    if folder.startswith(_HUB_SCHEME):
        from .hf.locator import folder_locator  # its grammar takes a millisecond to compile, which nobody else pays

        folder = folder_locator(folder)
    quoted = folder.startswith(("http://", "https://", "file://", "hf://"))
    return f"{folder}/{quote(path) if quoted else path}"


def locator_prefixes(source: str) -> tuple[str, ...]:
    """How the locators of a source's files begin, whatever revision they are pinned to."""
    if source.startswith(_HUB_SCHEME):
        from .hf.locator import repository_prefix

        if name := repository_prefix(source):
            return f"{name}@", f"{name}/"
    return (join_locator(source, ""),)


def read_all(source: Source, locator: str, *, at_most: int) -> bytes:
    """A small object whole. Raises SourceError, ValueError where it is longer than *at_most* bytes."""
    return read_body(source.open(locator), at_most=at_most, locator=locator)


def read_body(body: Body, *, at_most: int, locator: str) -> bytes:
    """A small body whole, and close it. Raises SourceError, ValueError where it is longer than *at_most* bytes."""
    deadline = time.monotonic() + READ_ALL_TIMEOUT_S
    try:
        if body.start != 0:
            raise ValueError(f"the answer begins at byte {body.start}")
        data, view = bytearray(), memoryview(bytearray(1 << 16))
        while count := body.read_into(view):
            data += view[:count]
            if len(data) > at_most:
                raise ValueError(f"longer than {at_most:,} bytes")
            if time.monotonic() > deadline:
                raise TimedOut(f"it took longer than {READ_ALL_TIMEOUT_S:.0f} s", locator=locator)
        return bytes(data)
    finally:
        body.close()
