"""The values of a transfer: what is wanted, how each source is doing, which ranges are in flight, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelstow.cas import Digest
from modelstow.cas.pieces import PIECE

from .retry import Failure, RetryState


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRequest:
    """One blob to bring home."""

    digest: Digest
    size: int
    urls: tuple[str, ...]
    # Of *urls*, those that hold it as compressed pieces, by the plain one of the same mirror.
    compressed: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()  # in trees, for messages
    name: str = ""  # what progress calls it
    local_candidates: tuple[str, ...] = ()  # files on this disk that may hold its bytes
    force_refetch: bool = False  # fetch it even if it is there
    seen_commit: str = ""  # ``store.commits_seen`` when it was asked for


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request to *locator* for bytes ``[start, stop)``; *claim* is the right to write the missing pieces in it.

    *start* is inside a piece where the same source has begun it before.
    """

    claim: int
    locator: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Nobody may be asked for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Idle:
    """There is nothing to ask for beside what is on its way."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Every piece is held and nothing is on its way: look at the digest of the whole."""


@dataclass(frozen=True, slots=True)
class Fail:
    """No source is left; ``failures`` has the reason of each."""

    failures: Mapping[str, Failure]


Step = Request | Backoff | Idle | Verify | Fail
