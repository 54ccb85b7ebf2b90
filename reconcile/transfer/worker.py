"""Workers: one connection each, which reads the ranges of one blob and hands on pieces as they complete.

Bodies are read in steps that fit their rate, and a rate below a minimum counts as stalled: a server that trickles bytes
would never time out by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from modelstow.backends import Body, EndedEarly, ProtocolError, SourceError, TimedOut
from modelstow.cas.buffers import aligned_buffer
from modelstow.cas.chunking import DEFAULT, Chunking
from modelstow.cas.pieces import PieceHasher

from .retry import Failure, Reason, RetryPolicy, failure_of
from .state import Request

MOST_STEP = 1 << 20
FIRST_STEP, _LEAST_STEP = 1 << 16, 1 << 14
_QUICK_S, _SLOW_S = 0.005, 0.1  # a large read returns when its buffer is full: it should take neither less nor more

SOURCE_BUGS = (ValueError, KeyError, TypeError, AttributeError)
"""Errors of a source that cannot parse a response. Other errors, of a caller's progress callback for example, pass."""


def malformed_response(error: Exception, locator: str) -> ProtocolError:
    """The failure of a source that raised one of ``SOURCE_BUGS``."""
    return ProtocolError(f"malformed response ({type(error).__name__})", locator=locator)


class BodyReader:
    """A reader of one body with stall detection. Used by one thread; the caller closes the body."""

    def __init__(self, body: Body, locator: str, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._body, self._locator, self._policy, self._clock = body, locator, policy, clock
        self._step = FIRST_STEP
        self._window_began_at, self._window_bytes = clock(), 0  # in which the rate is measured

    def read(self, view: memoryview) -> int:
        """Read into the beginning of *view*; the number of bytes, 0 at the end. Raises SourceError, among them TimedOut."""
        before = self._clock()
        try:
            count = self._body.read_into(view[: self._step])
        except SOURCE_BUGS as error:
            raise malformed_response(error, self._locator) from error
        now = self._clock()
        if now - before < _QUICK_S:
            self._step = min(2 * self._step, MOST_STEP)
        elif now - before > _SLOW_S:
            self._step = max(self._step // 2, _LEAST_STEP)
        self._window_bytes += count
        least, window_s = self._policy.floor_bytes_s, self._policy.floor_window_s
        if now - self._window_began_at >= window_s:
            if self._window_bytes < window_s * least:
                raise TimedOut(f"less than {least} bytes a second for {window_s:.0f} s", locator=self._locator)
            self._window_began_at, self._window_bytes = now, 0
        return count


class TransferSink(Protocol):
    """The receiver of one blob's bytes. Workers call it for each step, from any number of threads at once.

    A claim is the number of a range. It may become invalid at any time: the range stalled, or was taken over.
    """

    size: int  # bytes of the blob
    chunking: Chunking  # of its pieces

    def open(self, request: Request) -> Body:
        """Request a range from its source. The caller closes the body. Raises SourceError."""
        ...

    def opened(self, claim: int, body: Body) -> bool:
        """The source responded. False if the range is not active any more; else another thread may close the body."""
        ...

    def whole_file(self, claim: int, body: Body) -> bool:
        """Take the whole of a local file at once, where possible; then nothing is left to read."""
        ...

    def ignores_ranges(self, claim: int) -> None:
        """The source sends the whole blob, from byte 0."""
        ...

    def owns(self, claim: int, piece: int) -> bool:
        """Whether this range fetches the piece."""
        ...

    def has_later(self, claim: int, piece: int) -> bool:
        """Whether this range still fetches a piece after this one."""
        ...

    def received(self, request: Request, count: int) -> bool:
        """Bytes of the range arrived; False if it is not active any more. Raises Cancelled."""
        ...

    def write(self, claim: int, piece: int, offset: int, data: memoryview) -> bool:
        """Write a part of a piece at byte *offset* of the blob; False if the claim is invalid. Raises OSError."""
        ...

    def complete(self, claim: int, piece: int, hash_: bytes) -> bool:
        """Record a piece that is written whole; False if this range should end. Raises OSError."""
        ...


@dataclass(slots=True)
class PiecePrefix:
    """The beginning of a piece that is written, up to byte *reached* of the blob."""

    hasher: PieceHasher
    reached: int


class WrongSize(Exception):
    """An object whose size is not the one in the lockfile."""

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"its file has {actual:,} bytes, the lockfile says {expected:,}")
        self.actual = actual


class _TakenOver(Exception):
    """A range that is not active any more: another connection fetches its pieces."""


class Worker:
    """A reader of ranges, one after the other, through one small buffer, which stays in the processor's cache."""

    def __init__(self, sink: TransferSink, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._sink, self._policy, self._clock = sink, policy, clock
        self._buffer = aligned_buffer(min(MOST_STEP, sink.size))
        self.prefix: PiecePrefix | None = None  # what the last range left of the piece that was arriving

    def run(self, request: Request, prefix: PiecePrefix | None = None) -> Failure | None:
        """Fetch one range; its failure, or None. *prefix*: that of its first piece, where it starts inside a piece.

        Raises Cancelled, OSError of this disk.
        """
        self.prefix = prefix
        try:
            try:
                body = self._sink.open(request)
            except SOURCE_BUGS as error:
                raise malformed_response(error, request.locator) from error
            try:
                if self._sink.opened(request.claim, body):
                    self._receive(request, body)
            finally:
                body.close()
        except _TakenOver:
            return None
        except SourceError as error:
            return failure_of(error)
        except WrongSize as error:
            return Failure(code="SIZE_MISMATCH", what=str(error), reason=Reason.WRONG_SIZE, actual=error.actual)
        return None

    def _receive(self, request: Request, body: Body) -> None:
        sink, size, chunking = self._sink, self._sink.size, self._sink.chunking
        reader = BodyReader(body, request.locator, self._policy, self._clock)
        if body.total is not None and body.total != size:
            raise WrongSize(size, body.total)
        if body.start != request.start:
            self.prefix = None
        if body.start > request.start:
            raise EndedEarly(f"the body begins at {body.start:,}, not at {request.start:,}", locator=request.locator)
        if body.fd is not None and sink.whole_file(request.claim, body):
            return
        if not body.ranged:
            sink.ignores_ranges(request.claim)
        at, stop = body.start, request.stop if body.ranged else size
        for index in range(chunking.index_at(body.start), chunking.count(stop)):
            start, end = chunking.range(index, size)
            if (at > start and self.prefix is None) or not sink.owns(request.claim, index):
                if body.ranged and start >= request.start:
                    return
                at = self._skip(reader, at, end, request)
                continue
            if not self._receive_piece(reader, index, at, end, request):
                return
            at = end
            if not body.ranged and not sink.has_later(request.claim, index):
                break
        if at == size and body.total is None and (extra := body.read_into(memoryview(bytearray(1)))):
            raise WrongSize(size, size + extra)

    def _skip(self, reader: BodyReader, at: int, end: int, request: Request) -> int:
        while at < end:
            at += self._read(reader, self._buffer[: end - at], request)
        return at

    def _receive_piece(self, reader: BodyReader, index: int, at: int, end: int, request: Request) -> bool:
        """Read, write and record one piece; False if this range should end."""
        began_at, piece = self._clock(), self.prefix or PiecePrefix(PieceHasher(), at)
        limit_s = self._policy.piece_s * max(1.0, self._sink.chunking.piece_bytes / DEFAULT.piece_bytes)
        self.prefix = piece
        while at < end:
            count = self._read(reader, self._buffer[: end - at], request)
            part = self._buffer[:count]
            if not self._sink.write(request.claim, index, at, part):
                return False
            piece.hasher.update(part)
            piece.reached = at = at + count
            if self._clock() - began_at > limit_s:
                raise TimedOut(f"a piece took longer than {limit_s:.0f} s", locator=request.locator)
        self.prefix = None
        return self._sink.complete(request.claim, index, piece.hasher.digest())

    def _read(self, reader: BodyReader, view: memoryview, request: Request) -> int:
        count = reader.read(view)
        if not self._sink.received(request, count):
            raise _TakenOver
        if count == 0:
            raise EndedEarly("the body ended early", locator=request.locator)
        return count
