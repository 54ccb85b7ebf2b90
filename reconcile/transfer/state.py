"""The state of a transfer: the blob requested, its sources, pieces and ranges in flight; and the scheduler's actions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from modelstow.cas import Digest

from .retry import Failure, RetryState


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRequest:
    """The request to have one blob in the store. ``urls`` are absolute, or relative to ``TransferContext.base``."""

    digest: Digest
    size: int  # bytes
    urls: tuple[str, ...]  # best first
    # Those of *urls* that hold it as compressed pieces, by the plain one of the same mirror.
    compressed: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()  # in trees, for messages
    name: str = ""  # for progress
    local_candidates: tuple[str, ...] = ()  # files on this disk that may hold its bytes
    force_refetch: bool = False  # fetch it even if it is intact
    seen_commit: str = ""  # ``store.commits_seen`` at the time of the request


_ASSUMED_RATE = 8 << 20  # bytes a second, of a source that has not sent anything yet


@dataclass(slots=True)
class SourceState:
    """The state of one source within one transfer. Rates are in bytes a second of one connection."""

    locator: str
    recently_failed: bool  # in an earlier transfer
    retry_state: RetryState
    exhausted: bool = False  # it failed permanently for this blob, or has no attempts left
    failure: Failure | None = None  # the last one
    rate: float | None = None  # measured lately
    rated_at: float = 0.0  # when, on the caller's clock
    running: int = 0  # its ranges in flight
    ignores_ranges: bool = False
    max_connections: int = 1 << 30
    counted_to: int = 0  # the last claim that had been requested when its latest failure was counted


@dataclass(slots=True)
class Range:
    """A range in flight, and the claim on its pieces."""

    claim: int
    source: SourceState
    piece_began_at: float  # when the piece that is arriving was begun
    last_byte_at: float
    pieces: set[int] = field(default_factory=set)  # kept by ``PieceMap``
    piece_bytes: int = 0  # received of the piece that is arriving
    resumed_bytes: int = 0  # of its first piece, from an earlier connection
    writing: int | None = None  # the piece with a write in progress: it must not be taken over
    whole_blob: bool = False  # the source ignores ranges and sends everything

    def seconds_left(self, count: int, now: float) -> float:
        """The estimated time until this number of bytes has arrived, at the rate observed."""
        rate, took = self.source.rate or _ASSUMED_RATE, now - self.piece_began_at
        if took > 1.0 or (self.piece_bytes and took > 0):
            rate = self.piece_bytes / took
        return max(0.0, count - self.piece_bytes) / rate if rate else float("inf")


@dataclass(frozen=True, slots=True)
class Missing:
    """A piece that no range fetches. *sender* sent its bytes up to byte *prefix_stop* of the blob, then failed."""

    sender: str = ""
    prefix_stop: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """A piece that is written and recorded, with the hash that it has now; whether it is correct is not known."""

    sender: str
    hash: bytes


Piece = Missing | Range | Held
"""The state of one piece; a range stands for its claim."""
_MISSING = Missing()


class PieceMap:
    """The state of every piece of one blob. Exactly the range that claims a piece has it in ``pieces``."""

    def __init__(self, count: int) -> None:
        self._pieces: list[Piece] = [_MISSING] * count
        self._held = 0  # pieces
        self._first_gap = 0  # every piece before it is held

    def __getitem__(self, index: int) -> Piece:
        return self._pieces[index]

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def complete(self) -> bool:
        """Whether every piece is held."""
        return self._held == len(self._pieces)

    @property
    def empty(self) -> bool:
        """Whether no piece is held."""
        return not self._held

    def held(self) -> dict[int, Held]:
        """The pieces that are held, by index, in order."""
        return {index: piece for index, piece in enumerate(self._pieces) if isinstance(piece, Held)}

    def hold(self, index: int, sender: str, hash_: bytes) -> None:
        """Record a piece that is written; its claim ends."""
        self._set(index, Held(sender, hash_))

    def claim(self, range_: Range, indices: Iterable[int]) -> None:
        """Assign pieces that are not held to a range. Another range loses them, and their prefixes are dropped."""
        for index in indices:
            self._set(index, range_)
            range_.pieces.add(index)

    def release(self, indices: Iterable[int]) -> None:
        """Make pieces missing: those of a range that ended or was divided, or those that are invalidated."""
        for index in tuple(indices):
            self._set(index, _MISSING)

    def keep_prefix(self, index: int, sender: str, stop: int) -> None:
        """Make a piece missing but for its bytes up to byte *stop* of the blob, which *sender* sent."""
        self._set(index, Missing(sender, stop))

    def drop_prefixes(self, sender: str) -> None:
        """Forget the prefixes that this source sent."""
        self.release(i for i, piece in enumerate(self._pieces) if isinstance(piece, Missing) and piece.sender == sender)

    def missing(self, window: int) -> Iterator[int]:
        """The pieces that no range fetches, in order, of the *window* pieces from the first gap on."""
        while self._first_gap < len(self._pieces) and isinstance(self._pieces[self._first_gap], Held):
            self._first_gap += 1
        indices = range(self._first_gap, min(len(self._pieces), self._first_gap + window))
        return (index for index in indices if isinstance(self._pieces[index], Missing))

    def _set(self, index: int, piece: Piece) -> None:
        before = self._pieces[index]
        if isinstance(before, Range):
            before.pieces.discard(index)
        elif isinstance(before, Held):
            self._held -= 1
            self._first_gap = min(self._first_gap, index)
        self._held += isinstance(piece, Held)
        self._pieces[index] = piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The action to request bytes ``[start, stop)`` from *locator*. *claim* is the right to write their missing pieces.

    *start* is within a piece where the same source sent the beginning of that piece before.
    """

    claim: int
    locator: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """The action to wait: no source may be requested for this long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Idle:
    """The action to wait for the ranges in flight: there is nothing else to request."""


@dataclass(frozen=True, slots=True)
class Verify:
    """The action to check the digest of the whole: every piece is held and no range is in flight."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The action to give up: no source is left. ``failures`` by locator."""

    failures: Mapping[str, Failure]


Action = Request | Backoff | Idle | Verify | Fail
