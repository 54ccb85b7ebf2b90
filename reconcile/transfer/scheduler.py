"""Decides the next step of one blob's transfer. Feed it facts; it never sleeps, reads or connects.

A blob is a row of pieces; each is missing, claimed by a range that is on its way, or held, and a held one remembers who
sent it. Any number of ranges may be on their way at once, from any sources: each goes to the source that is fastest just
now, in file order, within a window ahead of the first gap. Where nothing is left to be asked, a slow range loses its rest
to a connection that is free. Bytes may be written only under the claim that is valid then.

Sources stand in order: those that failed lately come last, never out. A transient failure costs a source a pause, in which
others are asked; nothing waits while another source could serve. A permanent one ends the source for this blob.

When all pieces are there and the whole is wrong, somebody lied. One sender: it is convicted, and another source takes
over; where none can, it is asked once more. Several: *purify*. One sender's pieces are kept and the others' fetched
again from it. Right now: every sender whose piece differed is convicted. Still wrong: the reference itself is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from modelstow.cas.pieces import PIECE, piece_count, piece_range

from .retry import Failure, Reason, RetryPolicy, RetryState
from .state import Backoff, Fail, Idle, Range, Request, SourceState, Step, Verify

EARLIER = "an earlier run"
"""The sender of pieces whose source is not among those of today."""
_NOT_ASKED = Failure(code="SOURCE_UNAVAILABLE", what="not asked")
_STALE_RATE_S = 30.0  # a source that was not asked for so long is tried again


@dataclass(slots=True)
class Transfer:
    """One blob of *size* bytes from *locators*, best first; *late* are those that failed lately, *spent* of them those
    that another blob has given up: they break only once more."""

    size: int
    locators: Sequence[str]
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    late: frozenset[str] = frozenset()
    spent: frozenset[str] = frozenset()
    jitter: Callable[[], float] = random.random
    _held: dict[int, str] = field(default_factory=dict)  # piece -> who sent it
    _hashes: dict[int, bytes] = field(default_factory=dict)
    _front: int = 0  # no piece before it is missing
    _claims: dict[int, int] = field(default_factory=dict)  # piece -> the range that brings it
    _ranges: dict[int, Range] = field(default_factory=dict)
    _begun: dict[int, tuple[str, int]] = field(default_factory=dict)  # piece -> who sent its beginning, and where that ends
    _reached: dict[int, int] = field(default_factory=dict)  # piece -> the farthest that any beginning went
    _asked: int = 0
    _moved: dict[int, int] = field(default_factory=dict)  # piece -> how often it was taken over
    _sources: list[SourceState] = field(default_factory=list)
    _reference: str | None = None
    _hopeless: bool = False  # a blob of no bytes was found not to be its name
    _before: dict[int, tuple[str, bytes]] = field(default_factory=dict)  # what purifying replaced

    def __post_init__(self) -> None:
        for locator in dict.fromkeys(self.locators):
            late = locator in self.late
            patience = RetryState(self.policy, locator in self.spent, self.jitter)
            self._sources.append(SourceState(locator, late, patience, self.policy.integrity.attempts - 1))
        self._sources.sort(key=lambda source: source.late)

    # ---- facts

    def hold(self, piece: int, sender: str, hash_: bytes) -> None:
        """A piece is there from before: an earlier run left it, or it was found on this disk."""
        self._held[piece], self._hashes[piece] = sender, hash_

    def takes(self, claim: int, piece: int) -> bool:
        """Whether this range is the one to bring the piece. One that sends everything claims what nobody else brings."""
        range_ = self._ranges.get(claim)
        if range_ is not None and range_.endless and piece not in self._held:
            self._begun.pop(piece, None)
            return self._claims.setdefault(piece, claim) == claim
        return range_ is not None and self._claims.get(piece) == claim

    def claim_rest(self, claim: int) -> bool:
        """Let this range bring all of the blob at once; False if something is held, or another is on its way."""
        if self._held or list(self._ranges) != [claim]:
            return False
        self._claims = dict.fromkeys(range(piece_count(self.size)), claim)
        self._begun.clear()  # it is written over
        return True

    def ignores_ranges(self, claim: int) -> None:
        """The source sends everything, to one connection if to any: where another may serve, it is asked last."""
        if range_ := self._ranges.get(claim):
            range_.endless = range_.source.endless = True
            range_.source.most = 1
            if self._claims.get(0) != claim and self._ranged():
                self.ended(claim)  # most of what it would send is there, or comes from elsewhere

    def _ranged(self) -> list[SourceState]:
        return [s for s in self._sources if self._may_serve(s) and not s.endless]

    def got(self, claim: int, count: int, now: float) -> bool:
        """So many bytes came for a range; False if it was taken over."""
        if range_ := self._ranges.get(claim):
            range_.got, range_.heard = range_.got + count, now
        return range_ is not None

    def may_write(self, claim: int, piece: int) -> bool:
        """Whether the piece may be written to; if so, nobody takes it over until ``written`` or ``kept``."""
        mine = self.takes(claim, piece)
        if mine:
            self._ranges[claim].writing = piece
        return mine

    def written(self, claim: int) -> None:
        self._ranges[claim].writing = None

    def kept(self, claim: int, piece: int, hash_: bytes, now: float) -> None:
        """The piece was written and is on record."""
        range_ = self._ranges[claim]
        source = range_.source
        start, stop = piece_range(piece, self.size)
        rate = (stop - start - range_.skipped) / max(now - range_.began, 1e-6)
        # The harmonic mean: one slow piece counts for more than many quick ones before it.
        source.rate, source.rated_at = rate if source.rate is None else 2 / (1 / source.rate + 1 / rate), now
        source.patience.progressed()
        source.over = source.over and source.failure is not None and source.failure.reason.permanent
        range_.began, range_.heard, range_.got, range_.skipped, range_.writing = now, now, 0, 0, None
        del self._claims[piece]
        self.hold(piece, source.locator, hash_)
        if len(self._held) == piece_count(self.size):  # what others send of everything, nobody needs any more
            for other in [other for other, r in self._ranges.items() if r.endless and other != claim]:
                self.ended(other)

    def ended(self, claim: int) -> None:
        """A range is over, whatever it brought."""
        if range_ := self._ranges.pop(claim, None):
            range_.source.running -= 1
            self._claims = {piece: owner for piece, owner in self._claims.items() if owner != claim}

    def failed(self, claim: int, failure: Failure, now: float, reached: int = 0) -> bool:
        """A source did not give what was asked. False, and not counted, if the range was not its own any more.

        *reached*: up to which byte the piece that was arriving is there, if the source may go on behind it.
        """
        if claim not in self._ranges:
            return False
        source = self._ranges[claim].source
        self._note_beginning(self.current(claim), source, reached)
        self.ended(claim)
        source.failure = failure
        # What was on its way when the last failure was counted broke with it: one restart of a server, one failure.
        if claim > source.counted or failure.reason.permanent:
            source.counted = self._asked
            source.over = not source.patience.failed(failure, now) or source.over
        else:
            source.patience.honor_retry_after(failure, now)
        source.most = max(1, source.running) if failure.reason is Reason.RATE_LIMIT else source.most
        # It goes to the end of the row: the others are asked first, it is asked again when they cannot.
        self._sources.remove(source)
        self._sources.append(source)
        if source.over and self._reference == source.locator:
            self._reference = None
        return True

    def _note_beginning(self, piece: int, source: SourceState, reached: int) -> None:
        """What a range leaves of a piece. One that got farther than any before it is progress."""
        start, stop = piece_range(max(piece, 0), self.size)
        if piece >= 0 and start < reached < stop:
            self._begun[piece] = source.locator, reached
            if reached - self._reached.get(piece, start) >= self.policy.progress:
                self._reached[piece] = reached
                source.patience.progressed()

    def slowest(self, count: int) -> list[int]:
        """Ranges to give up where fewer connections do as well: those that have got least of their piece."""
        idle = [claim for claim, range_ in self._ranges.items() if range_.writing is None]
        return sorted(idle, key=lambda claim: self._ranges[claim].got)[:count]

    def failures(self) -> dict[str, Failure]:
        """What each source failed with last."""
        return {s.locator: s.failure or _NOT_ASKED for s in self._sources}

    def over(self, locator: str) -> bool:
        """Whether a source has no attempt left."""
        return any(source.over for source in self._sources if source.locator == locator)

    def overdue(self, now: float) -> list[int]:
        """Ranges that have been silent for too long while another connection could bring their pieces."""
        silent = [claim for claim, r in self._ranges.items() if now - r.heard > self.policy.stall_s and r.writing is None]
        return [claim for claim in silent if self._other_could(self._ranges[claim], now)]

    def lives(self, claim: int, piece: int = -1) -> bool:
        """Whether the range still has something to bring, from behind *piece* on."""
        range_ = self._ranges.get(claim)
        if range_ is None or piece < 0:
            return range_ is not None
        if range_.endless:
            later = range(piece + 1, piece_count(self.size))
            return any(p not in self._held and self._claims.get(p, claim) == claim for p in later)
        return any(owner == claim and p > piece for p, owner in self._claims.items())

    def locator(self, claim: int) -> str:
        """Who was asked for a range; empty where it does not count any more."""
        return self._ranges[claim].source.locator if claim in self._ranges else ""

    def current(self, claim: int) -> int:
        """The piece that a range is bringing just now; -1 where it brings none."""
        return min((piece for piece, owner in self._claims.items() if owner == claim), default=-1)

    def senders(self) -> frozenset[str]:
        """Who sent the pieces that are held."""
        return frozenset(self._held.values())

    def proven(self) -> tuple[str, ...]:
        """The whole is right. Returns the senders that purifying proved to have lied."""
        return tuple(
            dict.fromkeys(sender for piece, (sender, hash_) in self._before.items() if self._hashes.get(piece) != hash_)
        )

    def wrong(self, failure: Failure) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The whole is wrong. Returns the pieces to be struck off, and the senders convicted by this."""
        senders = set(self._held.values())
        if self._reference is None and len(senders) > 1:
            reference = self._choose_reference(senders)
            if reference is not None:
                others = tuple(piece for piece, sender in self._held.items() if sender != reference)
                self._before |= {piece: (self._held[piece], self._hashes[piece]) for piece in others}
                self._reference = reference
                self._invalidate(others)
                return others, ()
        if not senders:  # a blob of no bytes that is not its name: no source can change that
            self._hopeless = True
            for source in self._sources:
                source.over, source.failure = True, failure
        # Of several senders of whom none can be asked again nobody can be convicted: another may have lied.
        alone = {self._reference} if self._reference else senders if len(senders) == 1 else set()
        liars = tuple(sorted(alone))
        for liar in liars:
            self._mark_corrupt(liar, failure)
        self._reference = None
        struck = tuple(self._held)
        self._invalidate(struck)
        return struck, liars

    def wrong_piece(self, claim: int, failure: Failure) -> None:
        """A piece arrived that cannot be right, because what it should hash to was proven before."""
        range_ = self._ranges.get(claim)
        if range_ is None:
            return
        self._mark_corrupt(range_.source.locator, failure)
        if self._reference == range_.source.locator:
            self._reference = None

    # ---- decisions

    def next(self, now: float, allowed: int = 1) -> Step:
        """What one more connection should do now; *allowed*: how many may run at once."""
        if len(self._held) == piece_count(self.size) and not self._hopeless:
            return Idle() if self._ranges else Verify()
        open_ = [s for s in self._sources if self._may_serve(s)]
        if not open_ and not self._ranges and self._reference is None:
            self._retrust_once()
            open_ = [s for s in self._sources if self._may_serve(s)]
        if not open_:
            return Idle() if self._ranges else Fail(self.failures())
        open_ = self._ranged() or open_
        ready = [s for s in open_ if s.patience.ready_at <= now and s.running < s.most]
        if not ready:
            return Idle() if self._ranges else Backoff(seconds=min(s.patience.ready_at for s in open_) - now)
        source = self._choose(ready, now, allowed)
        first = self._first_for(source)
        if first is not None:
            return self._ask(source, first, self._run(first, source, allowed), now)
        return self._take_over(source, now, allowed) or Idle()

    def _may_serve(self, source: SourceState) -> bool:
        if source.over or source.corrupt:
            return False
        return self._reference is None or source.locator == self._reference

    def _choose(self, ready: Sequence[SourceState], now: float, allowed: int) -> SourceState:
        """The source that is fastest just now; with several connections, each source is tried by one of them first."""
        several = allowed > 1 or bool(self._ranges)
        for source in ready if several else ready[:1]:
            untried = source.rate is None or now - source.rated_at > _STALE_RATE_S
            if untried and not source.late and not source.running:
                return source
        measured = [s for s in ready if s.rate is not None]
        return max(measured, key=lambda s: s.rate or 0.0, default=ready[0])

    def _unclaimed(self) -> Iterator[int]:
        """Missing pieces that nothing brings, in order, within the window ahead of the first gap."""
        while self._front in self._held:
            self._front += 1
        stop = min(piece_count(self.size), self._front + max(1, self.policy.window // PIECE))
        return (piece for piece in range(self._front, stop) if piece not in self._held and piece not in self._claims)

    def _first_for(self, source: SourceState) -> int | None:
        """The next piece for a source: what another has begun is left to that one, as long as there is something else."""
        free = list(self._unclaimed())
        return next((piece for piece in free if self._may_begin(piece, source)), next(iter(free), None))

    def _may_begin(self, piece: int, source: SourceState) -> bool:
        return self._begun.get(piece, (source.locator, 0))[0] == source.locator

    def _run(self, first: int, source: SourceState, allowed: int) -> int:
        """The end of the range to be asked: some seconds' worth, and a fair share where several connections run."""
        free = [piece for piece in self._unclaimed() if piece >= first]
        if source.rate is None:  # all to the first that is asked, one piece to one that is tried beside others
            most = 1 if self._ranges else len(free)
        else:
            most = max(1, int(source.rate * self.policy.range_s / PIECE))
        if allowed > 1:
            most = min(most, max(1, len(free) // (2 * allowed)))
        stop = first + 1
        while stop - first < most and stop in free[:most] and self._may_begin(stop, source):
            stop += 1
        return stop

    def _ask(self, source: SourceState, first: int, stop: int, now: float) -> Request:
        self._asked += 1
        self._claims |= dict.fromkeys(range(first, stop), self._asked)
        start, end = piece_range(first, self.size)[0], piece_range(stop - 1, self.size)[1]
        sender, reached = self._begun.get(first, ("", start))
        at = reached if sender == source.locator and not source.endless else start
        for piece in range(first, stop):
            self._begun.pop(piece, None)
        self._ranges[self._asked] = Range(source, now, now, skipped=at - start)
        source.running += 1
        return Request(claim=self._asked, locator=source.locator, start=at, stop=end)

    def _take_over(self, source: SourceState, now: float, allowed: int) -> Request | None:
        """Some of what the slowest range still has to bring; or its last piece, if it would take far longer."""
        rows = []
        for claim, range_ in self._ranges.items():
            if pieces := sorted(p for p, owner in self._claims.items() if owner == claim and p != range_.writing):
                divisible = len(pieces) > 1 or range_.writing is not None
                rows.append((divisible, range_.left_s(len(pieces), now), claim, pieces))
        divisible, left_s, claim, pieces = max(rows, default=(False, 0.0, 0, []))
        if left_s < self.policy.worth_s:
            return None
        range_ = self._ranges[claim]
        if divisible and not source.rate:
            return self._ask(source, pieces[-1], pieces[-1] + 1, now)
        if divisible:
            # It keeps its share and the rest is free again, for whoever comes: in small ranges and in file order, so that
            # the proof can follow. Halves would leave gaps that end together with the whole. One piece alone is the last,
            # beside another that is being written.
            share = max(1, len(pieces) // (2 * allowed)) if len(pieces) > 1 else 0
            for later in pieces[share:]:
                del self._claims[later]
            free = self._first_for(source)
            return None if free is None else self._ask(source, free, self._run(free, source, allowed), now)
        piece = pieces[0]
        mine_s = PIECE / source.rate if source.rate else 0.0
        unknown = source.rate is None and source is range_.source
        if left_s < 2 * mine_s + self.policy.worth_s or unknown or self._moved.get(piece, 0) >= self.policy.takeovers:
            return None
        if now - range_.began < self.policy.worth_s:
            return None  # it has only just begun
        self._moved[piece] = self._moved.get(piece, 0) + 1
        if not range_.endless:
            self.ended(claim)
        return self._ask(source, piece, piece + 1, now)

    def _other_could(self, range_: Range, now: float) -> bool:
        """Whether another source could bring what this range does not, or the same over another connection."""
        for source in self._sources:
            if source is not range_.source and self._may_serve(source) and source.patience.ready_at <= now:
                return True
        fellows = (r for r in self._ranges.values() if r is not range_ and r.source is range_.source)
        return any(now - fellow.heard < self.policy.stall_s / 2 for fellow in fellows)

    # ---- those who lied

    def _retrust_once(self) -> None:
        """Nobody else can serve: whoever sent wrong bytes is asked once more."""
        for source in self._sources:
            if source.corrupt and source.chances and not source.over:
                source.corrupt, source.chances = False, source.chances - 1

    def _choose_reference(self, senders: Iterable[str]) -> str | None:
        able = [s.locator for s in self._sources if s.locator in senders and not s.over and not s.corrupt]
        held = list(self._held.values())
        return max(able, key=held.count, default=None)

    def _mark_corrupt(self, locator: str, failure: Failure) -> None:
        for source in self._sources:
            if source.locator == locator:
                source.corrupt, source.failure = True, failure
        self._begun = {piece: begun for piece, begun in self._begun.items() if begun[0] != locator}
        for claim in [claim for claim, r in self._ranges.items() if r.source.locator == locator and r.writing is None]:
            self.ended(claim)

    def _invalidate(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            self._held.pop(piece, None)
            self._hashes.pop(piece, None)
            self._reached.pop(piece, None)
        self._front = 0
