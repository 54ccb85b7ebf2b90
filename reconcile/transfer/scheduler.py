"""The scheduler of one blob's transfer: a state machine without I/O that decides the next request.

Feed it what happened; it never sleeps, reads or connects. A blob is a sequence of pieces: each is missing, claimed by a
range in flight, or held. Any number of ranges may be in flight at once, from any sources. Each goes to the source that is
fastest at that time, in file order, within a window ahead of the first gap. When no piece is missing, a slow range loses
part of its pieces to a free connection. Bytes may be written only under a claim that is still valid.

Sources are ordered: those that failed recently come last, but are never excluded. A transient failure delays a source,
and the others serve meanwhile: nothing waits while another source could serve. A permanent failure excludes the source
for this blob. ``SourceSet`` keeps that account. When all pieces are held and the digest does not match,
``CorruptionIsolation`` decides which of them to invalidate and which source may serve.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from modelstow.cas.chunking import DEFAULT, Chunking

from .corruption import Isolation
from .retry import Failure, RetryPolicy
from .sources import SourceSet, fastest
from .state import Action, Backoff, Fail, Idle, Missing, PieceMap, Range, Request, SourceState, Verify

EARLIER = "an earlier run"
"""The sender of held pieces whose source is not among the present ones."""


class Scheduler:
    """The scheduler of one transfer. Times (*now*) are monotonic seconds. Not safe for threads: the caller locks."""

    def __init__(
        self,
        size: int,
        locators: Sequence[str],
        policy: RetryPolicy = RetryPolicy(),
        recently_failed: frozenset[str] = frozenset(),
        exhausted: frozenset[str] = frozenset(),
        jitter: Callable[[], float] = random.random,
        chunking: Chunking = DEFAULT,
    ) -> None:
        """A transfer of *size* bytes from *locators*, best first, in the pieces of *chunking*.

        *recently_failed* ones come last. Of them *exhausted* ones, which had no attempts left in another transfer, have one
        attempt until they send a piece.
        """
        self.size, self.policy, self.chunking = size, policy, chunking
        self._pieces = PieceMap(chunking.count(size))
        self._sources = SourceSet(locators, policy, recently_failed=recently_failed, exhausted=exhausted, jitter=jitter)
        self._ranges: dict[int, Range] = {}  # in flight, by claim
        self._last_claim = 0
        self._farthest: dict[int, int] = {}  # by piece: where the longest of its prefixes ended
        self._takeovers: dict[int, int] = {}  # by piece: how often another range took it over
        self._hopeless = False  # an empty blob whose digest does not match

    # ---- what happened

    def hold(self, piece: int, sender: str, hash_: bytes) -> None:
        """Record a piece that was held before the transfer: of an earlier run, or found on this disk."""
        self._pieces.hold(piece, sender, hash_)

    def ignores_ranges(self, claim: int) -> None:
        """The source sends the whole blob. It gets one connection, and only where no source with ranges may serve."""
        if range_ := self._ranges.get(claim):
            range_.whole_blob = range_.source.ignores_ranges = True
            range_.source.max_connections = 1
            others = any(not source.ignores_ranges for source in self._sources.usable())
            if self._pieces[0] is not range_ and others:
                self.ended(claim)  # most of what it would send is held, or is claimed by other ranges

    def received(self, claim: int, count: int, now: float) -> bool:
        """Bytes of a range arrived; False if it is not active any more."""
        if range_ := self._ranges.get(claim):
            range_.piece_bytes, range_.last_byte_at = range_.piece_bytes + count, now
        return range_ is not None

    def may_write(self, claim: int, piece: int) -> bool:
        """Whether a range may write to a piece. If so, the piece is not taken over before ``written`` or ``completed``."""
        owns = self.owns(claim, piece)
        if owns:
            self._ranges[claim].writing = piece
        return owns

    def written(self, claim: int) -> None:
        """A write that ``may_write`` allowed has ended."""
        self._ranges[claim].writing = None

    def completed(self, claim: int, piece: int, hash_: bytes, now: float) -> None:
        """A piece is written and recorded: progress, which restores its source's attempts."""
        range_ = self._ranges[claim]
        source = range_.source
        start, stop = self.chunking.range(piece, self.size)
        rate = (stop - start - range_.resumed_bytes) / max(now - range_.piece_began_at, 1e-6)
        # The harmonic mean: one slow piece counts for more than many quick ones before it.
        source.rate, source.rated_at = rate if source.rate is None else 2 / (1 / source.rate + 1 / rate), now
        source.retry_state.reset()
        source.exhausted = source.exhausted and source.failure is not None and source.failure.reason.permanent
        range_.piece_began_at, range_.last_byte_at = now, now
        range_.piece_bytes, range_.resumed_bytes, range_.writing = 0, 0, None
        self._pieces.hold(piece, source.locator, hash_)
        if self._pieces.complete:  # what other sources still send of the whole blob is not needed any more
            for other in [other for other, r in self._ranges.items() if r.whole_blob and other != claim]:
                self.ended(other)

    def ended(self, claim: int) -> None:
        """A range ended, whatever arrived; the pieces that it still claims are missing again."""
        if range_ := self._ranges.pop(claim, None):
            range_.source.running -= 1
            self._pieces.release(range_.pieces)

    def failed(self, claim: int, failure: Failure, now: float, reached: int = 0) -> bool:
        """A range failed. False, and not counted, if it was not active any more.

        *reached*: the byte up to which the piece that was arriving is written, if its source may resume it there.
        """
        if claim not in self._ranges:
            return False
        source, piece = self._ranges[claim].source, self.current_piece(claim)
        self.ended(claim)
        self._keep_prefix(piece, source, reached)
        self._sources.failed(source, failure, now, claim=claim, last_claim=self._last_claim)
        return True

    def _keep_prefix(self, piece: int, source: SourceState, reached: int) -> None:
        """Record what a failed range leaves of a piece. One that got farther than any before it is progress."""
        start, stop = self.chunking.range(max(piece, 0), self.size)
        if piece >= 0 and start < reached < stop:
            self._pieces.keep_prefix(piece, source.locator, reached)
            if reached - self._farthest.get(piece, start) >= self.policy.progress:
                self._farthest[piece] = reached
                source.retry_state.reset()

    # ---- corruption

    def verified(self) -> tuple[str, ...]:
        """The digest matches. Returns the senders that are thereby proven corrupt."""
        return self._sources.verified(self._pieces.held())

    def digest_mismatch(self, failure: Failure) -> Isolation:
        """The digest does not match: invalidate pieces, and exclude senders that are proven corrupt with *failure*."""
        if self._pieces.empty:  # the blob has no bytes: no source can change that
            self._hopeless = True
            self._sources.exhaust(failure)
        isolation = self._sources.digest_mismatch(self._pieces.held(), failure)
        for sender in isolation.corrupt:
            self._withdraw(sender)
        self._pieces.release(isolation.invalidate)
        for piece in isolation.invalidate:
            self._farthest.pop(piece, None)
        return isolation

    def piece_mismatch(self, claim: int, failure: Failure) -> None:
        """A piece arrived whose hash is not the one that was verified before: its sender is corrupt."""
        if range_ := self._ranges.get(claim):
            self._sources.mark_corrupt(range_.source.locator, failure)
            self._withdraw(range_.source.locator)

    def _withdraw(self, sender: str) -> None:
        """End a corrupt sender's ranges, and forget the prefixes that it sent."""
        self._pieces.drop_prefixes(sender)
        for claim in [claim for claim, r in self._ranges.items() if r.source.locator == sender and r.writing is None]:
            self.ended(claim)

    # ---- claims and queries

    def owns(self, claim: int, piece: int) -> bool:
        """Whether this range fetches the piece. One that sends the whole blob claims each missing piece on the way."""
        range_ = self._ranges.get(claim)
        if range_ is None:
            return False
        if range_.whole_blob and isinstance(self._pieces[piece], Missing):
            self._pieces.claim(range_, [piece])
        return self._pieces[piece] is range_

    def claim_all(self, claim: int) -> bool:
        """Claim the whole blob for this range; False if a piece is held or another range is in flight."""
        if not self._pieces.empty or list(self._ranges) != [claim]:
            return False
        self._pieces.claim(self._ranges[claim], range(len(self._pieces)))
        return True

    def active(self, claim: int) -> bool:
        """Whether the range is in flight and was not taken over."""
        return claim in self._ranges

    def has_later(self, claim: int, piece: int) -> bool:
        """Whether the range still fetches a piece after this one."""
        range_ = self._ranges.get(claim)
        if range_ is None:
            return False
        if range_.whole_blob:
            later = (self._pieces[index] for index in range(piece + 1, len(self._pieces)))
            return any(isinstance(state, Missing) or state is range_ for state in later)
        return any(index > piece for index in range_.pieces)

    def locator(self, claim: int) -> str:
        """The source of a range; empty if it is not active any more."""
        return self._ranges[claim].source.locator if claim in self._ranges else ""

    def current_piece(self, claim: int) -> int:
        """The piece that is arriving over a range; -1 if there is none."""
        return min(self._ranges[claim].pieces, default=-1) if claim in self._ranges else -1

    def senders(self) -> frozenset[str]:
        """The senders of the pieces that are held."""
        return frozenset(piece.sender for piece in self._pieces.held().values())

    def failures(self) -> dict[str, Failure]:
        """The last failure of each source, by locator."""
        return self._sources.failures()

    def is_exhausted(self, locator: str) -> bool:
        """Whether a source has no attempts left for this blob."""
        return self._sources.is_exhausted(locator)

    def stalled(self, now: float) -> list[int]:
        """The claims of ranges without data for ``stall_s`` seconds whose pieces another connection could fetch."""
        limit_s = self.policy.stall_s
        silent = [claim for claim, r in self._ranges.items() if now - r.last_byte_at > limit_s and r.writing is None]
        return [claim for claim in silent if self._replaceable(self._ranges[claim], now)]

    def least_advanced(self, count: int) -> list[int]:
        """The claims to end where fewer connections are allowed: those that received least of their current piece."""
        idle = [claim for claim, range_ in self._ranges.items() if range_.writing is None]
        return sorted(idle, key=lambda claim: self._ranges[claim].piece_bytes)[:count]

    # ---- decisions

    def next(self, now: float, allowed: int = 1) -> Action:
        """The next action of one more connection; *allowed*: connections at once."""
        if self._pieces.complete and not self._hopeless:
            return Idle() if self._ranges else Verify()
        usable = self._sources.candidates(retrust=not self._ranges)
        if not usable:
            return Idle() if self._ranges else Fail(self.failures())
        ready = [s for s in usable if s.retry_state.ready_at <= now and s.running < s.max_connections]
        if not ready:
            return Idle() if self._ranges else Backoff(seconds=min(s.retry_state.ready_at for s in usable) - now)
        source = fastest(ready, now, several=allowed > 1 or bool(self._ranges))
        first = self._first_for(source)
        if first is not None:
            return self._request(source, first, self._stop_of(first, source, allowed), now)
        return self._take_over(source, now, allowed) or Idle()

    def _missing(self) -> list[int]:
        """The missing pieces within the window, in order."""
        return list(self._pieces.missing(max(1, self.policy.window // self.chunking.piece_bytes)))

    def _first_for(self, source: SourceState) -> int | None:
        """The next piece for a source: one with another source's prefix is left to that, if there is any other piece."""
        missing = self._missing()
        return next((piece for piece in missing if self._fits(piece, source)), next(iter(missing), None))

    def _fits(self, piece: int, source: SourceState) -> bool:
        """Whether a missing piece has no prefix of another source."""
        state = self._pieces[piece]
        return isinstance(state, Missing) and state.sender in ("", source.locator)

    def _stop_of(self, first: int, source: SourceState, allowed: int) -> int:
        """The end of a range from *first* on: ``range_s`` seconds' worth, and a fair share of several connections."""
        missing = [piece for piece in self._missing() if piece >= first]
        if source.rate is None:  # everything for the first source, one piece for one that is measured next to others
            most = 1 if self._ranges else len(missing)
        else:
            most = max(1, int(source.rate * self.policy.range_s / self.chunking.piece_bytes))
        if allowed > 1:
            most = min(most, max(1, len(missing) // (2 * allowed)))
        stop = first + 1
        for piece in missing[1:most]:
            if piece != stop or not self._fits(piece, source):
                break
            stop += 1
        return stop

    def _request(self, source: SourceState, first: int, stop: int, now: float) -> Request:
        self._last_claim += 1
        start, end = self.chunking.range(first, self.size)[0], self.chunking.range(stop - 1, self.size)[1]
        state, at = self._pieces[first], start
        if isinstance(state, Missing) and state.sender == source.locator and not source.ignores_ranges:
            at = state.prefix_stop
        range_ = Range(self._last_claim, source, now, now, resumed_bytes=at - start)
        self._ranges[range_.claim] = range_
        self._pieces.claim(range_, range(first, stop))
        source.running += 1
        return Request(claim=range_.claim, locator=source.locator, start=at, stop=end)

    # ---- slow and stalled ranges

    def _take_over(self, source: SourceState, now: float, allowed: int) -> Request | None:
        """Request a part of what the slowest range still has to fetch; or its last piece, if that would take far longer."""
        candidates = []
        for claim, range_ in self._ranges.items():
            if pieces := sorted(piece for piece in range_.pieces if piece != range_.writing):
                divisible = len(pieces) > 1 or range_.writing is not None
                left_s = range_.seconds_left(len(pieces) * self.chunking.piece_bytes, now)
                candidates.append((divisible, left_s, claim, pieces))
        divisible, left_s, claim, pieces = max(candidates, default=(False, 0.0, 0, []))
        if left_s < self.policy.worth_s:
            return None
        if not divisible:
            return self._take_last(source, self._ranges[claim], pieces[0], left_s, now)
        if not source.rate:
            return self._request(source, pieces[-1], pieces[-1] + 1, now)
        # It keeps its share, and the rest is missing again: it is requested in small ranges and in file order, so that
        # hashing can follow. Halves would leave gaps that end together with the whole. A single piece is the last,
        # next to another with a write in progress.
        share = max(1, len(pieces) // (2 * allowed)) if len(pieces) > 1 else 0
        self._pieces.release(pieces[share:])
        first = self._first_for(source)
        return None if first is None else self._request(source, first, self._stop_of(first, source, allowed), now)

    def _take_last(self, source: SourceState, range_: Range, piece: int, left_s: float, now: float) -> Request | None:
        """Request the last piece of a range, which ends, if the source would be faster by far."""
        own_s = self.chunking.piece_bytes / source.rate if source.rate else 0.0
        unknown = source.rate is None and source is range_.source
        takeovers = self._takeovers.get(piece, 0)
        if left_s < 2 * own_s + self.policy.worth_s or unknown or takeovers >= self.policy.takeovers:
            return None
        if now - range_.piece_began_at < self.policy.worth_s:
            return None  # it has only just begun
        self._takeovers[piece] = takeovers + 1
        if not range_.whole_blob:
            self.ended(range_.claim)
        return self._request(source, piece, piece + 1, now)

    def _replaceable(self, range_: Range, now: float) -> bool:
        """Whether another source, or the same one over another connection, could fetch what this range does not."""
        if any(s is not range_.source and s.retry_state.ready_at <= now for s in self._sources.usable()):
            return True
        others = (r for r in self._ranges.values() if r is not range_ and r.source is range_.source)
        return any(now - other.last_byte_at < self.policy.stall_s / 2 for other in others)
