"""One connection at work for one blob: reads the ranges it is given and hands on whole pieces.

Bodies are read in steps that fit their rate, with a floor below which a source counts as stalled: a server that trickles
bytes would never time out by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from modelstow.backends import Body, EndedEarly, ProtocolError, SourceError, TimedOut
from modelstow.cas.buffers import aligned_buffer
from modelstow.cas.pieces import PIECE, PieceHasher, piece_count, piece_range

from .retry import Failure, Reason, RetryPolicy, failure_of
from .state import Request

MOST_STEP = 1 << 20
FIRST_STEP, _LEAST_STEP = 1 << 16, 1 << 14
_QUICK_S, _SLOW_S = 0.005, 0.1  # a large read returns when its buffer is full: it should take neither less nor more

SOURCE_BUGS = (ValueError, KeyError, TypeError, AttributeError)
"""What a source may raise that stumbles over an answer. What others raise, a caller's progress callback say, is theirs."""


def malformed_response(error: Exception, locator: str) -> ProtocolError:
    return ProtocolError(f"its answer makes no sense ({type(error).__name__})", locator=locator)


class BodyReader:
    """One body, read by one thread."""

    def __init__(self, body: Body, locator: str, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._body, self._locator, self._policy, self._clock = body, locator, policy, clock
        self._step = FIRST_STEP
        self._began, self._bytes = clock(), 0  # of the window in which the rate is looked at

    def read(self, view: memoryview) -> int:
        """Put some bytes at the beginning of *view*; how many, 0 at the end. Raises SourceError, TimedOut among them."""
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
        self._bytes += count
        floor, window_s = self._policy.floor_bytes_s, self._policy.floor_window_s
        if now - self._began >= window_s:
            if self._bytes < window_s * floor:
                raise TimedOut(f"less than {floor} bytes a second for {window_s:.0f} s", locator=self._locator)
            self._began, self._bytes = now, 0
        return count


class TransferSink(Protocol):
    """Whom lanes bring the bytes of one blob: told of each step, and asked before it. Any number may call at once."""

    size: int

    def open(self, ask: Request) -> Body:
        """Request a source. Raises SourceError."""
        ...

    def opened(self, claim: int, body: Body) -> bool:
        """A source answered; False if nobody waits for it any more."""
        ...

    def whole_file(self, claim: int, body: Body) -> bool:
        """Take all of a local file at once, where that can be done; then nothing is left to read."""
        ...

    def ignores_ranges(self, claim: int) -> None:
        """The source sends everything, from byte 0."""
        ...

    def takes(self, claim: int, piece: int) -> bool:
        """Whether this range is the one that brings the piece."""
        ...

    def lives(self, claim: int, piece: int) -> bool:
        """Whether it still has a later piece to bring."""
        ...

    def got(self, ask: Request, count: int) -> bool:
        """So many bytes came of what was asked; False if nobody waits for more. Raises Stopped."""
        ...

    def write(self, claim: int, piece: int, offset: int, data: memoryview) -> bool:
        """Write a part of a piece under the claim that is valid now; False if another brings it. Raises OSError."""
        ...

    def keep(self, claim: int, piece: int, hash_: bytes) -> bool:
        """Put a whole piece on record; False if this range should end. Raises OSError."""
        ...


@dataclass(slots=True)
class Beginning:
    """A piece that is there up to the byte *reached* of the blob."""

    hasher: PieceHasher
    reached: int


class WrongSize(Exception):
    """A source's object has another length than the lockfile says."""

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"its file has {actual:,} bytes, the lockfile says {expected:,}")
        self.actual = actual


class _TakenOver(Exception):
    """Another connection brings what this one was asked for."""


class Worker:
    """Reads ranges one after the other through one small buffer, which stays in the processor's cache."""

    def __init__(self, blob: TransferSink, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._blob, self._policy, self._clock = blob, policy, clock
        self._buffer = aligned_buffer(min(MOST_STEP, blob.size))
        self.beginning: Beginning | None = None  # what the last range left of the piece that it was bringing

    def run(self, ask: Request, beginning: Beginning | None = None) -> Failure | None:
        """Bring one range; why it failed, or None. *beginning*: what is there of its first piece, where *ask* begins
        behind that. Raises Stopped, OSError of this disk."""
        self.beginning = beginning
        try:
            try:
                body = self._blob.open(ask)
            except SOURCE_BUGS as error:
                raise malformed_response(error, ask.locator) from error
            try:
                if self._blob.opened(ask.claim, body):
                    self._receive(ask, body)
            finally:
                body.close()
        except _TakenOver:
            return None
        except SourceError as error:
            return failure_of(error)
        except WrongSize as error:
            return Failure(code="SIZE_MISMATCH", what=str(error), reason=Reason.WRONG_SIZE, actual=error.actual)
        return None

    def _receive(self, ask: Request, body: Body) -> None:
        blob, size = self._blob, self._blob.size
        intake = BodyReader(body, ask.locator, self._policy, self._clock)
        if body.total is not None and body.total != size:
            raise WrongSize(size, body.total)
        if body.start != ask.start:
            self.beginning = None
        if body.start > ask.start:
            raise EndedEarly(f"the body begins at {body.start:,}, not at {ask.start:,}", locator=ask.locator)
        if body.fd is not None and blob.whole_file(ask.claim, body):
            return
        if not body.ranged:
            blob.ignores_ranges(ask.claim)
        at, stop = body.start, ask.stop if body.ranged else size
        for index in range(body.start // PIECE, piece_count(stop)):
            start, end = piece_range(index, size)
            if (at > start and self.beginning is None) or not blob.takes(ask.claim, index):
                if body.ranged and start >= ask.start:
                    return
                at = self._skip(intake, at, end, ask)
                continue
            if not self._bring(intake, index, at, end, ask):
                return
            at = end
            if not body.ranged and not blob.lives(ask.claim, index):
                break
        if at == size and body.total is None and (extra := body.read_into(memoryview(bytearray(1)))):
            raise WrongSize(size, size + extra)

    def _skip(self, intake: BodyReader, at: int, end: int, ask: Request) -> int:
        while at < end:
            at += self._read(intake, self._buffer[: end - at], ask)
        return at

    def _bring(self, intake: BodyReader, index: int, at: int, end: int, ask: Request) -> bool:
        """One piece, from the network to the disk and on record; False if this range should end."""
        began, piece = self._clock(), self.beginning or Beginning(PieceHasher(), at)
        self.beginning = piece
        while at < end:
            count = self._read(intake, self._buffer[: end - at], ask)
            part = self._buffer[:count]
            if not self._blob.write(ask.claim, index, at, part):
                return False
            piece.hasher.update(part)
            piece.reached = at = at + count
            if self._clock() - began > self._policy.piece_s:
                raise TimedOut(f"a piece took longer than {self._policy.piece_s:.0f} s", locator=ask.locator)
        self.beginning = None
        return self._blob.keep(ask.claim, index, piece.hasher.digest())

    def _read(self, intake: BodyReader, view: memoryview, ask: Request) -> int:
        count = intake.read(view)
        if not self._blob.got(ask, count):
            raise _TakenOver
        if count == 0:
            raise EndedEarly("the body ended early", locator=ask.locator)
        return count
