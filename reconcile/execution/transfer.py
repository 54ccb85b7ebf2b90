"""Decides the next step of one blob's transfer. Feed it facts; it never sleeps, reads or connects.

A blob is a row of pieces; each is missing or held, and a held one remembers who sent it. Sources stand in order: those
that failed lately come last, never out. A transient failure costs a source a pause, during which others are asked;
nothing waits while another source could serve. A permanent one ends the source for this blob.

When all pieces are there and the whole is wrong, somebody lied. One sender: it is convicted, and another source takes
over; where none can, it is asked once more. Several: *purify*. One sender's pieces are kept and the others' fetched
again from it. Right now: every sender whose piece differed is convicted. Still wrong: the purifier itself is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cas.pieces import piece_count, piece_range

EARLIER = "an earlier run"
"""The sender of pieces whose source is not among those of today."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and when a source is asked again. All waiting of the engine is set here; seconds."""

    attempts: int = 5  # in a row without a new piece
    first_pause_s: float = 1.0
    factor: float = 2.0
    longest_pause_s: float = 30.0
    throttled_attempts: int = 10
    throttled_pause_s: float = 5.0
    throttled_factor: float = 1.5
    retry_after_cap_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Why a source did not give what was asked."""

    code: str
    what: str
    transient: bool = False
    throttled: bool = False
    retry_after: float | None = None
    actual: str | int | None = None  # the wrong digest or size, where that is the reason
    hint: str = ""  # what the source itself advises


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask *locator* for bytes ``[start, stop)``: whole pieces that are missing."""

    locator: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nobody may be asked for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Prove:
    """Every piece is held: look at the digest of the whole."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No source is left; ``failures`` has the reason of each."""

    failures: Mapping[str, Fact]


Step = Ask | Wait | Prove | GiveUp


@dataclass(slots=True)
class _Standing:
    """How one source stands in this transfer."""

    locator: str
    late: bool  # it failed lately, elsewhere
    attempts: int
    throttled_attempts: int
    pause_s: float
    throttled_pause_s: float
    ready_at: float = 0.0
    over: bool = False  # permanent for this blob
    convicted: bool = False
    second_chance: bool = True
    failure: Fact | None = None


@dataclass(slots=True)
class Transfer:
    """One blob of *size* bytes from *locators*, best first; *late* are those that failed lately."""

    size: int
    locators: Sequence[str]
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    late: frozenset[str] = frozenset()
    jitter: Callable[[], float] = random.random
    _held: dict[int, str] = field(default_factory=dict)  # piece -> who sent it
    _hashes: dict[int, bytes] = field(default_factory=dict)
    _standings: list[_Standing] = field(default_factory=list)
    _purifier: str | None = None
    _hopeless: bool = False  # a blob of no bytes was found not to be its name
    _before: dict[int, tuple[str, bytes]] = field(default_factory=dict)  # what purifying replaced

    def __post_init__(self) -> None:
        p = self.policy
        for locator in dict.fromkeys(self.locators):
            late = locator in self.late
            attempts = (1, 1) if late else (p.attempts, p.throttled_attempts)
            self._standings.append(_Standing(locator, late, *attempts, p.first_pause_s, p.throttled_pause_s))
        self._standings.sort(key=lambda standing: standing.late)

    # ---- facts

    def hold(self, piece: int, sender: str, hash_: bytes) -> None:
        """A piece is there: it just arrived whole, or an earlier run left it."""
        self._held[piece] = sender
        self._hashes[piece] = hash_
        for standing in self._standings:
            if standing.locator == sender:  # progress gives a source its patience back
                standing.attempts, standing.throttled_attempts = self.policy.attempts, self.policy.throttled_attempts
                standing.pause_s, standing.throttled_pause_s = self.policy.first_pause_s, self.policy.throttled_pause_s

    def failed(self, locator: str, fact: Fact, now: float) -> None:
        """A source did not give what was asked."""
        standing = self._standing(locator)
        standing.failure = fact
        if not fact.transient:
            standing.over = True
        elif fact.throttled:
            standing.throttled_attempts -= 1
            pause = standing.throttled_pause_s
            standing.throttled_pause_s = pause * self.policy.throttled_factor
            standing.over = standing.throttled_attempts <= 0
            standing.ready_at = now + self._pause(pause, fact.retry_after)
        else:
            standing.attempts -= 1
            pause = standing.pause_s
            standing.pause_s = min(pause * self.policy.factor, self.policy.longest_pause_s)
            standing.over = standing.attempts <= 0
            standing.ready_at = now + self._pause(pause, fact.retry_after)
        # It goes to the end of the row: the others are asked first, it is asked again when they cannot.
        self._standings.remove(standing)
        self._standings.append(standing)
        if standing.over and self._purifier == locator:
            self._purifier = None

    def senders(self) -> frozenset[str]:
        """Who sent the pieces that are held."""
        return frozenset(self._held.values())

    def proven(self) -> tuple[str, ...]:
        """The whole is right. Returns the senders that purifying proved to have lied."""
        return tuple(
            dict.fromkeys(sender for piece, (sender, hash_) in self._before.items() if self._hashes.get(piece) != hash_)
        )

    def wrong(self, fact: Fact) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The whole is wrong. Returns the pieces to be struck off, and the senders convicted by this."""
        senders = set(self._held.values())
        if self._purifier is None and len(senders) > 1:
            purifier = self._choose_purifier(senders)
            if purifier is not None:
                others = tuple(piece for piece, sender in self._held.items() if sender != purifier)
                self._before |= {piece: (self._held[piece], self._hashes[piece]) for piece in others}
                self._purifier = purifier
                self._strike(others)
                return others, ()
        if not senders:  # a blob of no bytes that is not its name: no source can change that
            self._hopeless = True
            for standing in self._standings:
                standing.over, standing.failure = True, fact
        # Of several senders of whom none can be asked again nobody can be convicted: another may have lied.
        alone = {self._purifier} if self._purifier else senders if len(senders) == 1 else set()
        liars = tuple(sorted(alone))
        for liar in liars:
            self._convict(liar, fact)
        self._purifier = None
        struck = tuple(self._held)
        self._strike(struck)
        return struck, liars

    def wrong_piece(self, piece: int, locator: str, fact: Fact) -> None:
        """A piece arrived that cannot be right, because what it should hash to was proven before."""
        self._convict(locator, fact)
        self._strike((piece,))
        if self._purifier == locator:
            self._purifier = None

    # ---- decisions

    def next(self, now: float) -> Step:
        """What to do now."""
        span = self._missing_run()
        if span is None and not self._hopeless:
            return Prove()
        open_ = [s for s in self._standings if self._may_serve(s)]
        if not open_ and self._purifier is None:
            self._give_second_chances()
            open_ = [s for s in self._standings if self._may_serve(s)]
        if not open_:
            return GiveUp(
                {s.locator: s.failure or Fact(code="SOURCE_UNAVAILABLE", what="not asked") for s in self._standings}
            )
        ready = next((s for s in open_ if s.ready_at <= now), None)
        if ready is None:
            return Wait(seconds=min(s.ready_at for s in open_) - now)
        start, stop = span or (0, 0)
        return Ask(locator=ready.locator, start=start, stop=stop)

    def _may_serve(self, standing: _Standing) -> bool:
        if standing.over or standing.convicted:
            return False
        return self._purifier is None or standing.locator == self._purifier

    def _missing_run(self) -> tuple[int, int] | None:
        """The first run of missing pieces, in bytes."""
        count = piece_count(self.size)
        first = next((piece for piece in range(count) if piece not in self._held), None)
        if first is None:
            return None
        last = next((piece for piece in range(first, count) if piece in self._held), count)
        return piece_range(first, self.size)[0], piece_range(last - 1, self.size)[1]

    def _give_second_chances(self) -> None:
        """Nobody else can serve: whoever sent wrong bytes is asked once more."""
        for standing in self._standings:
            if standing.convicted and standing.second_chance and not standing.over:
                standing.convicted, standing.second_chance = False, False

    def _choose_purifier(self, senders: Iterable[str]) -> str | None:
        able = [s.locator for s in self._standings if s.locator in senders and not s.over and not s.convicted]
        held = list(self._held.values())
        return max(able, key=held.count, default=None)

    def _convict(self, locator: str, fact: Fact) -> None:
        for standing in self._standings:
            if standing.locator == locator:
                standing.convicted, standing.failure = True, fact

    def _strike(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            self._held.pop(piece, None)
            self._hashes.pop(piece, None)

    def _standing(self, locator: str) -> _Standing:
        return next(standing for standing in self._standings if standing.locator == locator)

    def _pause(self, pause: float, retry_after: float | None) -> float:
        jittered = pause * (0.5 + self.jitter() / 2)
        asked = min(retry_after or 0.0, self.policy.retry_after_cap_s)
        return max(jittered, asked)
