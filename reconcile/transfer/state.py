"""What a transfer knows of its sources, and of the ranges that are on their way."""

from __future__ import annotations

from dataclasses import dataclass

from modelstow.cas.pieces import PIECE

from .retry import Failure, RetryState

_GUESS = 8 << 20  # bytes a second of a source that has sent nothing yet


@dataclass(slots=True)
class SourceState:
    """How one source stands in this transfer."""

    locator: str
    late: bool  # it failed lately, elsewhere
    patience: RetryState
    chances: int  # how often it is asked again after wrong bytes
    over: bool = False  # permanent for this blob
    corrupt: bool = False
    failure: Failure | None = None
    rate: float | None = None  # bytes a second of one connection, lately
    rated_at: float = 0.0
    running: int = 0
    endless: bool = False  # it ignores ranges
    most: int = 1 << 30  # connections that it bears
    counted: int = 0  # the last range that was asked when its latest failure was counted


@dataclass(slots=True)
class Range:
    """A range on its way. ``began``: when the piece that is arriving began; ``got``: its bytes so far."""

    source: SourceState
    began: float
    heard: float
    got: int = 0
    skipped: int = 0  # bytes of its first piece that were there before
    writing: int | None = None  # a piece that is being written to just now: nobody takes it over meanwhile
    endless: bool = False  # the source ignores ranges and sends everything

    def left_s(self, pieces: int, now: float) -> float:
        """Seconds until so many pieces will be there, at the rate seen."""
        rate, took = self.source.rate or _GUESS, now - self.began
        if took > 1.0 or (self.got and took > 0):
            rate = self.got / took
        return max(0.0, pieces * PIECE - self.got) / rate if rate else float("inf")
